"""OVN's own firewall in the kernel's datapath: a guest's connections die when it moves, and live with SAMI.

The agents hear what libvirt's hook would say of the guest. Where its port is bound, the lab tells OVN as Neutron does.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import traffic
from lab.agents import AGENT, AgentProcess
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.kernels import patient
from lab.kernels.guest import BROKER
from lab.libvirt.relay import Relay
from lab.migration import Record
from lab.ovn import OvnGuest, OvnHost, OvnLab, domain_xml
from lab.traffic import Traffic
from lab.verdict import growth_times

pytestmark = [pytest.mark.usefixtures("kernel_lab"), pytest.mark.timeout(3000)]

MOVES = 10
BYTES_PER_SECOND = 20_000.0
WATCHED_SECONDS = 20.0
"""The peer sends again at 0.2, 0.6, 1.4, 3, 6.2 and 12.6 s, whenever the guest was stopped."""
PATIENT = (*AGENT[:-1], patient.__name__)
# All takes some fifteen times as long as on a host.
OPTIONS: dict[str, dict[str, object]] = {
    "migration": {"call_seconds": 60, "verdict_seconds": 60, "started_seconds": 60, "zone_seconds": 300},
    "bounds": {"handshake_seconds": 120},
}


@pytest.fixture(scope="module")
def lab(kernel_lab: None) -> Iterator[OvnLab]:
    with OvnLab() as made:
        # Not as many here as there, so that a guest that moves has another zone here than there.
        for name, host in (("stays-a", "a"), ("stays-too", "a"), ("stays-b", "b")):
            made.add_guest(name, host)
        yield made


class Agents:
    """A `sami-agent` on each host, which hears what libvirt's hook is told there."""

    def __init__(
        self, lab: OvnLab, stack: ExitStack, folder: Path, more: Mapping[str, dict[str, dict[str, object]]]
    ) -> None:
        """`more` are options of single hosts' agents. What is told says the guest's addresses if there are none."""
        self._says_addresses = not more
        self.of: dict[str, AgentProcess] = {}
        address, port = os.environ[BROKER].split(":")
        for host in lab.hosts.values():
            relay = Relay(host.namespace, int(port), address)
            stack.callback(relay.close)
            relay.mend()
            options: dict[str, dict[str, object]] = {
                "DEFAULT": {"transport_url": f"rabbit://guest:guest@127.0.0.1:{port}/"},
                "agent": {"scopes": "ovn"},
                "ovs": {"ovsdb_connection": host.chassis.connection},
                **OPTIONS,
                **more.get(host.name, {}),
            }
            agent = AgentProcess(folder, host.name, options, start=host.start, program=PATIENT)
            self.of[host.name] = stack.enter_context(agent)

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        self.of[host.name].tell_of(phase, guest, domain_xml(guest, says_addresses=self._says_addresses))

    def reports(self, guest: Guest, record: Record, moves: int) -> tuple[dict, dict]:
        """Of the source and of the destination, once both have ended their part of the guest's last move."""
        for name, agent in self.of.items():
            wait_until(lambda agent=agent: agent.ended(guest.uuid) == moves, f"the session on {name} to end", 30)  # type: ignore[misc]
        return self.of[record.source].reports(guest.uuid)[0], self.of[record.destination].reports(guest.uuid)[0]


@pytest.fixture
def agents(lab: OvnLab, request: pytest.FixtureRequest) -> Iterator[Agents]:
    with ExitStack() as stack:
        more = request.param(lab) if hasattr(request, "param") else {}
        yield Agents(lab, stack, lab.folder / f"agents-{len(lab.guests)}", more)


class Ends:
    """The entries that end on a host from now on, as its kernel tells, and who ended them."""

    def __init__(self, lab: OvnLab, host: OvnHost) -> None:
        self._file = lab.folder / f"ends-{host.name}"
        with self._file.open("w") as out:
            host.start(["conntrack", "-E", "-p", "tcp", "-e", "DESTROY"], stdout=out)

    def of(self, guest: Guest, at_least: int = 0) -> list[str]:
        """Of the guest's entries, once there are so many."""

        def found() -> list[str]:
            return [line for line in self._file.read_text().splitlines() if is_of(guest, line)]

        wait_until(lambda: len(found()) >= at_least, f"{at_least} entries of {guest.name} to end", 5)
        return found()


def is_of(guest: Guest, line: str) -> bool:
    return any(f"={address} " in line for address in guest.addresses)


def entries(host: OvnHost, guest: Guest) -> dict[int, dict[str, str]]:
    """By zone, the guest's TCP entries: their names and the kernel's ids."""
    found = defaultdict[int, dict[str, str]](dict)
    for family in ("ipv4", "ipv6"):
        for line in host.run(["conntrack", "-L", "-f", family, "-p", "tcp", "-o", "id"]).splitlines():
            if is_of(guest, line):
                name = " ".join(re.findall(r"\b(?:src|dst|sport|dport)=\S+", line))
                said = dict(re.findall(r"\b(zone|id)=(\d+)", line))
                found[int(said["zone"])][name] = said["id"]
    return dict(found)


def total(flow: Traffic) -> int:
    return flow.samples()[-1].total


def grows(flow: Traffic) -> None:
    start = total(flow)
    wait_until(lambda: total(flow) > start + BYTES_PER_SECOND, f"{flow.name} to go on", 3, poll_seconds=0.1)


def downloads(lab: OvnLab, guest: OvnGuest) -> list[Traffic]:
    """The guest begins them, and then the outside alone speaks."""
    found = [traffic.download(lab, guest, family=family, rate=BYTES_PER_SECOND) for family in (4, 6)]  # type: ignore[arg-type]
    for one in found:
        grows(one)
    return found


def growths_after(flow: Traffic, record: Record) -> list[float]:
    return [at for at in growth_times(flow.samples()) if at > record.cut_over_at]


def test_download_dies_without_sami_and_the_guest_can_begin_another(lab: OvnLab) -> None:
    guest = lab.add_guest("dies", "a")
    flows = downloads(lab, guest)
    record = lab.migrate(guest, "a", "b", copy_seconds=2)
    for flow in flows:
        wait_until(
            lambda flow=flow: flow.samples()[-1].time > record.cut_over_at + WATCHED_SECONDS,  # type: ignore[misc]
            "the time that is watched",
            WATCHED_SECONDS,
            poll_seconds=0.1,
        )
        assert not growths_after(flow, record)
        flow.stop()
    for flow in downloads(lab, guest):
        flow.stop()


def test_downloads_live_with_sami_in_ten_moves_there_and_back_and_neighbours_are_not_touched(
    lab: OvnLab, agents: Agents, record_property: Callable[[str, object], None]
) -> None:
    guest = lab.add_guest("lives", "a")
    neighbours = [each for each in lab.guests.values() if each.name.startswith("stays")]
    theirs = [flow for neighbour in neighbours for flow in downloads(lab, neighbour)]
    flows = downloads(lab, guest)
    own = set(entries(lab.hosts["a"], guest)[lab.hosts["a"].zone(guest)])
    assert len(own) == len(flows)
    # The outside has a port on this host, and its own zone has the same connections, wherever the guest is.
    outside = lab.hosts["a"].zone_of("outside")
    beside = entries(lab.hosts["a"], guest)[outside]
    standing = {(host.name, each.name): entries(host, each) for host in lab.hosts.values() for each in neighbours}
    ends = {host.name: Ends(lab, host) for host in lab.hosts.values()}
    for number in range(MOVES):
        here, there = ("a", "b") if number % 2 == 0 else ("b", "a")
        zone_here, before = lab.hosts[here].zone(guest), len(ends[here].of(guest))
        record = lab.migrate(guest, here, there, agents.tell, copy_seconds=2)
        assert record.errors == []
        for flow in flows:
            grows(flow)
        left, arrived = agents.reports(guest, record, number + 1)
        assert arrived["flows"]["verified"] == len(flows), arrived
        assert arrived["milliseconds"]["resumed to scope known"] < 0, arrived
        assert left["flows"]["exported"] == len(flows), left
        # ovn-controller empties the zone of a port that has left, and either it or the agent comes first.
        ended = ends[here].of(guest, before + len(flows) + left["flows"]["late"])[before:]
        by_switch = sum("progname=ovs-vswitchd" in line for line in ended)
        assert left["flows"]["purged"] + left["flows"]["late"] == len(ended) - by_switch, (ended, left)
        assert left["flows"]["purged"] + by_switch == len(flows), (ended, left)
        zone_there = lab.hosts[there].zone(guest)
        assert zone_there != zone_here
        found = {host.name: entries(host, guest) for host in lab.hosts.values()}
        assert found["a"].pop(outside) == beside
        assert set(found[there].pop(zone_there)) == own
        assert found == {"a": {}, "b": {}}
        for host in lab.hosts.values():
            for each in neighbours:
                assert entries(host, each) == standing[host.name, each.name]
                assert not ends[host.name].of(each)
        stalls = " ".join(f"{growths_after(flow, record)[0] - record.paused_at:.1f}" for flow in flows)
        record_property(
            f"move {number + 1}",
            f"{here} > {there}: stalls {stalls} s; removed by OVN {by_switch}, purged {left['flows']['purged']}",
        )
    for flow in theirs:
        grows(flow)
    for flow in (*theirs, *flows):
        flow.stop()


def southbound_on_one(lab: OvnLab) -> dict[str, dict[str, dict[str, object]]]:
    """On the other host nobody says the addresses before the guest runs: its agent does not wait for them for long."""
    return {
        "a": {"ovn": {"ovn_sb_connection": lab.central.southbound}},
        "b": {"migration": OPTIONS["migration"] | {"started_seconds": 2}},
    }


@pytest.mark.parametrize("agents", [southbound_on_one], indirect=True)
def test_before_the_guest_runs_ovn_says_its_addresses_in_the_southbound_database_alone(
    lab: OvnLab, agents: Agents
) -> None:
    guest = lab.add_guest("unsaid", "a")
    flows = downloads(lab, guest)
    for number, (here, there) in enumerate((("a", "b"), ("b", "a")), 1):
        record = lab.migrate(guest, here, there, agents.tell, copy_seconds=2)
        assert record.errors == []
        for flow in flows:
            grows(flow)
        _, arrived = agents.reports(guest, record, number)
        assert arrived["flows"]["verified"] == len(flows), arrived
        is_late = arrived["milliseconds"]["resumed to scope known"] > 0
        assert is_late == (there == "b"), arrived
    for flow in flows:
        flow.stop()
