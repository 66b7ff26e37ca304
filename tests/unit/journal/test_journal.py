"""What is written is there: in order, for another reader, and after the writer was killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sami_plugin.errors import JournalDamaged, JournalError
from sami_plugin.journal import journal as journal_module
from sami_plugin.journal.journal import FORMAT_VERSION, Journal
from sami_plugin.model.report import Report
from sami_plugin.model.settings import Retention

ONE, TWO = "1" * 8, "12" * 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    made = Journal(path)
    yield made
    made.close()


def begin(journal: Journal, session: str = ONE) -> None:
    journal.begin(session, "guest", "source", "host-b", "waiting")


def test_decisions_come_back_in_order(journal: Journal) -> None:
    begin(journal)
    for number, state in enumerate(("copying", "following", "drained")):
        journal.record(ONE, number, f"event {number}", state, ["WakeAt", "say Offer"], is_durable=number == 2)
    rows = journal.decisions(ONE)
    assert [(row["number"], row["event"], row["state"]) for row in rows] == [
        (0, "event 0", "copying"),
        (1, "event 1", "following"),
        (2, "event 2", "drained"),
    ]
    assert rows[0]["actions"] == ["WakeAt", "say Offer"]
    assert journal.decisions(TWO) == []


def test_payloads_are_kept_until_the_session_ends_and_the_report_after_it(journal: Journal) -> None:
    begin(journal)
    begin(journal, TWO)
    journal.keep_payload(ONE, 2, b"second")
    journal.keep_payload(ONE, 1, b"first")
    journal.keep_payload(TWO, 1, b"other")
    assert list(journal.payloads(ONE)) == [(1, b"first"), (2, b"second")]
    journal.end(ONE, "ended", "moved", {"flows": {"exported": 3}})
    assert list(journal.payloads(ONE)) == []
    assert list(journal.payloads(TWO)) == [(1, b"other")]
    (row,) = (row for row in journal.sessions() if row["session"] == ONE)
    assert (row["state"], row["outcome"], json.loads(row["report"])) == ("ended", "moved", {"flows": {"exported": 3}})
    assert row["ended_at"] >= row["started_at"]


def test_session_that_could_not_begin_here_ends_here_all_the_same(journal: Journal) -> None:
    told = Report(ONE, "guest", "source", "host-a", "host-b", outcome="moved").as_dict()
    journal.end(ONE, "ended", "moved", told)
    (row,) = journal.sessions()
    assert (row["guest"], row["role"], row["peer"], row["outcome"]) == ("guest", "source", "host-b", "moved")
    assert json.loads(row["report"]) == told
    assert journal.unfinished() == []


def test_damaged_file_is_put_aside_and_the_agent_works(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(JournalDamaged, match="not a database"):
        Journal(path)
    journal = journal_module.opened(path, Retention())
    begin(journal)
    assert [row["session"] for row in journal.unfinished()] == [ONE]
    journal.close()
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_bytes().startswith(b"this is no database")
    assert "a new one begins" in caplog.text


def test_file_of_which_a_page_is_damaged_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its first page is whole, so it opens: each session would find out anew that it cannot be written."""
    journal = Journal(path)
    begin(journal)
    journal.close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        (page,) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sessions'").fetchone()
        (octets,) = other.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * octets)
        file.write(b"\xff" * octets)
    with contextlib.closing(journal_module.opened(path, Retention())) as journal:
        begin(journal)
        assert [row["session"] for row in journal.unfinished()] == [ONE]
    assert len([*path.parent.glob("*.damaged-*")]) == 1
    (told,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in told


def test_file_that_may_not_be_opened_is_left_alone(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(JournalError) as caught:
        journal_module.opened(path, Retention())
    assert not isinstance(caught.value, JournalDamaged)
    assert path.is_dir()


def test_journal_of_format_1_is_read_on(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.executescript(
            "CREATE TABLE sessions (session TEXT PRIMARY KEY, guest TEXT NOT NULL, role TEXT NOT NULL, "
            "peer TEXT NOT NULL, state TEXT NOT NULL, started_at REAL NOT NULL, ended_at REAL, outcome TEXT, "
            "report TEXT);"
            "INSERT INTO sessions VALUES ('old', 'guest', 'source', 'host-b', 'drained', 1.0, NULL, NULL, NULL);"
            "PRAGMA user_version=1;"
        )
    for _ in range(2):
        journal = Journal(path)
        (row,) = journal.unfinished()
        assert (row["session"], row["known_as"], row["heard"], row["ports"]) == ("old", "", "[]", "[]")
        journal.close()


def test_journal_of_before_it_was_noted_what_is_done_has_nothing_that_is(path: Path) -> None:
    journal = Journal(path)
    begin(journal)
    journal.close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.executescript("ALTER TABLE sessions DROP COLUMN applied; ALTER TABLE sessions DROP COLUMN named;")
    for applied in (0, 3):
        journal = Journal(path)
        (row,) = journal.unfinished()
        assert (row["applied"], json.loads(row["named"])) == (applied, {"refused": 1} if applied else {})
        journal.note_applied(ONE, 3, {"refused": 1})
        journal.close()


def test_session_with_which_another_goes_on_leaves_it_everything(journal: Journal) -> None:
    begin(journal)
    journal.know(ONE, peer="host-c", ports=[{"port": "tap"}])
    journal.keep_payload(ONE, 3, b"flows")
    journal.go_on(ONE, TWO, ONE, "drained", {"guest suspended"}, {"outcome": "continued"})
    kept = list(journal.payloads(ONE)), list(journal.payloads(TWO)), journal.payload_count(TWO)
    assert kept == ([], [(3, b"flows")], 3)
    (row,) = journal.unfinished()
    assert (row["session"], row["known_as"], row["peer"], row["state"]) == (TWO, ONE, "host-c", "drained")
    assert (json.loads(row["heard"]), json.loads(row["ports"])) == (["guest suspended"], [{"port": "tap"}])
    found = journal.known_as(ONE, "source")
    assert found is not None
    assert found["session"] == TWO
    assert journal.newest("guest") == TWO


def test_payloads_that_may_be_asked_for_late_outlive_their_session_for_a_while(journal: Journal) -> None:
    begin(journal)
    journal.keep_payload(ONE, 1, b"flows")
    journal.end(ONE, "ended", "purged without arrival", {}, keep_payloads_seconds=60.0)
    begin(journal, TWO)
    journal.end(TWO, "ended", "moved", {})
    assert list(journal.payloads(ONE)) == [(1, b"flows")]
    journal._db.execute("UPDATE sessions SET flows_until = 0")
    journal.end(TWO, "ended", "moved", {})
    assert list(journal.payloads(ONE)) == []


def test_sessions_are_listed_newest_first(journal: Journal) -> None:
    for session in (ONE, TWO):
        begin(journal, session)
    assert [row["session"] for row in journal.sessions()] == [TWO, ONE]
    assert [row["report"] for row in journal.sessions()] == [None, None]


def test_session_that_begins_twice_is_refused(journal: Journal) -> None:
    begin(journal)
    with pytest.raises(JournalError, match="UNIQUE"):
        begin(journal)
    assert len(journal.sessions()) == 1


def test_reader_sees_what_is_written_and_changes_nothing(journal: Journal, path: Path) -> None:
    begin(journal)
    reader = Journal(path, read_only=True)
    journal.record(ONE, 1, "later", "copying", [], is_durable=False)
    assert [row["event"] for row in reader.decisions(ONE)] == ["later"]
    with pytest.raises(JournalError, match="readonly"):
        begin(reader, TWO)
    reader.close()


def test_only_the_agent_s_user_reads_it(journal: Journal, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_file_of_another_format_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA user_version={FORMAT_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=f"no journal of format {FORMAT_VERSION}"):
        Journal(path)
    assert path.read_bytes()[:100][60:64] == before[60:64]
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_file_that_is_no_database_is_refused_by_path(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, and longer than a header of one would be" * 20)
    for read_only in (False, True):
        with pytest.raises(JournalError, match=str(path)):
            Journal(path, read_only=read_only)


def test_journal_that_is_not_there_is_not_made_by_a_reader(path: Path) -> None:
    with pytest.raises(JournalError, match=str(path)):
        Journal(path, read_only=True)
    assert not path.exists()


def test_closed_journal_says_so(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    with pytest.raises(JournalError, match="cannot use the journal"):
        begin(journal)


def test_threads_write_side_by_side(journal: Journal) -> None:
    sessions = [f"session {number}" for number in range(8)]

    def write(session: str) -> None:
        begin(journal, session)
        for number in range(50):
            journal.record(session, number, str(number), "copying", [], is_durable=number % 10 == 0)

    threads = [threading.Thread(target=write, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        assert [row["event"] for row in journal.decisions(session)] == [str(number) for number in range(50)]


WRITER = """
import sys
from sami_plugin.journal.journal import Journal
journal = Journal(sys.argv[1])
journal.begin("s", "guest", "source", "host-b", "waiting")
number = 0
while True:
    number += 1
    journal.keep_payload("s", number, b"x" * number)
    journal.record("s", number, "event", "copying", [], is_durable=False)
    print(number, flush=True)
"""


def test_what_was_written_is_there_after_the_writer_was_killed(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(50)][-1]
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    journal = Journal(path)
    numbers = [row["number"] for row in journal.decisions("s")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= told
    assert [len(payload) for _, payload in journal.payloads("s")][: len(numbers)] == numbers
    journal.close()


def test_durable_decision_waits_for_the_disk_and_others_do_not(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    begin(journal)
    journal.record(ONE, 0, "event", "drained", [], is_durable=False)
    assert synced == []
    journal.record(ONE, 1, "event", "drained", [], is_durable=True)
    assert synced == [f"{path}-wal"]
    journal.go_on(ONE, TWO, ONE, "drained", (), {"outcome": "continued"})
    assert synced == [f"{path}-wal"] * 2
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (1,), "checkpoints are safe without us"


def test_nobody_waits_for_another_s_flush(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(journal)
    begin(journal, TWO)
    is_slow, may_end = threading.Event(), threading.Event()

    def fdatasync(file: int) -> None:
        is_slow.set()
        may_end.wait(10)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    waiting = threading.Thread(
        target=journal.record, args=(ONE, 0, "event", "purging", []), kwargs={"is_durable": True}
    )
    waiting.start()
    assert is_slow.wait(10)
    others = threading.Thread(
        target=journal.record, args=(TWO, 0, "event", "drained", []), kwargs={"is_durable": False}
    )
    others.start()
    others.join(5)
    has_waited = others.is_alive()
    may_end.set()
    waiting.join()
    others.join()
    assert not has_waited


def test_disk_that_fails_is_a_failing_journal(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    begin(journal)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(JournalError, match="Input/output error"):
        journal.record(ONE, 0, "event", "purging", [], is_durable=True)


def test_journal_that_another_process_had_locked_works_afterwards(journal: Journal, path: Path) -> None:
    for session in (ONE, TWO):
        begin(journal, session)
    journal._db.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # a backup, an operator's sqlite3
    with pytest.raises(JournalError, match="locked"):
        journal.end(ONE, "ended", "moved", {})
    other.execute("ROLLBACK")
    journal.record(TWO, 1, "event", "state", ["Purge"], is_durable=True)
    assert other.execute("SELECT count(*) FROM decisions").fetchone() == (1,), "durable is seen by everybody"
    journal.end(TWO, "ended", "moved", {})
    other.close()


def test_agent_that_starts_waits_for_who_has_the_journal_for_a_moment(path: Path) -> None:
    """As a reader does that meets a writer, or the first one after a crash."""
    Journal(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        moment = threading.Timer(0.3, other.rollback)
        moment.start()
        Journal(path).close()
        assert not other.in_transaction
        moment.join()


def test_report_that_is_no_json_leaves_the_journal_usable(journal: Journal) -> None:
    begin(journal)
    with pytest.raises(TypeError):
        journal.end(ONE, "ended", "moved", {"count": object()})
    journal.end(ONE, "ended", "moved", {})
    assert journal.sessions()[0]["outcome"] == "moved"


def test_refusals_are_counted_by_who_and_why_and_the_oldest_give_way(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal.sqlite")
    made.count_refusals({("host-x", "NotAuthorised: no"): 2})
    made.count_refusals({("host-x", "NotAuthorised: no"): 1, ("user 7 of this host", "OperatorError: guest"): 1})
    rows = {row["who"]: row for row in made.refusals()}
    assert {who: row["count"] for who, row in rows.items()} == {"host-x": 3, "user 7 of this host": 1}
    assert rows["host-x"]["first_at"] < rows["host-x"]["last_at"]
    made.count_refusals({(f"host-{number}", "no"): 1 for number in range(1000)})
    assert {row["who"] for row in made.refusals()} == {f"host-{number}" for number in range(1000)}


def test_journal_that_others_may_write_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.touch()
    path.chmod(0o666)
    Journal(path)
    assert path.stat().st_mode & 0o777 == 0o600


def ended(made: Journal, number: int, octets: int = 100) -> str:
    """A session that has begun, decided something, and ended."""
    session = f"session-{number}"
    made.begin(session, "guest", "source", "host-b", "copying")
    made.record(session, 1, "peer said Open", "copying", ["x" * octets], is_durable=False)
    made.end(session, "ended", "moved", {"session": session})
    return session


def test_what_ended_long_ago_is_forgotten_and_what_is_under_way_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Journal(tmp_path / "journal.sqlite", keep=Retention(days=60.0 / 86400))
    clock = [1_000_000.0]
    monkeypatch.setattr(journal_module.time, "time", lambda: clock[0])
    made.begin("under way", "guest", "source", "host-b", "copying")
    old = ended(made, 1)
    clock[0] += 59
    recent = ended(made, 2)
    assert [row["session"] for row in made.sessions()] == [recent, old, "under way"]
    clock[0] += 1
    last = ended(made, 3)
    assert [row["session"] for row in made.sessions()] == [last, recent, "under way"]
    assert made.decisions(old) == []
    assert len(made.decisions(recent)) == 1


def test_journal_takes_no_more_room_than_it_may(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    made = Journal(path, keep=Retention(octets=1 << 20))
    made.begin("under way", "guest", "source", "host-b", "copying")
    made.keep_payload("under way", 1, bytes(100_000))
    for number in range(100):
        last = ended(made, number, octets=50_000)
    kept = [row["session"] for row in made.sessions()]
    assert kept[0] == last
    assert kept[-1] == "under way"
    assert 5 < len(kept) < 25
    assert [len(one) for _, one in made.payloads("under way")] == [100_000]
    made.close()
    assert path.stat().st_size < 1.2 * (1 << 20)


def test_descriptions_of_guests_take_no_room_from_the_history(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal.sqlite", keep=Retention(octets=1 << 20))
    for number in range(60):
        made.keep_description(f"guest {number}", "ä" * 10_000)
    kept = [ended(made, number) for number in range(4)]
    assert [row["session"] for row in made.sessions()] == kept[::-1]


def test_the_last_report_is_kept_whatever_room_it_takes(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal.sqlite", keep=Retention(octets=1))
    ended(made, 1)
    last = ended(made, 2)
    assert [row["session"] for row in made.sessions()] == [last]
