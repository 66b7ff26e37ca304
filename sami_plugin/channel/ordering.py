"""Numbered messages: put in order on arrival, and harmless when repeated.

Each stream has one numbering in each direction, from 0. TLS bears no gap, no repetition and no change of order, and RPC
does all three.
"""

from __future__ import annotations

from sami_plugin.errors import IllegalMessage


class Inbox:
    """Takes messages in any order and gives them out in theirs. Not thread-safe."""

    def __init__(self, most_waiting: int = 256) -> None:
        self._next = 0
        self._waiting: dict[int, bytes] = {}
        self._seen: dict[int, int] = {}
        """By number, the hash of what came: Python's own, which nobody can aim at from outside this process."""
        self._most_waiting = most_waiting

    @property
    def next_number(self) -> int:
        """All messages before this number are here."""
        return self._next

    @property
    def waiting_octets(self) -> int:
        """The size of what waits for a message that comes before it."""
        return sum(map(len, self._waiting.values()))

    def accept(self, number: int, payload: bytes) -> list[bytes]:
        """The messages that are in order now, thanks to this one; none if it is early or a repetition.

        :raises IllegalMessage: the number was used before for other bytes, or is too far ahead; nothing has changed.
        """
        digest = hash(payload)
        if number < 0 or number >= self._next + self._most_waiting:
            raise IllegalMessage(f"message {number} is out of the window that begins at {self._next}")
        known = self._seen.get(number)
        if known is not None:
            if known != digest:
                raise IllegalMessage(f"message {number} came again with other bytes")
            return []
        if number < self._next:
            return []
        self._seen[number] = digest
        self._waiting[number] = payload
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            self._seen.pop(self._next - self._most_waiting, None)
            self._next += 1
        return ready
