"""Guests with six flows come to hosts that have four places, and each policy decides as it says.

Real agents, each a process of its own, over a real RabbitMQ; real kernels, flows and commands. One lab serves all
tests: a guest that has to stay is asked for again by the next one, the flows of one that came are cleared away.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from lab import isolation, judge, traffic
from lab.agents import AgentProcess, file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import CommandFailed
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.migration import Record
from lab.traffic import Traffic
from lab.verdict import has_survived
from sami_plugin.errors import Veto
from sami_plugin.journal.journal import Journal
from sami_plugin.model.results import MEND_NO_PLACE, WORDS, Reason

pytestmark = pytest.mark.usefixtures("world")

SAMI = (sys.executable, "-m", "sami_plugin.cmd.cli")
WATCHED_SECONDS = 4.0
NO_PLACE = WORDS[Reason.NO_PLACE]
NOT_SENT = f"not exported: there was no place for it at the destination; {MEND_NO_PLACE}"

Begin = Callable[[Lab, Guest], Traffic]
MATTER_MOST: Mapping[str, Begin] = {
    "tcp": lambda lab, guest: traffic.download(lab, guest, rate=20_000),
    "tcp over IPv6": lambda lab, guest: traffic.download(lab, guest, family=6, rate=20_000),
    "udp": lambda lab, guest: traffic.udp_stream(lab, guest, packets=10),
    "udp over IPv6": lambda lab, guest: traffic.udp_stream(lab, guest, family=6, packets=10),
}
"""Seen both ways for long: the kernel calls them assured."""
MATTER_LEAST: Mapping[str, Begin] = {
    "icmp": lambda lab, guest: traffic.icmp_echo(lab, guest, packets=10),
    "icmpv6": lambda lab, guest: traffic.icmp_echo(lab, guest, family=6, packets=10),
}
SIX = {**MATTER_MOST, **MATTER_LEAST}
THREE = {name: SIX[name] for name in ("tcp", "udp", "icmpv6")}


@dataclass(frozen=True)
class Case:
    guest: str
    to: str
    verdict: str = "proceed"
    """What the policy says to six flows and four places."""
    is_moved: bool = True
    operator: str = ""
    """What the operator says."""


# By guest, those that it outlives first.
CASES = {
    "proceed": Case("proceed", "b"),
    "partial, too few": Case("partial", "c", "veto", is_moved=False),
    "partial, enough": Case("partial", "b"),
    "veto": Case("veto", "b", "veto", is_moved=False),
    "ask, refused": Case("ask", "b", "ask", is_moved=False, operator="refuse"),
    "ask, silence is a veto": Case("ask", "c", "ask", is_moved=False),
    "ask, approved": Case("ask", "b", "ask", operator="approve"),
    "ask, silence is none": Case("ask-too", "d", "ask"),
}
GUESTS = {"proceed": "proceed", "partial": "partial", "veto": "veto", "ask": "ask", "ask-too": "ask"}
"""And the policies that are theirs on each host."""
PAIR = "ad"
"""Where the two guests are that come to b at a time."""
POLICIES: Mapping[str, Mapping[str, object]] = {
    "a": {},
    "b": {"partial_percent": 60, "ask_seconds": 60},
    "c": {"partial_percent": 70, "ask_seconds": 0.5, "silence_means": "veto"},
    "d": {"ask_seconds": 0.5, "silence_means": "proceed"},
}
"""What differs from host to host. Four of six are 67 percent."""
HEADROOM_PERCENT = 20
CAPACITY = {"b": 10, "c": 10, "d": 14}
"""Four places beside the resident's four entries and, on d, the three of the guest that will leave."""


class Cloud:
    """Four hosts with agents, and on three of them a resident whose entries nobody may touch."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.guests = {name: lab.add_guest(name, "a") for name in GUESTS}
        self.pair = {host: lab.add_guest(f"pair-{host}", host) for host in PAIR}
        self.residents = {host: lab.add_guest(f"own-{host}", host) for host in CAPACITY}
        self.agents: dict[str, AgentProcess] = {}
        for host, guest in self.residents.items():
            for number in range(4):
                traffic.quiet(guest, lab.hosts[host], number)
        wanted = [*((guest, SIX) for guest in self.guests.values()), *((guest, THREE) for guest in self.pair.values())]
        with ThreadPoolExecutor(4) as pool:  # each waits for its processes most of the time
            begun = pool.map(lambda one: {name: begin(lab, one[0]) for name, begin in one[1].items()}, wanted)
            self.flows = {guest.uuid: flows for (guest, _), flows in zip(wanted, begun, strict=True)}
        for host, most in (("a", 4 * len(GUESTS) + 2), ("d", 4 + 2)):
            wait_until(lambda h=host, m=most: self._assured(h) == m, f"{most} flows on {host} to be assured", 20)
        for guest in lab.guests.values():
            guest.close_egress()  # else what the guest says itself begins its flows anew

    def _assured(self, host: str) -> int:
        lines = [self.lab.hosts[host].run(["conntrack", "-L", "-f", family]) for family in judge.FAMILIES]
        return "".join(lines).count("[ASSURED]")

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        self.agents[host.name].tell_of(phase, guest)

    def entries(self, host: str, guest: Guest) -> dict[judge.Flow, int | None]:
        """What the kernel there knows of the guest, and by which id."""
        table = judge.table(self.lab.hosts[host], guest, self.lab.folder / f"table-{host}-{guest.name}")
        return {flow: entry.id for flow, entry in table.entries.items()}

    def of_residents(self) -> dict[str, dict[judge.Flow, int | None]]:
        return {host: self.entries(host, guest) for host, guest in self.residents.items()}

    def lives(self, guest: Guest, record: Record) -> set[str]:
        """Which of the guest's streams have gone on where it came to."""
        until = record.cut_over_at + WATCHED_SECONDS
        flows = self.flows[guest.uuid]
        for name, flow in flows.items():
            wait_until(lambda f=flow: f.samples()[-1].time > until, f"{name} to be watched", WATCHED_SECONDS + 5)
        return {
            name for name, flow in flows.items() if has_survived(flow.samples(), record.cut_over_at, WATCHED_SECONDS)
        }

    def goes_on(self, guest: Guest) -> None:
        for name, flow in self.flows[guest.uuid].items():
            before = flow.samples()[-1].total
            wait_until(lambda f=flow, b=before: f.samples()[-1].total > b, f"{name} to go on", 5)

    def reports(self, guest: Guest, *hosts: str) -> list[dict[tuple[str, str], Any]]:
        """What `sami report` says on each of these hosts, once the session has ended there."""
        for host in hosts:
            wait_until(lambda h=host: self._has_ended(h, guest), f"the session on {host} to end", 30, poll_seconds=0.05)
        with ThreadPoolExecutor() as pool:
            said = list(
                pool.map(lambda host: sami("report", guest.uuid, "--journal", self.agents[host].journal), hosts)
            )
        return [{(row["Part"], row["What"]): (row["Value"], row["Detail"]) for row in rows} for _, rows in said]

    def _has_ended(self, host: str, guest: Guest) -> bool:
        sessions = self.agents[host].sessions(guest.uuid)
        return bool(sessions and sessions[0]["report"])

    def clear(self, guest: Guest) -> None:
        """Ends the guest's flows, and has the kernels forget them."""
        for flow in self.flows[guest.uuid].values():
            flow.stop()
        for host in self.lab.hosts.values():
            for family in judge.FAMILIES:
                with suppress(CommandFailed):  # where there is none
                    host.run(["conntrack", "-D", "-f", family, "-w", str(host.zone(guest))])


def sami(*arguments: object, code: int = 0) -> tuple[str, Any]:
    """What the command writes on stderr, and on stdout as JSON."""
    command = [*SAMI, *map(str, arguments), *([] if arguments[0] == "session" else ["-f", "json"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stderr, json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    if not isolation.is_inside():
        pytest.fail("this test makes network namespaces; run it in a world of lab.isolation", pytrace=False)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        broker = Broker(tmp_path_factory.mktemp("broker"))
        stack.callback(broker.stop)
        starting = pool.submit(broker.start)
        lab = stack.enter_context(Lab(hosts=tuple(POLICIES)))
        made = Cloud(lab)
        starting.result()
        guests = ",".join(f"{guest.uuid}:{GUESTS[name]}" for name, guest in made.guests.items())
        for name, host in lab.hosts.items():
            options = file_and_broker(host.scope_file, broker.url)
            options["agent"] |= {"capacity": CAPACITY[name]} if name in CAPACITY else {}
            options["migration"] = {"headroom_percent": HEADROOM_PERCENT, "watch_seconds": 0.1, "verdict_seconds": 20}
            options["policy"] = {"guests": guests, **POLICIES[name]}
            made.agents[name] = AgentProcess(lab.folder, name, options)
            stack.callback(made.agents[name].stop)
        list(pool.map(AgentProcess.start, made.agents.values()))
        yield made
        list(pool.map(AgentProcess.stop, made.agents.values()))


def check_of(cloud: Cloud, guest: Guest, to: str, *, code: int) -> dict[str, Any]:
    _, found = sami("check", guest.uuid, "--to", to, "--config-file", cloud.agents["a"].configuration, code=code)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ask, refused", "ask, silence is none")])
def test_check_says_beforehand_what_the_policy_will_say_and_changes_nothing(cloud: Cloud, name: str) -> None:
    case = CASES[name]
    guest = cloud.guests[case.guest]
    before = cloud.entries("a", guest), cloud.of_residents()
    found = check_of(cloud, guest, case.to, code=0 if case.verdict == "proceed" else 1)
    assert (found["verdict"], found["flows"], found["carried"]) == (case.verdict, 6, 4)
    assert found["kinds"] == {f"{kind}-{family}": 1 for kind in ("tcp", "udp", "icmp") for family in judge.FAMILIES}
    assert found["losses"] == {NO_PLACE: 2}
    assert sorted(flow.split()[0] for flow in found["not_carried"]) == ["icmp", "icmpv6"]
    assert (cloud.entries("a", guest), cloud.of_residents()) == before
    assert cloud.entries(case.to, guest) == {}


@pytest.mark.parametrize("name", CASES)
def test_policy_has_the_guest_come_with_the_four_flows_that_matter_most_or_stay_with_all_six(
    cloud: Cloud, name: str
) -> None:
    case = CASES[name]
    guest = cloud.guests[case.guest]
    try:
        before, of_residents = cloud.entries("a", guest), cloud.of_residents()
        assert len(before) == 6
        assert {host: len(entries) for host, entries in of_residents.items()} == dict.fromkeys(CAPACITY, 4)
        with ThreadPoolExecutor(1) as pool:
            moving = pool.submit(cloud.lab.migrate, guest, "a", case.to, cloud.tell, copy_seconds=0.2)
            if case.operator:
                answer(cloud, guest, case)
            record = moving.result()
        source, destination = cloud.reports(guest, "a", case.to)
        words = f"4 of 6 flows have a place on {case.to}; 2 lost: {NO_PLACE}"
        assert ("remark", words) in destination
        if case.is_moved:
            assert (record.outcome, record.errors) == ("moved", [])
            assert cloud.lives(guest, record) == set(MATTER_MOST)
            is_most = {flow: not flow.protocol.startswith("icmp") for flow in before}
            assert set(cloud.entries(case.to, guest)) == {flow for flow, is_it in is_most.items() if is_it}
            assert cloud.entries("a", guest) == {}
            assert source["named", NOT_SENT][0] == 2
            assert sorted(flow.split()[0] for flow in source["named", NOT_SENT][1]) == ["icmp", "icmpv6"]
            assert (source["flows", "exported"][0], destination["flows", "imported"][0]) == (4, 4)
        else:
            assert record.outcome == "vetoed"
            ((host, phase, error),) = record.errors
            assert (host, phase, type(error)) == (case.to, "prepare", Veto)
            assert words in str(error)
            cloud.goes_on(guest)
            assert cloud.entries("a", guest) == before
            assert cloud.entries(case.to, guest) == {}
        outcome = "moved" if case.is_moved else "stayed"
        assert [report["session", "outcome"][0] for report in (source, destination)] == [outcome, outcome]
        assert cloud.of_residents() == of_residents
    finally:
        if case.is_moved:
            cloud.clear(guest)


def answer(cloud: Cloud, guest: Guest, case: Case) -> None:
    """The operator's word, once it is waited for; of another session nobody waits for one."""
    agent = cloud.agents[case.to]

    def asked() -> str:
        with closing(Journal(agent.journal, read_only=True)) as journal:
            session: str = next((row["session"] for row in journal.sessions() if row["guest"] == guest.uuid), "")
            is_asked = any(said["event"].startswith("verdict: ask") for said in journal.decisions(session))
        return session if is_asked else ""

    wait_until(asked, "the operator to be asked", 30, poll_seconds=0.05)
    where = ("--config-file", agent.configuration)
    said, _ = sami("session", case.operator, "ffffffff", *where, code=1)
    assert f"no session of that name waits for an answer here; those that wait: {asked()}" in said
    sami("session", case.operator, asked()[:8], *where)


def test_two_guests_from_two_hosts_are_not_promised_one_place_and_each_has_its_own_flows(cloud: Cloud) -> None:
    """Four places, and three flows each: one guest gets all three, and the other the one that matters most."""
    try:
        before = {host: cloud.entries(host, guest) for host, guest in cloud.pair.items()}
        assert [len(entries) for entries in before.values()] == [3, 3]
        of_residents = cloud.of_residents()
        together = threading.Barrier(2)

        def tell(host: Host, phase: str, guest: Guest) -> None:
            if phase == "prepare":
                together.wait(20)
            cloud.tell(host, phase, guest)

        with ThreadPoolExecutor(2) as pool:
            moves = {
                host: pool.submit(cloud.lab.migrate, guest, host, "b", tell, copy_seconds=0.2)
                for host, guest in cloud.pair.items()
            }
            records = {host: move.result() for host, move in moves.items()}
        assert [record.errors for record in records.values()] == [[], []]
        lives = {host: cloud.lives(guest, records[host]) for host, guest in cloud.pair.items()}
        assert sorted(lives.values(), key=len) == [{"tcp"}, set(THREE)]
        for host, guest in cloud.pair.items():
            there = set(cloud.entries("b", guest))
            assert there == {flow for flow in before[host] if len(lives[host]) == 3 or flow.protocol == "tcp"}
            assert cloud.entries(host, guest) == {}
            source, destination = cloud.reports(guest, host, "b")
            assert destination["flows", "imported"][0] == source["flows", "exported"][0] == len(there)
            assert source.get(("named", NOT_SENT), (0, []))[0] == 3 - len(there)
        assert cloud.of_residents() == of_residents
    finally:
        for guest in cloud.pair.values():
            cloud.clear(guest)
