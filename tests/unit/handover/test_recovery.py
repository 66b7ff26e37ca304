"""An agent is killed and started anew, at any point: each flow is where its guest is, and nowhere else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import netaddr
import pytest

from sami_plugin import former as formers
from sami_plugin.codec import messages
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import JournalError
from sami_plugin.journal.journal import Journal
from sami_plugin.model.flows import Batch, ZoneRole
from sami_plugin.model.migration import VERSIONS, MigrationEvent, Open, Phase
from sami_plugin.model.results import Results
from sami_plugin.model.scope import Scope
from sami_plugin.session import Host, Session
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    IMPATIENT,
    SETTINGS,
    ZONES,
    begin,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    leave,
    limited,
    ports,
    prepare,
    report,
    tcp_flows,
    until,
    until_idle,
    words,
    zone_scope,
)

STEPS = ("prepare", "started", "in sync", "suspended", "complete", "resumed", "arrived", "stopped")
"""Up to which the migration goes before an agent is killed."""


def steps_of(hosts: Hosts, guest: str) -> Iterator[str]:
    """The migration, step by step."""
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    yield "prepare"
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.say("host-b", Phase.STARTED, guest)
    yield "started"
    until(lambda: hosts.has_step("host-b", guest, "in sync"))
    yield "in sync"
    hosts.say("host-a", Phase.SUSPENDED, guest)
    yield "suspended"
    until(lambda: all(one._state() == "complete" for one in hosts.agents["host-b"].sessions()))
    yield "complete"
    hosts.unplug("host-a", guest)
    hosts.say("host-b", Phase.RESUMED, guest)
    yield "resumed"
    until(lambda: held(hosts, "host-a") == set())
    yield "arrived"
    hosts.say("host-a", Phase.STOPPED, guest)
    yield "stopped"


@pytest.mark.parametrize("killed", ["host-a", "host-b", "both"])
@pytest.mark.parametrize("at", STEPS)
def test_migration_goes_on_after_an_agent_was_killed(tmp_path: Path, killed: str, at: str) -> None:
    """All words that come while it is away are lost. Afterwards the hypervisor is asked, as `LibvirtHost` does."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        foreign = tcp_flows(7, "192.0.2.200")
        hosts.drivers["host-a"].insert(nobody_s(hosts, guest), foreign)
        victims = ["host-a", "host-b"] if killed == "both" else [killed]
        for step in steps_of(hosts, guest):
            if step == at:
                for host in victims:
                    hosts.kill(host)
                for host in victims:
                    hosts.start(host)
                recall(hosts, guest, victims, step)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL
        assert held(hosts, "host-a") == set()
        assert len(held(hosts, "host-a", 999)) == 7


def nobody_s(hosts: Hosts, guest: str) -> Scope:
    """A zone on host-a that is no guest's."""
    scope = hosts.scope("host-a", guest)
    return replace(scope, zones={ZoneRole.PORT: 999}, addresses=(netaddr.IPAddress("192.0.2.200"),))


def recall(hosts: Hosts, guest: str, victims: list[str], step: str) -> None:
    """What an agent that was started anew is told by its hypervisor of a migration that is at this step."""
    at = STEPS.index(step)
    for host in victims:
        if host == "host-a" and at < STEPS.index("stopped"):
            words(hosts, guest, ("host-a", Phase.OUTGOING))
            if at >= STEPS.index("suspended"):
                words(hosts, guest, ("host-a", Phase.SUSPENDED))
        if host == "host-a" and at >= STEPS.index("stopped"):
            words(hosts, guest, ("host-a", Phase.STOPPED))
        if host == "host-b" and at >= STEPS.index("resumed"):
            words(hosts, guest, ("host-b", Phase.RESUMED))
        elif host == "host-b" and at >= STEPS.index("started"):
            words(hosts, guest, ("host-b", Phase.STARTED))


@pytest.mark.parametrize("has_left", [False, True])
def test_what_a_source_was_asked_is_in_the_journal_before_it_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_left: bool
) -> None:
    """Killed in between, it would leave a destination that waits for an answer to what was taken."""
    with hosts_in(tmp_path, limited(arrival_seconds=20)) as hosts:
        guest = guest_with_flows(hosts)
        asked: list[Session] = []
        run = Host.run
        with monkeypatch.context() as patched:
            patched.setattr(
                Host, "run", lambda host, one: run(host, one) if host.name == "host-b" else asked.append(one)
            )
            words(hosts, guest, ("host-a", Phase.OUTGOING), ("host-b", Phase.PREPARE))
            until(lambda: bool(asked))
        hosts.kill("host-a")
        if has_left:
            hosts.unplug("host-a", guest)
        hosts.start("host-a")
        if not has_left:
            words(hosts, guest, ("host-a", Phase.OUTGOING))
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert (held(hosts, "host-a"), ports(hosts, "host-b")) == (set(), ALL)


def test_what_a_former_agent_was_asked_and_is_asked_again_late_ends_no_later_migration(tmp_path: Path) -> None:
    """A call to an agent that was killed is made again, and may come when the guest's next migration is under way."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        words(hosts, guest, ("host-a", Phase.OUTGOING), ("host-b", Phase.PREPARE))
        until(lambda: any(one.peer for one in hosts.agents["host-a"].sessions()))
        (first,) = hosts.agents["host-b"].sessions()
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        hosts.kill("host-a")
        hosts.start("host-a")
        begin(hosts, guest)
        asked_again = first.host.line(first.id)
        asked_again.peer = "host-a"
        hosts.agents["host-b"]._ended.add(first.id, asked_again, first.host.monotonic())
        asked_again.say(messages.encode(Open(guest, "host-b", VERSIONS, ("tcp-ipv4",), ("zlib",), None)))
        until(lambda: asked_again._sender is not None and asked_again._sender.is_idle)  # its call was taken
        finish(hosts, guest)
        until_idle(hosts)
        assert (held(hosts, "host-a"), ports(hosts, "host-b")) == (set(), ALL)


def test_guest_that_left_in_the_next_migration_while_the_agent_was_away_leaves_nothing_behind(tmp_path: Path) -> None:
    """What the agent knows of when it is there again is the migration before, which the destination says was none."""
    with hosts_in(tmp_path, limited(arrival_seconds=20)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.kill("host-a")
        hosts.say("host-b", Phase.STOPPED, guest)
        assert hosts.agents["host-b"].wait_until_idle(20)
        words(hosts, guest, ("host-b", Phase.PREPARE), ("host-b", Phase.STARTED))
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.STOPPED), ("host-b", Phase.RESUMED))
        until_idle(hosts)
        assert (held(hosts, "host-a"), ports(hosts, "host-b")) == (set(), ALL)


def test_guest_that_had_left_while_the_agent_was_away_has_not_come_again_before_that_is_said(tmp_path: Path) -> None:
    """What the journal has is that it ran here once; where it is now, another migration has yet to show."""
    with hosts_in(tmp_path, limited(arrival_seconds=20)) as hosts:
        guest = guest_with_flows(hosts)
        words(hosts, guest, ("host-a", Phase.OUTGOING), ("host-b", Phase.PREPARE))
        until(lambda: hosts.agents["host-b"].sessions()[0]._state() == "receiving")
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-b", Phase.RESUMED, guest)  # its port has no zone here yet
        until(lambda: hosts.agents["host-b"].sessions()[0]._known.runs_here)
        hosts.kill("host-b")
        hosts.say("host-a", Phase.STOPPED, guest)
        hosts.say("host-a", Phase.RESUMED, guest)  # it is back, and nobody could say that it would
        assert hosts.agents["host-a"].wait_until_idle(20)
        words(hosts, guest, ("host-a", Phase.OUTGOING))
        hosts.start("host-b")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        until(lambda: hosts.has_step("host-b", guest, "in sync"))
        hosts.say("host-a", Phase.SUSPENDED, guest)
        until(lambda: all(one._state() == "complete" for one in hosts.agents["host-b"].sessions()))
        words(hosts, guest, ("host-a", Phase.ROLLBACK))
        until_idle(hosts)
        assert ports(hosts, "host-a") == ALL


def test_next_agent_knows_that_the_guest_has_come_before_its_flows_had(tmp_path: Path) -> None:
    """Of one that leaves again while no agent is there, it would ask as of one that has not come."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        hosts.say("host-b", Phase.OUTGOING, guest, destination="host-a")
        hosts.kill("host-b")
        hosts.start("host-b")
        assert hosts.agents["host-b"].underway() == [(guest, "source")]


def test_agent_that_died_before_it_went_on_with_a_session_has_what_that_had(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "journal.sqlite")) as journal:
        journal.begin("one", "a guest", "destination", "host-a", "looking")
        decided = (("guest resumed", "receiving", []), ("Verify done (3)", "arrived", ["say Complete", "say Arrived"]))
        for number, (event, state, actions) in enumerate((*decided, ("peer said AskAgain", "ended", ["HandOver"])), 1):
            journal.record("one", number, event, state, actions, is_durable=False)
        former = formers.read(journal, journal.unfinished()[0], SETTINGS, None)
    assert former.state == "arrived"
    assert former.has(formers.WAS_HERE)
    assert not former.has("guest resumed")


def test_where_the_ports_are_is_in_the_journal_before_anything_is_put_in(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watched(MemoryDriver):
        def insert(self, scope: Scope, batch: Batch) -> Results:
            journal = Journal(tmp_path / "host-b-journal.sqlite", read_only=True)
            seen.extend(row["ports"] for row in journal.unfinished())
            journal.close()
            return super().insert(scope, batch)

    def driver(name: str) -> MemoryDriver:
        return (Watched if name == "host-b" else MemoryDriver)(MemoryDevice(name))

    with hosts_in(tmp_path, driver=driver) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
    assert seen
    assert all("tap" in ports for ports in seen)


@pytest.mark.parametrize("killed", ["host-a", "host-b", "both"])
@pytest.mark.parametrize("at", STEPS[: STEPS.index("resumed")])
def test_guest_that_stays_keeps_its_flows_after_an_agent_was_killed(tmp_path: Path, killed: str, at: str) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        victims = ["host-a", "host-b"] if killed == "both" else [killed]
        for step in steps_of(hosts, guest):
            if step == at:
                break
        for host in victims:
            hosts.kill(host)
        for host in victims:
            hosts.start(host)
        recall(hosts, guest, victims, at)
        words(hosts, guest, ("host-a", Phase.ROLLBACK), ("host-b", Phase.STOPPED))
        until_idle(hosts)
        assert ports(hosts, "host-a") == ALL
        assert held(hosts, "host-b") == set()


def test_source_that_was_killed_before_it_wrote_down_that_the_guest_stays_is_told_again(tmp_path: Path) -> None:
    """An abort while memory is copied says nothing on the source."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        hosts.kill("host-a")
        with closing(sqlite3.connect(tmp_path / "host-a-journal.sqlite")) as journal, journal:
            journal.execute("UPDATE sessions SET state = 'following', outcome = NULL, report = NULL, ended_at = NULL")
        hosts.start("host-a")
        until_idle(hosts)
        assert hosts.reports("host-a", guest)[0]["outcome"] == "stayed"
        assert ports(hosts, "host-a") == ALL


def test_agent_that_was_away_when_the_guest_left_knows_where_it_went_and_what_it_left(tmp_path: Path) -> None:
    """Nobody had asked for the guest's flows yet, and with the guest its ports have gone."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.kill("host-a")
        hosts.unplug("host-a", guest)
        hosts.start("host-a")
        assert hosts.agents["host-a"].underway() == [(guest, "source")]
        words(hosts, guest, ("host-a", Phase.STOPPED))
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        words(hosts, guest, ("host-b", Phase.STARTED), ("host-b", Phase.RESUMED))
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL
        assert held(hosts, "host-a") == set()
        hosts.kill("host-a")
        hosts.start("host-a")
        assert hosts.agents["host-a"].underway() == []


def test_journal_that_failed_once_is_not_believed_by_the_session_that_goes_on(tmp_path: Path) -> None:
    """It may lack flows: who is started anew would leave them behind."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        (former,) = hosts.agents["host-a"].sessions()
        former.lose_journal(JournalError("the disk is full"))
        hosts.kill("host-b")
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.STARTED))
        until(lambda: former.is_over and hosts.agents["host-a"].sessions())
        (successor,) = hosts.agents["host-a"].sessions()
        assert not successor._journal_works  # so it purges nothing
        assert any("the journal did not work" in remark for remark in successor.report.remarks)
        hosts.say("host-a", Phase.ROLLBACK, guest)
        words(hosts, guest, ("host-b", Phase.STOPPED))
        until_idle(hosts)
        # It works again: what is over is not gone on with at the next start.
        assert [one["outcome"] for one in hosts.reports("host-a", guest)] == ["stayed", "continued"]


def test_session_that_could_not_be_written_down_when_it_began_is_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_on_a_full_disk(*_: object, **__: object) -> None:
        raise JournalError("the disk is full")

    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        monkeypatch.setattr(hosts.agents["host-b"].host.journal, "begin", begin_on_a_full_disk)
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert (told["outcome"], told["flows"]["imported"], told["remarks"]) == ("moved", 100, ["the disk is full"])
        hosts.kill("host-b")
        hosts.start("host-b")
        assert hosts.agents["host-b"].underway() == []


@pytest.mark.parametrize("at", STEPS)
def test_what_a_reboot_took_away_is_missed_by_nobody(tmp_path: Path, at: str) -> None:
    """The destination's kernel and guests are gone; a guest that did not run there yet is on the source."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        for step in steps_of(hosts, guest):
            if step == at:
                break
        hosts.kill("host-b")
        scope = zone_scope("host-b")
        hosts.drivers["host-b"].remove(scope, tcp_flows(100).identities)
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.STOPPED))
        if STEPS.index(at) < STEPS.index("resumed"):
            words(hosts, guest, ("host-a", Phase.ROLLBACK))
        elif STEPS.index(at) < STEPS.index("stopped"):
            words(hosts, guest, ("host-a", Phase.STOPPED))
        until_idle(hosts)
        assert held(hosts, "host-b") == set()
        assert ports(hosts, "host-a") == (ALL if STEPS.index(at) < STEPS.index("resumed") else set())


@pytest.mark.parametrize(("late_import_seconds", "is_late"), [(30.0, False), (0.0, True)])
def test_agent_that_was_away_longer_than_the_arrival_limit_may_fetch_the_flows_for_a_while(
    tmp_path: Path, late_import_seconds: float, is_late: bool
) -> None:
    with hosts_in(tmp_path, replace(limited(arrival_seconds=3.0), late_import_seconds=late_import_seconds)) as hosts:
        guest = guest_with_flows(hosts)
        prepare(hosts, guest)
        until(lambda: hosts.has_step("host-a", guest, "export ended"))
        hosts.kill("host-b")
        leave(hosts, guest)
        until(lambda: hosts.reports("host-a", guest))
        assert hosts.reports("host-a", guest)[0]["outcome"] == "purged without arrival"
        assert held(hosts, "host-a") == set()
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.RESUMED))
        until(lambda: is_late or len(hosts.reports("host-a", guest)) == 2)
        until_idle(hosts)
        newest = hosts.reports("host-b", guest)[0]
        if is_late:
            assert held(hosts, "host-b") == set()
            assert "too long to be imported (late_import_seconds)" in newest["reason"]
        else:
            assert ports(hosts, "host-b") == ALL
            assert newest["outcome"] == "moved"
            assert [one["outcome"] for one in hosts.reports("host-a", guest)] == ["moved", "purged without arrival"]


def test_agent_that_was_away_all_the_time_fetches_what_the_guest_left(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.kill("host-b")
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        leave(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.start("host-b")
        for phase in (Phase.STARTED, Phase.RESUMED):
            event = MigrationEvent(guest, phase, source="host-a", is_incoming=phase is Phase.STARTED)
            hosts.agents["host-b"].note(event)
        until(lambda: hosts.reports("host-b", guest))
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL
        assert held(hosts, "host-a") == set()
        assert hosts.reports("host-b", guest)[0]["outcome"] == "moved"


def test_agent_that_refused_a_guest_and_died_before_anybody_heard_it_fetches_what_the_guest_left(
    tmp_path: Path,
) -> None:
    """The source heard that the guest stays; what was to stop the migration did not."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        prepare(hosts, guest)
        until(lambda: hosts.has_step("host-a", guest, "export ended"))
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert hosts.reports("host-a", guest)[0]["outcome"] == "stayed"
        hosts.kill("host-b")
        leave(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.start("host-b")
        hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STARTED, source="host-a", is_incoming=True))
        hosts.agents["host-b"].note(MigrationEvent(guest, Phase.RESUMED, source="host-a"))
        until(lambda: len(hosts.reports("host-b", guest)) == 2)
        until_idle(hosts)
        assert hosts.reports("host-b", guest)[0]["outcome"] == "moved"
        assert ports(hosts, "host-b") == ALL
        assert held(hosts, "host-a") == set()


def test_what_a_guest_left_is_no_other_host_s_than_the_one_that_it_went_to(tmp_path: Path) -> None:
    with hosts_in(tmp_path, IMPATIENT) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        leave(hosts, guest)
        hosts.plug("host-c", guest, ZONES["host-c"], GUEST_ADDRESS)
        hosts.agents["host-c"].note(MigrationEvent(guest, Phase.STARTED, source="host-a", is_incoming=True))
        until(lambda: any(one._state() == "orphaned" for one in hosts.agents["host-c"].sessions()))
        hosts.say("host-c", Phase.STOPPED, guest)
        until_idle(hosts)
        assert held(hosts, "host-c") == set()
        assert f"{guest} has left this host already" in hosts.reports("host-c", guest)[0]["reason"]


def test_what_the_source_lost_while_the_destination_s_agent_was_away_is_taken_out_there(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.kill("host-b")
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), tcp_flows(10).identities)
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.STARTED))
        until(lambda: hosts.has_step("host-b", guest, "in sync"))
        until(lambda: ports(hosts, "host-b") == set(range(1010, 1100)))
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == set(range(1010, 1100))
        assert held(hosts, "host-a") == set()


def test_what_the_guest_ended_while_its_host_s_agent_was_away_is_not_put_back(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.kill("host-b")
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.unplug("host-a", guest)
        hosts.drivers["host-b"].remove(zone_scope("host-b"), tcp_flows(10).identities)  # it runs, and ends ten
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.RESUMED))
        hosts.say("host-a", Phase.STOPPED, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == set(range(1010, 1100))
        assert held(hosts, "host-a") == set()


@pytest.mark.parametrize("lost", ["host-a", "host-b"])
@pytest.mark.parametrize("at", ["started", "in sync", "complete", "arrived"])
def test_journal_that_was_lost_loses_no_flow(tmp_path: Path, lost: str, at: str) -> None:
    """What is not known is kept where it is; nothing is in two places that was not there before the guest was."""
    with hosts_in(tmp_path, limited(open_seconds=1.0, session_seconds=10.0, arrival_seconds=0.5)) as hosts:
        guest = guest_with_flows(hosts)
        for step in steps_of(hosts, guest):
            if step == at:
                break
        hosts.kill(lost)
        for file in tmp_path.glob(f"{lost}-journal*"):
            file.unlink()
        hosts.start(lost)
        on_source = ports(hosts, "host-a")
        if STEPS.index(at) < STEPS.index("complete"):
            words(hosts, guest, ("host-a", Phase.ROLLBACK), ("host-b", Phase.STOPPED))
            until_idle(hosts)
            assert ports(hosts, "host-a") == ALL
        else:
            hosts.unplug("host-a", guest)
            words(hosts, guest, ("host-b", Phase.RESUMED), ("host-a", Phase.STOPPED))
            assert ports(hosts, "host-b") == ALL
            until_idle(hosts)
            assert ports(hosts, "host-b") == ALL
            assert ports(hosts, "host-a") in (on_source, set())


def test_agent_that_cannot_read_its_journal_starts_and_carries_flows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(journal: Journal) -> list[dict[str, object]]:
        raise JournalError(f"cannot use the journal {journal.path}: database disk image is malformed")

    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.kill("host-b")
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "unfinished", unreadable)
            hosts.start("host-b")
        assert "what was under way is not gone on with" in caplog.text
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL


def spoil(path: Path, hosts: Hosts, host: str, how: str) -> None:
    """The host's journal takes nothing any more."""
    journal = hosts.agents[host].host.journal
    if how == "read-only":
        journal._db.execute("PRAGMA query_only=1")
    elif how == "full":
        journal._db.execute("PRAGMA max_page_count=1")  # as many as there are
        for size in (2000, 10):
            fill(journal._db, "INSERT INTO refusals VALUES (? || ?, 'x', 1, 0, 0)", "x" * size)
        fill(journal._db, "INSERT INTO decisions VALUES (?, ?, 0, '', '', '')", "filler")
        fill(journal._db, "INSERT INTO payloads VALUES (?, ?, '')", "filler")
    else:
        garbage = path / "garbage"
        garbage.write_bytes(b"no database" * 1000)
        journal._db = sqlite3.connect(garbage, check_same_thread=False, isolation_level=None)


def fill(database: sqlite3.Connection, statement: str, text: str) -> None:
    for number in range(10**6):
        try:
            database.execute(statement, (text, number))
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            return
    raise AssertionError("it takes everything")


@pytest.mark.parametrize("how", ["read-only", "full", "corrupt"])
@pytest.mark.parametrize("host", ["host-a", "host-b"])
@pytest.mark.parametrize("at", ["prepare", "in sync", "complete"])
def test_where_the_journal_does_not_work_the_guest_moves_and_nothing_is_purged(
    tmp_path: Path, host: str, at: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with hosts_in(tmp_path, IMPATIENT if host == "host-a" else SETTINGS) as hosts:
        guest = guest_with_flows(hosts)
        for step in steps_of(hosts, guest):
            if step == at:
                spoil(tmp_path, hosts, host, how)
            if step == "resumed":
                break
        hosts.say("host-a", Phase.STOPPED, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL
        assert ports(hosts, "host-a") == (ALL if host == "host-a" else set())
        assert "flows are carried, nothing is purged" in caplog.text
