"""Guests move between real kernels, and what their firewalls know moves with them."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import netaddr
import numpy as np
import pytest

from lab import judge, traffic
from lab.carrier import Carrier
from lab.contract import NoCarrier
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import KINDS, Lab
from lab.migration import Abort, Call, Crash, Record
from lab.traffic import Traffic
from lab.verdict import has_survived
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.handover import DestinationSession
from sami_plugin.migration.decision import Done
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, ZoneRole
from sami_plugin.model.protocols import TCP, SctpState, TcpState
from sami_plugin.model.results import WORDS, Reason
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Limits, Settings
from sami_plugin.testing.conformance import flows

pytestmark = pytest.mark.usefixtures("world")

WATCHED_SECONDS = 5.0
BE_LIBERAL = 0x08
OUTSIDE = {4: "10.92.0.254", 6: "fd92::fe"}


def total(flow: Traffic) -> int:
    samples = flow.samples()
    return samples[-1].total if samples else 0


def goes_on(flow: Traffic, more: int = 100_000) -> None:
    start = total(flow)
    wait_until(lambda: total(flow) >= start + more, f"{flow.name} to go on", 8.0)


def has_lived(flow: Traffic, record: Record) -> bool:
    until = record.cut_over_at + WATCHED_SECONDS
    wait_until(lambda: flow.samples()[-1].time > until, "the time that is watched", WATCHED_SECONDS + 5)
    return has_survived(flow.samples(), record.cut_over_at, WATCHED_SECONDS)


def left(lab: Lab, host: str, guest: Guest) -> set[judge.Flow]:
    return judge.table(lab.hosts[host], guest, lab.folder / f"left-{host}-{guest.name}").of(guest.addresses)


def translated(lab: Lab, host: str, guest: Guest) -> set[tuple[object, ...]]:
    """The guest's flows there that its public addresses are in, with both ends of their replies."""
    entries = judge.table(lab.hosts[host], guest, lab.folder / f"translated-{host}-{guest.name}").entries.values()
    return {entry[:3] for entry in entries if {entry.flow.destination, entry.reply_destination} & {*guest.port.public}}


def wait_for(carrier: Carrier, host: str, guest: Guest, step: str) -> Callable[[], None]:
    """A wait until the guest's session on that host has come to this step."""

    def is_there() -> bool:
        assert carrier.hosts is not None
        return carrier.hosts.has_step(host, guest.uuid, step)

    return lambda: wait_until(is_there, f"{step} on {host}", 20.0)


def scope_of(host: Host, guest: Guest) -> Scope:
    addresses = tuple(netaddr.IPAddress(address) for address in guest.addresses)
    return Scope(guest.port.id, guest.uuid, {ZoneRole.PORT: host.zone(guest)}, addresses, host.netns_path)


# ------------------------------------------------------------------------------------------------- lives, and dies


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bridge"])  # the demo's hosts are bridges
def test_a_download_lives_with_sami_and_dies_without(kind: str) -> None:
    def lives(carrier: Carrier | NoCarrier) -> bool:
        with Lab(kind=kind) as lab:
            guest = lab.add_guest("g", "a")
            carrier.start(lab)
            try:
                flow = traffic.download(lab, guest)
                goes_on(flow)
                record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5)
                assert record.errors == []
                if is_alive := has_lived(flow, record):
                    wait_until(lambda: are_windows_checked(lab.hosts["b"], guest), "window checks to be back", 10.0)
                    goes_on(flow)
                return is_alive
            finally:
                carrier.stop()

    with ThreadPoolExecutor(2) as both:
        assert list(both.map(lives, (Carrier(), NoCarrier()))) == [True, False]


def are_windows_checked(host: Host, guest: Guest) -> bool:
    """Of all the guest's connections there."""
    driver = LinuxConntrackDriver()
    try:
        exported = list(driver.export(scope_of(host, guest)))
    finally:
        driver.close()
    flags = [
        batch.rows[name]
        for batch in exported
        if isinstance(batch, Batch) and batch.template.protocol is TCP
        for name in ("tcpTrackingFlags", "reverseTcpTrackingFlags")
    ]
    assert flags
    return not (np.concatenate(flags) & BE_LIBERAL).any()


BEGINNINGS = {
    "download": traffic.download,
    "serve": lambda lab, guest, **more: traffic.serve(lab, guest, 80, **more),
    "udp": traffic.udp_download,
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("begun", BEGINNINGS)
def test_a_translated_download_lives_with_sami_and_dies_without(begun: str, family: int) -> None:
    """Masqueraded, where the guest began it, and else by a destination NAT. Hosts choose ports of their own."""

    def lives(carrier: Carrier | NoCarrier) -> bool:
        with Lab(kind="routed") as lab:
            guest = lab.add_guest("g", "a", is_translated=True)
            guest.allow("tcp", 80)
            carrier.start(lab)
            try:
                flow = BEGINNINGS[begun](lab, guest, family=family)
                goes_on(flow, 1000)
                before = translated(lab, "a", guest)
                assert len(before) == 1
                record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5)
                assert record.errors == []
                if is_alive := has_lived(flow, record):
                    assert translated(lab, "b", guest) == before
                    assert not left(lab, "a", guest)
                return is_alive
            finally:
                carrier.stop()

    with ThreadPoolExecutor(2) as both:
        assert list(both.map(lives, (Carrier(), NoCarrier()))) == [True, False]


def test_flows_go_in_as_soon_as_the_zone_is_known_even_if_that_is_when_the_guest_runs() -> None:
    carrier = Carrier()
    with Lab() as lab:
        guest = lab.add_guest("g", "a")
        carrier.start(lab)
        try:
            flow = traffic.download(lab, guest)
            goes_on(flow)
            record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5, is_port_early=False)
            assert has_lived(flow, record)
            assert carrier.report("b", guest)["flows"]["imported"] == 1
        finally:
            carrier.stop()


# --------------------------------------------------------------------------------------------------- field by field


MERGED = {TcpState: {TcpState.LISTEN, TcpState.FIN_WAIT_2, TcpState.CLOSING}, SctpState: {SctpState.SHUTDOWN_PENDING}}
"""States that conntrack does not tell from others."""


def every_combination(guest: Guest) -> list[Batch]:
    """Every protocol, family, state and mark that the driver carries, and what is expected of a flow of each family."""
    batches = []
    used = 0
    declared = [TEMPLATES[name] for name in sorted(LinuxConntrackDriver().capabilities().templates)]
    for template in (one for one in declared if not one.is_expectation):
        protocol = template.protocol
        states = (
            [None]
            if protocol.states is None
            else [one for one in protocol.states if one not in MERGED[protocol.states]]
        )
        marks, statuses = (0, 1, 0xFFFFFFFF), (0, FlowStatus.SEEN_REPLY, FlowStatus.SEEN_REPLY | FlowStatus.ASSURED)
        cases = list(itertools.product(states, marks, statuses))
        family = 6 if template.is_ipv6 else 4
        ends = (netaddr.IPAddress(guest.address(family)),), (netaddr.IPAddress(OUTSIDE[family]),)
        batch = flows(template, len(cases), source=ends[0], destination=ends[1], first=used)
        used += len(cases)
        for row, (state, mark, status) in zip(batch.rows, cases, strict=True):
            row["conntrackStatus"] = status | FlowStatus.CONFIRMED
            row["flowMark"] = mark
            if state is not None:
                row[protocol.state_field] = state
        if template.is_translated:
            batch.rows[f"postNATSourceIPv{family}Address"] = _number(guest.public(family))
        if protocol is TCP:
            batch.rows["reverseTcpWindowScale"] = 11
            batch.rows["tcpTrackingFlags"], batch.rows["reverseTcpTrackingFlags"] = 0x0B, 0x0F
        batches.append(batch)
    for template in (one for one in declared if one.is_expectation):
        family = 6 if template.is_ipv6 else 4
        ends = (netaddr.IPAddress(guest.address(family)),), (netaddr.IPAddress(OUTSIDE[family]),)
        port = 20000 + used
        used += 1
        master = flows(TEMPLATES[f"tcp-extended-ipv{family}"], 1, source=ends[0], destination=ends[1])
        master.rows["sourceTransportPort"], master.rows["destinationTransportPort"] = port, 21
        expected = flows(template, 1, source=ends[0], destination=ends[1])
        expected.rows["masterSourceTransportPort"] = port
        expected.rows["expectationSourceTransportPortMask"] = 0xFFFF
        expected.rows[f"expectationSourceIPv{family}Mask"] = (1 << 64) - 1 if family == 6 else 0xFFFFFFFF
        batches += [master, expected]
    return batches


def _number(address: str) -> int | tuple[int, int]:
    value = int(netaddr.IPAddress(address))
    return divmod(value, 1 << 64) if ":" in address else value


NOT_KEPT: dict[str, str] = {
    "flowId": "each kernel gives its own",
    "remainingTimeoutSeconds": "it runs on",
}


LABELS = "table inet sami_test { chain labels { type filter hook output priority 0; udp dport 9 ct label set 5; }; }"


def table_of(host: Host, guest: Guest) -> dict[tuple[object, ...], dict[str, object]]:
    """What the kernel holds, by key, every field that a record has."""
    found = {}
    for batch in LinuxConntrackDriver().export(scope_of(host, guest)):
        assert isinstance(batch, Batch), batch
        key = [field[0] for field in batch.template.key]
        for row in batch.rows:
            values = {name: row[name].tolist() for name in row.dtype.names}
            found[tuple(str(values.pop(name)) for name in key)] = values
    return found


def conntrack_of(host: Host, guest: Guest) -> set[str]:
    """What conntrack(8) says of the zone, without what differs by nature: zone, id, timeout."""
    lines = host.run(["conntrack", "-L", "-w", str(host.zone(guest)), "-o", "extended,id"]).splitlines()
    lines += host.run(["conntrack", "-L", "-f", "ipv6", "-w", str(host.zone(guest)), "-o", "extended,id"]).splitlines()
    without = re.compile(r"\b(?:zone|id)=\d+ ?")
    return {
        re.sub(r"^(\S+ +\d+ +\S+ +\d+ +)\d+ ", r"\1", without.sub("", line)).strip() for line in lines if "src=" in line
    }


def test_every_combination_is_the_same_on_the_other_kernel() -> None:
    carrier = Carrier()
    with Lab(kind="routed") as lab:
        guest = lab.add_guest("g", "a", is_translated=True)
        carrier.start(lab)
        try:
            here, there = lab.hosts["a"], lab.hosts["b"]
            for host in (here, there):  # the kernel keeps labels where a rule sets some
                host.run(["nft", "-f", "-"], LABELS)
            batches = every_combination(guest)
            for batch in batches:
                made = LinuxConntrackDriver().insert(scope_of(here, guest), batch)
                assert (made["outcome"] == 0).all(), made
            before: dict[str, object] = {}

            def look() -> None:
                before["table"], before["tool"] = table_of(here, guest), conntrack_of(here, guest)

            lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5, at={"paused": Call(look)})
            carrier.result(guest)
            after, expected = table_of(there, guest), before["table"]
            assert isinstance(expected, dict)
            assert len(expected) == sum(map(len, batches)) >= 216  # of TCP, UDP and ICMP alone
            assert after.keys() == expected.keys()
            differing = {
                field
                for key, values in expected.items()
                for field, value in values.items()
                if after[key][field] != value
            }
            assert differing <= NOT_KEPT.keys()
            assert conntrack_of(there, guest) == before["tool"]
            assert left(lab, "a", guest) == set()
        finally:
            carrier.stop()


# ------------------------------------------------------------------------------------------------- while it is copied


def udp_survives_a_long_copy(settings: Settings) -> tuple[bool, int]:
    """Whether the entry of a stream of one packet a second, with a timeout of 3 s, is there when the guest runs."""
    carrier = Carrier(settings)
    with Lab() as lab:
        for host in lab.hosts.values():
            host.sysctl("nf_conntrack_udp_timeout", 3)
            host.sysctl("nf_conntrack_udp_timeout_stream", 3)
        guest = lab.add_guest("g", "a")
        carrier.start(lab)
        try:
            flow = traffic.udp_echo(lab, guest, packets=1)
            goes_on(flow, 1)
            there: list[set[judge.Flow]] = []
            lab.migrate(
                guest,
                "a",
                "b",
                carrier.tell,
                copy_seconds=9.5,
                at={"moved": Call(lambda: there.append(left(lab, "b", guest)))},
            )
            return len(there[0]) == 1, carrier.result(guest)["flows"]["imported"]
        finally:
            carrier.stop()


@pytest.mark.parametrize("renews", [True, False], ids=["renewed", "not renewed"])
def test_a_copy_of_three_udp_timeouts_loses_nothing_as_long_as_timeouts_are_renewed(
    renews: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not renews:
        monkeypatch.setattr(DestinationSession, "_renew", lambda self, action: Done("Renew"))
    # No whole export in between: that would refresh the timeouts too.
    is_there, _ = udp_survives_a_long_copy(Settings(Limits(hold_seconds=3, resync_seconds=3600.0)))
    assert is_there is renews


# ----------------------------------------------------------------------------------------------- the guest stays


@pytest.mark.parametrize("phase", ["started", "copying", "suspended", "moved"])
@pytest.mark.parametrize("how", [Abort, Crash])
def test_a_guest_that_stays_keeps_every_flow_and_the_destination_has_none(phase: str, how: type[Abort | Crash]) -> None:
    carrier = Carrier(Settings(Limits(session_seconds=10.0)))
    with Lab() as lab:
        guest = lab.add_guest("g", "a")
        carrier.start(lab)
        try:
            flow = traffic.download(lab, guest)
            goes_on(flow)
            before = left(lab, "a", guest)
            wait = [Call(wait_for(carrier, "b", guest, "in sync"))] if phase != "started" else []
            at = {"copying": wait} if phase != "copying" else {}
            record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.2, at={**at, phase: [*wait, how()]})
            assert record.outcome in ("aborted", "crashed")
            goes_on(flow)
            assert before <= left(lab, "a", guest)
            if how is Crash:  # its hypervisor is started anew, and is asked
                carrier.tell(lab.hosts["b"], "stopped", guest)
            wait_until(lambda: not left(lab, "b", guest), "the destination to discard", 15.0)
            assert before <= left(lab, "a", guest)
        finally:
            carrier.stop()


# ------------------------------------------------------------------------------------------- two guests at a time


def test_two_guests_in_opposite_directions() -> None:
    carrier = Carrier()
    with Lab() as lab:
        guests = {"a": lab.add_guest("g", "a"), "b": lab.add_guest("h", "b")}
        carrier.start(lab)
        try:
            flows = {host: traffic.download(lab, guest) for host, guest in guests.items()}
            for flow in flows.values():
                goes_on(flow)
            with ThreadPoolExecutor(2) as both:
                moves = [
                    both.submit(lab.migrate, guests[here], here, there, carrier.tell, copy_seconds=0.5)
                    for here, there in (("a", "b"), ("b", "a"))
                ]
                records = [move.result() for move in moves]
            assert [has_lived(flow, record) for flow, record in zip(flows.values(), records, strict=True)] == [
                True,
                True,
            ]
            for here, guest in guests.items():
                assert carrier.result(guest)["flows"] == {
                    "exported": 1,
                    "purged": 1,
                    "imported": 1,
                    "degraded": 0,
                    "refused": 0,
                    "verified": 1,
                }
                assert left(lab, here, guest) == set()
        finally:
            carrier.stop()


# -------------------------------------------------------------------- guests of a shared zone that talk to each other


def talking_guests(lab: Lab) -> tuple[Guest, Guest, list[Traffic]]:
    """Two guests on host a of which one downloads from the other, in both families, and both from outside."""
    one, two = lab.add_guest("one", "a"), lab.add_guest("two", "a")
    two.allow("tcp", 80)
    flows = [traffic.serve(lab, two, 80, client=one), traffic.download(lab, one), traffic.download(lab, two)]
    for flow in flows:
        goes_on(flow)
    return one, two, flows


def shared_entry(lab: Lab, host: str, one: Guest, two: Guest) -> int | None:
    """The kernel's id of the one entry of the flow between the two, if it is there."""
    table = judge.table(lab.hosts[host], one, lab.folder / f"shared-{host}")
    ids = [entry.id for flow, entry in table.entries.items() if {flow.source, flow.destination} == {one.v4, two.v4}]
    return ids[0] if ids else None


def test_shared_zone_one_guest_moves_and_the_other_stays() -> None:
    carrier = Carrier()
    with Lab(kind="shared") as lab:
        carrier.start(lab)
        try:
            one, two, flows = talking_guests(lab)
            before = shared_entry(lab, "a", one, two)
            record = lab.migrate(one, "a", "b", carrier.tell, copy_seconds=0.5)
            assert all(has_lived(flow, record) for flow in flows)
            carrier.result(one)
            assert before is not None
            assert shared_entry(lab, "a", one, two) == before
            assert shared_entry(lab, "b", one, two) is not None
        finally:
            carrier.stop()


@pytest.mark.parametrize("destinations", [("b", "b"), ("b", "c")])
def test_shared_zone_both_guests_move_at_the_same_time(destinations: tuple[str, str]) -> None:
    carrier = Carrier()
    with Lab(hosts=("a", "b", "c"), kind="shared") as lab:
        carrier.start(lab)
        try:
            one, two, flows = talking_guests(lab)
            with ThreadPoolExecutor(2) as both:
                moves = [
                    both.submit(lab.migrate, guest, "a", there, carrier.tell, copy_seconds=0.5)
                    for guest, there in zip((one, two), destinations, strict=True)
                ]
                last = max((move.result() for move in moves), key=lambda record: record.cut_over_at)
            assert all(has_lived(flow, last) for flow in flows)
            carrier.result(one), carrier.result(two)
            assert left(lab, "a", one) | left(lab, "a", two) == set()
            for there in destinations:
                assert shared_entry(lab, there, one, two) is not None
        finally:
            carrier.stop()


def test_shared_zone_both_guests_move_one_after_the_other() -> None:
    carrier = Carrier()
    with Lab(kind="shared") as lab:
        carrier.start(lab)
        try:
            one, two, flows = talking_guests(lab)
            lab.migrate(one, "a", "b", carrier.tell, copy_seconds=0.5)
            carrier.result(one)
            for flow in flows:
                goes_on(flow)
            there = shared_entry(lab, "b", one, two)
            record = lab.migrate(two, "a", "b", carrier.tell, copy_seconds=0.5)
            assert all(has_lived(flow, record) for flow in flows)
            carrier.result(two)
            assert there is not None
            assert shared_entry(lab, "b", one, two) == there  # it was the first guest's own when the second came
            assert left(lab, "a", one) | left(lab, "a", two) == set()
        finally:
            carrier.stop()


def test_shared_zone_one_moves_while_the_other_ones_migration_is_aborted() -> None:
    carrier = Carrier()
    with Lab(kind="shared") as lab:
        carrier.start(lab)
        try:
            one, two, flows = talking_guests(lab)
            arrived = threading.Event()
            with ThreadPoolExecutor(2) as both:
                stays = both.submit(
                    lab.migrate,
                    two,
                    "a",
                    "b",
                    carrier.tell,
                    copy_seconds=0.2,
                    at={"suspended": [Call(lambda: arrived.wait(20)), Abort()]},
                )
                moved = lab.migrate(one, "a", "b", carrier.tell, copy_seconds=1.0)
                arrived.set()
                assert (moved.outcome, stays.result().outcome) == ("moved", "aborted")
            carrier.report("b", one), carrier.report("b", two)
            for flow in flows:
                goes_on(flow)
            assert shared_entry(lab, "a", one, two) is not None
            assert shared_entry(lab, "b", one, two) is not None
        finally:
            carrier.stop()


def test_a_removal_that_the_source_sees_travels_and_other_flows_stay() -> None:
    carrier = Carrier()
    with Lab() as lab:
        guest = lab.add_guest("g", "a")
        carrier.start(lab)
        try:
            driver, here = LinuxConntrackDriver(), scope_of(lab.hosts["a"], guest)
            batch = next(one for one in every_combination(guest) if one.template.name == "tcp-ipv4")
            driver.insert(here, batch)
            removed, kept = batch.take(np.arange(10)), batch.take(np.arange(10, len(batch)))

            def remove() -> None:
                wait_for(carrier, "b", guest, "in sync")()
                driver.remove(here, driver.read_back(here, removed)[0].identities)

            lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.2, at={"copying": Call(remove)})
            carrier.result(guest)
            there = scope_of(lab.hosts["b"], guest)
            assert not driver.read_back(there, removed)[1].any()
            assert driver.read_back(there, kept)[1].all()
        finally:
            carrier.stop()


# ---------------------------------------------------------------------------------------------- places in the table


def test_of_six_flows_four_fit_where_the_kernel_has_four_places_that_may_be_taken() -> None:
    """The table's size is one for the whole machine, so it is the headroom that is chosen here."""
    with Lab(kind="routed") as lab:
        guest = lab.add_guest("g", "a")
        capacity = int(lab.hosts["b"].sysctl("nf_conntrack_max"))
        assert int(lab.hosts["b"].sysctl("nf_conntrack_count")) == 0
        carrier = Carrier(Settings(headroom_percent=100 * (1 - 4.5 / capacity)))
        carrier.start(lab)
        try:
            streams = [traffic.udp_echo(lab, guest) for _ in range(4)]
            for host in lab.hosts.values():
                host.sysctl("nf_conntrack_udp_timeout", 600)
            traffic.flows(lab, guest, count=2, new_per_second=0)

            def are_assured() -> bool:
                return lab.hosts["a"].run(["conntrack", "-L", "-p", "udp"]).count("[ASSURED]") == len(streams)

            wait_until(are_assured, "the streams to be assured", 20.0, poll_seconds=0.1)
            guest.close_egress()
            before = left(lab, "a", guest)
            assert len(before) == 6
            record = lab.migrate(guest, "a", "b", carrier.tell)
            report = carrier.report("b", guest)
            assert all(has_lived(stream, record) for stream in streams)
            assert len(left(lab, "b", guest)) == report["flows"]["imported"] == 4
            assert report["verdict"]["losses"] == {WORDS[Reason.NO_PLACE]: 2}
            named = carrier.report("a", guest)["named"]
            assert [entry["count"] for reason, entry in named.items() if "there was no place" in reason] == [2]
        finally:
            carrier.stop()
