"""A short hunt; the long one is ``python -m tests.fuzz.messages --inputs 1000000``."""

from __future__ import annotations

from tests.fuzz.hunt import hunt
from tests.fuzz.messages import TARGET


def test_messages_are_taken_or_refused_whatever_comes() -> None:
    counts = hunt(TARGET, inputs=20_000, seed=20240229)
    assert counts["taken"] > 1_000
    assert counts["Malformed"] > 5_000
