"""What comes over the agent's unix socket, lines and what is none: ``python -m tests.fuzz.sockets``."""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

from sami_plugin.hooks import local_socket
from sami_plugin.model.migration import MigrationEvent
from tests.fuzz import events
from tests.fuzz.hunt import Target, main

PIECES = (1, 7, 4096, 1 << 16)


class Refused(Exception):
    """Nothing of it was an event or a request."""


class Asked(Exception):
    """There was a request in it, and maybe an event."""


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
    """Each line is answered, with a line; nothing else is said, and for each that was taken an event has come, or a
    question that can be asked."""
    told: list[MigrationEvent] = []
    asked: list[str] = []

    def check(said: local_socket.Said) -> dict[str, object]:
        guest, to = local_socket.guest_of(said), local_socket.text_of(said, "to")
        assert guest == str(uuid.UUID(guest))
        asked.append(to)
        return {"verdict": "proceed", "to": to}

    def decide(said: local_socket.Said) -> None:
        asked.append(local_socket.text_of(said, "session"))

    connection: Any = Connection(octets)
    requests = {"check": check, "approve": decide, "refuse": decide}
    local_socket.answer_all(connection, told.append, 1.0, lambda error: None, requests)
    answers = [json.loads(line)["answer"] for line in connection.said.splitlines()]
    lines = octets.split(b"\n")
    assert len(answers) == len(lines) - (not lines[-1])
    assert answers.count("ok") == len(told) + len(asked)
    assert all(0 < len(name) <= 255 and name.isprintable() for name in asked)
    if asked:
        raise Asked
    if not told:
        raise Refused


REQUESTS: tuple[dict[str, object], ...] = (
    {"request": "check", "guest": events.GUEST, "to": "host-b"},
    {"request": "approve", "session": "01f3c9a2"},
    {"request": "refuse", "session": events.GUEST},
)
_REQUESTS = tuple(json.dumps(one).encode() for one in REQUESTS)

TARGET = Target(
    name="sockets",
    corpus=(
        *events.TARGET.corpus,
        *_REQUESTS,
        b"\n".join(events.TARGET.corpus) + b"\n",
        b"\n".join((*_REQUESTS, *events.TARGET.corpus[1:])) + b"\n",
        b"\n\n",
        b"\xff\n{}\n",
    ),
    decode=decode,
    refusals=(Refused, Asked),
    octets=1 << 19,
    octets_per_octet=300,
)

if __name__ == "__main__":
    sys.exit(main(TARGET))
