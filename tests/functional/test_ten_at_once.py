"""Ten guests move between three hosts at a time, eight of them to where half of their flows have a place.

Real agents, each a process of its own, over a real RabbitMQ; real kernels and flows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from lab import isolation, judge, traffic
from lab.agents import AgentProcess, file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.migration import Record
from lab.traffic import Traffic
from lab.verdict import has_survived

WAYS = {
    **dict.fromkeys(("g0", "g1", "g2", "g3"), "ac"),
    **dict.fromkeys(("g4", "g5", "g6", "g7"), "bc"),
    **dict.fromkeys(("g8", "g9"), "ab"),
}
PLACES = 12
FLOWS = 3
"""Of each guest: one that lives only where its entry is, and two that are quiet."""
RATE, WATCHED_SECONDS = 20_000, 4.0


class Ten:
    """The agents of the hosts, the guests, and their flows."""

    def __init__(self, lab: Lab, agents: dict[str, AgentProcess]) -> None:
        self.lab = lab
        self.agents = agents
        self.guests = {name: lab.add_guest(name, way[0]) for name, way in WAYS.items()}
        with ThreadPoolExecutor() as pool:
            begun = pool.map(lambda guest: traffic.download(lab, guest, rate=RATE), self.guests.values())
            self.downloads: dict[str, Traffic] = dict(zip(self.guests, begun, strict=True))
        for name, guest in self.guests.items():
            host = lab.hosts[WAYS[name][0]]
            for number in range(FLOWS - 1):
                traffic.quiet(guest, host, number)
            guest.close_egress()  # else what it says itself begins its download anew

    def flows(self, host: str, guest: Guest) -> set[judge.Flow]:
        """What the kernel there knows of the guest, in its own zone."""
        return set(judge.table(self.lab.hosts[host], guest, self.lab.folder / f"t-{host}-{guest.name}").entries)

    def has_got(self, name: str, since: float) -> int:
        """How many bytes of its download the guest has received since then."""
        samples = self.downloads[name].samples()
        return samples[-1].total - max(sample.total for sample in samples if sample.time <= since)

    def of_everybody(self, host: str) -> int:
        """How many entries the kernel there has in all."""
        return sum(len(self.lab.hosts[host].run(["conntrack", "-L", "-f", one]).splitlines()) for one in judge.FAMILIES)


@pytest.fixture
def ten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ten]:
    if not isolation.is_inside():
        pytest.fail("this test makes network namespaces; run it in a world of lab.isolation", pytrace=False)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        broker = stack.enter_context(Broker(tmp_path_factory.mktemp("broker")))
        lab = stack.enter_context(Lab(hosts=("a", "b", "c")))
        agents = dict[str, AgentProcess]()
        for name, host in lab.hosts.items():
            options = file_and_broker(host.scope_file, broker.url)
            options["agent"] |= {"capacity": PLACES} if name == "c" else {}
            options["migration"] = {"headroom_percent": 0, "watch_seconds": 0.1}
            agents[name] = AgentProcess(lab.folder, name, options)
            stack.callback(agents[name].stop)
        list(pool.map(AgentProcess.start, agents.values()))
        yield Ten(lab, agents)


def test_each_guest_has_its_own_flows_and_no_place_is_promised_twice(ten: Ten) -> None:
    before = {name: ten.flows(way[0], ten.guests[name]) for name, way in WAYS.items()}
    assert {len(flows) for flows in before.values()} == {FLOWS}
    together = threading.Barrier(len(WAYS))

    def tell(host: Host, phase: str, guest: Guest) -> None:
        if phase == "prepare":
            together.wait(60)
        ten.agents[host.name].tell_of(phase, guest)

    def move(name: str) -> Record:
        return ten.lab.migrate(ten.guests[name], *WAYS[name], tell, copy_seconds=1.0)

    with ThreadPoolExecutor(len(WAYS)) as pool:
        records = dict(zip(WAYS, pool.map(move, WAYS), strict=True))
    assert {(record.outcome, len(record.errors)) for record in records.values()} == {("moved", 0)}

    promised = 0
    for name, (source, destination) in WAYS.items():
        guest = ten.guests[name]
        for host in (source, destination):
            wait_until(
                lambda h=host, g=guest: ten.agents[h].ended(g.uuid) == 1, f"{name}'s session on {host} to end", 30
            )
        there = ten.flows(destination, guest)
        assert there <= before[name], "another guest's flow, or one that nobody had"
        assert ten.flows(source, guest) == set()
        left, came = (ten.agents[host].reports(guest.uuid)[0] for host in (source, destination))
        assert (left["outcome"], came["outcome"]) == ("moved", "moved")
        carried = {"exported": left["flows"]["exported"], "imported": came["flows"]["imported"]}
        assert {*carried.values(), came["verdict"]["places"]} == {len(there)}, (carried, came)
        named = [flow for told in left["named"].values() for flow in told["flows"]]
        assert len(named) == FLOWS - len(there)
        if destination == "c":
            promised += len(there)
        else:
            assert len(there) == FLOWS
        download, at = ten.downloads[name], records[name].cut_over_at
        if any(flow.protocol == "tcp" for flow in there):
            # How soon is shown where fewer move: ten at once, and what else the machine does, make their pauses long.
            wait_until(lambda n=name, t=at: ten.has_got(n, t) > RATE * WATCHED_SECONDS, f"{name} to go on", 60)
        else:
            wait_until(lambda d=download, t=at: d.samples()[-1].time > t + WATCHED_SECONDS, f"{name} to be watched", 10)
            assert not has_survived(download.samples(), at, WATCHED_SECONDS), name
    assert promised == ten.of_everybody("c") == PLACES
