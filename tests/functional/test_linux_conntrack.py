"""The conntrack driver against the kernel, in network namespaces of our own. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import netaddr
import numpy as np
import pytest

from benchmarks.floor import namespaces
from sami_plugin import errors, privileged
from sami_plugin.drivers.base import Changes
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, keep_events_on, probe
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.decode import Decoder
from sami_plugin.drivers.linux_conntrack.encode import dump_request
from sami_plugin.drivers.linux_conntrack.netlink import Connection
from sami_plugin.model import protocols
from sami_plugin.model.flows import (
    ACCOUNTING,
    BARRED,
    TEMPLATES,
    Addresses,
    Batch,
    FlowStatus,
    Omitted,
    Template,
    ZoneRole,
    answers,
    turned_round,
)
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.protocols import Protocol, SctpState, TcpState
from sami_plugin.model.results import Outcome, Reason, Results, lost_fields
from sami_plugin.model.risk import FUNCTIONS
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import (
    NEIGHBOUR_ADDRESSES,
    OUTSIDE_ADDRESSES,
    PORT_ADDRESSES,
    FlowDriverConformance,
    flows,
)

TCP = TEMPLATES["tcp-ipv4"]
UDP = TEMPLATES["udp-ipv4"]


@pytest.fixture
def places() -> Iterator[list[str]]:
    """Two fresh network namespaces, by path."""
    with namespaces() as paths:
        yield paths


@pytest.fixture
def labelled(places: list[str]) -> None:
    """The namespaces keep labels: the kernel does where a rule sets some (newer ones also where one looks at them)."""
    for namespace in places:
        nft(namespace, "add table inet sami_test")
        nft(namespace, "add chain inet sami_test labels { type filter hook output priority 0; }")
        nft(namespace, "add rule inet sami_test labels udp dport 9 ct label set 5")


def nft(namespace: str, command: str) -> None:
    subprocess.run(["nsenter", f"--net={namespace}", "nft", command], check=True)


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver()
    yield made
    made.close()


def scope_of(namespace: str, zone: int = 5, **more: object) -> Scope:
    return Scope("port", "guest", {ZoneRole.PORT: zone}, PORT_ADDRESSES, namespace, **more)  # type: ignore[arg-type]


def exported(driver: LinuxConntrackDriver, scope: Scope) -> dict[str, Batch]:
    parts: dict[str, list[Batch]] = {}
    for part in driver.export(scope):
        assert isinstance(part, Batch), part
        parts.setdefault(part.template.name, []).append(part)
    return {name: Batch.joined(TEMPLATES[name], [part.rows for part in some]) for name, some in parts.items()}


def omitted(driver: LinuxConntrackDriver, scope: Scope) -> list[Omitted]:
    return [part for part in driver.export(scope) if isinstance(part, Omitted)]


def tool(namespace: str, *arguments: str) -> str:
    """conntrack(8), the outside judge and the other traffic."""
    if shutil.which("conntrack") is None:
        raise RuntimeError("conntrack(8) is missing: apt-get install conntrack")
    command = ["nsenter", f"--net={namespace}", "conntrack", *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def outcomes(made: Results) -> list[tuple[Outcome, Reason]]:
    return [(Outcome(int(one["outcome"])), Reason(int(one["reason"]))) for one in made]


def unnumbered(batch: Batch) -> Batch:
    """Names of flows of which the device's id is not known."""
    return changed(batch, flowId=0).identities


def changed(batch: Batch, **fields: object) -> Batch:
    rows = batch.rows.copy()
    for name, value in fields.items():
        rows[name] = value
    return Batch(batch.template, rows)


class TestConformance(FlowDriverConformance):
    """What every driver promises."""

    @pytest.fixture(autouse=True)
    def _places(self, places: list[str], labelled: None, driver: LinuxConntrackDriver) -> Iterator[None]:
        # As the agent does: an entry made before anybody listens may never tell an event.
        self.namespace, self.driver = places[0], driver
        self.kept_on = keep_events_on(places[0])
        yield
        self.kept_on.close()

    def make_driver(self) -> LinuxConntrackDriver:
        return self.driver

    def make_scope(self) -> Scope:
        return scope_of(self.namespace, 5)

    def make_other_scope(self) -> Scope:
        return dataclasses.replace(scope_of(self.namespace, 6), port="other")

    def make_shared_scope(self) -> Scope:
        return scope_of(self.namespace, 7, is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)

    def has_fixed_timeouts(self, template: Template) -> bool:
        return template.protocol is protocols.GRE

    def test_flow_that_is_made_again_has_another_id(self) -> None:
        """The kernel cannot promise that: its id is a hash over the entry's place in memory, which is used again.

        What is promised instead: the flow is told as it is now, so that whoever replaces by key is right.
        """
        sent = flows(TCP, 1)
        self.driver.insert(self.make_scope(), sent)
        with self.driver.watch(self.make_scope()) as watch:
            self.driver.remove(self.make_scope(), unnumbered(sent))
            self.driver.insert(self.make_scope(), changed(sent, flowMark=50))
            told = watch.collect()
        assert [batch.rows["flowMark"].tolist() for batch in told.upserts] == [[50]]


# --- what a move keeps


def states_of(protocol: Protocol) -> list[int | None]:
    """Those that the kernel takes."""
    if protocol.states is None or protocol.state_field is None:
        return [None]
    return [state for state in protocol.states if nl.STATES_TO_KERNEL[protocol.state_field][state] != nl.NO_STATE]


STATUSES = [
    FlowStatus.CONFIRMED,
    FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY,
    FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.ASSURED,
    FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.ASSURED | FlowStatus.FIXED_TIMEOUT,
]
NOT_KEPT = {
    # What is asked for, by field: what the kernel makes of it instead.
    ("tcpConnectionState", TcpState.FIN_WAIT_2): TcpState.CLOSE_WAIT,
    ("tcpConnectionState", TcpState.CLOSING): TcpState.LAST_ACK,
    ("sctpAssociationState", SctpState.SHUTDOWN_PENDING): SctpState.ESTABLISHED,
}


@pytest.mark.parametrize("zone", [0, 9])
@pytest.mark.parametrize(
    "name", sorted(name for name, one in TEMPLATES.items() if one.is_flow and not one.is_expectation)
)
def test_a_move_keeps_every_field_but_those_named_here(
    places: list[str], labelled: None, driver: LinuxConntrackDriver, name: str, zone: int
) -> None:
    template = TEMPLATES[name]
    source, destination = scope_of(places[0], 5), scope_of(places[1], zone)
    state_field = template.protocol.state_field
    kinds = list(itertools.product(STATUSES, (0, 0xDEADBEEF), states_of(template.protocol)))
    sent = flows(template, len(kinds))
    added_to_extended = sent.rows["conntrackStatus"][0] & np.uint32(FlowStatus.HELPER | FlowStatus.SEQ_ADJUST)
    sent.rows["conntrackStatus"] = [int(status) for status, _, _ in kinds]
    sent.rows["flowMark"] = [mark for _, mark, _ in kinds]
    if state_field is not None:
        sent.rows[state_field] = [int(state) for _, _, state in kinds if state is not None]
    if name not in driver.capabilities(source).templates:
        assert set(outcomes(driver.insert(source, sent))) == {(Outcome.REFUSED, Reason.NOT_DECLARED)}
        assert not exported(driver, source)
        return
    assert set(outcomes(driver.insert(source, sent))) == {(Outcome.IMPORTED, Reason.NONE)}

    moved = exported(driver, source)[name]
    assert len(moved) == len(sent)
    assert (driver.insert(destination, moved)["outcome"] == Outcome.IMPORTED).all()
    kept, present = driver.read_back(destination, sent)
    assert present.all()

    for field in template.dtype.names or ():
        wanted, found = sent.rows[field], kept.rows[field]
        if field == "flowId":
            continue  # each kernel gives its own
        if field == "remainingTimeoutSeconds":
            assert (found <= wanted).all()
            assert (found.astype(int) >= wanted.astype(int) - 5).all()
            continue
        if field in ACCOUNTING:
            assert not found.any()  # no kernel takes them
            continue
        for number in range(len(sent)):
            want = NOT_KEPT.get((field, wanted[number])) if wanted.ndim == 1 else None
            want = wanted[number] if want is None else want
            if field in ("tcpTrackingFlags", "reverseTcpTrackingFlags"):
                want |= nl.FLAG_BE_LIBERAL  # added to every flow: without it the flow dies
            if field == "conntrackStatus" and template.protocol is protocols.GRE:
                want |= np.uint32(FlowStatus.FIXED_TIMEOUT)  # for the same reason
            if field == "conntrackStatus" and template.is_extended:  # so it does of these
                want |= added_to_extended
            if field == "conntrackStatus" and template.is_translated:  # the kernel says itself what it translates
                want |= np.uint32(FlowStatus.SRC_NAT | FlowStatus.SRC_NAT_DONE | FlowStatus.DST_NAT_DONE)
            assert np.array_equal(found[number], want), (field, kinds[number])
    moved_back, _ = driver.read_back(destination, moved)
    assert not lost_fields(moved, moved_back.rows).any()
    _agrees_with_conntrack(places[1], zone, kept)


def _agrees_with_conntrack(namespace: str, zone: int, kept: Batch) -> None:
    family = "ipv6" if kept.template.is_ipv6 else "ipv4"
    text = tool(namespace, "-L", "-f", family, "-o", "extended,id")
    lines = {}
    for line in text.splitlines():
        numbers = re.findall(r"\bid=(\d+)", line)  # ICMP has others before the entry's
        lines[int(numbers[-1])] = line
    words = {
        "tcp": {
            TcpState.CLOSED: "CLOSE",
            TcpState.SYN_RECEIVED: "SYN_RECV",
            TcpState.FIN_WAIT_1: "FIN_WAIT",
            TcpState.SYN_SENT_SIMULTANEOUS: "SYN_SENT2",
        },
        "sctp": {SctpState.SHUTDOWN_RECEIVED: "SHUTDOWN_RECD"},
    }
    assert len(lines) == len(kept)
    protocol = kept.template.protocol
    for row in kept.rows:
        line = lines[int(row["flowId"])]
        assert f"src={PORT_ADDRESSES[kept.template.is_ipv6]} dst={OUTSIDE_ADDRESSES[kept.template.is_ipv6]}" in line
        assert f"mark={row['flowMark']} " in line, line
        assert (f"zone={zone} " in line) == (zone != 0), line
        assert ("[ASSURED]" in line) == bool(row["conntrackStatus"] & FlowStatus.ASSURED), line
        assert ("[UNREPLIED]" in line) != bool(row["conntrackStatus"] & FlowStatus.SEEN_REPLY), line
        if protocol.states is not None:
            state = protocol.states(int(row[protocol.state_field]))
            assert f" {words[protocol.name].get(state, state.name)} " in line, line
        if "sourceTransportPort" in (row.dtype.names or ()):
            # The first of the two directions that the line has.
            ports = re.search(r"sport=(\d+) dport=(\d+)", line)
            assert ports is not None, line
            assert ports.groups() == (str(row["sourceTransportPort"]), str(row["destinationTransportPort"]))
        elif "greKey" in (row.dtype.names or ()):
            keys = re.search(r"srckey=(\S+) dstkey=(\S+)", line)
            assert keys is not None, line
            assert keys.groups() == (hex(row["reverseGreKey"]), hex(row["greKey"]))
        elif "icmpIdentifier" in (row.dtype.names or ()):
            assert f"id={row['icmpIdentifier']} " in line, line


def test_status_bits_that_the_kernel_does_not_take_do_not_refuse_the_flow(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    sent = flows(UDP, 16)
    sent.rows["conntrackStatus"] = [1 << bit for bit in range(16)]
    assert (driver.insert(scope_of(places[0]), sent)["outcome"] == Outcome.IMPORTED).all()
    kept, _ = driver.read_back(scope_of(places[0]), sent)
    taken = [int(FlowStatus.CONFIRMED) | (1 << bit & int(nl.STATUS_TAKEN)) for bit in range(16)]
    assert kept.rows["conntrackStatus"].tolist() == taken


def test_window_scale_goes_only_with_its_flag_in_both_directions(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    sent = flows(TCP, 2)
    sent.rows["tcpTrackingFlags"] = 0x01
    sent.rows["reverseTcpTrackingFlags"] = 0x01, 0x00
    driver.insert(scope_of(places[0]), sent)
    kept, _ = driver.read_back(scope_of(places[0]), sent)
    assert kept.rows["tcpWindowScale"].tolist() == [7, 0]
    assert kept.rows["reverseTcpWindowScale"].tolist() == [8, 0]


# --- what is exported


def test_translated_flows_are_exported_with_both_sides(places: list[str], driver: LinuxConntrackDriver) -> None:
    for protocol in ("tcp", "udp"):
        more = ["--state", "ESTABLISHED"] if protocol == "tcp" else []
        tool(
            places[0], "-I", "-p", protocol, "-w", "5", "-t", "60", "-s", "192.0.2.10", "-d", "198.51.100.1",
            "-r", "198.51.100.1", "-q", "203.0.113.1", "--sport", "4000", "--dport", "443",
            "--reply-port-src", "443", "--reply-port-dst", "61000", *more,
        )  # fmt: skip
    told = exported(driver, scope_of(places[0]))
    assert set(told) == {"tcp-nat-ipv4", "udp-nat-ipv4"}
    for batch in told.values():
        row = batch.rows[0]
        assert netaddr.IPAddress(int(row["postNATSourceIPv4Address"])) == netaddr.IPAddress("203.0.113.1")
        assert netaddr.IPAddress(int(row["postNATDestinationIPv4Address"])) == netaddr.IPAddress("198.51.100.1")
        assert (row["postNAPTSourceTransportPort"], row["postNAPTDestinationTransportPort"]) == (61000, 443)
        kept, present = driver.read_back(scope_of(places[0]), batch)
        assert present.all()
        assert (kept.rows["postNAPTSourceTransportPort"] == 61000).all()


def test_what_a_destination_nat_gives_another_guest_is_taken_from_nobody(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    scope = scope_of(places[0])
    others = dataclasses.replace(scope, addresses=NEIGHBOUR_ADDRESSES)
    theirs, mine = (given_by_nat(addresses) for addresses in (NEIGHBOUR_ADDRESSES, PORT_ADDRESSES))
    assert outcomes(driver.insert(others, theirs)) == [(Outcome.IMPORTED, Reason.NONE)]
    assert outcomes(driver.insert(scope, mine)) == [(Outcome.REFUSED, Reason.TRANSLATION_TAKEN)]
    assert driver.read_back(others, theirs)[1].all()
    assert outcomes(driver.insert(others, theirs)) == [(Outcome.IMPORTED, Reason.NONE)]


def given_by_nat(addresses: Addresses) -> Batch:
    """A peer's flow to a public address, which is translated to one of these."""
    batch = flows(TEMPLATES["udp-nat-ipv4"], 1, source=OUTSIDE_ADDRESSES)
    batch.rows["destinationIPv4Address"] = batch.rows["postNATSourceIPv4Address"]
    batch.rows["postNATSourceIPv4Address"] = batch.rows["sourceIPv4Address"]
    batch.rows["postNATDestinationIPv4Address"] = next(int(one) for one in addresses if one.version == 4)
    return batch


def test_place_that_a_peer_s_stray_packets_took_is_the_nat_s_again(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    """What came before the NAT was there is nobody's; what was answered is somebody's."""
    scope, mine = scope_of(places[0]), flows(TEMPLATES["udp-nat-ipv4"], 2)
    strays = answers(mine)
    strays.rows["conntrackStatus"], strays.rows["remainingTimeoutSeconds"] = int(FlowStatus.CONFIRMED), 60
    strays.rows["conntrackStatus"][1] |= int(FlowStatus.SEEN_REPLY)
    public = netaddr.IPAddress(int(mine.rows["postNATSourceIPv4Address"][0]))
    driver.insert(dataclasses.replace(scope, addresses=(public,)), strays)
    assert outcomes(driver.insert(scope, mine)) == [
        (Outcome.IMPORTED, Reason.NONE),
        (Outcome.REFUSED, Reason.TRANSLATION_TAKEN),
    ]


def test_what_no_template_holds_is_named(places: list[str], driver: LinuxConntrackDriver) -> None:
    ends = ["-w", "5", "-t", "60", "-s", "192.0.2.10", "-d", "198.51.100.1"]
    dccp = ["--sport", "1", "--dport", "2", "--state", "OPEN", "--role", "client"]
    tool(places[0], "-I", "-p", "dccp", *dccp, *ends)
    (left,) = omitted(driver, scope_of(places[0]))
    assert (left.reason, left.count) == ("protocol dccp is not carried", 1)
    (name,) = left.examples
    assert re.fullmatch(r"dccp 192\.0\.2\.10(:1)? > 198\.51\.100\.1(:2)?", name)  # newer kernels know no DCCP
    others = dataclasses.replace(scope_of(places[0]), is_shared=True, addresses=NEIGHBOUR_ADDRESSES)
    assert not omitted(driver, others), "another guest's flows were told as this one's"


def test_stable_flows_are_all_exported_while_others_come_and_go(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    scope = scope_of(places[0])
    stable = flows(TCP, 5000)
    busy = changed(flows(TCP, 3000), destinationTransportPort=80)
    driver.insert(scope, stable)
    stop, rounds, failed = threading.Event(), [0], []

    def disturb() -> None:
        try:
            while not stop.is_set():
                driver.insert(scope, busy)
                driver.remove(scope, unnumbered(busy))
                rounds[0] += 1
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            failed.append(error)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(30):
            told = exported(driver, scope)["tcp-ipv4"]
            assert (KeyIndex(told).find(stable) >= 0).all()
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert rounds[0] > 5


def test_several_zones_are_exported_with_their_roles(places: list[str], driver: LinuxConntrackDriver) -> None:
    zones = {ZoneRole.PORT: 5, ZoneRole.DNAT: 6, ZoneRole.SNAT: 0}
    scope = dataclasses.replace(scope_of(places[0]), zones=zones)
    sent = changed(flows(UDP, 3), zoneRole=[1, 2, 3])
    driver.insert(scope, sent)
    driver.insert(scope_of(places[0], 8), flows(UDP, 1))
    for some in (zones, {ZoneRole.PORT: 5, ZoneRole.DNAT: 6}):
        told = exported(driver, dataclasses.replace(scope, zones=some))["udp-ipv4"]
        assert sorted(told.rows["zoneRole"]) == sorted(int(role) for role in some)


def test_abandoned_export_leaves_a_driver_that_works(places: list[str], driver: LinuxConntrackDriver) -> None:
    driver.insert(scope_of(places[0]), flows(TCP, 20_000))
    for _ in range(3):
        next(iter(driver.export(scope_of(places[0]))))
    assert len(exported(driver, scope_of(places[0]))["tcp-ipv4"]) == 20_000


def test_many_flows_are_read_back_by_a_dump_and_few_by_asking(places: list[str], driver: LinuxConntrackDriver) -> None:
    scope = scope_of(places[0])
    sent = flows(TCP, 12_000)
    driver.insert(scope, sent)
    there = np.arange(12_000) % 3 != 0
    driver.remove(scope, unnumbered(sent.take(~there)))
    order = np.random.default_rng(1).permutation(12_000)
    for wanted in (order, order[:50]):
        kept, present = driver.read_back(scope, sent.take(wanted))
        assert np.array_equal(present, there[wanted])
        assert np.array_equal(
            kept.rows["sourceTransportPort"][present], sent.rows["sourceTransportPort"][wanted][present]
        )
        assert not kept.rows[~present].view(np.uint8).any()


# --- what an insert replaces, and what it leaves alone


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", ["tcp-ipv4", "udp-ipv6"])
def test_stale_entry_of_the_tuple_is_replaced(
    places: list[str], driver: LinuxConntrackDriver, name: str, is_turned: bool
) -> None:
    scope, other = scope_of(places[0], 5), scope_of(places[0], 6)
    sent = flows(TEMPLATES[name], 3)
    stale = changed(turned_round(sent) if is_turned else sent, flowMark=99)
    for zone in (scope, other):
        driver.insert(zone, stale)
    untouched = exported(driver, other)[name]
    assert (driver.insert(scope, sent)["outcome"] == Outcome.IMPORTED).all()
    kept, present = driver.read_back(scope, sent)
    assert present.all()
    assert np.array_equal(kept.rows["flowMark"], sent.rows["flowMark"])
    assert len(exported(driver, scope)[name]) == 3
    assert sorted(exported(driver, other)[name].rows["flowId"]) == sorted(untouched.rows["flowId"])


def test_translated_entry_whose_reply_is_in_the_way_is_replaced(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    tool(
        places[0], "-I", "-p", "udp", "-w", "5", "-t", "60", "-s", "192.0.2.99", "-d", "198.51.100.1",
        "-r", "198.51.100.1", "-q", "192.0.2.10", "--sport", "4000", "--dport", "443",
        "--reply-port-src", "443", "--reply-port-dst", "20000",
    )  # fmt: skip
    assert outcomes(driver.insert(scope_of(places[0]), flows(UDP, 1))) == [(Outcome.IMPORTED, Reason.NONE)]
    assert set(exported(driver, scope_of(places[0]))) == {"udp-ipv4"}


def test_entry_in_the_way_that_ends_at_a_neighbour_stays(places: list[str], driver: LinuxConntrackDriver) -> None:
    tool(
        places[0], "-I", "-p", "udp", "-w", "5", "-t", "60", "-s", "192.0.2.20", "-d", "198.51.100.1",
        "-r", "198.51.100.1", "-q", "192.0.2.10", "--sport", "4000", "--dport", "443",
        "--reply-port-src", "443", "--reply-port-dst", "20000",
    )  # fmt: skip
    shared = scope_of(places[0], is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)
    assert outcomes(driver.insert(shared, flows(UDP, 1))) == [(Outcome.REFUSED, Reason.EXISTS)]
    assert set(exported(driver, scope_of(places[0]))) == {"udp-nat-ipv4"}


def test_flow_that_the_firewall_bars_while_it_is_watched_is_told_as_removed_and_omitted(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    # conntrack 1.4.7 updates entries of zone 0 only.
    barring = dataclasses.replace(scope_of(places[0], 0), barred_marks=1)
    with keep_events_on(places[0]):
        for template in (TCP, UDP):
            driver.insert(barring, changed(flows(template, 1), flowMark=0))
        ids = exported(driver, barring)["udp-ipv4"].rows["flowId"].tolist()
        with driver.watch(barring) as watch:
            # As Neutron's firewall in Open vSwitch does it: ct(commit,zone=...,exec(set_field:0x1->ct_mark)).
            tool(places[0], "-U", "-p", "udp", "-s", "192.0.2.10", "--mark", "1")
            told = watch.collect()
    assert not told.upserts
    assert [one for batch in told.removals for one in batch.rows["flowId"].tolist()] == ids
    assert [part.template for part in driver.export(barring) if isinstance(part, Batch)] == [TCP]
    assert omitted(driver, barring) == [Omitted(BARRED, 1, ("udp 192.0.2.10:20000 > 198.51.100.1:443",))]


def test_same_flow_several_times_in_one_batch_ends_as_one_entry(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    sent = flows(UDP, 1).take(np.zeros(3, np.intp))
    made = driver.insert(scope_of(places[0]), changed(sent, flowMark=[1, 2, 3]))
    assert (made["outcome"] == Outcome.IMPORTED).all()
    assert exported(driver, scope_of(places[0]))["udp-ipv4"].rows["flowMark"].tolist() == [3]


def test_neighbours_entries_are_the_same_after_everything(places: list[str], driver: LinuxConntrackDriver) -> None:
    shared = scope_of(places[0], is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)
    with_neighbour = flows(TCP, 4, destination=NEIGHBOUR_ADDRESSES)
    theirs = dataclasses.replace(scope_of(places[0]), addresses=NEIGHBOUR_ADDRESSES)
    driver.insert(theirs, with_neighbour.take(np.arange(2)))
    before = tool(places[0], "-L", "-o", "id,extended")
    present, missing = (Outcome.PRESENT, Reason.NONE), (Outcome.REFUSED, Reason.LOCAL_PORTS_OWN)
    assert outcomes(driver.insert(shared, changed(with_neighbour, flowMark=77))) == [present] * 2 + [missing] * 2
    reverse = turned_round(with_neighbour)
    assert outcomes(driver.insert(shared, changed(reverse, flowMark=77))) == [present] * 2 + [missing] * 2
    renewed = driver.renew(shared, changed(with_neighbour, remainingTimeoutSeconds=9999))
    assert renewed["outcome"].tolist() == [Outcome.PRESENT] * 2 + [Outcome.ABSENT] * 2
    numbers = re.compile(r" id=\d+")
    assert numbers.findall(tool(places[0], "-L", "-o", "id,extended")) == numbers.findall(before)
    assert "mark=77" not in tool(places[0], "-L")
    rows = exported(driver, theirs)["tcp-ipv4"].rows
    assert (rows["remainingTimeoutSeconds"] <= 600).all()


# --- what is refused, and why


def test_each_refusal_has_its_reason(places: list[str], driver: LinuxConntrackDriver) -> None:
    sent = flows(TCP, 5)
    sent.rows["sourceIPv4Address"][0] = int(netaddr.IPAddress("203.0.113.9"))
    sent.rows["remainingTimeoutSeconds"][1] = 0
    sent.rows["zoneRole"][2] = ZoneRole.SNAT
    sent.rows["tcpConnectionState"][3] = TcpState.LISTEN
    assert outcomes(driver.insert(scope_of(places[0]), sent)) == [
        (Outcome.REFUSED, Reason.FOREIGN_ADDRESS),
        (Outcome.REFUSED, Reason.EXPIRED),
        (Outcome.REFUSED, Reason.NOT_DECLARED),
        (Outcome.REFUSED, Reason.INVALID),
        (Outcome.IMPORTED, Reason.NONE),
    ]
    assert len(exported(driver, scope_of(places[0]))["tcp-ipv4"]) == 1


def test_failures_among_many_rows_fall_on_the_right_rows(places: list[str], driver: LinuxConntrackDriver) -> None:
    """ICMP types without an answer make no entry (EINVAL); every kernel answer finds its row, over several chunks."""
    sent = flows(TEMPLATES["icmp-ipv4"], 30_000)
    wrong = np.random.default_rng(2).random(len(sent)) < 0.4
    sent.rows["icmpTypeIPv4"][wrong] = 3
    made = driver.insert(scope_of(places[0]), sent)
    assert np.array_equal(made["outcome"] == Outcome.REFUSED, wrong)
    assert set(made["reason"][wrong]) == {Reason.INVALID}


def test_without_the_capability_nothing_is_done_and_the_operator_is_told(places: list[str]) -> None:
    """The kernel answers a whole batch by one EPERM, which must not be taken for success of the other rows."""

    def drop_and_insert() -> str:
        # Capabilities are the thread's own; the socket's opener must lack it too.
        driver = LinuxConntrackDriver()
        _drop_net_admin()
        try:
            driver.insert(dataclasses.replace(scope_of(places[0]), namespace=None), flows(UDP, 5))
        except errors.NotPermitted as error:
            return str(error)
        finally:
            driver.close()
        return "no error"

    assert "CAP_NET_ADMIN" in _in_a_thread_inside(places[0], drop_and_insert)
    assert not exported(LinuxConntrackDriver(), scope_of(places[0]))


def _in_a_thread_inside(namespace: str, work):  # type: ignore[no-untyped-def]
    return privileged.in_namespace(namespace, work)


def _drop_net_admin() -> None:
    import ctypes

    # capset(2), of this thread alone: version 3 header, two sets of (effective, permitted, inheritable).
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << 12)
    data[1] &= ~(1 << 12)
    assert libc.capset(header, data) == 0


def test_no_namespace_at_the_path_is_said(driver: LinuxConntrackDriver) -> None:
    with pytest.raises(errors.NotAvailable, match="/run/netns/none-such"):
        driver.capabilities(scope_of("/run/netns/none-such"))


def test_caller_stays_in_its_namespace(places: list[str], driver: LinuxConntrackDriver) -> None:
    import os

    before = os.readlink("/proc/thread-self/ns/net")
    driver.insert(scope_of(places[0]), flows(UDP, 1))
    list(driver.export(scope_of(places[1])))
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_another_namespace_at_the_same_path_is_noticed(
    places: list[str], driver: LinuxConntrackDriver, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "netns"
    path.symlink_to(places[0])
    driver.insert(scope_of(str(path)), flows(UDP, 1))
    path.unlink()
    path.symlink_to(places[1])
    assert not exported(driver, scope_of(str(path)))


# --- removing and renewing


def test_removal_names_its_victims(places: list[str], driver: LinuxConntrackDriver) -> None:
    here, there = scope_of(places[0], 5), scope_of(places[0], 0)
    sent = flows(TCP, 4)
    driver.insert(here, sent)
    driver.insert(there, sent)
    names = exported(driver, here)["tcp-ipv4"]
    names = names.take(KeyIndex(names).find(sent)).identities
    names.rows["flowId"][1] += 1
    names.rows["flowId"][2] = 0
    made = driver.remove(here, names.take(np.arange(3)))
    assert made["outcome"].tolist() == [Outcome.REMOVED, Outcome.ABSENT, Outcome.REMOVED]
    assert driver.read_back(here, sent)[1].tolist() == [False, True, False, True]
    assert driver.read_back(there, sent)[1].all()
    assert not len(driver.remove(here, names.take(np.zeros(4, bool))))
    assert driver.read_back(here, sent)[1].tolist() == [False, True, False, True]


def test_renew_of_a_fixed_timeout_leaves_it_and_is_no_refusal(places: list[str], driver: LinuxConntrackDriver) -> None:
    sent = flows(UDP, 1)
    sent.rows["conntrackStatus"] |= np.uint32(FlowStatus.FIXED_TIMEOUT)
    driver.insert(scope_of(places[0]), sent)
    made = driver.renew(scope_of(places[0]), changed(sent, remainingTimeoutSeconds=9000))
    assert made["outcome"].tolist() == [Outcome.PRESENT]


def test_renew_with_zero_does_not_remove(places: list[str], driver: LinuxConntrackDriver) -> None:
    sent = flows(UDP, 1)
    driver.insert(scope_of(places[0]), sent)
    made = driver.renew(scope_of(places[0]), changed(sent, remainingTimeoutSeconds=0))
    assert outcomes(made) == [(Outcome.REFUSED, Reason.EXPIRED)]
    assert driver.read_back(scope_of(places[0]), sent)[1].all()


# --- the watch


def gone(changes: Changes) -> list[int]:
    return [int(port) for batch in changes.removals for port in batch.rows["sourceTransportPort"]]


def come(changes: Changes) -> list[int]:
    return [int(port) for batch in changes.upserts for port in batch.rows["sourceTransportPort"]]


def test_watch_tells_the_id_that_went_before_the_flow_that_took_its_place(
    places: list[str], driver: LinuxConntrackDriver
) -> None:
    scope, sent = scope_of(places[0]), flows(TCP, 1)
    with driver.watch(scope) as watch:
        driver.insert(scope, sent)
        first = watch.collect()
        driver.remove(scope, unnumbered(sent))
        # The kernel's id is a hash over the entry's place in memory; let another entry have that place.
        driver.insert(scope_of(places[0], 6), flows(TCP, 200))
        driver.insert(scope, changed(sent, flowMark=50))
        second = watch.collect()
        driver.remove(scope, unnumbered(sent))
        third = watch.collect()
    old = first.upserts[0].rows["flowId"][0]
    assert gone(first) == []
    assert come(first) == [20000]
    assert second.removals[0].rows["flowId"].tolist() == [old]
    assert second.upserts[0].rows["flowMark"].tolist() == [50]
    assert third.removals[0].rows["flowId"].tolist() == second.upserts[0].rows["flowId"].tolist()
    assert not third.upserts


def test_watch_of_a_tuple_that_was_turned_round_tells_both(places: list[str], driver: LinuxConntrackDriver) -> None:
    scope, sent = scope_of(places[0]), flows(UDP, 1)
    driver.insert(scope, sent)
    with keep_events_on(places[0]), driver.watch(scope) as watch:
        driver.insert(scope, turned_round(sent))
        changes = watch.collect()
    assert come(changes) == [443]
    # The first entry was made when nobody listened: with nf_conntrack_events=2 its end may be untold.
    assert set(gone(changes)) <= {20000}


def test_watch_takes_zone_zero_and_several_zones(places: list[str], driver: LinuxConntrackDriver) -> None:
    sent = flows(UDP, 1)
    for wanted in ({5}, {0}, {5, 0}, {6, 5, 65535}):
        zones = dict(zip((ZoneRole.PORT, ZoneRole.DNAT, ZoneRole.SNAT), sorted(wanted), strict=False))
        watched = dataclasses.replace(scope_of(places[0]), zones=zones)
        with driver.watch(watched) as watch:
            for zone in (0, 5, 6, 7, 65535):
                driver.insert(scope_of(places[0], zone), sent)
            changes = watch.collect()
        told = sorted(zones[ZoneRole(int(role))] for batch in changes.upserts for role in batch.rows["zoneRole"])
        assert told == sorted(wanted)


def test_other_zones_events_never_reach_the_process(places: list[str], driver: LinuxConntrackDriver) -> None:
    with driver.watch(scope_of(places[0])) as watch:
        driver.insert(scope_of(places[0], 6), flows(UDP, 1000))
        chunks, is_complete = watch._connection.events()  # type: ignore[attr-defined]
    assert not chunks
    assert is_complete


def test_lost_events_are_said_and_the_next_changes_are_complete(places: list[str]) -> None:
    driver = LinuxConntrackDriver(watch_receive_octets=1 << 14)
    scope = scope_of(places[0])
    with driver.watch(scope) as watch:
        driver.insert(scope, flows(UDP, 2000))
        assert not watch.collect().is_complete
        assert watch.collect().is_complete
        driver.insert(scope, flows(UDP, 1, first=5000))
        changes = watch.collect()
        assert changes.is_complete
        assert come(changes) == [25000]
    driver.close()


def test_watch_sees_timeout_as_removal(places: list[str], driver: LinuxConntrackDriver) -> None:
    scope = scope_of(places[0])
    with driver.watch(scope) as watch:
        driver.insert(scope, changed(flows(UDP, 1), remainingTimeoutSeconds=1))
        assert come(watch.collect()) == [20000]
        time.sleep(1.2)
        list(driver.export(scope))  # the kernel ends an expired entry when it comes across it
        assert gone(watch.collect()) == [20000]


def test_flow_made_while_attended_tells_its_end_to_a_later_watch(places: list[str]) -> None:
    """With nf_conntrack_events=2, the default, an entry tells only if somebody listened when it was made.

    The other half, that it tells nothing without a listener, cannot be held to: the kernel keeps one flag for all
    network namespaces (nf_ctnetlink_has_listener), and other tests listen.
    """
    driver = LinuxConntrackDriver()
    scope = scope_of(places[0])
    for _ in range(2):
        driver.attend(scope.namespace)
    driver.insert(scope, flows(UDP, 1))
    with driver.watch(scope) as watch:
        driver.remove(scope, unnumbered(flows(UDP, 1)))
        assert gone(watch.collect()) == [20000]
    driver.close()


SIOCGSKNS = 0x894C
"""Asks for the network namespace of a socket (linux/sockios.h)."""


def namespaces_of_sockets() -> set[int]:
    """The inodes of the network namespaces that this process has sockets in."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket
            namespace = fcntl.ioctl(int(name), SIOCGSKNS)
            found.add(os.fstat(namespace).st_ino)
            os.close(namespace)
    return found


def test_nothing_keeps_a_namespace_alive_that_is_gone(driver: LinuxConntrackDriver) -> None:
    """Such as a router's: with a socket in it its devices would live on, and with them their peers."""
    with namespaces(1) as (stays,):
        with namespaces(1) as (gone,):
            for namespace in (stays, gone):
                driver.attend(namespace)
                driver.insert(scope_of(namespace), flows(UDP, 1))
            inode = os.stat(gone).st_ino
        assert inode in namespaces_of_sockets()
        driver.attend(stays)
        assert namespaces_of_sockets() & {inode, os.stat(stays).st_ino} == {os.stat(stays).st_ino}


def test_keep_events_on_takes_nothing(places: list[str], driver: LinuxConntrackDriver) -> None:
    kept_on = keep_events_on(places[0])
    driver.insert(scope_of(places[0]), flows(UDP, 5000))
    assert kept_on._connection.events() == ([], True)
    kept_on.close()
    kept_on.close()


# --- the kernel's abilities


def test_capabilities_tell_the_namespaces_own_numbers(places: list[str], driver: LinuxConntrackDriver) -> None:
    driver.insert(scope_of(places[0]), flows(UDP, 7))
    first, second = (driver.capabilities(scope_of(place)) for place in places)
    assert (first.in_use, second.in_use) == (7, 0)
    assert first.capacity is not None
    assert first.capacity > 0
    assert first.device != second.device
    assert first.device == LinuxConntrackDriver().capabilities(scope_of(places[0], 99)).device
    assert first.can_watch


def test_operator_is_told_what_no_kernel_can_be_given(places: list[str], driver: LinuxConntrackDriver) -> None:
    scopes = [scope_of(place) for place in places[:2]]
    names = ("nf_conntrack_acct", "nf_conntrack_timestamp")
    for name in names:
        switch = ["sysctl", "-qw", f"net.netfilter.{name}=1"]
        subprocess.run(["nsenter", f"--net={places[0]}", *switch], check=True)
    told = [[note.split()[0] for note in driver.capabilities(scope).notes] for scope in scopes]
    assert [[name in notes for name in names] for notes in told] == [[True, True], [False, False]]


def test_probe_agrees_with_what_this_kernel_does(places: list[str], driver: LinuxConntrackDriver) -> None:
    driver.insert(scope_of(places[0], 5), flows(UDP, 3))
    connection = Connection(places[0])
    came = sum(len(messages) for messages in connection.dump(dump_request(6)))
    connection.close()
    assert probe.features().filters_dump_by_zone == (came == 0)
    assert probe.features().functions == FUNCTIONS
    assert probe.features().keeps_zones


SAMPLES = {
    "gre": (["--srckey", "7", "--dstkey", "9"], "srckey=0x7 dstkey=0x9"),
    "sctp": (
        ["--sport", "7", "--dport", "9", "--state", "ESTABLISHED", "--orig-vtag", "1", "--reply-vtag", "2"],
        "sport=7 dport=9",
    ),
    "udplite": (["--sport", "7", "--dport", "9"], "sport=7 dport=9"),
}


@pytest.mark.parametrize("protocol", nl.OPTIONAL, ids=lambda each: each.name)
def test_protocol_is_declared_where_this_kernel_tells_its_flows_apart(
    places: list[str], driver: LinuxConntrackDriver, protocol: Protocol
) -> None:
    arguments, shown = SAMPLES[protocol.name]
    declared = driver.capabilities(scope_of(places[0])).templates
    for family, ends in zip(("ipv4", "ipv6"), zip(PORT_ADDRESSES, OUTSIDE_ADDRESSES, strict=True), strict=True):
        named = ["-p", protocol.name, "-t", "60", "-s", str(ends[0]), "-d", str(ends[1])]
        tool(places[0], "-I", *named, *arguments)
        is_told_apart = shown in tool(places[0], "-L", "-f", family)
        assert (f"{protocol.kind}-{family}" in declared) == is_told_apart


def test_protocol_that_the_kernel_takes_and_forgets_the_ports_of_is_not_declared(
    places: list[str], driver: LinuxConntrackDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protocol 253 is for experiments (RFC 3692): no kernel knows it, and each takes entries of it."""
    unknown = dataclasses.replace(protocols.UDPLITE, name="nothing", label="Nothing", number=253)
    monkeypatch.setattr(protocols, "BY_NUMBER", protocols.BY_NUMBER | {253: unknown})
    known = protocols.of_template
    monkeypatch.setattr(
        protocols, "of_template", lambda name, family: unknown if name.startswith("udplite") else known(name, family)
    )
    monkeypatch.setattr(nl, "OPTIONAL", {unknown: "CONFIG_NOTHING"})
    monkeypatch.setattr(probe, "_FOUND", [])
    assert all(TEMPLATES[name].is_translated for name in probe.features().optional or ())
    able = driver.capabilities(scope_of(places[0]))
    assert not any(name.startswith("udplite") for name in able.templates)
    assert [note for note in able.notes if "Nothing" in note]
    tool(places[0], "-I", "-p", "253", "-w", "5", "-t", "60", "-s", "192.0.2.10", "-d", "198.51.100.1")
    (left,) = omitted(driver, scope_of(places[0]))
    assert left.reason == "protocol nothing is not carried"


def test_answers_that_are_said_to_fit_do_fit(places: list[str], driver: LinuxConntrackDriver) -> None:
    """With the smallest of buffers as well: no answer of the kernel's is ever dropped."""
    for octets in (1 << 12, 1 << 16, 1 << 20):
        small = LinuxConntrackDriver(receive_octets=octets)
        sent = flows(TEMPLATES["tcp-ipv6"], 3000)
        for _ in range(2):
            assert (small.insert(scope_of(places[0]), sent)["outcome"] == Outcome.IMPORTED).all()
        assert small.read_back(scope_of(places[0]), sent)[1].all()
        small.close()


def test_recorded_shapes_are_what_the_kernel_sends(
    places: list[str], labelled: None, driver: LinuxConntrackDriver
) -> None:
    """Entries of all kinds at once, in one dump: mixed lengths, marks, families."""
    declared = driver.capabilities(scope_of(places[0])).templates
    # Those with a NAT go to another peer: no flow is of two templates.
    peers = {False: OUTSIDE_ADDRESSES, True: NEIGHBOUR_ADDRESSES}
    sent = {
        name: flows(one, 100, destination=peers[one.is_translated], first=1000 * one.is_extended)
        for name in sorted(declared)
        for one in (TEMPLATES[name],)
        if not one.is_expectation
    }
    for batch in sent.values():
        batch.rows["flowMark"][::2] = 0
        driver.insert(scope_of(places[0]), batch)
    told = exported(driver, scope_of(places[0]))
    assert {name: len(batch) for name, batch in told.items()} == dict.fromkeys(sent, 100)
    decoder = Decoder({ZoneRole.PORT: 5})
    connection = Connection(places[0])
    for messages in connection.dump(dump_request(None)):
        list(decoder.decode(messages))
    connection.close()
    assert sum(map(len, decoder._shapes.values())) <= 2 * len(sent)
