"""Flows as columns: their octets, their names, and whose they are."""

from __future__ import annotations

import netaddr
import numpy as np
import pytest

from sami_plugin.model.flows import TEMPLATES, Batch, Template, has_end_in, holds_any, names
from sami_plugin.testing.conformance import (
    NEIGHBOUR_ADDRESSES,
    OUTSIDE_ADDRESSES,
    PORT_ADDRESSES,
    TRANSLATED_ADDRESSES,
    flows,
)

EVERY = pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda each: each.name)
TCP, UDP6 = TEMPLATES["tcp-ipv4"], TEMPLATES["udp-ipv6"]


@EVERY
def test_rows_are_packed_and_big_endian(template: Template) -> None:
    for each in (template, template.identity):
        sizes = [dtype.itemsize for dtype, *_ in each.dtype.fields.values()]
        assert each.dtype.itemsize == sum(sizes)
        assert all(dtype.base.byteorder in ">|" for dtype, *_ in each.dtype.fields.values())


@EVERY
def test_key_comes_first(template: Template) -> None:
    key = template.dtype.names[: len(template.key)]
    assert key == tuple(field[0] for field in template.key)
    assert template.key_octets == sum(template.dtype[name].itemsize for name in key)


@EVERY
def test_identities_keep_key_and_id(template: Template) -> None:
    batch = flows(template, 4)
    identities = batch.identities
    assert identities.template is template.identity
    assert identities.template.is_identity
    assert identities.identities is identities
    for row, name in zip(batch.rows, identities.rows, strict=True):
        assert row.tobytes()[: template.key_octets] == name.tobytes()[: template.key_octets]
        assert row["flowId"] == name["flowId"]
    assert not identities.rows["firewallEvent"].any()


def test_batch_of_other_rows_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="no rows of"):
        Batch(TCP, UDP6.empty())


@EVERY
def test_joined_keeps_order_and_octets(template: Template) -> None:
    first, second = flows(template, 3), flows(template, 2, first=100)
    joined = Batch.joined(template, [first.rows, second.rows])
    assert joined.rows.tobytes() == first.rows.tobytes() + second.rows.tobytes()
    assert len(Batch.joined(template, [])) == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tcp-ipv4", "tcp 192.0.2.10:20000 > 198.51.100.1:443"),
        ("udp-ipv6", "udp [2001:db8:1::10]:20000 > [2001:db8:2::1]:443"),
        ("icmp-ipv4", "icmp 192.0.2.10 > 198.51.100.1 type 8 code 0 id 1"),
        ("icmp-ipv6", "icmpv6 2001:db8:1::10 > 2001:db8:2::1 type 128 code 0 id 1"),
        ("sctp-ipv6", "sctp [2001:db8:1::10]:20000 > [2001:db8:2::1]:443"),
        ("udplite-ipv4", "udplite 192.0.2.10:20000 > 198.51.100.1:443"),
        ("gre-ipv4", "gre 192.0.2.10 > 198.51.100.1 key 20000 reverse key 443"),
        ("gre-ipv6", "gre 2001:db8:1::10 > 2001:db8:2::1 key 20000 reverse key 443"),
        ("tcp-nat-ipv4", "tcp 192.0.2.10:20000 > 198.51.100.1:443"),
    ],
)
def test_names_are_for_people(name: str, said: str) -> None:
    batch = flows(TEMPLATES[name], 30)
    assert names(batch)[0] == names(batch.identities)[0] == said
    assert len(names(batch)) == 20
    assert len(names(batch, 3)) == 3
    assert names(batch, 0) == ()


@EVERY
def test_no_address_matches_nothing(template: Template) -> None:
    assert not has_end_in(flows(template, 3), ()).any()


@EVERY
def test_either_end_counts_also_behind_a_translation(template: Template) -> None:
    batch = flows(template, 3)
    assert has_end_in(batch, PORT_ADDRESSES).all()
    assert has_end_in(batch, OUTSIDE_ADDRESSES).all() == template.is_flow
    assert not has_end_in(batch, NEIGHBOUR_ADDRESSES).any()
    assert has_end_in(batch, TRANSLATED_ADDRESSES).all() == ("-nat-" in template.name)


def test_addresses_of_the_other_family_match_nothing() -> None:
    # ::c000:20a has the number of 192.0.2.10.
    assert not has_end_in(flows(TCP, 3), (netaddr.IPAddress("::c000:20a"),)).any()
    assert not has_end_in(flows(UDP6, 3), (netaddr.IPAddress("192.0.2.10"),)).any()


def test_addresses_are_compared_whole() -> None:
    column = np.zeros((3, 2), ">u8")
    column[:] = [(1 << 63, 7), (1 << 63, 8), (0, 7)]
    wanted = netaddr.IPAddress((1 << 127) | 7, 6)
    assert holds_any(column, True, (wanted,)).tolist() == [True, False, False]
    assert holds_any(np.array([0xFFFFFFFF, 0], ">u4"), False, (netaddr.IPAddress("255.255.255.255"),)).tolist() == [
        True,
        False,
    ]
