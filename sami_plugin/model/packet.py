"""What one host's agent sends to another's: some octets of a TLS stream."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Packet:
    """Packets may be lost, repeated, reordered, read and forged on their way."""

    stream: int
    """Of its session, from 0."""
    number: int
    """Of its stream and direction, from 0."""
    octets: bytes = field(repr=False)
    """None at all: the server says that the stream is broken."""
