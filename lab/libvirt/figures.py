"""What many migrations showed, in figures, and whether it holds. Pure functions on what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
MOST_RATIO, MOST_DIFFERENCE_MS = 1.05, 20.0
PROTOCOLS = ("tcp", "udp")


@dataclass(frozen=True, slots=True)
class Move:
    """One migration of a guest with streams. Times are of the lab's one clock."""

    has_sami: bool
    """SAMI and the firewall; else there was neither on any host."""
    way: str
    """ "a to b" """
    virsh_seconds: float
    pause_ms: float
    gaps_ms: dict[str, float]
    """By protocol, the longest gap of any of its streams in either direction."""
    gap_began_before_event_ms: float
    """The longest gap of all began so long before libvirt's word SUSPENDED was heard; less than 0: after it."""
    lost: tuple[str, ...] = ()
    """Streams that did not go on, each with the direction."""
    had_zone: bool = True
    """The destination knew the guest's zone before the guest ran there. As the next two, only with SAMI."""
    complete_after_pause_ms: float | None = None
    """Until the destination's kernel had all flows; None where it never had."""
    is_complete_before_resume: bool = False

    @property
    def gap_ms(self) -> float:
        """The longest of all."""
        return max(self.gaps_ms.values())


Pair = tuple[Move, Move]
"""The same way of the same guest, one after the other: without any firewall and without SAMI, then with both."""


def result(moves: Sequence[Move], pairs: Sequence[Pair], others: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds. A figure of which nothing was measured is None."""
    ours = [move for move in moves if move.has_sami]
    zoned = [move for move in ours if move.had_zone]
    took = [move.complete_after_pause_ms for move in ours if move.complete_after_pause_ms is not None]
    return {
        "migrations": len(ours),
        "connections_lost": sum(len(move.lost) for move in ours),
        "complete_before_resume_share": _share(zoned),
        "moves_without_zone": len(ours) - len(zoned),
        "moves_never_complete": len(ours) - len(took),
        "pause_to_complete_ms": {
            "median": _percentile(took, 50),
            "p99": _percentile(took, 99),
            "max": _percentile(took, 100),
        },
        "gap_ms": _gaps(pairs),
        "pause_ms": _beside(pairs, lambda move: move.pause_ms),
        "gap_began_before_event_ms": {
            "median": _percentile([move.gap_began_before_event_ms for move in moves], 50),
            "max": _percentile([move.gap_began_before_event_ms for move in moves], 100),
        },
        "virsh_seconds": _beside(pairs, lambda move: move.virsh_seconds, digits=2),
        **others,
    }


def faults(made: dict[str, Any]) -> list[str]:
    """What of a result does not hold, in words."""
    found = []
    if made["connections_lost"]:
        found.append(f"{made['connections_lost']} connections were lost")
    if made["complete_before_resume_share"] != 1:
        found.append(f"flows were complete before the guest ran in {made['complete_before_resume_share']}, not in all")
    gap = made["gap_ms"]
    if gap is None:
        found.append("no pair was measured, so nothing is known of the gap")
    else:
        if gap["ratio_low"] > MOST_RATIO:
            found.append(f"the gap is longer than without firewall: ratio at least {gap['ratio_low']}")
        if gap["difference"] > MOST_DIFFERENCE_MS:
            found.append(f"the gap is {gap['difference']:.0f} ms longer than without firewall (medians)")
    return found


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Ratio of medians, second to first, and its 95 % bootstrap interval over the pairs."""
    value, resampled = _medians(pairs)
    low, high = np.percentile(resampled[1] / resampled[0], (2.5, 97.5))
    return float(value[1] / value[0]), float(low), float(high)


def difference_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Difference of medians, second less first, likewise."""
    value, resampled = _medians(pairs)
    low, high = np.percentile(resampled[1] - resampled[0], (2.5, 97.5))
    return float(value[1] - value[0]), float(low), float(high)


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Of both sides, and of resamples of the pairs, a row for each side."""
    both = np.array(pairs)
    chosen = np.random.default_rng(1).integers(0, len(both), (RESAMPLES, len(both)))
    return np.median(both, axis=0), np.median(both[chosen], axis=1).T


def table(made: dict[str, Any], name: str = "") -> str:
    """A result for people, a line for each figure."""
    lines = []
    for key, value in made.items():
        words = f"{name} {key}".strip().replace("_", " ")
        lines.append(table(value, words) if isinstance(value, dict) else f"{words:<56}{value}")
    return "\n".join(lines)


def _gaps(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    if not pairs:
        return None
    gaps = [(without.gap_ms, ours.gap_ms) for without, ours in pairs]
    both = _beside(pairs, lambda move: move.gap_ms) or {}
    by_protocol = {
        protocol: _beside(pairs, lambda move, protocol=protocol: move.gaps_ms[protocol])
        for protocol in PROTOCOLS
        if all(protocol in move.gaps_ms for pair in pairs for move in pair)
    }
    ends = ("", "_low", "_high")
    ratios = {f"ratio{end}": round(value, 3) for end, value in zip(ends, ratio_interval(gaps), strict=True)}
    apart = {f"difference{end}": round(value, 1) for end, value in zip(ends, difference_interval(gaps), strict=True)}
    return {**both, **ratios, **apart, "pairs": len(pairs), **by_protocol}


def _beside(pairs: Sequence[Pair], figure: Any, digits: int = 1) -> dict[str, float] | None:
    if not pairs:
        return None
    medians = (round(float(np.median([figure(pair[side]) for pair in pairs])), digits) for side in (0, 1))
    return dict(zip(("without_firewall", "with_sami"), medians, strict=True))


def _share(zoned: Sequence[Move]) -> float | None:
    return float(np.mean([move.is_complete_before_resume for move in zoned])) if zoned else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 1) if values else None
