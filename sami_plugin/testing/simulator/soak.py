"""Many runs one after another."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any

from sami_plugin.testing.simulator.world import World, attentive

SLICE = 500
"""Runs between two words of how far it is."""


@dataclass(slots=True)
class Slice:
    """Some runs, and what was violated in which."""

    runs: int
    cpu_seconds: float = 0.0
    """Of the process that played them."""
    failed: dict[int, list[str]] = field(default_factory=dict)


def played(first: int, runs: int, **fixed: Any) -> Slice:
    """The runs of so many seeds, from the first on; `fixed` as in `World`."""
    part = Slice(runs)
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
