"""A journal in memory, which outlives its host's agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sami_plugin.errors import JournalError
from sami_plugin.journal.journal import Journal


class MemoryJournal(Journal):
    """As `Journal`. `disturb` is called before and after each write, and may raise what it likes."""

    def __init__(self, clock: Callable[[], float], disturb: Callable[[str], None]) -> None:
        self._clock = clock
        self._disturb = disturb
        self.is_full = False
        self._sessions: dict[str, dict[str, Any]] = {}
        self._decisions: dict[str, list[dict[str, Any]]] = {}
        self._payloads: dict[str, dict[int, bytes]] = {}

    def close(self) -> None:
        pass

    def _before(self, what: str) -> None:
        self._disturb(f"before {what}")
        if self.is_full:
            raise JournalError("cannot use the journal: the disk is full")

    def begin(self, session: str, guest: str, role: str, peer: str, state: str) -> None:
        self._before("beginning")
        self._sessions[session] = {
            "session": session,
            "guest": guest,
            "role": role,
            "peer": peer,
            "state": state,
            "started_at": self._clock(),
            "ended_at": None,
            "outcome": None,
            "report": None,
        }
        self._disturb("after beginning")

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
        self._disturb("after a record")

    def keep_payload(self, session: str, number: int, payload: bytes) -> None:
        self._before("a payload")
        self._payloads.setdefault(session, {})[number] = payload
        self._disturb("after a payload")

    def end(self, session: str, state: str, outcome: str, report: dict[str, Any]) -> None:
        self._before("the end")
        known = self._sessions.get(session)
        if known is not None:
            known.update(state=state, outcome=outcome, report=report, ended_at=self._clock())
        self._payloads.pop(session, None)
        self._disturb("after the end")

    def count_refusals(self, counts: Mapping[tuple[str, str], int]) -> None:
        pass

    def refusals(self) -> list[dict[str, Any]]:
        return []

    def sessions(self) -> list[dict[str, Any]]:
        return list(reversed(self._sessions.values()))

    def decisions(self, session: str) -> list[dict[str, Any]]:
        return self._decisions.get(session, [])

    def payloads(self, session: str) -> Iterator[bytes]:
        yield from self._payloads.get(session, {}).values()

    # What the checks ask.

    def has_payloads(self, session: str) -> bool:
        """Whether flows of the session are kept."""
        return bool(self._payloads.get(session))
