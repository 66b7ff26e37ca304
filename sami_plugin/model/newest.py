"""What is known of many, where it is enough to know it of those that came last."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

ValueT = TypeVar("ValueT")


class Newest(OrderedDict[str, ValueT]):
    """By name, oldest first. Not thread-safe."""

    def __init__(self, most: int) -> None:
        """So many are kept."""
        super().__init__()
        self._most = most

    def put(self, name: str, value: ValueT) -> None:
        """As the newest, whether it was known or not; the oldest of too many is forgotten."""
        self.pop(name, None)
        self[name] = value
        if len(self) > self._most:
            self.popitem(last=False)
