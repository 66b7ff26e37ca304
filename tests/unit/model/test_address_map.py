"""Other addresses here than there: wherever they stand in a flow, in whole columns."""

from __future__ import annotations

import netaddr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.errors import ConfigurationError
from sami_plugin.model.address_map import AddressMap, has_changed, peer_sees_another
from sami_plugin.model.flows import TEMPLATES, Batch, Template

MAP = AddressMap.parse(
    ["10.1.0.0/24=10.9.0.0/24", "2001:db8:1::/48=2001:db8:9::/48", "2001:db8:5::/68=2001:db8:6::/68"]
)
EVERY = pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), *(each.identity for each in TEMPLATES.values())], ids=lambda each: each.name
)


def flow(template: Template, *addresses: str) -> Batch:
    """One flow with these addresses, in the order of the template's fields."""
    batch = Batch(template, template.empty(1))
    for field, text in zip(batch.address_fields, addresses, strict=True):
        number = int(netaddr.IPAddress(text))
        batch.rows[field] = divmod(number, 1 << 64) if template.is_ipv6 else number
    return batch


def addresses_of(batch: Batch) -> list[str]:
    (row,) = batch.rows
    version = 6 if batch.template.is_ipv6 else 4
    found = []
    for field in batch.address_fields:
        halves = [int(half) for half in np.atleast_1d(row[field])]
        found.append(str(netaddr.IPAddress(sum(half << 64 * at for at, half in enumerate(reversed(halves))), version)))
    return found


@EVERY
def test_an_address_is_rewritten_wherever_it_stands(template: Template) -> None:
    there, here = ("2001:db8:1:2::7", "2001:db8:9:2::7") if template.is_ipv6 else ("10.1.0.7", "10.9.0.7")
    other = "2001:db8:ffff::1" if template.is_ipv6 else "198.51.100.1"
    places = len(Batch(template, template.empty()).address_fields)
    if template.is_expectation:
        assert places == 5 - template.is_identity  # those of the master too, and of the NAT that is to be
    elif template.is_flow:
        assert places == 2 + 2 * template.is_translated + 2 * template.is_extended
    else:
        assert places >= len(template.ends)
    for place in range(places):
        sent = flow(template, *[there if at == place else other for at in range(places)])
        as_sent = sent.rows.tobytes()
        made, is_ambiguous = MAP.applied(sent)
        assert addresses_of(made) == [here if at == place else other for at in range(places)]
        assert not is_ambiguous.any()
        assert sent.rows.tobytes() == as_sent


def test_bits_behind_a_prefix_that_ends_within_a_half_stay() -> None:
    made, _ = MAP.applied(flow(TEMPLATES["tcp-ipv6"], "2001:db8:5::fff:1:2:3", "2001:db8:5:0:1000::"))
    assert addresses_of(made) == ["2001:db8:6:0:fff:1:2:3", "2001:db8:5:0:1000::"]


def test_prefixes_that_change_places_do() -> None:
    swap = AddressMap.parse(["10.1.0.0/24=10.2.0.0/24", "10.2.0.0/24=10.1.0.0/24"])
    made, is_ambiguous = swap.applied(flow(TEMPLATES["tcp-ipv4"], "10.1.0.1", "10.2.0.2"))
    assert addresses_of(made) == ["10.2.0.1", "10.1.0.2"]
    assert not is_ambiguous.any()


@pytest.mark.parametrize("at", [0, 1])
def test_an_address_of_ours_that_stands_for_nothing_there_is_told(at: int) -> None:
    ends = ["198.51.100.1", "198.51.100.1"]
    ends[at] = "10.9.0.7"
    assert MAP.applied(flow(TEMPLATES["tcp-ipv4"], *ends))[1].all()


@given(
    numbers=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2),
    theirs=st.integers(0, 2**32 - 1),
    ours=st.integers(0, 2**32 - 1),
    length=st.integers(0, 32),
)
def test_what_is_told_apart_there_is_told_apart_here(numbers: list[int], theirs: int, ours: int, length: int) -> None:
    """Else a flow would take another's place."""
    pair = [f"{netaddr.IPNetwork(f'{netaddr.IPAddress(number)}/{length}').cidr}" for number in (theirs, ours)]
    known = AddressMap.parse(["=".join(pair)])
    near = [(number & ((1 << 32 - length) - 1)) | int(netaddr.IPNetwork(pair[number % 2]).ip) for number in numbers]
    ends = [str(netaddr.IPAddress(number)) for number in near]
    (one, one_unclear), (other, other_unclear) = (known.applied(flow(TEMPLATES["udp-ipv4"], end, end)) for end in ends)
    if not (one_unclear.any() or other_unclear.any()):
        assert (addresses_of(one) == addresses_of(other)) == (ends[0] == ends[1])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["10.1.0.0/24"], "no pair"),
        (["10.1.0.0/24=x"], "no pair"),
        (["=10.1.0.0/24"], "no pair"),
        (["10.1.0.7/24=10.9.0.0/24"], "without bits behind the prefix"),
        (["10.1.0.0/24=10.9.0.0/25"], "equally long"),
        (["10.1.0.0/24=2001:d00::/24"], "one family"),
        (["10.1.0.0/24=10.9.0.0/24", "10.1.0.0/25=10.8.0.0/25"], "their prefixes 10.1.0.0/24 and 10.1.0.0/25 overlap"),
        (["10.1.0.0/25=10.9.0.0/25", "10.2.0.0/24=10.9.0.0/24"], "our prefixes 10.9.0.0/25 and 10.9.0.0/24 overlap"),
    ],
)
def test_what_is_no_map_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        AddressMap.parse(texts)


HERE = (netaddr.IPAddress("10.9.0.7"),)
PUBLIC, PEER = "203.0.113.9", "198.51.100.1"


@pytest.mark.parametrize(
    ("name", "there", "sees_another"),
    [
        ("tcp-ipv4", ("10.1.0.7", PEER), True),
        ("tcp-ipv4", (PEER, "10.1.0.7"), True),
        ("tcp-ipv4", (PUBLIC, PEER), False),
        # Source, destination; what the replies go to, what they come from.
        ("tcp-nat-ipv4", ("10.1.0.7", PEER, PUBLIC, PEER), False),
        ("tcp-nat-ipv4", ("10.1.0.7", PEER, "10.1.0.200", PEER), True),
        ("tcp-nat-ipv4", (PEER, PUBLIC, PEER, "10.1.0.7"), False),
        ("tcp-nat-ipv4", (PEER, "10.1.0.200", PEER, "10.1.0.7"), True),
    ],
)
def test_whether_its_peer_sees_another_address(name: str, there: tuple[str, ...], sees_another: bool) -> None:
    sent = flow(TEMPLATES[name], *there)
    made, _ = MAP.applied(sent)
    assert peer_sees_another(sent, made, HERE).tolist() == [sees_another]
    assert has_changed(sent, made, sent.address_fields).tolist() == [any(end.startswith("10.1.") for end in there)]
