"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable

from lab.errors import DeadlinePassed

POLL_SECONDS = 0.002


def wait_until(condition: Callable[[], object], what: str, seconds: float = 5.0) -> None:
    """Return as soon as condition() is true. Blocks; raises DeadlinePassed(what) after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlinePassed(what, seconds)
        time.sleep(POLL_SECONDS)
