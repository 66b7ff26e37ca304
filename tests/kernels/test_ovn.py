"""OVN's own firewall in the kernel's datapath: a guest's connections die when it moves, and live with SAMI.

The agents hear what libvirt's hook would say of the guest. Where its port is bound, the lab tells OVN as Neutron does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import netaddr
import pytest

from lab import traffic
from lab.agents import AGENT, AgentProcess
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.kernels import patient
from lab.kernels.guest import BROKER
from lab.libvirt.relay import Relay
from lab.migration import Call, Record
from lab.namespace import Namespace
from lab.ovn import SECURED, SWITCH, OvnGuest, OvnHost, OvnLab, domain_xml
from lab.port import Port, Rules
from lab.traffic import Traffic
from lab.verdict import growth_times
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.model.flows import Batch, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.results import Outcome
from sami_plugin.model.scope import Scope
from sami_plugin.scopes.open_vswitch import Integration
from sami_plugin.scopes.ovn import OvnScopes

pytestmark = [pytest.mark.usefixtures("kernel_lab"), pytest.mark.timeout(3000)]

MOVES = 10
CHANGES_IN = 4
"""In this move, counted from 0, the flows change while memory is copied."""
BYTES_PER_SECOND = 20_000.0
WATCHED_SECONDS = 20.0
"""The peer sends again at 0.2, 0.6, 1.4, 3, 6.2 and 12.6 s, whenever the guest was stopped."""
NOBODY = "192.0.2.1"
SWITCHD, PYTHON, PACKETS = "ovs-vswitchd", "python", "packets"
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


class Events:
    """Guests' TCP entries that are made and end on a host from now on, as its kernel tells, and by whose doing."""

    def __init__(self, lab: OvnLab, host: OvnHost) -> None:
        self._host = host
        self._file = lab.folder / f"events-{host.name}"
        self._marks = itertools.count(1)
        self._read: dict[str, int] = defaultdict(int)
        with self._file.open("w") as out:
            host.start(["conntrack", "-E", "-p", "tcp", "-e", "NEW,DESTROY", "-o", "id,userspace"], stdout=out)
        self._lines()

    def new_of(self, guest: Guest) -> dict[tuple[int, str], list[tuple[str, str]]]:
        """Since the last time: by zone and name of an entry, what became of it, and by which program, or by packets."""
        found = defaultdict[tuple[int, str], list[tuple[str, str]]](list)
        lines = [line for line in self._lines() if is_of(guest, line)]
        for line in lines[self._read[guest.name] :]:
            program = re.search(r"\[USERSPACE\](?:.* progname=(\S+))?", line)
            who = PACKETS if program is None else program[1] or "a program that has ended"
            found[zone_of(line), name_of(line)].append(("ended" if "[DESTROY]" in line else "made", who))
        self._read[guest.name] = len(lines)
        return dict(found)

    def _lines(self) -> list[str]:
        """All that the kernel has told up to now: it tells in order, so an entry is made here and waited for."""
        marks: list[str] = []

        def is_marked() -> bool:
            told = self._file.read_text()
            if any(mark in told for mark in marks):
                return True
            number = next(self._marks)
            ends = ["-s", NOBODY, "-d", NOBODY, "--sport", str(number), "--dport", "9"]
            self._host.run(["conntrack", "-I", "-p", "tcp", *ends, "--state", "ESTABLISHED", "-t", "600"])
            marks.append(f" sport={number} dport=9 ")
            return False

        wait_until(is_marked, f"the events of {self._host.name}", 5, poll_seconds=0.2)
        return self._file.read_text().splitlines()


def is_of(guest: Guest, line: str) -> bool:
    return any(f"={address} " in line for address in guest.addresses)


def name_of(line: str) -> str:
    return " ".join(re.findall(r"\b(?:src|dst|sport|dport)=\S+", line))


def zone_of(line: str) -> int:
    return int(re.findall(r"\bzone=(\d+)", line)[0])


def entries(host: OvnHost, guest: Guest) -> dict[int, dict[str, str]]:
    """By zone, the guest's TCP entries: their names and the kernel's ids."""
    found = defaultdict[int, dict[str, str]](dict)
    for family in ("ipv4", "ipv6"):
        for line in host.run(["conntrack", "-L", "-f", family, "-p", "tcp", "-o", "id"]).splitlines():
            if is_of(guest, line):
                found[zone_of(line)][name_of(line)] = re.findall(r"\bid=(\d+)", line)[0]
    return dict(found)


def renew(host: OvnHost, guest: Guest) -> None:
    """Gives the guest's entries the time again that they have: to who watches, they have changed."""
    own = tuple(map(netaddr.IPAddress, guest.addresses))
    scope = Scope(guest.port.id, guest.uuid, {ZoneRole.PORT: host.zone(guest)}, own, host.netns_path)
    driver = LinuxConntrackDriver()
    for part in list(driver.export(scope)):
        assert isinstance(part, Batch)
        driver.renew(scope, part)
    driver.close()


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
    events = {host.name: Events(lab, host) for host in lab.hosts.values()}
    for number in range(MOVES):
        here, there = ("a", "b") if number % 2 == 0 else ("b", "a")
        zone_here = lab.hosts[here].zone(guest)
        change = Call(partial(renew, lab.hosts[here], guest))
        at = {"copying": change} if number == CHANGES_IN else {}
        record = lab.migrate(guest, here, there, agents.tell, copy_seconds=2, at=at)
        assert record.errors == []
        for flow in flows:
            grows(flow)
        left, arrived = agents.reports(guest, record, number + 1)
        zone_there = lab.hosts[there].zone(guest)
        assert zone_there != zone_here
        found = {host.name: entries(host, guest) for host in lab.hosts.values()}
        assert found["a"].pop(outside) == beside
        assert set(found[there].pop(zone_there)) == own
        assert found == {"a": {}, "b": {}}
        went, came = events[here].new_of(guest), events[there].new_of(guest)
        told = f"\n{here}: {went}\n{there}: {came}\n{left}\n{arrived}"  # as text, of which pytest leaves nothing out
        # ovn-controller empties the zone of a port that has left, and either it or the agent comes first.
        first = [went.pop((zone_here, name)) for name in own]
        by_switch = first.count([("ended", SWITCHD)])
        assert by_switch + first.count([("ended", PYTHON)]) == len(flows), told
        assert left["flows"]["purged"] == len(flows) - by_switch, told
        assert left["flows"]["exported"] == len(flows), told
        # A packet that comes when the zone has been emptied makes an entry, as of a connection that the peer began.
        assert {zone for zone, _ in went} <= {zone_here}, told
        late = list(went.values())
        by_agent = late.count([("made", PACKETS), ("ended", PYTHON)])
        assert by_agent + late.count([("made", PACKETS), ("ended", SWITCHD)]) == len(late), told
        assert left["flows"]["late"] == by_agent, told
        # A flow that changes while memory is copied is put in again, and for that the agent ends what it had put in.
        assert set(came) == {(zone_there, name) for name in own}, told
        again = [len(story) // 2 for story in came.values()]
        for story, times in zip(came.values(), again, strict=True):
            assert story == [("made", PYTHON), *[("ended", PYTHON), ("made", PYTHON)] * times], told
        assert number != CHANGES_IN or all(again), told
        assert arrived["flows"]["imported"] == len(flows), told
        assert arrived["flows"]["verified"] == len(flows) + sum(again), told
        assert arrived["milliseconds"]["resumed to scope known"] < 0, told
        for host in lab.hosts.values():
            for each in neighbours:
                assert entries(host, each) == standing[host.name, each.name]
                assert not events[host.name].new_of(each)
        stalls = " ".join(f"{growths_after(flow, record)[0] - record.paused_at:.1f}" for flow in flows)
        record_property(
            f"move {number + 1}",
            f"{here} > {there}: stalls {stalls} s; removed by OVN {by_switch}, purged {left['flows']['purged']}, "
            f"late {left['flows']['late']}; put in again {sum(again)}",
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
def test_addresses_that_ovn_has_dropped_from_its_flows_are_known_before_the_guest_runs_by_the_southbound_database(
    lab: OvnLab, agents: Agents
) -> None:
    guest = lab.add_guest("unsaid", "a")
    flows = downloads(lab, guest)

    def tell(host: Host, phase: str, guest: Guest) -> None:
        if phase == "started":
            lab.hosts[host.name].compute_anew(guest)
        agents.tell(host, phase, guest)

    for number, (here, there) in enumerate((("a", "b"), ("b", "a")), 1):
        record = lab.migrate(guest, here, there, tell, copy_seconds=2)
        assert record.errors == []
        for flow in flows:
            grows(flow)
        _, arrived = agents.reports(guest, record, number)
        assert arrived["flows"]["imported"] == len(flows), f"{arrived}"
        is_late = arrived["milliseconds"]["resumed to scope known"] > 0
        assert is_late == (there == "b"), f"{arrived}"
    for flow in flows:
        flow.stop()


FLOATING, BEYOND = "198.51.100.7", "198.51.100.9"


@pytest.fixture(scope="module")
def router(lab: OvnLab) -> Iterator[tuple[OvnGuest, Namespace]]:
    """A guest with a distributed floating IP, and a place beyond the router that translates it on the guest's host."""
    guest, home = lab.add_guest("floats", "a"), lab.hosts["a"]
    lab.nbctl("lr-add", "neutron-r", "--", "ls-add", "beyond")
    for switch, port, mac, network in (
        (SWITCH, "in", "02:92:00:00:03:01", "10.92.0.1/24"),
        ("beyond", "out", "02:92:00:00:03:02", "198.51.100.1/24"),
    ):
        lab.nbctl("lrp-add", "neutron-r", f"lrp-{port}", mac, network)
        lab.nbctl("lsp-add", switch, port, "--", "lsp-set-type", port, "router")
        lab.nbctl("lsp-set-addresses", port, "router", "--", "lsp-set-options", port, f"router-port=lrp-{port}")
    lab.nbctl("lrp-set-gateway-chassis", "lrp-out", "elsewhere", "1")
    nat = ("dnat_and_snat", FLOATING, guest.addresses[0], guest.port.id, "02:92:00:00:03:07")
    lab.nbctl("lr-nat-add", "neutron-r", *nat)
    mac = "02:92:00:00:03:09"
    port = Port("beyond", -1, "tap-beyond", mac, (BEYOND,), Rules())
    lab.nbctl("lsp-add", "beyond", port.id, "--", "lsp-set-addresses", port.id, f"{mac} {BEYOND}")
    beyond = Namespace(f"{lab.prefix}beyond")
    try:
        home.plug(port, "vm-beyond")
        home.namespace.ip(f"link set vm-beyond netns {beyond.name} name eth0")
        beyond.ip(f"address add {BEYOND}/24 dev eth0", "link set eth0 up")
        guest.namespace.ip(f"route add {BEYOND}/32 via 10.92.0.1")
        wait_until(lambda: home.is_installed(port.tap), "OVN to install it", 60, poll_seconds=0.1)
        yield guest, beyond
    finally:
        home.unplug(port.tap)
        beyond.close()
        lab.nbctl("lr-del", "neutron-r", "--", "ls-del", "beyond", "--", "lsp-del", "in")


@pytest.mark.parametrize("begun_by", ["guest", "beyond"])
def test_connection_through_a_distributed_floating_ip(
    lab: OvnLab, router: tuple[OvnGuest, Namespace], begun_by: str
) -> None:
    """Of the router's entry alone. Where the kernel picks up connections in their midst OVN makes it what it was."""
    guest, beyond = router
    home = lab.hosts["a"]
    finder, driver = OvnScopes(Integration(home.chassis.connection, "br-int")), LinuxConntrackDriver()
    finder.learn(guest.uuid, (GuestPort(guest.tap, interface_id=guest.port.id),))
    wait_until(lambda: len(finder.find(guest.uuid)) == 2, "the router's scope", 60, poll_seconds=0.5)
    scope = replace(finder.find(guest.uuid)[1], namespace=home.netns_path)
    with ExitStack() as stack:
        ends = {"guest": guest.namespace, "beyond": beyond}
        with ends["beyond" if begun_by == "guest" else "guest"].inside():
            listener = stack.enter_context(socket.create_server(("0.0.0.0", 80)))
        with ends[begun_by].inside():
            begun = stack.enter_context(socket.socket())
        if begun_by == "beyond":
            lab.nbctl("acl-add", SECURED, "to-lport", "1002", f"outport == @{SECURED} && ip4", "allow-related")
            stack.callback(lab.nbctl, "acl-del", SECURED, "to-lport", "1002", f"outport == @{SECURED} && ip4")
        begun.settimeout(30)
        begun.connect((BEYOND if begun_by == "guest" else FLOATING, 80))
        taken = stack.enter_context(listener.accept()[0])
        inside, outside = (begun, taken) if begun_by == "guest" else (taken, begun)

        def arrives() -> bool:
            inside.settimeout(3)
            outside.send(b"piece")
            with contextlib.suppress(TimeoutError):
                return bool(inside.recv(100))
            return False

        assert arrives()
        parts = [part for part in driver.export(scope) if isinstance(part, Batch) and "tcp" in part.template.name]
        assert {part.template.name for part in parts} >= {"tcp-nat-ipv4"}
        for tcp_loose, is_carried in ((0, True), (1, False)):
            home.namespace.sysctl("nf_conntrack_tcp_loose", tcp_loose)
            for part in parts:
                assert (driver.remove(scope, part.identities)["outcome"] == Outcome.REMOVED).all()
            if is_carried:
                assert not arrives(), "a connection that the router does not know"
                for part in parts:
                    assert (driver.insert(scope, part)["outcome"] == Outcome.IMPORTED).all()
                inside.settimeout(60)  # what was lost comes again, after a while
                assert inside.recv(100)
            assert arrives()
            parts = [part for part in driver.export(scope) if isinstance(part, Batch) and "tcp" in part.template.name]
    driver.close()
    finder.close()
