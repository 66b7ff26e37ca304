"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable

from lab.errors import DeadlinePassed

POLL_SECONDS = 0.002


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 5.0, *, poll_seconds: float = POLL_SECONDS
) -> None:
    """Return as soon as condition() is true. Blocks; raises DeadlinePassed(what) after `seconds`.

    A condition that costs something is looked at less often: `poll_seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlinePassed(what, seconds)
        time.sleep(poll_seconds)
