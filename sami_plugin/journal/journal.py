"""The journal: one SQLite file per host.

Every decision is a row, written before its actions are done: what happened, the state it led to, and what is to be
done. Payloads of flows are kept as they were sent or received, so that a later start can name what was put in or has to
go. Only what is marked as durable waits for the disk; the rest is in the file system's hands at once and on the disk a
little later, because a disk takes longer than a guest is paused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sami_plugin.errors import JournalDamaged, JournalError
from sami_plugin.model.settings import Retention

LOG = logging.getLogger(__name__)

FORMAT_VERSION = 2

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session     TEXT PRIMARY KEY,
    guest       TEXT NOT NULL,
    role        TEXT NOT NULL,
    peer        TEXT NOT NULL,
    state       TEXT NOT NULL,
    started_at  REAL NOT NULL,
    ended_at    REAL,
    outcome     TEXT,
    report      TEXT,
    known_as    TEXT NOT NULL DEFAULT '',
    heard       TEXT NOT NULL DEFAULT '[]',
    ports       TEXT NOT NULL DEFAULT '[]',
    flows_until REAL NOT NULL DEFAULT 0,
    destination TEXT NOT NULL DEFAULT '',
    token       TEXT NOT NULL DEFAULT '',
    applied     INTEGER NOT NULL DEFAULT 0,
    named       TEXT NOT NULL DEFAULT '{}',
    begun_at    REAL NOT NULL DEFAULT 0,
    place       INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS decisions (
    session     TEXT NOT NULL,
    number      INTEGER NOT NULL,
    at          REAL NOT NULL,
    event       TEXT NOT NULL,
    state       TEXT NOT NULL,
    actions     TEXT NOT NULL,
    PRIMARY KEY (session, number)
);
CREATE TABLE IF NOT EXISTS payloads (
    session     TEXT NOT NULL,
    number      INTEGER NOT NULL,
    payload     BLOB NOT NULL,
    PRIMARY KEY (session, number)
);
CREATE TABLE IF NOT EXISTS outgoing (
    guest       TEXT PRIMARY KEY,
    told        TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS descriptions (
    guest       TEXT PRIMARY KEY,
    xml         TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS refusals (
    who         TEXT NOT NULL,
    reason      TEXT NOT NULL,
    count       INTEGER NOT NULL,
    first_at    REAL NOT NULL,
    last_at     REAL NOT NULL,
    PRIMARY KEY (who, reason)
);
"""

_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_PRIMARY = 0xFF
"""Of a result code; the rest says more."""

_ADDED = {
    "known_as": "TEXT NOT NULL DEFAULT ''",
    "heard": "TEXT NOT NULL DEFAULT '[]'",
    "ports": "TEXT NOT NULL DEFAULT '[]'",
    "flows_until": "REAL NOT NULL DEFAULT 0",
    "destination": "TEXT NOT NULL DEFAULT ''",
    "token": "TEXT NOT NULL DEFAULT ''",
    "applied": "INTEGER NOT NULL DEFAULT 0",
    "named": "TEXT NOT NULL DEFAULT '{}'",
    "begun_at": "REAL NOT NULL DEFAULT 0",
    "place": "INTEGER NOT NULL DEFAULT 0",
}
"""Columns of sessions that agents before this one did not write; they can do with them."""
PLACE = "CASE place WHEN 0 THEN rowid ELSE place END"
"""Among all sessions: who goes on with one stands where that stood, whatever has begun since."""

MOST_REFUSALS = 1000
"""Rows; those that were not seen for longest give way."""


def opened(path: str | Path, keep: Retention) -> Journal:
    """The journal for an agent. A file that is damaged is put aside, for somebody to look at, and another one begun.

    :raises JournalError: it cannot be read or written; who mends that loses nothing.
    """
    try:
        with contextlib.ExitStack() as unless_whole:
            journal = Journal(path, keep=keep)
            unless_whole.callback(journal.close)
            journal.check()
            unless_whole.pop_all()
        return journal
    except JournalDamaged as error:
        aside = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{ending}", f"{aside}{ending}")
        LOG.error("%s; it is %s now, and a new one begins: what was under way is not gone on with", error, aside)
        return Journal(path, keep=keep)


class Journal:
    """Thread-safe. A file that cannot be used raises `JournalError`, which tells the path and the reason."""

    def __init__(
        self,
        path: str | Path,
        *,
        read_only: bool = False,
        keep: Retention = Retention(),  # noqa: B008, a frozen value
    ) -> None:
        self.path = Path(path)
        self._keep = keep
        self._lock = threading.Lock()
        try:
            if read_only:
                self._db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, check_same_thread=False)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
                os.fchmod(file, 0o600)  # it may have been there, and others must not write what is believed later
                os.close(file)
                self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
                # Nothing waits for the disk but what calls `_sync`; a file system without WAL has all of it wait.
                self._is_logged = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal"
                self._db.execute(f"PRAGMA synchronous={'NORMAL' if self._is_logged else 'FULL'}")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > FORMAT_VERSION or (read_only and version == 0):
                raise JournalError(f"{self.path} is no journal of format {FORMAT_VERSION} (it says {version})")
            if not read_only:
                columns = [row[1] for row in self._db.execute("PRAGMA table_info(sessions)")]
                missing = [column for column in _ADDED if columns and column not in columns]
                later = "".join(f"ALTER TABLE sessions ADD COLUMN {one} {_ADDED[one]};" for one in missing)
                self._db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{later}PRAGMA user_version={FORMAT_VERSION};COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> JournalError:
        is_damaged = getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _DAMAGED
        kind = JournalDamaged if is_damaged else JournalError
        return kind(f"cannot use the journal {self.path}: {error}")

    def check(self) -> None:
        """Reads all of the file.

        :raises JournalDamaged: a part of it is not what was written there.
        :raises JournalError: it cannot be read now.
        """
        try:
            with self._lock:
                (said,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        if said != "ok":
            kind = JournalError if "unable to get" in said or "failed to get" in said else JournalDamaged
            raise kind(f"cannot use the journal {self.path}: {' '.join(said.split())}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def begin(
        self,
        session: str,
        guest: str,
        role: str,
        peer: str,
        state: str,
        *,
        ports: Iterable[dict[str, Any]] = (),
        destination: str = "",
        token: str = "",
    ) -> None:
        """`destination` is where the guest goes to, `token` what its description says (`Origin`), if they are known.

        `ports` as in `know`.
        """
        now = time.time()
        self._write(
            "INSERT INTO sessions "
            "(session, guest, role, peer, state, started_at, begun_at, known_as, ports, destination, token) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (session, guest, role, peer, state, now, now, session, json.dumps(list(ports)), destination, token),
        )

    def go_on(
        self, former: str, session: str, known_as: str, state: str, heard: Iterable[str], report: dict[str, Any]
    ) -> None:
        """Ends a session with which another one goes on, and begins that one, with all that the former has kept.

        `known_as` is the id by which the peer knows it, `state` and `heard` are what it has come to so far. Waits for
        the disk.
        """
        now, told = time.time(), json.dumps(report)
        with self._lock, self._failing():
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:  # commits, or rolls back
                self._db.execute(
                    "INSERT INTO sessions (session, guest, role, peer, state, started_at, known_as, heard, ports, "
                    "destination, token, applied, named, begun_at, place) "
                    "SELECT ?, guest, role, peer, ?, ?, ?, ?, ports, destination, token, applied, named, begun_at, "
                    f"{PLACE} FROM sessions WHERE session = ?",
                    (session, state, now, known_as, json.dumps(sorted(heard)), former),
                )
                self._db.execute("UPDATE payloads SET session = ? WHERE session = ?", (session, former))
                self._db.execute(
                    "UPDATE sessions SET state = 'ended', outcome = ?, report = ?, ended_at = ?, token = '' "
                    "WHERE session = ?",
                    (report["outcome"], told, now, former),
                )
        self._sync()

    def know(
        self, session: str, *, peer: str, ports: list[dict[str, Any]], destination: str = "", token: str = ""
    ) -> None:
        """Who the other host is, and where the guest's ports have their state here: as much as is known by now."""
        self._write(
            "UPDATE sessions SET peer = ?, ports = ?, destination = ?, token = ? WHERE session = ?",
            (peer, json.dumps(ports), destination, token, session),
        )

    def unfinished(self) -> list[dict[str, Any]]:
        """Sessions that have begun and not ended, oldest first."""
        return self._read(f"SELECT * FROM sessions WHERE ended_at IS NULL ORDER BY {PLACE}, rowid", ())

    def known_as(self, known_as: str, role: str) -> dict[str, Any] | None:
        """The newest session by the id that both hosts know it by; None where there is none."""
        rows = self._read(
            "SELECT * FROM sessions WHERE known_as = ? AND role = ? ORDER BY rowid DESC LIMIT 1",
            (known_as, role),
        )
        return rows[0] if rows else None

    def record(
        self, session: str, number: int, event: str, state: str, actions: list[str], *, is_durable: bool
    ) -> None:
        """Writes one decision. Where `is_durable`, returns only when the disk has it and all before it."""
        self._write(
            "INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?)",
            (session, number, time.time(), event, state, json.dumps(actions)),
            is_durable=is_durable,
        )

    def keep_payload(self, session: str, number: int, payload: bytes) -> None:
        self._write("INSERT OR REPLACE INTO payloads VALUES (?, ?, ?)", (session, number, payload))

    def note_applied(self, session: str, number: int, named: Mapping[str, Any]) -> None:
        """What the payloads say up to this one is done: of all behind it, it may be, or may be in part.

        `named` is what the report will say of flows that were not put in as they were sent.
        """
        query = "UPDATE sessions SET applied = ?, named = ? WHERE session = ?"
        self._write(query, (number, json.dumps(named), session))

    def note_named(self, session: str, named: Mapping[str, Any]) -> None:
        """What the report of a source will say of flows that were not sent."""
        self._write("UPDATE sessions SET named = ? WHERE session = ?", (json.dumps(named), session))

    def end(
        self, session: str, state: str, outcome: str, report: dict[str, Any], *, keep_payloads_seconds: float = 0.0
    ) -> None:
        """Closes a session, which may not be here yet: what did not work when it began may work now.

        Drops its payloads, for the flows are where they belong now, or keeps them for a while.
        Forgets sessions that ended longer ago than they are kept, and the oldest of those that take too much room.
        """
        now, told = time.time(), json.dumps(report)
        with self._lock, self._failing():
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:  # commits, or rolls back
                ended = self._db.execute(
                    "UPDATE sessions SET state = ?, outcome = ?, report = ?, ended_at = ?, flows_until = ?, token = '' "
                    "WHERE session = ?",
                    (state, outcome, told, now, now + keep_payloads_seconds, session),
                )
                if not ended.rowcount:
                    self._db.execute(
                        "INSERT INTO sessions (session, guest, role, peer, state, started_at, ended_at, outcome, "
                        "report, known_as, flows_until) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            *(session, report["guest"], report["role"], report["peer"], state, now, now),
                            *(outcome, told, session, now + keep_payloads_seconds),
                        ),
                    )
                self._db.execute(
                    "DELETE FROM payloads WHERE session IN "
                    "(SELECT session FROM sessions WHERE ended_at IS NOT NULL AND flows_until <= ?)",
                    (now,),
                )
                self._forget(time.time() - self._keep.days * 86400.0)
                while self._octets() > self._keep.octets and (older := self._older_half_ended()) is not None:
                    self._forget(older)

    def _forget(self, ended_at: float) -> None:
        """The sessions that ended then or before, and all about them."""
        gone = "(SELECT session FROM sessions WHERE ended_at <= ?)"
        for table in ("decisions", "payloads", "sessions"):
            self._db.execute(f"DELETE FROM {table} WHERE session IN {gone}", (ended_at,))

    def _octets(self) -> int:
        """What sessions take of the file; it does not shrink, and what is free in it is used again."""
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        (of_guests,) = self._db.execute("SELECT total(length(CAST(xml AS BLOB))) FROM descriptions").fetchone()
        return int((pages - free) * size - of_guests)

    def _older_half_ended(self) -> float | None:
        """When the last one of the older half ended; None where there is but one, which is kept."""
        rows = self._db.execute("SELECT ended_at FROM sessions WHERE ended_at IS NOT NULL ORDER BY ended_at").fetchall()
        return float(rows[len(rows) // 2 - 1][0]) if len(rows) > 1 else None

    def keep_outgoing(self, guest: str, told: str | None) -> None:
        """What is known of a guest that is moved away; None where it is not, any more."""
        self._keep_of("outgoing", guest, told)

    def outgoing(self) -> dict[str, str]:
        """By guest, what was kept of those that are moved away."""
        return {row["guest"]: row["told"] for row in self._read("SELECT * FROM outgoing", ())}

    def keep_description(self, guest: str, xml: str | None) -> None:
        """How a guest that runs here is described; None where it does not run here any more."""
        self._keep_of("descriptions", guest, xml)

    def descriptions(self) -> dict[str, str]:
        """By guest, of those that run here."""
        return {row["guest"]: row["xml"] for row in self._read("SELECT * FROM descriptions", ())}

    def _keep_of(self, table: str, guest: str, text: str | None) -> None:
        if text is None:
            self._write(f"DELETE FROM {table} WHERE guest = ?", (guest,))
        else:
            self._write(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (guest, text))

    def count_refusals(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Adds how often each one was refused for each reason since the last call."""
        now = time.time()
        with self._lock, self._failing():
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:  # commits, or rolls back
                self._db.executemany(
                    "INSERT INTO refusals VALUES (?, ?, ?, ?, ?) ON CONFLICT (who, reason) "
                    "DO UPDATE SET count = count + excluded.count, last_at = excluded.last_at",
                    [(who, reason, count, now, now) for (who, reason), count in counts.items()],
                )
                self._db.execute(
                    "DELETE FROM refusals WHERE rowid IN "
                    "(SELECT rowid FROM refusals ORDER BY last_at DESC LIMIT -1 OFFSET ?)",
                    (MOST_REFUSALS,),
                )

    def refusals(self) -> list[dict[str, Any]]:
        """Who was refused what, and how often; the last one first. None in a journal of before they were counted."""
        if not self._read("SELECT 1 FROM sqlite_master WHERE name = 'refusals'", ()):
            return []
        return self._read("SELECT * FROM refusals ORDER BY last_at DESC", ())

    def sessions(self) -> list[dict[str, Any]]:
        """All sessions, newest first, each in the state to which its last decision led."""
        last = "SELECT state FROM decisions WHERE session = sessions.session ORDER BY number DESC LIMIT 1"
        rows = self._read(f"SELECT *, ({last}) AS last FROM sessions ORDER BY {PLACE} DESC, rowid DESC", ())
        for row in rows:
            last = row.pop("last")
            row["state"] = last if last is not None and row["ended_at"] is None else row["state"]
        return rows

    def decisions(self, session: str) -> list[dict[str, Any]]:
        """What was decided in a session, in order."""
        rows = self._read("SELECT * FROM decisions WHERE session = ? ORDER BY number", (session,))
        for row in rows:
            row["actions"] = json.loads(row["actions"])
        return rows

    def payloads(self, session: str) -> Iterator[tuple[int, bytes]]:
        """With their numbers, in order."""
        for row in self._read("SELECT * FROM payloads WHERE session = ? ORDER BY number", (session,)):
            yield row["number"], row["payload"]

    def newest(self, guest: str) -> str:
        """The id of the guest's newest session; empty where it has none."""
        query = f"SELECT session FROM sessions WHERE guest = ? ORDER BY {PLACE} DESC, rowid DESC LIMIT 1"
        rows = self._read(query, (guest,))
        return str(rows[0]["session"]) if rows else ""

    def payload_count(self, session: str) -> int:
        """The highest number of a payload; 0 where there is none."""
        rows = self._read("SELECT max(number) AS number FROM payloads WHERE session = ?", (session,))
        return int(rows[0]["number"] or 0)

    def _read(self, query: str, values: tuple[object, ...]) -> list[dict[str, Any]]:
        with self._lock, self._failing():
            cursor = self._db.execute(query, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _write(self, query: str, values: tuple[object, ...], *, is_durable: bool = False) -> None:
        with self._lock, self._failing():
            self._db.execute(query, values)
        if is_durable:
            self._sync()

    def _sync(self) -> None:
        """Waits until the disk has all that was written. Others write meanwhile: no guest waits for another's flush.

        Of the log SQLite itself syncs the beginning, and the whole of it before any of it goes into the database.
        """
        if not self._is_logged:
            return
        with self._failing():
            file = os.open(f"{self.path}-wal", os.O_RDONLY)
            try:
                os.fdatasync(file)
            finally:
                os.close(file)

    def _failing(self) -> _Failing:
        return _Failing(self.path)


class _Failing:
    """Turns what SQLite and the disk raise into `JournalError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, sqlite3.Error | OSError):
            raise JournalError(f"cannot use the journal {self._path}: {error}") from error
