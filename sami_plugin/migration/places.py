"""Who may put how many new entries into a device, so that no import makes it drop the entries of others.

A kernel whose table is full drops unassured entries of anybody to make room (early_drop in nf_conntrack_core.c). So
some of the table is left alone, and no place is promised twice.
"""

from __future__ import annotations

from collections.abc import Callable

SPARE = 1000
SPARE_SHARE = 16
"""What is promised beyond what was asked for, at most that part of what is free: in the pause nothing is asked then."""

Look = Callable[[], tuple[int | None, int]]
"""The device's capacity, None where it has no limit of its own, and how many entries it has now."""


class Places:
    """The promises of one device. Not thread-safe."""

    def __init__(self, headroom_percent: float) -> None:
        self._headroom = headroom_percent / 100
        self._left: dict[str, int] = {}
        """By session, what it may put in without the device being asked."""
        self._taken: dict[str, int] = {}
        """By session, what it is putting in now: the device has it already, or not yet."""

    def take(self, session: str, wanted: int, look: Look) -> int:
        """How many new entries of `wanted` the session may put in, after which it says `used`."""
        left = self._left.get(session, 0)
        if wanted <= left:
            granted, left = wanted, left - wanted
        else:
            capacity, in_use = look()
            if capacity is None:
                return wanted
            others = sum(count for one, count in (*self._left.items(), *self._taken.items()) if one != session)
            free = max(0, int(capacity * (1 - self._headroom)) - in_use - others)
            granted = min(wanted, free)
            left = min(SPARE, (free - granted) // SPARE_SHARE)
        self._left[session] = left
        self._taken[session] = granted
        return granted

    def used(self, session: str) -> None:
        """What it took is in the device, or will never be."""
        self._taken.pop(session, None)

    def release(self, session: str) -> None:
        """It will put in nothing more."""
        self._left.pop(session, None)
        self._taken.pop(session, None)
