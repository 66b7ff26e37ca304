"""What is told of a migration afterwards: what moved, what did not and why, and when each step was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES_PER_REASON = 20
"""How many flows of one reason a report names; the count tells how many there were."""
MOST_REMARKS = 50


@dataclass(slots=True)
class Report:
    """Collected by one session, from beginning to end."""

    session: str
    guest: str
    role: str
    host: str
    peer: str
    outcome: str = ""
    reason: str = ""
    verdict: dict[str, Any] = field(default_factory=dict)
    """What the destination's policy said before memory was copied, and to what; empty: it was not asked."""
    flows: dict[str, int] = field(default_factory=dict)
    """How many flows were exported, imported, degraded, refused, verified, purged, left, ..."""
    named: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per reason, how many flows and the names of the first of them."""
    steps: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By step, when it happened first: wall clock in seconds since 1970, monotonic clock of the host in seconds."""
    remarks: list[str] = field(default_factory=list)
    request_id: str = ""
    """The manager's, where it was told."""

    def step(self, name: str, wall: float, monotonic: float) -> None:
        """Notes when something happened; of what happens again and again, the first time."""
        self.steps.setdefault(name, (wall, monotonic))

    @property
    def began_at(self) -> float:
        """Wall clock of the first step, in seconds since 1970; never, where none has happened."""
        return next((wall for wall, _ in self.steps.values()), math.inf)

    def spans(self) -> dict[str, float]:
        """Milliseconds between the steps of `SPANS`, of those that happened."""
        at = self.steps
        return {
            name: round((at[until][1] - at[since][1]) * 1000, 3)
            for name, since, until in _NAMED_SPANS[self.role]
            if since in at and until in at
        }

    def remark(self, words: str) -> None:
        """Notes something for the operator, the same thing once, and only so much of it."""
        if words not in self.remarks and len(self.remarks) < MOST_REMARKS:
            self.remarks.append(words)

    def name(self, reason: str, count: int, names: tuple[str, ...]) -> None:
        entry = self.named.setdefault(reason, {"count": 0, "flows": []})
        entry["count"] += count
        entry["flows"] += names[: NAMES_PER_REASON - len(entry["flows"])]

    def name_once(self, reason: str, count: int, names: Sequence[str]) -> None:
        """Flows of which some may have been named already: those of which the names are known are counted once."""
        entry = self.named.setdefault(reason, {"count": 0, "flows": []})
        named = [*dict.fromkeys((*entry["flows"], *names))]
        entry["count"] = max(entry["count"], count, len(named))
        entry["flows"] = named[:NAMES_PER_REASON]

    def as_dict(self) -> dict[str, Any]:
        """For the journal and for JSON output."""
        return {
            "session": self.session,
            "guest": self.guest,
            "role": self.role,
            "host": self.host,
            "peer": self.peer,
            "request_id": self.request_id,
            "outcome": self.outcome,
            "reason": self.reason,
            "verdict": self.verdict,
            "flows": dict(self.flows),
            "named": self.named,
            "remarks": list(self.remarks),
            "steps": [
                {"step": name, "at": wall, "monotonic": monotonic}
                for name, (wall, monotonic) in tuple(self.steps.items())
            ],
            "milliseconds": self.spans(),
        }


BOTH_HAVE = "both hosts have the device {device}: what it keeps stays in it"
"""A remark."""

SPANS: dict[str, tuple[tuple[str, str], ...]] = {
    "source": (
        ("asked", "export began"),
        ("asked", "offered"),
        ("offered", "answered"),
        ("export began", "export ended"),
        ("suspended", "last changes sent"),
        ("suspended", "complete"),
        ("complete", "arrived"),
        ("arrived", "purged"),
        ("purged", "proved"),
        ("proved", "watched"),
    ),
    "destination": (
        ("asked", "offered"),
        ("first flows", "in sync"),
        ("started", "scope known"),
        ("resumed", "scope known"),
        ("last changes came", "last changes applied"),
        ("last changes applied", "complete"),
        ("complete", "resumed"),
        ("resumed", "complete"),
        ("arrived", "source purged"),
    ),
}
"""Which pairs of steps a report gives the time between."""
_NAMED_SPANS = {
    role: [(f"{since} to {until}", since, until) for since, until in spans] for role, spans in SPANS.items()
}
