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
    """The promises of one device. Not thread-safe.

    A promise binds sessions and not traffic: what traffic takes meanwhile is taken from the promises.
    """

    def __init__(self, headroom_percent: float) -> None:
        self._headroom = headroom_percent / 100
        self._left: dict[str, int] = {}
        """By session, what it was promised and has not put in yet."""
        self._unasked: dict[str, int] = {}
        """How much of that it may put in without the device being asked."""
        self._taken: dict[str, int] = {}
        """By session, what it is putting in now: the device has it already, or not yet."""

    def promise(self, session: str, wanted: int, look: Look) -> int:
        """How many of `wanted` new entries the session may put in, whenever it does: until `lapse` or `release`."""
        free = self._free(session, look)
        if free is None:
            return wanted
        granted = min(wanted, free)
        self._unasked[session] = _spare(free - granted)
        self._left[session] = granted + self._unasked[session]
        return granted

    def left(self, session: str) -> int:
        """What it was promised and has not put in yet."""
        return self._left.get(session, 0)

    def take(self, session: str, wanted: int, look: Look) -> int:
        """How many new entries of `wanted` the session may put in now, after which it says `used`."""
        if wanted <= self._unasked.get(session, 0):
            granted = wanted
            self._left[session] = self.left(session) - wanted
            self._unasked[session] = self._unasked.get(session, 0) - wanted
        else:
            free = self._free(session, look)
            if free is None:
                return wanted
            granted = min(wanted, free)
            self._unasked[session] = _spare(free - granted)
            if not self._is_another_at_it(session):  # else some are counted twice, and no promise is broken for that
                self._left[session] = min(self.left(session), free)
            self._left[session] = max(self.left(session) - granted, self._unasked[session])
        self._taken[session] = granted
        return granted

    def needs_to_wait(self, session: str, wanted: int, look: Look) -> bool:
        """Whether there may be more room when those that are putting in now have said `used`.

        Until then what they took is counted, whether the device has it already or not.
        """
        if not self._is_another_at_it(session) or wanted <= self._unasked.get(session, 0):
            return False
        free = self._free(session, look)
        return free is not None and free < wanted

    def _is_another_at_it(self, session: str) -> bool:
        return any(count for one, count in self._taken.items() if one != session)

    def _free(self, session: str, look: Look) -> int | None:
        """What no other session was promised; None where there is no limit."""
        capacity, in_use = look()
        if capacity is None:
            return None
        others = sum(count for one, count in (*self._left.items(), *self._taken.items()) if one != session)
        return max(0, int(capacity * (1 - self._headroom)) - in_use - others)

    def used(self, session: str) -> None:
        """What it took is in the device, or will never be."""
        self._taken.pop(session, None)

    def lapse(self, session: str) -> None:
        """The promise is over. What the session still wants to put in it asks for anew."""
        self._left.pop(session, None)
        self._unasked.pop(session, None)

    def release(self, session: str) -> None:
        """It will put in nothing more."""
        self.lapse(session)
        self._taken.pop(session, None)


def _spare(free: int) -> int:
    return min(SPARE, free // SPARE_SHARE)
