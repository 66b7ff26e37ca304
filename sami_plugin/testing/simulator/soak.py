"""Many runs one after another."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any

from sami_plugin.testing.simulator.world import World, attentive

SLICE = 500
"""Runs between two words of how far it is."""
FLOOR_TURNS = 20_000
"""Of the loop that tells how fast the machine is now."""


@dataclass(slots=True)
class Slice:
    """Some runs, and what was violated in which."""

    runs: int
    cpu_seconds: float = 0.0
    """Of the process that played them."""
    floor_seconds: float = 0.0
    """What `FLOOR_TURNS` turns of a loop took the same process just before."""
    failed: dict[int, list[str]] = field(default_factory=dict)


def played(first: int, runs: int, **fixed: Any) -> Slice:
    """The runs of so many seeds, from the first on; `fixed` as in `World`."""
    part = Slice(runs, floor_seconds=_floor())
    began = time.process_time()
    # A world is one large circle of objects, which is swept up when all is over.
    gc.disable()
    gc.freeze()
    try:
        with attentive():
            for seed in range(first, first + runs):
                world = World(seed, tells=False, **fixed)
                if violations := world.run():
                    part.failed[seed] = [str(violation) for violation in violations]
                world.dissolve()
    finally:
        gc.collect()
        gc.unfreeze()
        gc.enable()
    part.cpu_seconds = time.process_time() - began
    return part


@dataclass(slots=True)
class _Counted:
    number: int

    def key(self) -> tuple[int, int]:
        return self.number, self.number + 1


def _floor() -> float:
    """CPU seconds of what a run is made of, too: objects, calls and a dictionary."""
    began = time.process_time()
    known = {}
    for number in range(FLOOR_TURNS):
        one = _Counted(number)
        known[one.key()] = one
    return time.process_time() - began
