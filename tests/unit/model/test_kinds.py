"""Kinds of state that drivers bring: what they have to be like, and the way through codec, index and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import netaddr
import numpy as np
import pytest

from sami_plugin.codec import ipfix
from sami_plugin.errors import ConfigurationError, Malformed
from sami_plugin.migration.negotiation import Demand, weigh
from sami_plugin.model import information_elements as elements
from sami_plugin.model.address_map import AddressMap, peer_sees_another
from sami_plugin.model.flows import TEMPLATES, Batch, Template, has_end_in, importance, names
from sami_plugin.model.information_elements import DataType, InformationElement, Origin, Semantics, Units
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.kinds import Kinds, bring
from sami_plugin.model.migration import Offer
from sami_plugin.testing.conformance import PORT_ADDRESSES, flows

VENDOR = 64512


def element(name: str, number: int, data_type: DataType = DataType.UNSIGNED32, **more: int) -> InformationElement:
    return InformationElement(
        name, number, data_type, Semantics.DEFAULT, Units.NONE, Origin.VENDOR, "Of a test.", vendor=VENDOR, **more
    )


ELEMENTS = (
    element("leaseIPv4Address", 1, DataType.IPV4_ADDRESS),
    element("leaseNumber", 2),
    element("leaseOwner", 3, DataType.OCTET_ARRAY, length=24),
)
LEASE = Template(
    "lease-ipv4",
    (("zoneRole", "u1"), ("leaseIPv4Address", ">u4"), ("leaseNumber", ">u4")),
    (("flowId", ">u4"), ("remainingTimeoutSeconds", ">u4"), ("leaseOwner", ">u8", (3,))),
    ends=("leaseIPv4Address",),
    words="{leaseNumber} of {leaseIPv4Address}",
)


@pytest.fixture
def known() -> Iterator[None]:
    """Nothing that a test brings stays."""
    templates, by_name, by_number = dict(TEMPLATES), dict(elements.ELEMENTS), dict(elements._BY_NUMBER)
    yield
    for now, before in ((TEMPLATES, templates), (elements.ELEMENTS, by_name), (elements._BY_NUMBER, by_number)):
        now.clear()
        now.update(before)
    elements._VENDORS.discard(VENDOR)


@pytest.fixture
def lease(known: None) -> Batch:
    bring(Kinds((LEASE,), ELEMENTS))
    batch = flows(LEASE, 3)
    batch.rows["leaseOwner"][:] = np.frombuffer(b"somebody".ljust(24, b"\0"), ">u8")
    return batch


def test_records_come_back_as_they_were_written(lease: Batch) -> None:
    others = flows(TEMPLATES["tcp-ipv4"], 4)
    told = ipfix.decode(ipfix.encode([others, lease, lease.identities], export_time=1))
    assert [one.template.name for one in told.batches] == ["tcp-ipv4", "lease-ipv4", "lease-ipv4-identity"]
    for one, sent in zip(told.batches, (others, lease, lease.identities), strict=True):
        assert one.rows.tobytes() == sent.rows.tobytes()


def test_reader_without_the_kind_says_so_and_goes_on_with_it_once_it_has_it(known: None) -> None:
    bring(Kinds((LEASE,), ELEMENTS))
    written = ipfix.encode([flows(LEASE, 1)], export_time=1)
    del TEMPLATES["lease-ipv4"]
    with pytest.raises(Malformed, match="no kind of flow known here"):
        ipfix.decode(written)
    bring(Kinds((LEASE,), ELEMENTS))
    assert len(ipfix.decode(written)) == 1


def test_number_of_a_kind_does_not_depend_on_what_else_is_there(known: None) -> None:
    bring(Kinds((LEASE,), ELEMENTS))
    alone = ipfix.encode([flows(LEASE, 1)], export_time=1)
    other = dataclasses.replace(LEASE, name="a-lease-ipv4", key=(*LEASE.key, ("flowMark", ">u4")))
    bring(Kinds((other,)))
    assert ipfix.encode([flows(LEASE, 1)], export_time=1) == alone
    assert len(ipfix.decode(alone + ipfix.encode([flows(other, 1)], export_time=1))) == 2


def test_a_vendors_elements_stand_under_its_own_number(lease: Batch) -> None:
    written = ipfix.encode([lease], export_time=1)
    assert (2 | 0x8000).to_bytes(2, "big") + b"\0\4" + VENDOR.to_bytes(4, "big") in written
    found = elements.find(VENDOR, 2, elements.EXAMPLE_ENTERPRISE)
    assert found is not None
    assert found.name == "leaseNumber"
    assert elements.find(VENDOR + 1, 2, elements.EXAMPLE_ENTERPRISE) is None


def test_number_that_a_vendor_has_cannot_be_ours(lease: Batch) -> None:
    with pytest.raises(ConfigurationError, match="64512 is the enterprise number of a vendor's elements"):
        ipfix.encode([lease], export_time=1, enterprise=VENDOR)


def test_people_read_its_words(lease: Batch) -> None:
    said = names(lease, 1)
    assert said == ("lease-ipv4 1 of 192.0.2.10",)
    assert names(lease.identities, 1) == said


def test_what_is_asked_of_flows_is_answered_for_it(lease: Batch) -> None:
    assert has_end_in(lease, PORT_ADDRESSES).all()
    assert not has_end_in(lease, (netaddr.IPAddress("192.0.2.11"),)).any()
    assert (importance(lease) > importance(flows(TEMPLATES["udp-ipv4"], 1))[0]).all()
    here, is_ambiguous = AddressMap.parse(["192.0.2.0/24=198.51.100.0/24"]).applied(lease)
    assert not is_ambiguous.any()
    assert has_end_in(here, (netaddr.IPAddress("198.51.100.10"),)).all()
    assert not peer_sees_another(lease, here, PORT_ADDRESSES).any()
    table = FlowTable()
    table.put(lease)
    table.put(flows(TEMPLATES["udp-ipv4"], 3))
    table.discard(lease.identities.take(np.array([1])))
    assert sorted((one.template.name, len(one)) for one in table.batches()) == [("lease-ipv4", 2), ("udp-ipv4", 3)]


def never(wanted: int) -> int:
    raise AssertionError("what is no flow takes no place of one")


def test_negotiation_counts_it_like_any_other(lease: Batch) -> None:
    demand = Demand.of(Offer(2, 1, ("lease-ipv4", "udp-ipv4"), (3, 2), (), (), ()))
    found = weigh(
        demand, declared={"udp-ipv4"}, admitted=lambda kind: True, functions=(), promise=lambda wanted: wanted
    )
    assert found.places == 2
    assert list(found.losses.values()) == [3]
    found = weigh(
        demand, declared=set(TEMPLATES), admitted=lambda kind: True, functions=(), promise=lambda wanted: wanted - 1
    )
    assert (found.places, found.kinds) == (3 + 1, ("lease-ipv4", "udp-ipv4"))
    assert list(found.losses.values()) == [1]
    found = weigh(demand, declared=set(TEMPLATES), admitted=lambda kind: "lease" in kind, functions=(), promise=never)
    assert (found.places, found.kinds) == (3, ("lease-ipv4",))


def test_the_same_may_be_brought_again(lease: Batch) -> None:
    before = len(TEMPLATES)
    bring(Kinds((LEASE,), ELEMENTS))
    assert len(TEMPLATES) == before


def changed(**more: object) -> Kinds:
    return Kinds((dataclasses.replace(LEASE, **more),), ELEMENTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (changed(name="udp-ipv4"), "the name of another one"),
        (changed(name="Lease"), "one that is none"),
        (changed(ends=()), "needs ends"),
        (changed(ends=("leaseOwner",)), "each a field of its key"),
        (changed(ends=("leaseNumber",)), "an end leaseNumber that is no address"),
        (changed(key=LEASE.key[1:]), "first in its key"),
        (changed(state=LEASE.state[1:]), "first in its state"),
        (changed(state=(*LEASE.state, ("leaseColour", "u1"))), "no information element; bring one"),
        (changed(state=(*LEASE.state[:2], ("leaseOwner", ">u8", (2,)))), "16 octets, and octetArray has 24"),
        (changed(key=(*LEASE.key[:2], ("leaseNumber", "<u4"))), "big-endian"),
        (changed(key=(*LEASE.key[:2], ("leaseNumber", ">i4"))), "big-endian unsigned"),
        (changed(words="{leaseName}"), "no format of its key's fields"),
        (Kinds((LEASE, dataclasses.replace(LEASE, name="rent-ipv4")), ELEMENTS), "the fields of lease-ipv4"),
        (Kinds((LEASE,), (*ELEMENTS, element("leaseColour", 3))), "name or the number of leaseOwner"),
        (Kinds((LEASE,), (*ELEMENTS, element("flowMark", 9))), "name or the number of flowMark"),
    ],
)
def test_what_cannot_be_carried_is_refused_whole(known: None, wrong: Kinds, complaint: str) -> None:
    before = dict(TEMPLATES), dict(elements.ELEMENTS)
    with pytest.raises(ConfigurationError, match=complaint):
        bring(wrong)
    assert (dict(TEMPLATES), dict(elements.ELEMENTS)) == before
