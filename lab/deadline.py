"""Waiting for a condition, never for a time."""

import os
import time
from collections.abc import Callable

from lab.errors import DeadlinePassed

POLL_SECONDS = 0.002

STRETCHED = "KERNEL_LAB"
"""Where it is set, in guests of lab.kernels, all takes some fifteen times as long, and may."""
STRETCH = 20 if STRETCHED in os.environ else 1


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 5.0, *, poll_seconds: float = POLL_SECONDS
) -> None:
    """Return as soon as condition() is true. Blocks; raises DeadlinePassed(what) after `seconds`.

    A condition that costs something is looked at less often: `poll_seconds`.
    """
    deadline = time.monotonic() + seconds * STRETCH
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlinePassed(what, seconds * STRETCH)
        time.sleep(poll_seconds)
