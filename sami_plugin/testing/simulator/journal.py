"""A journal in memory, which outlives its host's agent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import itemgetter
from typing import Any

from sami_plugin.errors import JournalError
from sami_plugin.journal.journal import Journal


class MemoryJournal(Journal):
    """As `Journal`. `disturb` is told before and after each write which it is, and may raise what it likes."""

    def __init__(self, clock: Callable[[], float], disturb: Callable[[str, str], None]) -> None:
        self._clock = clock
        self._disturb = disturb
        self.is_full = False
        self._sessions: dict[str, dict[str, Any]] = {}
        self._decisions: dict[str, list[dict[str, Any]]] = {}
        self._payloads: dict[str, dict[int, bytes]] = {}
        self._outgoing: dict[str, str] = {}
        self._noted_at: dict[str, float] = {}
        self._noted: list[tuple[str, float, float]] = []
        """Guests, and from when to when it was written down that they leave."""

    def close(self) -> None:
        pass

    def _before(self, what: str) -> None:
        self._disturb("before", what)
        if self.is_full:
            raise JournalError("cannot use the journal: the disk is full")

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
        self._before("beginning")
        self._enter(session, guest, role, peer, state)
        self._sessions[session].update(ports=list(ports), destination=destination, token=token)
        self._disturb("after", "beginning")

    def _enter(self, session: str, guest: str, role: str, peer: str, state: str) -> None:
        self._sessions[session] = {
            "session": session,
            "place": len(self._sessions),
            "guest": guest,
            "role": role,
            "peer": peer,
            "state": state,
            "started_at": self._clock(),
            "begun_at": self._clock(),
            "ended_at": None,
            "outcome": None,
            "report": None,
            "known_as": session,
            "heard": [],
            "ports": [],
            "destination": "",
            "token": "",
            "applied": 0,
            "named": {},
        }

    def record(
        self, session: str, number: int, event: str, state: str, actions: list[str], *, is_durable: bool
    ) -> None:
        self._before("a record")
        self._decisions.setdefault(session, []).append(
            {
                "session": session,
                "number": number,
                "at": self._clock(),
                "event": event,
                "state": state,
                "actions": actions,
                "is_durable": is_durable,
            }
        )
        self._disturb("after", "a record")

    def keep_payload(self, session: str, number: int, payload: bytes) -> None:
        self._before("a payload")
        self._payloads.setdefault(session, {})[number] = payload
        self._disturb("after", "a payload")

    def note_applied(self, session: str, number: int, named: Mapping[str, Any]) -> None:
        self._before("what is applied")
        if session in self._sessions:
            self._sessions[session].update(applied=number, named=named)

    def note_named(self, session: str, named: Mapping[str, Any]) -> None:
        self._before("what is named")
        if session in self._sessions:
            self._sessions[session].update(named=named)

    def keep_outgoing(self, guest: str, told: str | None) -> None:
        self._before("what goes out")
        if told is None:
            self._outgoing.pop(guest, None)
            if guest in self._noted_at:
                self._noted.append((guest, self._noted_at.pop(guest), self._clock()))
        else:
            self._outgoing[guest] = told
            self._noted_at.setdefault(guest, self._clock())
        self._disturb("after", "what goes out")

    def had_noted(self, guest: str, after: float, before: float) -> bool:
        """Whether it was written down between these times that the guest leaves."""
        still = ((one, since, math.inf) for one, since in self._noted_at.items())
        return any(
            one == guest and since <= before and after <= until for one, since, until in chain(self._noted, still)
        )

    def outgoing(self) -> dict[str, str]:
        return dict(self._outgoing)

    def go_on(
        self, former: str, session: str, known_as: str, state: str, heard: Iterable[str], report: dict[str, Any]
    ) -> None:
        self._before("going on")
        now, known = self._clock(), self._sessions.get(former)
        if known is not None:
            begun = {"session": session, "known_as": known_as, "state": state, "heard": sorted(heard)}
            is_open = {"started_at": now, "ended_at": None, "outcome": None, "report": None}
            self._sessions[session] = {**known, **begun, **is_open}
            known.update(state="ended", outcome=report["outcome"], report=report, ended_at=now)
        self._payloads[session] = self._payloads.pop(former, {})
        self._disturb("after", "going on")

    def know(
        self, session: str, *, peer: str, ports: list[dict[str, Any]], destination: str = "", token: str = ""
    ) -> None:
        self._before("what is known")
        if session in self._sessions:
            self._sessions[session].update(peer=peer, ports=ports, destination=destination, token=token)

    def unfinished(self) -> list[dict[str, Any]]:
        return [_told(row) for row in self._in_order() if row["ended_at"] is None]

    def known_as(self, known_as: str, role: str) -> dict[str, Any] | None:
        rows = [row for row in self._sessions.values() if (row["known_as"], row["role"]) == (known_as, role)]
        return _told(rows[-1]) if rows else None

    def newest(self, guest: str) -> str:
        return next((row["session"] for row in reversed(self._in_order()) if row["guest"] == guest), "")

    def _in_order(self) -> list[dict[str, Any]]:
        return sorted(self._sessions.values(), key=itemgetter("place"))

    def payload_count(self, session: str) -> int:
        return max(self._payloads.get(session, {0: b""}), default=0)

    def end(
        self, session: str, state: str, outcome: str, report: dict[str, Any], *, keep_payloads_seconds: float = 0.0
    ) -> None:
        self._before("the end")
        if session not in self._sessions:
            self._enter(session, report["guest"], report["role"], report["peer"], state)
        self._sessions[session].update(state=state, outcome=outcome, report=report, ended_at=self._clock())
        if not keep_payloads_seconds:
            self._payloads.pop(session, None)
        self._disturb("after", "the end")

    def count_refusals(self, counts: Mapping[tuple[str, str], int]) -> None:
        pass

    def refusals(self) -> list[dict[str, Any]]:
        return []

    def sessions(self) -> list[dict[str, Any]]:
        return [_told(row) for row in reversed(self._in_order())]

    def decisions(self, session: str) -> list[dict[str, Any]]:
        return self._decisions.get(session, [])

    def payloads(self, session: str) -> Iterator[tuple[int, bytes]]:
        yield from sorted(self._payloads.get(session, {}).items())

    # What the checks ask.

    def outcome_of(self, session: str) -> str:
        """How the session ended, if that is written down; else empty."""
        return self._sessions.get(session, {}).get("outcome") or ""

    def has_payloads(self, session: str) -> bool:
        """Whether flows of the session are kept."""
        return bool(self._payloads.get(session))


def _told(row: dict[str, Any]) -> dict[str, Any]:
    told = {name: json.dumps(row[name]) for name in ("heard", "ports", "report", "named") if row[name] is not None}
    return {**row, **told}
