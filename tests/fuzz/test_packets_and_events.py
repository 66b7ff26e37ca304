"""A short run of what `make fuzz` does for long."""

from __future__ import annotations

from tests.fuzz import events, packets
from tests.fuzz.hunt import hunt


def test_spoiled_packets_are_heard_by_nobody() -> None:
    counts = hunt(packets.target(), 300, seed=1)
    assert counts["taken"] < 300
    assert sum(counts.values()) == 300


def test_spoiled_events_are_refused_or_are_events() -> None:
    counts = hunt(events.TARGET, 4000, seed=1)
    assert min(counts["OperatorError"], counts["Malformed"], counts["taken"]) > 50, counts
