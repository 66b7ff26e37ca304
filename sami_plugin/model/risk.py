"""What would be lost if a guest moved, and what is said to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sami_plugin.model.flows import ACCOUNTING, Batch
from sami_plugin.model.migration import Answer
from sami_plugin.model.verdict import Verdict

MARKS, HELPERS, LABELS, MASTERS = "marks", "helpers", "labels", "masters"
SEQUENCE_ADJUSTMENT, SYNPROXY = "sequence adjustment", "synproxy"
"""Functions of a firewall that not each one has, and that not each flow needs."""
FUNCTIONS = frozenset({MARKS, HELPERS, LABELS, MASTERS, SEQUENCE_ADJUSTMENT, SYNPROXY})
ACCOUNTED = "accounting"
"""One that a driver has only if it says so."""

FUNCTION_OF: dict[str, str] = {
    "flowMark": MARKS,
    "conntrackHelper": HELPERS,
    "conntrackLabels": LABELS,
    "masterProtocolIdentifier": MASTERS,
    "tcpOffsetBefore": SEQUENCE_ADJUSTMENT,
    "tcpOffsetAfter": SEQUENCE_ADJUSTMENT,
    "reverseTcpOffsetBefore": SEQUENCE_ADJUSTMENT,
    "reverseTcpOffsetAfter": SEQUENCE_ADJUSTMENT,
    "synproxySequenceNumber": SYNPROXY,
    **dict.fromkeys(ACCOUNTING, ACCOUNTED),
}
"""By field, what a flow needs in which it is not 0."""


@dataclass(frozen=True, slots=True)
class Risk:
    """Of one migration, as the destination knows it before memory is copied."""

    guest: str
    source: str
    destination: str
    flows: int | None
    """How many the guest has; None: nobody said."""
    kinds: tuple[str, ...] = ()
    """Those that the destination takes."""
    carried: int = 0
    """How many of them have a place at the destination."""
    losses: Mapping[str, int] = field(default_factory=dict)
    """By reason, how many do not come at all."""
    degraded: Mapping[str, int] = field(default_factory=dict)
    """By reason, how many come, and may lack something."""
    why_unknown: str = ""

    @property
    def lost(self) -> int:
        return sum(self.losses.values())

    @property
    def is_none(self) -> bool:
        """Whether all is known, and all comes as it is."""
        return self.flows is not None and not self.losses and not self.degraded

    @property
    def words(self) -> str:
        """One line."""
        if self.flows is None:
            return f"what the guest's flows need is not known: {self.why_unknown}"
        parts = [f"{self.carried} of {self.flows} flows have a place on {self.destination}"]
        parts += [f"{count} lost: {reason}" for reason, count in self.losses.items()]
        parts += [f"{count} degraded: {reason}" for reason, count in self.degraded.items()]
        return "; ".join(parts)

    def answered(self, verdict: Verdict, kept_seconds: float) -> Answer:
        """What the source is told of it."""
        reasons = {**self.losses, **self.degraded}
        told = tuple(reasons), tuple(reasons.values())
        return Answer(self.carried, int(kept_seconds), self.kinds, *told, verdict=verdict.value)


def functions_of(batch: Batch) -> set[str]:
    """The functions that any of these flows uses."""
    there = batch.rows.dtype.names or ()
    return {function for name, function in FUNCTION_OF.items() if name in there and batch.rows[name].any()}
