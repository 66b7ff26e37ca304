"""Elements of ipsets, on a real kernel: a driver's promises, and addresses that a move does not let off."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lab.carrier import Carrier
from lab.contract import NoCarrier
from lab.lab import Lab
from lab.namespace import Namespace
from lab.traffic import comes
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.drivers.nft_sets import NftSetsDriver
from sami_plugin.drivers.nft_sets.kinds import IPV4, IPV6, NO_OTHER, Statements
from sami_plugin.drivers.several import SeveralDrivers
from sami_plugin.errors import ConfigurationError
from sami_plugin.model.flows import Batch, Omitted, ZoneRole
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.results import Outcome, Reason, lost_fields
from sami_plugin.testing.conformance import flows
from tests.sets import PromisesOfSets, ipsets_listed, scope_of, told

GUEST, OTHER, GUEST_V6 = "192.0.2.10", "192.0.2.77", "2001:db8:1::10"
SETS = """create ports4 hash:ip,port timeout 3600
create ports6 hash:ip,port family inet6 timeout 3600
create plain hash:ip
create timed hash:ip timeout 3600
create counted hash:ip timeout 3600 counters
create pairs hash:ip,port,ip
create pairs6 hash:ip,port,ip family inet6 timeout 60
create small hash:ip maxelem 1
create noted hash:ip comment skbinfo
create networks hash:ip netmask 24
create ranges hash:net
create bits bitmap:ip range 192.0.2.0/24 timeout 3600
"""


@pytest.fixture
def place() -> Iterator[Namespace]:
    made = Namespace(f"ipsets-{os.getpid()}")
    made.run(["ipset", "restore"], SETS)
    yield made
    made.close()


def driver_of(*sets: str) -> NftSetsDriver:
    return NftSetsDriver([f"ipset {name}" for name in sets])


def add(place: Namespace, *elements: str) -> None:
    place.run(["ipset", "restore"], "".join(f"add {element}\n" for element in elements))


class TestPromises(PromisesOfSets):
    BEHIND = b"\0\0\6\0\0\0"

    def make_sets(self, place: Namespace) -> None:
        place.run(["ipset", "restore"], SETS)

    def make_driver(self) -> FlowDriver:
        return driver_of("ports4", "ports6")


# ------------------------------------------------------------------------------------------------- field by field


ELEMENTS = (
    f"ports4 {GUEST},tcp:443",
    f"ports4 {GUEST},udp:443",
    f"ports6 {GUEST_V6},udp:53",
    f"plain {GUEST}",
    f"timed {GUEST} timeout 200",
    f"counted {GUEST} packets 3 bytes 300",
    f"pairs {GUEST},tcp:22,{OTHER}",
    f"pairs {OTHER},udp:22,{GUEST}",
    f"pairs6 {GUEST_V6},tcp:22,2001:db8::77",
    f"bits {GUEST}",
)


def test_each_kind_of_element_comes_back_as_it_was(place: Namespace) -> None:
    add(place, *ELEMENTS, f"plain {OTHER}")
    before = ipsets_listed(place)
    driver, scope = driver_of(*dict.fromkeys(element.split()[0] for element in ELEMENTS)), scope_of(place)
    batches = told(driver, scope)
    assert sum(map(len, batches)) == len(ELEMENTS)
    for batch in batches:
        assert set(driver.remove(scope, batch.identities)["outcome"]) == {Outcome.REMOVED}
    assert ipsets_listed(place) == [f"plain {OTHER}"], "another's element went, or the guest's stayed"
    for batch in batches:
        assert set(driver.insert(scope, batch)["outcome"]) == {Outcome.IMPORTED}
        kept, is_there = driver.read_back(scope, batch)
        assert is_there.all()
        assert not lost_fields(batch, kept.rows).any()
    assert ipsets_listed(place) == before


def test_time_and_counters_are_kept_and_no_end_is_none(place: Namespace) -> None:
    add(place, f"timed {GUEST} timeout 200", f"counted {GUEST} timeout 0 packets 3 bytes 300", f"plain {GUEST}")
    driver, scope = driver_of("timed", "counted", "plain"), scope_of(place)
    for _ in range(2):
        timed, counted, plain = told(driver, scope)
        assert 190 <= timed.rows["remainingTimeoutSeconds"][0] <= 200
        assert counted.rows["remainingTimeoutSeconds"][0] == plain.rows["remainingTimeoutSeconds"][0] == NEVER_SECONDS
        assert counted.rows["nftElementStatements"].tolist() == [Statements.COUNTER]
        assert (counted.rows["nftCounterPackets"][0], counted.rows["nftCounterOctets"][0]) == (3, 300)
        for batch in (timed, counted, plain):
            driver.remove(scope, batch.identities)
            driver.insert(scope, batch)


def test_what_cannot_be_carried_is_named(place: Namespace) -> None:
    add(place, f"networks {GUEST}", f"ranges {GUEST}", f'noted {GUEST} comment "by hand"')
    driver, scope = driver_of("networks", "ranges", "noted", "nowhere"), scope_of(place)
    notes = " / ".join(driver.capabilities(scope).notes)
    assert "the ipset networks is not carried: it is of intervals" in notes
    assert "the ipset ranges is not carried: there is no address in its keys" in notes
    omitted = [(piece.reason, piece.count) for piece in driver.export(scope) if isinstance(piece, Omitted)]
    assert any("the ipset noted: elements with" in reason and count == 1 for reason, count in omitted)
    assert not told(driver, scope)


def test_set_that_is_elsewhere_or_otherwise_or_full_refuses_by_name(place: Namespace) -> None:
    scope = scope_of(place)
    add(place, f"plain {GUEST}", f"timed {GUEST}", f"small {GUEST}")
    plain, timed, small = (told(driver_of(name), scope)[0] for name in ("plain", "timed", "small"))
    for made, reason in (
        (driver_of("timed").insert(scope, plain), Reason.NO_ZONE),
        (NftSetsDriver(["timed=ipset pairs"]).insert(scope, timed), Reason.INVALID),
        (NftSetsDriver(["timed=ipset ports6"]).insert(scope, timed), Reason.INVALID),
        (NftSetsDriver(["timed=ipset elsewhere"]).insert(scope, timed), Reason.NO_ZONE),
    ):
        assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [reason])
    driver = driver_of("small")
    driver.remove(scope, small.identities)
    add(place, f"small {OTHER}")
    made = driver.insert(scope, small)
    assert (made["outcome"].tolist(), made["reason"].tolist()) == ([Outcome.REFUSED], [Reason.SET_FULL])


def test_any_values_are_taken_or_refused_and_never_raise(place: Namespace) -> None:
    random = np.random.default_rng(11)
    driver, scope = driver_of("ports4", "ports6", "counted", "pairs"), scope_of(place)
    for template, names in ((IPV4, (b"ports4", b"counted", b"pairs")), (IPV6, (b"ports6",))):
        rows = random.integers(0, 256, 60 * template.dtype.itemsize, dtype=np.uint8).view(template.dtype).copy()
        rows["zoneRole"] = ZoneRole.PORT
        for position, row in enumerate(rows):
            row["nftSetName"] = np.frombuffer(names[position % len(names)].ljust(32, b"\0"), ">u8")
        rows[template.ends[0]] = flows(template, 1).rows[template.ends[0]][0]
        octets = 16 if template.is_ipv6 else 4
        rows["nftAddressOffset"][::2], rows["nftOtherAddressOffset"][::2] = 0, NO_OTHER
        rows["nftSetKeyOctets"][::2], rows["nftSetDataOctets"][::2] = octets + 8, 0
        batch = Batch(template, rows)
        made = driver.insert(scope, batch)
        assert set(made["outcome"].tolist()) <= {Outcome.IMPORTED, Outcome.REFUSED}
        assert driver.read_back(scope, batch)[1].sum() == (made["outcome"] == Outcome.IMPORTED).sum()
        driver.remove(scope, batch.identities)
    assert not ipsets_listed(place)


def test_other_names_of_an_element_and_ones_that_would_stay_for_ever_are_refused(place: Namespace) -> None:
    add(place, f"ports4 {GUEST},tcp:443", f"timed {GUEST}", f"bits {GUEST}")
    scope = scope_of(place)
    named, timed, bits = (told(driver_of(name), scope)[0] for name in ("ports4", "timed", "bits"))
    for one, driver in ((named, driver_of("ports4")), (timed, driver_of("timed")), (bits, driver_of("bits"))):
        driver.remove(scope, one.identities)
    padded, portless = Batch(IPV4, named.rows.copy()), Batch(IPV4, named.rows.copy())
    padded.rows["nftSetKey"][0] |= np.frombuffer(bytes([0] * 6 + [1]).ljust(64, b"\0"), ">u8")
    portless.rows["nftSetKey"][0] ^= np.frombuffer(bytes([0] * 8 + [6 ^ 47]).ljust(64, b"\0"), ">u8")
    for wrong, sets, reason in (
        (padded, "ports4=ipset ports4", Reason.INVALID),
        (portless, "ports4=ipset ports4", Reason.INVALID),
        (timed, "timed=ipset plain", Reason.NO_TIMEOUTS),
        (bits, "bits=ipset elsewhere", Reason.INVALID),
    ):
        place.run(["ipset", "-exist", "create", "elsewhere", "bitmap:ip", "range", "10.0.0.0/24", "timeout", "9"])
        made = NftSetsDriver([sets]).insert(scope, wrong)
        assert (Outcome(made["outcome"][0]), Reason(made["reason"][0])) == (Outcome.REFUSED, reason)
    assert not ipsets_listed(place)


def test_many_elements_of_one_guest_are_read_once(place: Namespace) -> None:
    many = "".join(f"add ports4 {GUEST},udp:{port}\n" for port in range(1, 12001))
    place.run(["ipset", "restore"], many)
    driver, scope = driver_of("ports4"), scope_of(place)
    began = time.process_time()
    (batch,) = told(driver, scope)
    once = time.process_time() - began
    began = time.process_time()
    assert driver.read_back(scope, batch)[1].all()
    assert time.process_time() - began < 6 * once


@pytest.mark.parametrize("wrong", ["ipset", "ipset a b", "ip set"])
def test_wrong_names_are_told(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is no \[NAME=\]FAMILY TABLE SET and no \[NAME=\]ipset SET"):
        NftSetsDriver([wrong])


# ------------------------------------------------------------------------------------------------- a guest that moves


KNOCKED = """*raw
-A PREROUTING -p udp --dport 5002 -m set --match-set {name} src -j DROP
-A PREROUTING -p udp --dport 5002 -j SET --add-set {name} src --timeout 300
COMMIT
"""
NAMES = {4: "barred4", 6: "barred6"}


def _drivers() -> FlowDriver:
    return SeveralDrivers((("linux_conntrack", LinuxConntrackDriver()), ("nft_sets", driver_of(*NAMES.values()))))


@pytest.mark.usefixtures("world")
def test_address_that_is_barred_stays_barred_when_its_guest_moves_and_is_let_off_without_sami() -> None:
    def comes_afterwards(carrier: Carrier | NoCarrier) -> list[bool]:
        with Lab(kind="routed") as lab:
            for host in lab.hosts.values():
                sets = [
                    f"create {name} hash:ip family inet{'6' * (family == 6)} timeout 600\n"
                    for family, name in NAMES.items()
                ]
                host.namespace.run(["ipset", "restore"], "".join(sets))
                for family, tool in ((4, "iptables-restore"), (6, "ip6tables-restore")):
                    host.namespace.run([tool, "--noflush"], KNOCKED.format(name=NAMES[family]))
            guest = lab.add_guest("g", "a")
            carrier.start(lab)
            try:
                for family in (4, 6):
                    assert [comes(lab, guest, family, 5002) for _ in range(3)] == [True, False, False]
                record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.3)
                assert record.errors == []
                if isinstance(carrier, Carrier):
                    assert carrier.result(guest)["flows"]["refused"] == 0
                    assert "add" not in lab.hosts["a"].run(["ipset", "save"]), "what moved is still at the source"
                return [comes(lab, guest, family, 5002) for family in (4, 6)]
            finally:
                carrier.stop()

    with ThreadPoolExecutor(2) as both:
        ours, without = both.map(comes_afterwards, (Carrier(driver=_drivers), NoCarrier()))
    assert without == [True, True], "a move without SAMI is to let the guest off, or nothing is shown"
    assert ours == [False, False]
