"""Elements of nftables' sets and maps, on a real kernel: a driver's promises, and limits that a move does not reset."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import netaddr
import numpy as np
import pytest

from lab.carrier import Carrier
from lab.contract import NoCarrier
from lab.guest import Guest
from lab.lab import Lab
from lab.namespace import Namespace
from lab.traffic import comes
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.drivers.nft_sets import NftSetsDriver
from sami_plugin.drivers.nft_sets.kinds import IPV4, NO_OTHER, Statements
from sami_plugin.drivers.several import SeveralDrivers
from sami_plugin.errors import ConfigurationError
from sami_plugin.model.flows import Batch, Omitted, ZoneRole, has_end_in, names
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.results import Outcome, Reason, lost_fields
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import NEIGHBOUR_ADDRESSES
from tests.sets import PromisesOfSets, scope_of, told

SETS = """table inet filter {
  set ports4 { type ipv4_addr . inet_service; flags dynamic,timeout; timeout 1h; }
  set ports6 { type ipv6_addr . inet_service; flags dynamic,timeout; timeout 1h; }
  set plain { type ipv4_addr; flags dynamic; }
  set timed { type ipv4_addr; flags dynamic,timeout; timeout 1h; }
  set counted { type ipv4_addr; flags dynamic,timeout; timeout 1h; counter; quota over 5000 bytes; }
  set spent { type ipv4_addr; flags dynamic,timeout; timeout 1h; quota over 5000 bytes; counter; }
  set limited { type ipv4_addr; flags dynamic,timeout; timeout 1h; limit rate over 5/minute burst 3 packets; }
  set pairs { type ipv4_addr . ipv4_addr; flags dynamic,timeout; timeout 1h; }
  set marked { typeof ip saddr . meta mark; flags dynamic,timeout; timeout 1h; }
  set full { type ipv4_addr; flags dynamic; size 1; }
  set ranges { type ipv4_addr; flags interval; }
  map learned { type ipv4_addr : inet_service; flags dynamic,timeout; timeout 1h; }
  map hops { type ipv4_addr : ipv4_addr; flags dynamic; }
  map verdicts { type ipv4_addr : verdict; flags dynamic; }
}
"""
GUEST, OTHER = "192.0.2.10", "192.0.2.77"


@pytest.fixture
def place() -> Iterator[Namespace]:
    made = Namespace(f"sets-{os.getpid()}")
    made.run(["nft", "-f", "-"], SETS)
    yield made
    made.close()


def driver_of(*sets: str) -> NftSetsDriver:
    return NftSetsDriver([f"inet filter {name}" for name in sets])


def add(place: Namespace, name: str, *elements: str) -> None:
    place.run(["nft", "-f", "-"], f"add element inet filter {name} {{ {', '.join(elements)} }}\n")


class TestPromises(PromisesOfSets):
    BEHIND = b"\0\0"

    def make_sets(self, place: Namespace) -> None:
        place.run(["nft", "-f", "-"], SETS)

    def make_driver(self) -> FlowDriver:
        return driver_of("ports4", "ports6")


# ------------------------------------------------------------------------------------------------- field by field


ELEMENTS = {
    "plain": GUEST,
    "timed": f"{GUEST} timeout 300s expires 200s",
    "counted": GUEST,
    "spent": GUEST,
    "limited": GUEST,
    "pairs": f"{OTHER} . {GUEST}",
    "marked": f"{GUEST} . 0x2a",
    "ports4": f"{GUEST} . 443",
    "learned": f"{GUEST} : 8080",
    "hops": f"{GUEST} : {OTHER}",
}


def test_each_kind_of_element_comes_back_as_it_was(place: Namespace) -> None:
    for name, element in ELEMENTS.items():
        add(place, name, element)
    add(place, "ports6", "2001:db8:1::10 . 443")
    add(place, "plain", OTHER)
    before = _listed(place)
    driver, scope = driver_of(*ELEMENTS, "ports6"), scope_of(place)
    batches = told(driver, scope)
    assert sum(map(len, batches)) == len(ELEMENTS) + 1
    for batch in batches:
        assert set(driver.remove(scope, batch.identities)["outcome"]) == {Outcome.REMOVED}
    assert _listed(place) == {"plain": [OTHER]}, "another's element went, or the guest's stayed"
    for batch in batches:
        assert set(driver.insert(scope, batch)["outcome"]) == {Outcome.IMPORTED}
        kept, is_there = driver.read_back(scope, batch)
        assert is_there.all()
        assert not lost_fields(batch, kept.rows).any()
    assert _listed(place) == before


def _listed(place: Namespace) -> dict[str, list[str]]:
    """By set, its elements as nft prints them, without the times that run."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in place.run(["nft", "list", "table", "inet", "filter"]).splitlines():
        words = line.split()
        if words and words[0] in ("set", "map"):
            name = words[1]
        elif "elements" in line or (found.get(name) and "}" not in words[:1]):
            text = line.split("{", 1)[-1].replace("}", "")
            for element in filter(None, map(str.strip, text.split(","))):
                parts = element.split()
                if "expires" in parts:
                    del parts[parts.index("expires") : parts.index("expires") + 2]
                found.setdefault(name, []).append(" ".join(parts))
    return {name: sorted(elements) for name, elements in found.items()}


def test_state_of_statements_goes_along(place: Namespace) -> None:
    """Three packets of 100 octets of a quota and a counter, and a limit as it is set."""
    rule = "table inet filter { chain out { type filter hook output priority 0; udp dport 9 %s\n }\n}\n"
    place.ip("link set lo up", f"address add {GUEST}/32 dev lo")
    statements = "update @counted { ip saddr }\n udp dport 9 add @limited { ip saddr }"
    place.run(["nft", "-f", "-"], rule % statements)

    with place.inside():
        speaker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(3):
        speaker.sendto(bytes(72), (GUEST, 9))
    speaker.close()
    driver, scope = driver_of("counted", "limited"), scope_of(place)
    counted, limited = told(driver, scope)
    assert counted.rows["nftElementStatements"].tolist() == [Statements.QUOTA | Statements.COUNTER]
    assert (counted.rows["nftCounterPackets"][0], counted.rows["nftQuotaConsumedOctets"][0]) == (3, 300)
    assert [limited.rows[name][0] for name in ("nftLimitRate", "nftLimitUnitSeconds", "nftLimitBurst")] == [5, 60, 3]
    driver.remove(scope, counted.identities)
    driver.insert(scope, counted)
    (again, _) = told(driver, scope)
    assert again.rows["nftQuotaConsumedOctets"].tolist() == [300]
    assert any("limit" in note for note in driver.capabilities(scope).notes)


def test_time_that_is_left_is_kept_and_no_end_is_none(place: Namespace) -> None:
    add(place, "timed", f"{GUEST} timeout 300s expires 200s")
    add(place, "plain", GUEST)
    driver, scope = driver_of("timed", "plain"), scope_of(place)
    timed, plain = told(driver, scope)
    assert plain.rows["remainingTimeoutSeconds"].tolist() == [NEVER_SECONDS]
    driver.remove(scope, timed.identities)
    driver.insert(scope, timed)
    (again,) = told(driver_of("timed"), scope)
    assert 195 <= again.rows["remainingTimeoutSeconds"][0] <= 200
    assert again.rows["nftElementTimeoutMilliseconds"].tolist() == [300_000]


# ------------------------------------------------------------------------------------------------- what is not taken


def test_sets_that_cannot_be_carried_are_named(place: Namespace) -> None:
    add(place, "ranges", f"{GUEST}")
    add(place, "verdicts", f"{GUEST} : drop")
    driver, scope = driver_of("ranges", "verdicts", "nowhere"), scope_of(place)
    notes = " / ".join(driver.capabilities(scope).notes)
    assert "the set inet filter ranges is not carried: it is of intervals" in notes
    assert "the set inet filter verdicts is not carried: it maps to verdicts" in notes
    reasons = [piece.reason for piece in driver.export(scope) if isinstance(piece, Omitted)]
    assert len(reasons) == 2
    assert not told(driver, scope)


def test_set_that_is_elsewhere_or_otherwise_or_full_refuses_by_name(place: Namespace) -> None:
    scope = scope_of(place)
    for name in ("plain", "timed", "full"):
        add(place, name, GUEST)
    plain, timed, full = (told(driver_of(name), scope)[0] for name in ("plain", "timed", "full"))
    for made, reason in (
        (driver_of("timed").insert(scope, plain), Reason.NO_ZONE),
        (NftSetsDriver(["timed=inet filter pairs"]).insert(scope, timed), Reason.INVALID),
        (NftSetsDriver(["timed=inet elsewhere timed"]).insert(scope, timed), Reason.NO_ZONE),
    ):
        assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [reason])
    driver = driver_of("full")
    driver.remove(scope, full.identities)
    add(place, "full", OTHER)
    made = driver.insert(scope, full)
    assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [Reason.SET_FULL])


def test_what_does_not_fit_costs_nothing_else(place: Namespace) -> None:
    """The kernel does all of a transaction or nothing."""
    scope, driver = scope_of(place), driver_of("ports4")
    add(place, "ports4", *(f"{GUEST} . {port}" for port in range(1000, 1020)))
    (batch,) = told(driver, scope)
    driver.remove(scope, batch.take(np.arange(10)).identities)
    made = driver.remove(scope, batch.identities)
    assert made["outcome"].tolist() == [Outcome.ABSENT] * 10 + [Outcome.REMOVED] * 10
    batch.rows["nftQuotaFlags"][4], batch.rows["nftElementStatements"][4] = 0xFF, Statements.QUOTA
    made = driver.insert(scope, batch)
    refused = np.flatnonzero(made["outcome"] == Outcome.REFUSED).tolist()
    assert refused == [4]
    assert driver.read_back(scope, batch)[1].sum() == 19


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("filter limited", "no .NAME=.FAMILY TABLE SET"),
        ("inet6 filter limited", "FAMILY is one of ip, inet"),
        ("=inet filter limited", "a name has 1 to 32"),
        (f"inet filter {'s' * 33}", "a name has 1 to 32"),
    ],
)
def test_wrong_names_are_told(wrong: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        NftSetsDriver([wrong])


def test_two_sets_of_one_name_are_told() -> None:
    with pytest.raises(ConfigurationError, match="two have one name"):
        NftSetsDriver(["inet filter limited", "ip filter limited"])


# ------------------------------------------------------------------------------------------------- limits, moved


LIMITS = """table inet limits {
  set spent4 { type ipv4_addr; flags dynamic,timeout; timeout 10m; }
  set spent6 { type ipv6_addr; flags dynamic,timeout; timeout 10m; }
  set barred4 { type ipv4_addr; flags dynamic,timeout; timeout 10m; }
  set barred6 { type ipv6_addr; flags dynamic,timeout; timeout 10m; }
  chain forward {
    type filter hook forward priority filter - 10;
    udp dport 5001 add @spent4 { ip saddr quota over 500 bytes } drop
    udp dport 5001 add @spent6 { ip6 saddr quota over 500 bytes } drop
    udp dport 5002 ip saddr @barred4 drop
    udp dport 5002 ip6 saddr @barred6 drop
    udp dport 5002 add @barred4 { ip saddr timeout 5m }
    udp dport 5002 add @barred6 { ip6 saddr timeout 5m }
  }
}
"""
NAMES = [f"inet limits {kind}{family}" for kind in ("spent", "barred") for family in (4, 6)]


def _drivers() -> FlowDriver:
    return SeveralDrivers((("linux_conntrack", LinuxConntrackDriver()), ("nft_sets", NftSetsDriver(NAMES))))


@pytest.mark.usefixtures("world")
def test_a_rate_limit_is_not_reset_by_moving_and_is_without_sami() -> None:
    def comes_afterwards(carrier: Carrier | NoCarrier) -> dict[tuple[int, int], bool]:
        with Lab(kind="routed") as lab:
            for host in lab.hosts.values():
                host.namespace.run(["nft", "-f", "-"], LIMITS)
            guest = lab.add_guest("g", "a")
            carrier.start(lab)
            try:
                for family in (4, 6):
                    assert [comes(lab, guest, family, 5001) for _ in range(4)] == [True, True, False, False]
                    assert [comes(lab, guest, family, 5002) for _ in range(3)] == [True, False, False]
                record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.3)
                assert record.errors == []
                if isinstance(carrier, Carrier):
                    found = carrier.result(guest)["flows"]
                    assert found["refused"] == 0
                    assert _left(lab, guest) == 0, "what moved is still at the source"
                return {(family, port): comes(lab, guest, family, port) for family in (4, 6) for port in (5001, 5002)}
            finally:
                carrier.stop()

    def _left(lab: Lab, guest: Guest) -> int:
        own = tuple(netaddr.IPAddress(address) for address in guest.addresses)
        scope = Scope(guest.port.id, guest.uuid, {ZoneRole.PORT: 1}, own, lab.hosts["a"].netns_path)
        return sum(map(len, told(NftSetsDriver(NAMES), scope)))

    with ThreadPoolExecutor(2) as both:
        ours, without = both.map(comes_afterwards, (Carrier(driver=_drivers), NoCarrier()))
    assert set(without.values()) == {True}, "a move without SAMI is to reset the limits, or nothing is shown"
    assert set(ours.values()) == {False}


def test_element_that_ends_while_the_guest_moves_does_not_come_back(place: Namespace) -> None:
    add(place, "timed", f"{GUEST} timeout 1s")
    driver, scope = driver_of("timed"), scope_of(place)
    (batch,) = told(driver, scope)
    assert names(batch) == (f"nft-set-element-ipv4 {GUEST} in timed",)
    time.sleep(1.2)  # pacing: its end is what is waited for
    assert not told(driver, scope)
    assert driver.remove(scope, batch.identities)["outcome"].tolist() == [Outcome.ABSENT]


# ------------------------------------------------------------------------------------------------- what peers may send


def test_element_that_is_a_neighbours_too_is_left_alone(place: Namespace) -> None:
    add(place, "pairs", f"{GUEST} . {NEIGHBOUR_ADDRESSES[0]} timeout 2h")
    driver = driver_of("pairs")
    scope = dataclasses.replace(scope_of(place), is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)
    (batch,) = told(driver, scope)
    assert has_end_in(batch, NEIGHBOUR_ADDRESSES).all(), "who purges has to see whose it is as well"
    batch.rows["remainingTimeoutSeconds"], batch.rows["nftElementTimeoutMilliseconds"] = 5, 5000
    assert driver.insert(scope, batch)["outcome"].tolist() == [Outcome.PRESENT]
    assert driver.remove(scope, batch.identities)["outcome"].tolist() == [Outcome.REFUSED]
    assert told(driver, scope)[0].rows["remainingTimeoutSeconds"] > 7000
    driver.remove(scope_of(place), batch.identities)
    made = driver.insert(scope, batch)
    assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [Reason.LOCAL_PORTS_OWN])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("plain", {"nftSetKey": np.frombuffer(b"\1".ljust(64, b"\0"), ">u8")}),
        ("plain", {"nftSetKey": np.frombuffer(bytes(32) + b"\1".ljust(32, b"\0"), ">u8")}),
        ("plain", {"nftAddressOffset": 60}),
        ("plain", {"nftOtherAddressOffset": 200}),
        ("plain", {"nftSetKeyOctets": 64}),
        ("plain", {"nftSetDataOctets": 4}),
        ("pairs", {"nftAddressOffset": 0, "nftOtherAddressOffset": 4}),
        ("pairs", {"nftOtherAddressOffset": NO_OTHER}),
    ],
)
def test_other_name_of_an_element_is_refused(place: Namespace, name: str, change: dict[str, object]) -> None:
    add(place, name, ELEMENTS[name])
    driver, scope = driver_of(name), scope_of(place)
    (batch,) = told(driver, scope)
    driver.remove(scope, batch.identities)
    for field, value in change.items():
        batch.rows[field] = value
    if change.get("nftAddressOffset") == 0:  # the guest at both ends: the first is its own
        batch.rows["otherIPv4Address"] = batch.rows["elementIPv4Address"]
        batch.rows["nftAddressOffset"], batch.rows["nftOtherAddressOffset"] = 4, 0
    made = driver.insert(scope, batch)
    assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [Reason.INVALID])
    assert not told(driver, scope)


def test_what_a_set_here_allows_is_not_the_peers_to_say(place: Namespace) -> None:
    add(place, "spent", GUEST)
    driver, scope = driver_of("spent"), scope_of(place)
    (batch,) = told(driver, scope)
    batch.rows["nftQuotaOctets"], batch.rows["nftQuotaConsumedOctets"] = 1 << 62, 4000
    batch.rows["nftElementStatements"] |= np.uint8(Statements.LIMIT)
    batch.rows["nftLimitRate"], batch.rows["nftLimitUnitSeconds"] = 1 << 30, 1
    assert driver.insert(scope, batch)["outcome"].tolist() == [Outcome.IMPORTED]
    (kept,) = told(driver, scope)
    assert (kept.rows["nftQuotaOctets"][0], kept.rows["nftQuotaConsumedOctets"][0]) == (5000, 4000)
    assert kept.rows["nftElementStatements"].tolist() == [Statements.QUOTA | Statements.COUNTER]


def test_any_values_are_taken_or_refused_and_never_raise(place: Namespace) -> None:
    generator = np.random.default_rng(7)
    for name, element in ELEMENTS.items():
        add(place, name, element)
        driver, scope = driver_of(name), scope_of(place)
        (batch,) = told(driver, scope)
        rows = batch.rows[np.zeros(60, int)]
        octets = rows.view(np.uint8).reshape(60, -1)
        for row in octets:
            row[generator.integers(0, octets.shape[1], 12)] = generator.choice([0, 1, 4, 127, 255], 12)
        hostile = Batch(IPV4, rows)
        driver.insert(scope, hostile)
        driver.read_back(scope, hostile)
        driver.remove(scope, hostile.identities)
        for left in told(driver, scope):
            assert set(driver.remove(scope, left.identities)["outcome"]) == {Outcome.REMOVED}


# ------------------------------------------------------------------------------------------------- times


def test_element_without_time_left_is_refused_and_none_without_an_end_gets_one(place: Namespace) -> None:
    place.run(["nft", "-f", "-"], "add set inet filter openly { type ipv4_addr; flags dynamic,timeout; }\n")
    add(place, "openly", f"{GUEST} timeout 300s expires 100s")
    driver, scope = driver_of("openly"), scope_of(place)
    (batch,) = told(driver, scope)
    for sent, milliseconds, found in ((100, 300_000, 100), (50, 0, 50), (NEVER_SECONDS, 0, NEVER_SECONDS)):
        batch.rows["remainingTimeoutSeconds"], batch.rows["nftElementTimeoutMilliseconds"] = sent, milliseconds
        assert driver.insert(scope, batch)["outcome"].tolist() == [Outcome.IMPORTED]
        assert told(driver, scope)[0].rows["remainingTimeoutSeconds"].tolist() == [found]
    batch.rows["remainingTimeoutSeconds"] = 0
    made = driver.insert(scope, batch)
    assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [Reason.EXPIRED])
    (timed,) = (add(place, "timed", GUEST), told(driver_of("timed"), scope))[1]
    timed.rows["remainingTimeoutSeconds"] = NEVER_SECONDS
    driver_of("timed").insert(scope, timed)
    assert told(driver_of("timed"), scope)[0].rows["remainingTimeoutSeconds"].tolist() == [NEVER_SECONDS]
