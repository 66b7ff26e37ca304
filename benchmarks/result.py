"""What a benchmark gives: medians beside the floor of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Progress = Callable[[str], None]


def row(
    name: str, flows: int, seconds: Sequence[float], floors: Sequence[float], peers: Sequence[float] = ()
) -> dict[str, Any]:
    """Medians of all runs; `ratio` is to the floor. `peer` is what people use today."""
    took, least = statistics.median(seconds), statistics.median(floors)
    made: dict[str, Any] = {
        "name": name,
        "flows": flows,
        "runs": len(seconds),
        "seconds": round(took, 6),
        "floor_seconds": round(least, 6),
        "ratio": round(took / least, 4),
        "peer": None,
    }
    if peers:
        made["peer"] = {"name": "conntrack -L -o save | -R, -L, -D", "seconds": round(statistics.median(peers), 6)}
    return made
