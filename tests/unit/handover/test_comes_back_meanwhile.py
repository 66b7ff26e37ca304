"""A guest comes back while another session goes on with the one that saw it leave, or with the one that brings it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest

from sami_plugin.codec import messages
from sami_plugin.errors import JournalError, Veto
from sami_plugin.former import FormerPort
from sami_plugin.handover import DestinationSession, SourceSession
from sami_plugin.model.migration import VERSIONS, AskAgain, MigrationEvent, Open, Phase
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator
from sami_plugin.session import Session
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.hypervisor import Hypervisor, described
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    ZONES,
    begin,
    brief,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    ports,
    states,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
)
from tests.unit.handover.stranger import Stranger

NEW_ZONE = 77
"""Of the guest's port at the host where it comes back to."""


@dataclass(frozen=True)
class Return:
    """A guest that has left host-a for host-b, and comes back from host-c; host-b has not taken its flows."""

    hosts: Hosts
    guest: str
    other: Stranger

    def sessions(self, role: str) -> list[Session]:
        return [one for one in self.hosts.agents["host-a"].sessions() if one.role == role]

    def go_on(self) -> None:
        """host-b's agent has been started anew, and asks anew."""
        (former,) = self.sessions("source")
        self.other.say("host-a", str(uuid.uuid4()), opening(self.guest, continues=former.known_as))
        until(lambda: former not in self.sessions("source"))
        assert len(self.sessions("source")) == 1


def opening(guest: str, continues: str = "") -> Open:
    return Open(guest, "host-b", VERSIONS, ("tcp-ipv4",), ("zlib",), None, continues=continues)


@contextmanager
def returning(folder: Path, count: int, zone: int) -> Iterator[Return]:
    """With so many flows, to this zone."""
    with hosts_in(folder, brief(open_seconds=10.0, arrival_seconds=1.5)) as hosts:
        guest = guest_with_flows(hosts)
        hosts.kill("host-b")
        with Stranger(hosts, "host-b") as other:
            hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
            other.say("host-a", str(uuid.uuid4()), opening(guest))
            until(lambda: states(hosts, "host-a") == ["offered"])
            hosts.say("host-a", Phase.SUSPENDED, guest)
            hosts.unplug("host-a", guest)
            hosts.agents["host-a"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
            hosts.plug("host-c", guest, ZONES["host-c"], GUEST_ADDRESS)
            hosts.drivers["host-c"].insert(hosts.scope("host-c", guest), tcp_flows(count))
            hosts.say("host-c", Phase.OUTGOING, guest, destination="host-a")
            hosts.say("host-a", Phase.PREPARE, guest, "host-c")
            hosts.plug("host-a", guest, zone, GUEST_ADDRESS)
            hosts.say("host-a", Phase.STARTED, guest)
            until(lambda: len(ports(hosts, "host-a", zone)) >= count)
            yield Return(hosts, guest, other)


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_comes_with_a_guest_is_not_purged_by_who_goes_on_with_its_leaving(tmp_path: Path, is_killed: bool) -> None:
    with returning(tmp_path, 100, ZONES["host-a"]) as made:
        hosts, guest = made.hosts, made.guest
        (coming,) = made.sessions("destination")
        until(coming.has_caught_up.is_set)
        made.go_on()
        if is_killed:
            hosts.kill("host-a")
            hosts.start("host-a")
        until(lambda: not made.sessions("source"))
        hosts.say("host-c", Phase.SUSPENDED, guest)
        hosts.unplug("host-c", guest)
        hosts.say("host-a", Phase.RESUMED, guest)
        hosts.agents["host-c"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
        until(lambda: not hosts.agents["host-a"].sessions())
        assert len(held(hosts, "host-a")) == 100
        outcomes = {(report["role"], report["outcome"]) for report in hosts.reports("host-a", guest)}
        assert ("destination", "moved") in outcomes


def test_what_a_guest_left_is_purged_when_its_return_comes_to_nothing(tmp_path: Path) -> None:
    with returning(tmp_path, 7, NEW_ZONE) as made:
        hosts, guest = made.hosts, made.guest
        note = hosts.agents["host-a"].note
        note(MigrationEvent(guest, Phase.ROLLBACK, role="source"))  # libvirt's words for an incoming domain's end
        note(MigrationEvent(guest, Phase.STOPPED, role="destination"))
        hosts.unplug("host-a", guest)
        until(lambda: not hosts.agents["host-a"].sessions())
        assert ports(hosts, "host-a", NEW_ZONE) == set()
        assert ports(hosts, "host-a") == set()
        outcomes = {report["role"]: report["outcome"] for report in hosts.reports("host-a", guest)}
        assert outcomes == {"destination": "stayed", "source": "purged without arrival"}


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, id="the journal keeps the order of migrations")])
def test_that_a_return_comes_to_nothing_is_told_to_the_session_that_brings_the_guest(
    tmp_path: Path, is_killed: bool
) -> None:
    with returning(tmp_path, 7, NEW_ZONE) as made:
        made.go_on()
        if is_killed:
            made.hosts.kill("host-a")
            made.hosts.start("host-a")
        made.hosts.unplug("host-a", made.guest)
        made.hosts.agents["host-a"].note(MigrationEvent(made.guest, Phase.STOPPED))
        until(lambda: not made.sessions("destination"))
        assert ports(made.hosts, "host-a", NEW_ZONE) == set()


def test_end_of_what_comes_is_no_word_about_what_has_left_while_that_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with returning(tmp_path, 7, NEW_ZONE) as made:
        hosts, note = made.hosts, made.hosts.agents["host-a"].note
        (former,) = made.sessions("source")
        assert isinstance(former, SourceSession)
        is_told, flows = threading.Event(), former._flows_by_port

        def after_that() -> tuple[FormerPort, ...]:
            assert is_told.wait(10)
            return flows()

        monkeypatch.setattr(former, "_flows_by_port", after_that)
        made.other.say("host-a", str(uuid.uuid4()), opening(made.guest, continues=former.known_as))
        until(lambda: len(made.sessions("source")) == 2)
        note(MigrationEvent(made.guest, Phase.ROLLBACK, role="source"))
        is_told.set()
        note(MigrationEvent(made.guest, Phase.STOPPED, role="destination"))
        hosts.unplug("host-a", made.guest)
        until(lambda: not hosts.agents["host-a"].sessions())
        assert ports(hosts, "host-a") == set()


LATE = {
    "prepare": MigrationEvent("", Phase.PREPARE, source="host-b", role="destination"),
    "started": MigrationEvent("", Phase.STARTED, role="destination", domain=described("", "host-b", "0" * 64)),
    "libvirt's started": MigrationEvent("", Phase.STARTED, role="destination", is_incoming=True),
}


@pytest.mark.parametrize("has_session", [False, True])
@pytest.mark.parametrize("word", LATE.values(), ids=LATE)
def test_guest_that_came_back_while_no_agent_was_there_keeps_its_flows_whatever_is_said_late(
    tmp_path: Path, word: MigrationEvent, has_session: bool
) -> None:
    hypervisors = {name: Hypervisor(name) for name in ZONES}
    with hosts_in(tmp_path, brief(open_seconds=1.0, arrival_seconds=20.0), hypervisors=hypervisors) as hosts:
        guest = guest_with_flows(hosts)
        hypervisor = hypervisors["host-a"]
        hypervisor.mark(guest)
        hypervisor.leaving.add(guest)
        hosts.kill("host-b")
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hypervisor.leaving.clear()
        if has_session:
            hosts.agents["host-a"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
        hosts.kill("host-a")
        hypervisor.here.add(guest)
        hosts.start("host-a")
        agent = hosts.agents["host-a"]
        domain = word.domain and described(guest, "host-b", "0" * 64)
        agent.note(replace(word, guest=guest, domain=domain))
        until(lambda: all(one.role == "destination" for one in agent.sessions()))
        assert len(held(hosts, "host-a")) == 100
        agent.note(MigrationEvent(guest, Phase.STOPPED, role="destination"))
        hosts.start("host-b")


def test_session_whose_end_was_not_written_down_discards_nothing_of_a_guest_that_came_again(tmp_path: Path) -> None:
    with hosts_in(tmp_path, brief(open_seconds=2.0, arrival_seconds=20.0)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        journal = hosts.agents["host-b"].host.journal
        full = JournalError("the disk is full")
        with patch.object(journal, "end", side_effect=full), patch.object(journal, "record", side_effect=full):
            finish(hosts, guest)
            until(lambda: not hosts.agents["host-b"].sessions())
        begin(hosts, guest, "host-b", "host-a")
        hosts.say("host-b", Phase.SUSPENDED, guest)
        hosts.unplug("host-b", guest)
        hosts.say("host-a", Phase.RESUMED, guest)
        hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
        until_idle(hosts)
        begin(hosts, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        wait_for_step(hosts, "host-b", guest, "complete")
        hosts.kill("host-a")  # it says nothing more
        hosts.unplug("host-a", guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        until(lambda: states(hosts, "host-b")[-1] == "arrived")
        assert [row["role"] for row in hosts.agents["host-b"].host.journal.unfinished()] == ["destination"] * 2
        hosts.kill("host-b")
        hosts.start("host-b")
        until(lambda: len(hosts.agents["host-b"].sessions()) == 1)
        assert len(held(hosts, "host-b")) == 100
        hosts.start("host-a")


@contextmanager
def lingering(folder: Path) -> Iterator[tuple[Hosts, str]]:
    """A guest that has come to host-b; its source's agent is away, and the session waits for its last word."""
    with hosts_in(folder, brief(arrival_seconds=20.0, open_seconds=2.0)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        wait_for_step(hosts, "host-b", guest, "complete")
        hosts.kill("host-a")
        hosts.unplug("host-a", guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        until(lambda: states(hosts, "host-b") == ["arrived"])
        yield hosts, guest


def ask_anew(session: DestinationSession) -> None:
    session.hear([messages.encode(AskAgain(session.id))])


def test_next_migration_is_told_what_is_said_while_the_one_before_is_gone_on_with(tmp_path: Path) -> None:
    with lingering(tmp_path) as (hosts, guest):
        agent = hosts.agents["host-b"]
        (before,) = agent.sessions()
        assert isinstance(before, DestinationSession)
        hosts.unplug("host-b", guest)  # to host-c; nobody was there to tell of it
        hosts.plug("host-c", guest, ZONES["host-c"], GUEST_ADDRESS)
        hosts.drivers["host-c"].insert(hosts.scope("host-c", guest), tcp_flows(7, first_port=7000))
        hosts.say("host-c", Phase.OUTGOING, guest, destination="host-b")
        with before._deciding:  # its thread is busy, with a slow firewall for example
            ask_anew(before)
            agent.note(MigrationEvent(guest, Phase.PREPARE, source="host-c", role="destination"))
        hosts.plug("host-b", guest, NEW_ZONE, GUEST_ADDRESS)
        agent.note(MigrationEvent(guest, Phase.STARTED, role="destination", is_incoming=True))
        until(lambda: ports(hosts, "host-b", NEW_ZONE) == set(range(7000, 7007)))
        until(lambda: [one.peer for one in agent.sessions()] == ["host-c"])
        agent.note(MigrationEvent(guest, Phase.STOPPED, role="destination"))
        until(lambda: not agent.sessions())


def test_operator_has_spoken_also_where_another_session_goes_on(tmp_path: Path) -> None:
    settings = brief(verdict_seconds=1.0, open_seconds=20.0, ask_seconds=20.0)
    with hosts_in(tmp_path, settings) as hosts, ThreadPoolExecutor(1) as pool:
        guest = guest_with_flows(hosts)
        agent = hosts.agents["host-b"]
        agent.host.policies = Policies(AskOperator())
        hosts.kill("host-a")
        hook = pool.submit(hosts.say, "host-b", Phase.PREPARE, guest, "host-a")
        until(lambda: any(isinstance(one, DestinationSession) and one.is_asking for one in agent.sessions()))
        (asking,) = agent.sessions()
        assert isinstance(asking, DestinationSession)
        with asking._deciding:
            ask_anew(asking)
            agent.decide(guest, may_come=False)
        with pytest.raises(Veto, match="the operator refused"):
            hook.result(10)


def moves_on(hosts: Hosts, guest: str) -> None:
    hosts.say("host-b", Phase.OUTGOING, guest, destination="host-c")
    hosts.say("host-c", Phase.PREPARE, guest, "host-b")
    hosts.plug("host-c", guest, ZONES["host-c"], GUEST_ADDRESS)
    hosts.say("host-c", Phase.STARTED, guest)
    wait_for_step(hosts, "host-c", guest, "in sync")


def test_guest_that_stays_is_marked_anew_also_where_the_migration_before_is_not_over(tmp_path: Path) -> None:
    with lingering(tmp_path) as (hosts, guest):
        moves_on(hosts, guest)
        agent = hosts.agents["host-b"]
        hypervisor = agent._hypervisor = Hypervisor("host-b")
        hypervisor.here.add(guest)
        hypervisor.mark(guest)
        mark = hypervisor.marks[guest]
        hosts.say("host-c", Phase.STOPPED, guest)
        until(lambda: hypervisor.marks[guest] != mark)
        assert guest not in agent._outgoing


def test_guest_that_its_user_stops_for_a_moment_while_it_is_copied_is_purged_when_it_has_left(tmp_path: Path) -> None:
    with lingering(tmp_path) as (hosts, guest):
        moves_on(hosts, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        hosts.say("host-b", Phase.SUSPENDED, guest)
        wait_for_step(hosts, "host-c", guest, "complete")
        hosts.unplug("host-b", guest)
        hosts.say("host-c", Phase.RESUMED, guest)
        hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
        until(lambda: all(one.role == "destination" for one in hosts.agents["host-b"].sessions()))
        assert held(hosts, "host-b") == set()
        assert len(held(hosts, "host-c")) == 100


def test_guest_that_has_moved_is_not_told_of_twice_where_the_migration_before_is_not_over(tmp_path: Path) -> None:
    with lingering(tmp_path) as (hosts, guest):
        moves_on(hosts, guest)
        agent = hosts.agents["host-b"]
        agent.note(MigrationEvent(guest, Phase.SUSPENDED, role="source"))
        hosts.agents["host-c"].note(MigrationEvent(guest, Phase.RESUMED, role="destination"))
        until(lambda: all(one.role == "destination" for one in agent.sessions()))
        agent.note(MigrationEvent(guest, Phase.STOPPED, role="source"))  # with post-copy its process ends later
        assert [one.role for one in agent.sessions()] == ["destination"]
