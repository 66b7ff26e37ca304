"""Agents are killed at each write of their journals, on real kernels: connections live, each flow is in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import judge, traffic
from lab.agents import file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import DeadlinePassed
from lab.guest import Guest
from lab.kept_agents import KeptAgents
from lab.lab import Lab
from lab.migration import Abort
from lab.traffic import Traffic

pytestmark = [pytest.mark.usefixtures("world"), pytest.mark.timeout(600)]

LIMITS = {"arrival_limit": 20.0, "watch_seconds": 0.2, "open_seconds": 10.0}
MOST_WRITES = 60
"""More than any session writes."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


class Moves:
    """Guests that are moved to and fro, with a connection each on which only the peer speaks."""

    def __init__(self, lab: Lab, agents: KeptAgents) -> None:
        self.lab = lab
        self.agents = agents
        self.flows: dict[str, Traffic] = {}
        self.sides = ("a", "b")

    def add(self, name: str) -> None:
        guest = self.lab.add_guest(name, "a")
        self.flows[name] = traffic.download(self.lab, guest)
        self.goes_on(name)

    def goes_on(self, name: str) -> None:
        flow = self.flows[name]
        start = flow.samples()[-1].total if flow.samples() else 0
        wait_until(lambda: flow.samples() and flow.samples()[-1].total >= start + 50_000, f"{name} to go on", 15.0)

    def move(self, name: str, *, aborts: bool = False) -> None:
        """One migration, after which the connection goes on and the flow is where the guest is, and nowhere else."""
        guest = self.lab.guests[name]
        assert guest.host is not None
        here = guest.host.name
        there = self.sides[1 - self.sides.index(here)]
        at = {"suspended": Abort()} if aborts else {}
        record = self.lab.migrate(guest, here, there, self.agents.tell, copy_seconds=0.3, at=at)
        assert record.outcome == ("aborted" if aborts else "moved")
        self.goes_on(name)
        on, off = (here, there) if aborts else (there, here)
        wait_until(lambda: len(self.left(on, guest)) == 1, f"the flow of {name} on {on}", 15.0)
        wait_until(lambda: not self.left(off, guest), f"the flow of {name} to be gone from {off}", 40.0)
        for host in self.sides:
            agent = self.agents.agents[host]
            wait_until(lambda agent=agent: all(row["ended_at"] for row in agent.sessions(guest.uuid)), "all to end", 40)
        wait_until(self.agents.are_well, "an agent that died to be started anew", 20.0)

    def left(self, host: str, guest: Guest) -> set[judge.Flow]:
        return judge.table(self.lab.hosts[host], guest, self.lab.folder / f"left-{host}").of(guest.addresses)


@contextmanager
def moves(broker: Broker) -> Iterator[Moves]:
    with Lab() as lab:
        options = {
            name: {**file_and_broker(host.scope_file, broker.url), "migration": LIMITS}
            for name, host in lab.hosts.items()
        }
        with KeptAgents(lab, options) as agents:
            made = Moves(lab, agents)
            made.add("g")
            yield made


@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("aborts", [False, True], ids=["success", "abort"])
def test_download_lives_whichever_write_an_agent_dies_at(broker: Broker, role: str, aborts: bool) -> None:
    with moves(broker) as made:
        guest = made.lab.guests["g"]
        for write in range(MOST_WRITES):
            assert guest.host is not None
            here = guest.host.name
            victim = here if role == "source" else made.sides[1 - made.sides.index(here)]
            made.agents.arm(victim, write, ("after", "before")[write % 2])
            try:
                made.move("g", aborts=aborts)
            except DeadlinePassed as error:
                logs = "\n----\n".join(agent.log.read_text()[-4000:] for agent in made.agents.agents.values())
                raise AssertionError(f"write {write}, {victim} dies: {error}\n{logs}") from error
            if made.agents.disarm(victim):
                break
        assert made.agents.deaths == write > 6
