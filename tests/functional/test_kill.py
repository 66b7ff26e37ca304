"""Agents are killed at each step that they take, on real kernels: connections live, each flow is in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from lab import addresses, judge, traffic
from lab.agents import file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import CommandFailed, DeadlinePassed
from lab.guest import Guest
from lab.host import Host
from lab.kept_agents import KeptAgents
from lab.lab import Lab
from lab.migration import Abort, Action, Crash, Delay
from lab.verdict import has_survived
from sami_plugin.model.migration import Phase
from tests import kills

pytestmark = [pytest.mark.usefixtures("world"), pytest.mark.timeout(1800)]

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "migration": {"arrival_limit": 20.0, "watch_seconds": 0.2, "open_seconds": 10.0},
}
WATCHED_SECONDS = 4.0
ESP = "50"


class AnotherHook(Exception):
    """The veto of a hook that is not ours."""


@dataclass(frozen=True)
class Case:
    """What happens to a guest on its way."""

    ends: frozenset[str]
    """The outcomes that there may be."""
    at: Mapping[str, Action] = field(default_factory=dict)
    is_port_early: bool = True
    refused_at: str = ""
    """The phase at which another hook at the destination refuses the guest."""
    is_vetoed: bool = False
    """The guest has a flow that is not carried, and its policy is a veto."""


MOVED, ABORTED, CRASHED, VETOED = (frozenset({one}) for one in ("moved", "aborted", "crashed", "vetoed"))
CASES = {
    "success": Case(MOVED),
    "success, the port comes late": Case(MOVED, is_port_early=False),
    "success, a long pause": Case(MOVED, {"moved": Delay(0.5)}),
    "abort while memory is copied": Case(ABORTED, {"copying": Abort()}),
    "abort in the pause": Case(ABORTED, {"suspended": Abort()}),
    "abort when all is sent": Case(ABORTED, {"moved": Abort()}),
    "destination dies in the pause": Case(CRASHED, {"suspended": Crash()}),
    "another hook refuses at the beginning": Case(VETOED, refused_at="prepare"),
    "another hook refuses at the start": Case(VETOED, refused_at="started"),
    # An agent that is dead when its hook asks holds nobody up.
    "our own veto": Case(VETOED | MOVED, is_vetoed=True),
}
CHOSEN = {"source": (4, 7, 10), "destination": (5, 8, 11)}
CHOSEN_BEFORE_AN_END = {"source": (1, 4), "destination": (2, 4)}
"""Each case has one of them in turn; --every-step tries all."""


class Moves:
    """A guest that is moved to and fro, with a connection on which only the peer speaks."""

    def __init__(self, lab: Lab, agents: KeptAgents, case: Case) -> None:
        self.lab = lab
        self.agents = agents
        self.case = case
        self.guest = lab.guests["g"]
        self.flow = traffic.download(lab, self.guest)
        self.goes_on()

    def goes_on(self) -> None:
        start = self.flow.samples()[-1].total if self.flow.samples() else 0
        # A peer that got no answer while the agent was away tries again after as long as that was once more.
        wait_until(
            lambda: self.flow.samples() and self.flow.samples()[-1].total >= start + 50_000, "the download to go on", 40
        )

    @property
    def here(self) -> str:
        assert self.guest.host is not None
        return self.guest.host.name

    @property
    def there(self) -> str:
        return {"a": "b", "b": "a"}[self.here]

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        self.agents.tell(host, phase, guest)
        if phase == self.case.refused_at:
            raise AnotherHook

    def move(self) -> None:
        """One migration, after which the connection goes on and its flow is where the guest is, and nowhere else."""
        here, there = self.here, self.there
        if self.case.is_vetoed:
            self.has_what_is_not_carried()
        record = self.lab.migrate(
            self.guest, here, there, self.tell, copy_seconds=0.3, at=self.case.at, is_port_early=self.case.is_port_early
        )
        assert record.outcome in self.case.ends
        if record.outcome == "crashed":  # its hypervisor is started anew, and is asked
            self.tell(self.lab.hosts[there], Phase.STOPPED.value, self.guest)
        self.goes_on()
        on, off = (there, here) if record.outcome == "moved" else (here, there)
        assert self.here == on
        wait_until(lambda: len(self.left(on)) == 1, f"the flow on {on}", 15)
        wait_until(lambda: not self.left(off), f"the flow to be gone from {off}", 40)
        for host in (on, off):
            agent = self.agents.agents[host]
            wait_until(
                lambda agent=agent: all(row["ended_at"] for row in agent.sessions(self.guest.uuid)), "all to end", 40
            )
        wait_until(self.agents.are_well, "an agent that died to be started anew", 20)

    def has_what_is_not_carried(self) -> None:
        host = self.lab.hosts[self.here]
        for command, options in (("-D", ()), ("-I", ("-t", "600", "-u", "SEEN_REPLY"))):
            with contextlib.suppress(CommandFailed):  # where there is none to delete
                ends = ["-s", self.guest.v4, "-d", addresses.OUTSIDE_V4]
                host.run(["conntrack", command, "-w", str(host.zone(self.guest)), *ends, "-p", ESP, *options])

    def left(self, host: str) -> set[judge.Flow]:
        """The download, if the kernel there knows it."""
        table = judge.table(self.lab.hosts[host], self.guest, self.lab.folder / f"left-{host}")
        return {flow for flow in table.of(self.guest.addresses) if flow.protocol == "tcp"}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@contextmanager
def moves(broker: Broker, case: Case) -> Iterator[Moves]:
    with Lab() as lab:
        lab.add_guest("g", "a")
        options: dict[str, dict[str, Mapping[str, object]]] = {}
        for name, host in lab.hosts.items():
            options[name] = {**OPTIONS, **file_and_broker(host.scope_file, broker.url)}
            if case.is_vetoed:
                options[name] |= {"policy": {"default": "veto"}}
        with KeptAgents(lab, options) as agents:
            yield Moves(lab, agents, case)


@pytest.mark.parametrize("name", CASES)
def test_connection_lives_whichever_step_an_agent_dies_at(
    broker: Broker, name: str, pytestconfig: pytest.Config
) -> None:
    with moves(broker, CASES[name]) as made:
        for role, choice in (CHOSEN if CASES[name].ends == MOVED else CHOSEN_BEFORE_AN_END).items():
            chosen = choice[list(CASES).index(name) % len(choice)]
            before, deaths = made.agents.deaths, list[bool]()
            for step in kills.steps(pytestconfig, (chosen,), deaths):
                victim = made.here if role == "source" else made.there
                made.agents.arm(victim, step)
                try:
                    made.move()
                except DeadlinePassed as error:
                    logs = "\n----\n".join(agent.log.read_text()[-4000:] for agent in made.agents.agents.values())
                    raise AssertionError(f"step {step}, {role} {victim} dies: {error}\n{logs}") from error
                deaths.append(not made.agents.disarm(victim))
            assert made.agents.deaths - before == sum(deaths) > 0


def test_without_agents_the_connection_dies(broker: Broker) -> None:
    with moves(broker, CASES["success"]) as made:
        record = made.lab.migrate(made.guest, "a", "b", copy_seconds=0.3)
        until = record.cut_over_at + WATCHED_SECONDS
        wait_until(lambda: made.flow.samples()[-1].time > until, "the time that is watched", WATCHED_SECONDS + 5)
        assert not has_survived(made.flow.samples(), record.cut_over_at, WATCHED_SECONDS)
