"""How often something may happen."""

from __future__ import annotations


class TokenBucket:
    """So many at once, and so many a second in the long run. Not thread-safe; the time comes in as an argument."""

    def __init__(self, at_once: int, per_second: float) -> None:
        self._at_once = float(at_once)
        self._per_second = per_second
        self._left = self._at_once
        self._looked_at: float | None = None

    def take(self, now: float) -> bool:
        """Whether it may happen now. `now` is in seconds and never goes back."""
        since = 0.0 if self._looked_at is None else now - self._looked_at
        self._left = min(self._at_once, self._left + since * self._per_second)
        self._looked_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
