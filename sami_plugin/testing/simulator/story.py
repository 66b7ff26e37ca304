"""What happened in a run, in the order of time, and how it is drawn: one column per host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH = 46
"""Of a host's column, in characters."""


@dataclass(frozen=True, slots=True)
class Line:
    """Something that happened on a host, or came to one from another."""

    at: float
    host: str
    words: str
    sender: str = ""
    """The host that a message came from; of what happened within one host, none."""


class Story:
    """The lines of one run."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = list(hosts)
        self.lines: list[Line] = []

    def tell(self, at: float, host: str, words: str, sender: str = "") -> None:
        """`host` may be none of the run's: then the words are of the world at large."""
        self.lines.append(Line(at, host, words, sender))

    def drawn(self) -> str:
        """The whole story as a sequence diagram of text."""
        return "\n".join(self._drawing())

    def _drawing(self) -> Iterator[str]:
        yield " " * 10 + "".join(name.ljust(WIDTH) for name in self._hosts).rstrip()
        for line in self.lines:
            when = f"{line.at:9.3f} "
            if line.host not in self._hosts:
                yield f"{when}{line.host}: {line.words}"
            elif line.sender in self._hosts and line.sender != line.host:
                yield when + self._arrow(self._hosts.index(line.sender), self._hosts.index(line.host), line.words)
            else:
                column = self._hosts.index(line.host)
                words = line.words if not line.sender else f"<- {line.sender}: {line.words}"
                yield when + ("|" + " " * (WIDTH - 1)) * column + "| " + words
        yield ""

    def _arrow(self, sender: int, receiver: int, words: str) -> str:
        left, right = min(sender, receiver), max(sender, receiver)
        room = (right - left) * WIDTH - 1
        label = f" {words} "[: room - 6]
        shaft = f"--{label}".ljust(room - 1, "-")
        arrow = f"{shaft}>" if sender < receiver else f"<{shaft}"
        return ("|" + " " * (WIDTH - 1)) * left + "|" + arrow + "|"
