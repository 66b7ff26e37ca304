"""Agents are killed at each step that they take while real libvirt moves a guest: its connection lives all the same."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from lab import mortal
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import DeadlinePassed
from lab.kept_agents import MORTAL
from lab.libvirt.agents import HostAgent, Sami
from lab.libvirt.guest import Guest
from lab.libvirt.lab import LibvirtLab
from lab.traffic import Traffic
from sami_plugin.hooks import domain_xml
from tests import kills
from tests.libvirt import sequences
from tests.libvirt.sequences import Case, downloading

pytestmark = [pytest.mark.usefixtures("libvirt_here"), pytest.mark.timeout(1800)]

VETOED, UNHEEDED = "our own veto", "our own veto, which the hook does not heed"
SEQUENCES = {
    **sequences.MOVING,
    **sequences.LEFT_PAUSED,
    **sequences.STAYING,
    "source's libvirtd ends while memory is copied": sequences.source_libvirtd_ends,
    "the broker is away at the cut-over": partial(sequences.broker_away, has_all=False),
    VETOED: partial(sequences.refused_by_us, is_heeded=True),
    UNHEEDED: partial(sequences.refused_by_us, is_heeded=False),
}
CHOSEN = (
    "plain",
    "by events alone",
    "post-copy",
    "another hook refuses started",
    "abort while memory is copied",
    "source's libvirtd is killed",
    VETOED,
)
"""Without --every-step."""
ROLES = ("source", "destination")
STEPS = {"source": (1, 4, 7, 10), "destination": (0, 3, 6, 9)}
STEPS_BEFORE_AN_END = {"source": (1, 3, 5), "destination": (0, 2, 4)}
"""Of which each sequence has one in turn, of one host; --every-step tries all of both."""


@dataclass(frozen=True)
class Mortals:
    """Agents that may die, and one guest that goes through everything with one connection."""

    lab: LibvirtLab
    sami: Sami
    guest: Guest
    flow: Traffic


@pytest.fixture(scope="module")
def mortals(
    lab: LibvirtLab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Mortals]:
    """By the guest's policy: a veto is also for a source of which nothing is heard, as while its agent is away."""
    guest, flow = downloading(lab, "mortal", "a")
    with (
        Broker(tmp_path_factory.mktemp("broker")) as broker,
        Sami(
            lab,
            broker,
            program=MORTAL,
            policy={"guests": f"{guest.uuid}:{request.param}"},
            arrival_limit=20,
            watch_seconds=0.2,
        ) as sami,
    ):
        yield Mortals(lab, sami, guest, flow)
        lab.remove_guest(guest)
    for agent in sami.agents.values():  # the next ones of this lab begin with nothing
        shutil.rmtree(agent.configuration.parent)


@contextmanager
def dying(agent: HostAgent, step: int, deaths: list[bool]) -> Iterator[None]:
    """The agent dies before this step, and is started anew at once."""
    folder = agent.configuration.parent
    mortal.arm(folder, step)
    has_ended = threading.Event()

    def keep() -> None:
        while not has_ended.wait(0.02):
            if agent.has_died():
                agent.stop()
                agent.start()
                return

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
        deaths.append(not mortal.disarm(folder))
        if deaths[-1]:
            wait_until(lambda: not keeper.is_alive(), f"the agent of {agent.name} to be started anew", 30)
    finally:
        mortal.disarm(folder)
        has_ended.set()
        keeper.join()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = SEQUENCES if metafunc.config.getoption("--every-step") else CHOSEN
    vetoes = VETOED, UNHEEDED
    cases = [pytest.param("veto" if name in vetoes else "proceed", name, id=name) for name in names]
    metafunc.parametrize(("mortals", "name"), cases, indirect=["mortals"], scope="module")


def test_connection_lives_whichever_agent_dies(mortals: Mortals, name: str, pytestconfig: pytest.Config) -> None:
    number = list(SEQUENCES).index(name)
    for role in ROLES if pytestconfig.getoption("--every-step") else (ROLES[number % 2],):
        deaths: list[bool] = []
        steps = (STEPS_BEFORE_AN_END if name in (*sequences.STAYING, VETOED) else STEPS)[role]
        chosen = steps[number // 2 % len(steps)]
        for step in kills.steps(pytestconfig, (chosen,), deaths):
            case = Case(mortals.lab, mortals.sami, mortals.guest, mortals.flow)
            wait_until(lambda case=case: is_marked(case), "the guest to be marked by its host", 30, poll_seconds=0.1)
            victim = case.source if role == "source" else case.destination
            with dying(case.sami.agents[victim.name], step, deaths):
                SEQUENCES[name](case)
            settles(case, f"{role} dies at step {step}")
        assert any(deaths)


def is_marked(case: Case) -> bool:
    """Whether the guest's description says where it is, as a destination needs to know that is told by nobody else."""
    origin = domain_xml.origin_of(case.source.virsh("dumpxml", case.guest.name))
    return origin is not None and origin.host == case.source.name


def settles(case: Case, what: str) -> None:
    try:
        _settles(case)
    except DeadlinePassed as error:
        raise AssertionError(f"{what}: {error}; the agents said:\n{case.sami.words()}") from error


def _settles(case: Case) -> None:
    """Asserts that the connection goes on, and that its entry is where the guest is and nowhere else."""
    for host in case.lab.hosts.values():
        if case.lab.state(case.guest, host.name).startswith("paused"):
            host.virsh("resume", case.guest.name)
    here = case.lab.host_of(case.guest.name)
    (there,) = (host for host in case.lab.hosts.values() if host is not here)
    # A peer that got no answer while the agent was away tries again after as long as that was once more.
    wait_until(case.goes_on, "the connection to go on", 40)
    wait_until(lambda: case.entries(here) == 1, "the entry where the guest is", 15)
    wait_until(lambda: case.entries(there) == 0, "the entry to be gone", 40)
    for agent in case.sami.agents.values():
        wait_until(
            lambda agent=agent: all(row["ended_at"] for row in agent.sessions(case.guest.uuid)),
            "the sessions to end",
            40,
        )
