"""What comes over the agent's unix socket, lines and what is none: ``python -m tests.fuzz.sockets``."""

from __future__ import annotations

import json
import sys
from typing import Any

from sami_plugin.hooks import local_socket
from sami_plugin.model.migration import MigrationEvent
from tests.fuzz import events
from tests.fuzz.hunt import Target, main

PIECES = (1, 7, 4096, 1 << 16)


class Refused(Exception):
    """Nothing of it was an event."""


class Connection:
    """What comes in pieces, as the kernel likes; what was answered."""

    def __init__(self, octets: bytes) -> None:
        self.said = bytearray()
        self._octets = octets
        self._piece = PIECES[len(octets) % len(PIECES)]

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def recv(self, most: int) -> bytes:
        piece, self._octets = self._octets[: self._piece], self._octets[self._piece :]
        assert len(piece) <= most
        return piece

    def sendall(self, octets: bytes) -> None:
        self.said += octets


def decode(octets: bytes) -> None:
    """Each line is answered, with a line; nothing else is said, and an event has come for each that was taken."""
    told: list[MigrationEvent] = []
    connection: Any = Connection(octets)
    local_socket.answer_all(connection, told.append, 1.0, lambda error: None)
    answers = [json.loads(line)["answer"] for line in connection.said.splitlines()]
    lines = octets.split(b"\n")
    assert len(answers) == len(lines) - (not lines[-1])
    assert answers.count("ok") == len(told)
    if not told:
        raise Refused


TARGET = Target(
    name="sockets",
    corpus=(*events.TARGET.corpus, b"\n".join(events.TARGET.corpus) + b"\n", b"\n\n", b"\xff\n{}\n"),
    decode=decode,
    refusals=(Refused,),
    octets=1 << 19,
    octets_per_octet=300,
)

if __name__ == "__main__":
    sys.exit(main(TARGET))
