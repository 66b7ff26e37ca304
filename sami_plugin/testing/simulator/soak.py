"""Many runs one after another."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

from sami_plugin.testing.simulator.world import World, attentive

SLICE = 250
"""Runs between two words of how far it is."""


@dataclass(slots=True)
class Slice:
    """Some runs, and what was violated in which."""

    runs: int
    failed: dict[int, list[str]] = field(default_factory=dict)


def played(first: int, runs: int) -> Slice:
    """The runs of so many seeds, from the first on."""
    part = Slice(runs)
    # A world is one large circle of objects, which is swept up when all is over.
    gc.disable()
    try:
        with attentive():
            for seed in range(first, first + runs):
                if violations := World(seed, tells=False).run():
                    part.failed[seed] = [str(violation) for violation in violations]
    finally:
        gc.enable()
        gc.collect()
    return part
