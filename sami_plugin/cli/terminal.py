"""What people see while they wait: a line that counts, on a terminal only, and remarks."""

from __future__ import annotations

import time
from typing import TextIO

_PAUSE_SECONDS = 0.2


class Progress:
    """Rewrites one line of `stream`. Writes nothing where that is no terminal."""

    def __init__(self, stream: TextIO, what: str) -> None:
        self._stream = stream
        self._what = what
        self._is_shown = stream.isatty()
        self._next = time.monotonic() + _PAUSE_SECONDS
        self._octets = 0

    def __call__(self, count: int) -> None:
        """So many are done by now. Costs next to nothing when called often."""
        if not self._is_shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PAUSE_SECONDS
        line = f"{self._what}: {count} ..."
        self._stream.write("\r" + line.ljust(self._octets))
        self._stream.flush()
        self._octets = len(line)

    def close(self) -> None:
        """Wipes the line."""
        if self._octets:
            self._stream.write("\r" + " " * self._octets + "\r")
            self._stream.flush()
            self._octets = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remark(stream: TextIO, text: str) -> None:
    """One line beside the result, which goes to stdout."""
    stream.write(f"sami: {text}\n")
    stream.flush()
