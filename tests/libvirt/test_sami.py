"""SAMI beside real libvirt: real agents, hooks and RabbitMQ, and guests that move, or do not.

Each guest holds a download that it began itself. No rule admits a packet of it, so it lives only where its entry is;
`test_without_sami_the_download_dies` shows that.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.agents import AGENT
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import LabError
from lab.libvirt import traffic, unit
from lab.libvirt.agents import Sami
from lab.libvirt.guest import Guest
from lab.libvirt.host import LibvirtHost
from lab.libvirt.lab import LibvirtLab
from lab.traffic import Traffic
from lab.verdict import has_survived
from tests.libvirt import sequences
from tests.libvirt.sequences import SLOW_MIB, WATCHED_SECONDS, Case, downloading

pytestmark = pytest.mark.usefixtures("libvirt_here")

NO_ARRIVAL_SECONDS = 3
NO_ANSWER_SECONDS = 8
CAP_NET_ADMIN = 12


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def sami(lab: LibvirtLab, broker: Broker) -> Iterator[Sami]:
    with Sami(lab, broker, arrival_limit=NO_ARRIVAL_SECONDS, open_seconds=NO_ANSWER_SECONDS) as running:
        yield running


@pytest.fixture(scope="module")
def movers() -> list[tuple[Guest, Traffic]]:
    return []


@pytest.fixture
def case(
    lab: LibvirtLab, sami: Sami, movers: list[tuple[Guest, Traffic]], request: pytest.FixtureRequest
) -> Iterator[Case]:
    """One guest goes through everything with one connection; what a test that failed leaves is of no more use."""
    if not movers:
        movers.append(downloading(lab, "mover", "a"))
    guest, flow = movers[-1]
    failed = request.session.testsfailed
    yield Case(lab, sami, guest, flow)
    if request.session.testsfailed > failed:
        lab.remove_guest(guest)
        movers.clear()


# --- The guest moves


def test_without_sami_the_download_dies(lab: LibvirtLab) -> None:
    guest, flow = downloading(lab, "bare", "a")
    migration = lab.start_migration(guest, "a", "b")
    assert migration.wait().is_ok
    arrived = migration.wait_for("RESUMED/MIGRATED", lab.hosts["b"]).time
    wait_until(lambda: flow.samples()[-1].time > arrived + WATCHED_SECONDS, "the time that is watched", 30)
    assert not has_survived(flow.samples(), arrived, WATCHED_SECONDS)
    lab.remove_guest(guest)


def test_plain_migration_there_and_back_at_once(case: Case) -> None:
    there = case.start()
    assert there.wait().is_ok
    back = case.lab.start_migration(case.guest, case.destination.name, case.source.name)
    assert back.wait().is_ok
    arrived = back.wait_for("RESUMED/MIGRATED", case.source).time
    assert case.goes_on(arrived), case.words()
    for host in (case.source, case.destination):
        agent = case.sami.agents[host.name]
        wait_until(lambda agent=agent: agent.ended(case.guest.uuid) >= 2, f"both sessions on {host.name} to end", 20)
        assert [report["outcome"] for report in agent.reports(case.guest.uuid)[:2]] == ["moved", "moved"]
    assert (case.entries(case.source), case.entries(case.destination)) == (1, 0)


@pytest.mark.parametrize("name", [name for name in sequences.MOVING if name != "plain"])
def test_guest_moves(case: Case, name: str) -> None:
    arrival = "RESUMED/POSTCOPY" if name == "post-copy" else "RESUMED/MIGRATED"
    case.moves(sequences.MOVING[name](case), arrival)


@pytest.mark.parametrize("name", sequences.LEFT_PAUSED)
def test_guest_that_is_left_paused_has_arrived(case: Case, name: str) -> None:
    sequences.LEFT_PAUSED[name](case)
    reports = case.report(case.source), case.report(case.destination)
    assert [report["outcome"] for report in reports] == ["moved", "moved"]
    assert (case.entries(case.source), case.entries(case.destination)) == (0, 1)
    case.destination.virsh("resume", case.guest.name)
    assert case.goes_on()


def test_guest_whose_source_libvirtd_ends_while_memory_is_copied(case: Case) -> None:
    migration = sequences.source_libvirtd_ends(case)
    arrived = migration.wait_for("RESUMED/MIGRATED", case.destination).time
    assert case.goes_on(arrived), case.words()
    case.report(case.source)
    assert (case.entries(case.source), case.entries(case.destination)) == (0, 1)


# --- The guest stays


@pytest.mark.parametrize("name", sequences.STAYING)
def test_guest_stays(case: Case, name: str) -> None:
    sequences.STAYING[name](case)
    case.stays()


# --- Something is missing


def test_broker_that_is_away_at_the_cut_over(case: Case) -> None:
    sequences.broker_away(case)
    report = case.report(case.source)  # either the destination was heard in time, or the guest had been gone too long
    assert report["outcome"] in ("moved", "purged without arrival")
    case.report(case.destination)
    assert (case.entries(case.source), case.entries(case.destination)) == (0, 1)


def test_agents_need_no_more_than_cap_net_admin(case: Case) -> None:
    with ExitStack() as stack:
        for agent in case.sami.agents.values():
            stack.enter_context(agent.behind("setpriv", "--bounding-set=-all,+net_admin", "--no-new-privs"))
            status = Path(f"/proc/{agent.pid}/status").read_text()
            (effective,) = re.findall(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
            assert int(effective, 16) == 1 << CAP_NET_ADMIN
        case.moves(case.start())


UNIT = Path(__file__).parents[2] / "etc/systemd/sami-agent.service"


def test_agents_work_under_the_unit_that_ships_with_all_that_it_forbids(case: Case) -> None:
    with ExitStack() as stack:
        for agent in case.sami.agents.values():
            words = [sys.executable, "-I", "-S", unit.__file__, str(UNIT), str(case.lab.folder)]
            stack.enter_context(agent.behind(*words))
        found = [read_status(path) for path in agents_of(case.sami)]
        assert len(found) == len(case.sami.agents)
        for status in found:
            assert int(status["CapEff"], 16) == 1 << CAP_NET_ADMIN
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        case.moves(case.start())


def agents_of(sami: Sami) -> list[Path]:
    """The folders in /proc of all agents, whoever started them."""
    configurations = {str(agent.configuration) for agent in sami.agents.values()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if tuple(words[: len(AGENT)]) == AGENT and configurations & set(words):
                found.append(folder)
    return found


def read_status(folder: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)


@contextlib.contextmanager
def without_agent(case: Case, host: LibvirtHost) -> Iterator[None]:
    agent = case.sami.agents[host.name]
    agent.stop()
    try:
        yield
    finally:
        agent.start()


def moves_as_without_us(case: Case, revive: Callable[[], object]) -> None:
    """The migration succeeds, the connection does not; what revives it is for the next test."""
    migration = case.start()
    assert migration.wait().is_ok
    arrived = migration.wait_for("RESUMED/MIGRATED", case.destination).time
    assert not case.goes_on(arrived)
    revive()


@pytest.fixture
def lonely(lab: LibvirtLab, sami: Sami) -> Iterator[Case]:
    """A guest of its own, since its connection is to die."""
    guest, flow = downloading(lab, "lonely", "a")
    yield Case(lab, sami, guest, flow)
    lab.remove_guest(guest)


def test_without_an_agent_at_the_destination_the_source_keeps_nothing_of_a_guest_that_left(lonely: Case) -> None:
    with without_agent(lonely, lonely.destination):
        moves_as_without_us(lonely, lambda: None)
        report = lonely.report(lonely.source)
        assert (report["outcome"], report["flows"]["purged"]) == ("purged without arrival", 1)
        assert lonely.entries(lonely.source) == 0


def test_without_an_agent_at_the_source_the_destination_says_what_is_missing(lonely: Case) -> None:
    with without_agent(lonely, lonely.source):
        moves_as_without_us(lonely, lambda: None)
        report = lonely.report(lonely.destination)
        assert report["outcome"] == "failed"
        assert "the source did not answer" in report["reason"]
        assert lonely.entries(lonely.destination) == 0


def test_without_any_agent_the_guest_moves_all_the_same(lonely: Case) -> None:
    with without_agent(lonely, lonely.source), without_agent(lonely, lonely.destination):
        moves_as_without_us(lonely, lambda: None)


def test_without_a_broker_the_guest_moves_and_both_hosts_say_what_was_lost(lonely: Case) -> None:
    for relay in lonely.sami.relays.values():
        relay.cut()
    try:
        moves_as_without_us(lonely, lambda: None)
        assert lonely.report(lonely.source)["outcome"] == "purged without arrival"
        assert lonely.entries(lonely.source) == 0
    finally:
        for relay in lonely.sami.relays.values():
            relay.mend()
    assert lonely.report(lonely.destination)["outcome"] == "failed"


# --- Other guests


def test_guest_with_two_ports_of_several_addresses(lab: LibvirtLab, sami: Sami) -> None:
    guest = lab.add_guest("two", "a", nics=2, addresses_per_nic=2)
    flows = [traffic.download(lab, guest, family=family, nic=nic) for family in (4, 6) for nic in (0, 1)]
    guest.close_egress()
    migration = lab.start_migration(guest, "a", "b")
    assert migration.wait().is_ok
    arrived = migration.wait_for("RESUMED/MIGRATED", lab.hosts["b"]).time
    for flow in flows:
        wait_until(lambda flow=flow: flow.samples()[-1].time > arrived + WATCHED_SECONDS, "the time watched", 30)
        assert has_survived(flow.samples(), arrived, WATCHED_SECONDS), sami.words()
    reports = sami.reports(guest)
    assert reports["b"]["flows"]["imported"] == reports["a"]["flows"]["purged"] == 4
    lab.remove_guest(guest)


def test_guest_without_ports(lab: LibvirtLab, sami: Sami) -> None:
    guest = lab.add_guest("none", "a", nics=0)
    result = lab.migrate(guest, "a", "b")
    assert result.is_ok
    assert {report["outcome"] for report in sami.reports(guest).values()} == {"moved"}
    lab.remove_guest(guest)


def test_guest_that_stays_defined_at_a_source_whose_agent_was_away_has_left_it(lab: LibvirtLab, sami: Sami) -> None:
    """libvirt still has it there, turned off, and no word tells the agent that is started anew that it left."""
    guest, flow = downloading(lab, "defined", "a", is_persistent=True)
    case, agent = Case(lab, sami, guest, flow), sami.agents["a"]
    migration = case.start(bandwidth=SLOW_MIB)
    migration.wait_until_copying()
    wait_until(lambda: case.entries(case.destination) == 1, "the flow at the destination", 20)
    agent.stop(signal.SIGKILL)
    assert migration.wait().is_ok
    agent.start()
    assert case.goes_on(), case.words()
    wait_until(lambda: case.entries(case.source) == 0, f"the purge; it said:\n{sami.words()}", 20)
    assert case.entries(case.destination) == 1
    assert {report["outcome"] for report in sami.reports(guest).values()} == {"moved"}
    lab.remove_guest(guest)


def test_guest_that_moves_offline_is_nobodys_business(lab: LibvirtLab, sami: Sami) -> None:
    guest = lab.add_guest("off", "a", is_persistent=True)
    lab.hosts["a"].virsh("destroy", guest.name)
    result = lab.migrate(guest, "a", "b", "--offline", "--persistent")
    assert result.is_ok, result.words
    for agent in sami.agents.values():
        wait_until(lambda agent=agent: not is_busy_with(agent, guest), "no session to be left", 20)
    lab.remove_guest(guest)


def is_busy_with(agent: Any, guest: Guest) -> bool:
    journal = agent.sessions(guest.uuid)
    return any(row["ended_at"] is None for row in journal)


def test_three_guests_at_once_two_one_way_and_one_the_other(lab: LibvirtLab, sami: Sami) -> None:
    guests = [lab.add_guest(f"g{n}", "aab"[n], is_awaited=False) for n in range(3)]
    for guest, host in zip(guests, "aab", strict=True):
        guest.wait_until_ready(lab.hosts[host])
    flows = [traffic.download(lab, guest) for guest in guests]
    for guest in guests:
        guest.close_egress()
    ways = [("a", "b"), ("a", "b"), ("b", "a")]
    running = [lab.start_migration(guest, *way) for guest, way in zip(guests, ways, strict=True)]
    assert all(migration.wait().is_ok for migration in running)
    for migration, flow, (_, destination) in zip(running, flows, ways, strict=True):
        arrived = migration.wait_for("RESUMED/MIGRATED", lab.hosts[destination]).time
        wait_until(lambda flow=flow, at=arrived: flow.samples()[-1].time > at + WATCHED_SECONDS, "the time watched", 30)
        assert has_survived(flow.samples(), arrived, WATCHED_SECONDS), sami.words()
    for guest in guests:
        assert {report["outcome"] for report in sami.reports(guest).values()} == {"moved"}
        lab.remove_guest(guest)


def test_guest_that_starts_and_ends_here_makes_no_session(lab: LibvirtLab, sami: Sami) -> None:
    guest = lab.add_guest("local", "a")
    lab.hosts["a"].virsh("reboot", guest.name)
    lab.remove_guest(guest)
    assert all(agent.sessions(guest.uuid) == [] for agent in sami.agents.values())


def test_guest_that_is_lost_in_postcopy(lab: LibvirtLab, sami: Sami) -> None:
    guest, flow = downloading(lab, "lost", "a")
    case = Case(lab, sami, guest, flow)
    migration = case.start(bandwidth=SLOW_MIB, is_postcopy=True)
    migration.wait_until_copying()
    migration.switch_to_postcopy()
    migration.wait_for("RESUMED/POSTCOPY", case.destination)
    case.destination.kill_qemu(guest.name)
    assert not migration.wait().is_ok
    case.report(case.source)
    case.report(case.destination)
    with pytest.raises(LabError):
        lab.host_of(guest.name)
    lab.remove_guest(guest)
