"""Agents are killed at writes of their journals while real libvirt moves a guest: its connection lives all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import mortal
from lab.broker import Broker
from lab.deadline import wait_until
from lab.kept_agents import MORTAL
from lab.libvirt.agents import HostAgent, Sami
from lab.libvirt.lab import LibvirtLab
from tests.libvirt.test_sami import SLOW_MIB, Case, downloading

pytestmark = [pytest.mark.usefixtures("libvirt_here"), pytest.mark.timeout(600)]

SOURCE_WRITES = (6, 1, 12)
DESTINATION_WRITES = (7, 1, 11)
"""At the beginning, while memory is copied, about the pause, and after it; tests/functional/test_kill.py tries each."""


@pytest.fixture(scope="module")
def case_of(lab: LibvirtLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[object]]:
    with (
        Broker(tmp_path_factory.mktemp("broker")) as broker,
        Sami(lab, broker, program=MORTAL, arrival_limit=20, watch_seconds=0.2) as sami,
    ):
        guest, flow = downloading(lab, "mortal", "a")
        yield [lab, sami, guest, flow]
        lab.remove_guest(guest)


@contextmanager
def dying(agent: HostAgent, write: int) -> Iterator[None]:
    """The agent dies at this write of its journal, and is started anew at once."""
    folder = agent.configuration.parent
    mortal.arm(folder, write, ("after", "before")[write % 2])
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
        wait_until(lambda: not keeper.is_alive(), f"the agent of {agent.name} to die at write {write}", 30)
    finally:
        mortal.disarm(folder)
        has_ended.set()
        keeper.join()


@pytest.mark.parametrize("aborts", [False, True], ids=["success", "abort"])
@pytest.mark.parametrize("role", ["source", "destination"])
def test_guest_s_connection_lives_whichever_agent_dies(case_of: list[object], role: str, aborts: bool) -> None:
    writes = SOURCE_WRITES if role == "source" else DESTINATION_WRITES
    for write in writes[:1] if aborts else writes:
        case = Case(*case_of)  # type: ignore[arg-type]
        victim = case.source if role == "source" else case.destination
        with dying(case.sami.agents[victim.name], write):
            migration = case.start(bandwidth=SLOW_MIB if aborts else 2 * SLOW_MIB)
            if aborts:
                migration.wait_until_copying()
                migration.abort()
            assert migration.wait().is_ok is not aborts
        assert case.goes_on(), f"write {write}: {case.sami.words()}"
        on, off = (case.source, case.destination) if aborts else (case.destination, case.source)
        wait_until(lambda case=case, on=on: case.entries(on) == 1, f"write {write}: the entry where the guest is", 15)
        wait_until(
            lambda case=case, off=off: case.entries(off) == 0,
            f"write {write}: the entry to be gone; they said:\n{case.sami.words()}",
            40,
        )
        for agent in case.sami.agents.values():
            wait_until(
                lambda agent=agent, case=case: all(row["ended_at"] for row in agent.sessions(case.guest.uuid)),
                f"write {write}: the sessions to end; they said:\n{case.sami.words()}",
                40,
            )
