"""Messages between agents, spoiled: ``python -m tests.fuzz.messages --inputs 1000000 --seed 1``."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import msgpack

from sami_plugin.codec import messages
from sami_plugin.errors import Malformed
from sami_plugin.model.migration import (
    Answer,
    Arrived,
    AskAgain,
    Check,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    InSync,
    Message,
    Offer,
    Open,
    Purged,
    Room,
    Stays,
)
from tests.fuzz.hunt import Target, main
from tests.fuzz.mutations import MUTATORS

MESSAGES: tuple[Message, ...] = (
    Open("6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4", "host-b", (1, 2), ("tcp-ipv4", "udp-ipv6"), ("zstd", "zlib"), 250_000),
    Open("", "", (), (), (), None),
    Open("", "", (2,), (), (), None, "", "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4", True),
    Offer(1, 3),
    Offer(2, 3, ("tcp-ipv4", "udp-ipv6"), (250_000, 7), ("marks",)),
    Answer(200_000, 600, ("tcp-ipv4",), ("there was no free place for it",), (50_007,), "ask"),
    Room(3, "traffic has taken the others"),
    Check("6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4", ("tcp-ipv4",), (6,), ()),
    Flows(bytes(range(256))),
    InSync(100_000),
    FlowChanges(b"payload", is_last=True),
    Complete(99_998, 2),
    Arrived(),
    Purged(99_999, 1),
    Stays("the guest runs here"),
    AskAgain("6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4"),
    GivesUp("größer als erlaubt"),
)
STRANGE = (None, True, -1, 0, 1.5, 2**64 - 1, "", "Open", b"", (), (1,), ("a", b"b"), {}, {"a": (None,)}, "x" * 300)


def _unpacked(octets: bytes) -> dict[object, object] | None:
    try:
        body = msgpack.unpackb(octets, use_list=False)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def change_a_field(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    """Another value, another name, one field more or less, or a field of another message; still msgpack."""
    body, other = _unpacked(octets), _unpacked(generator.choice(corpus))
    if not body or not other:
        return octets
    name = generator.choice(list(body))
    match generator.randrange(5):
        case 0:
            body[name] = generator.choice(STRANGE)
        case 1:
            del body[name]
        case 2:
            body[generator.choice(list(other))] = generator.choice(list(other.values()))
        case 3:
            body[f"new {generator.randrange(3)}"] = generator.choice(STRANGE)
        case 4:
            body["kind"] = generator.choice(list(messages.KINDS))
    packed: bytes = msgpack.packb(body)
    return packed


def nest(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    """A field's value becomes a list in a list in a list."""
    body = _unpacked(octets)
    if not body:
        return octets
    name = generator.choice(list(body))
    rest = b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in body.items() if key != name)
    depth = generator.choice((1, 30, 300, 900, 1000, 1023, 3000))
    return bytes([0x80 | min(15, len(body))]) + rest + msgpack.packb(name) + b"\x91" * depth + b"\xc0"


def _decode(octets: bytes) -> object:
    message = messages.decode(octets)
    assert messages.decode(messages.encode(message)) == message
    return message


TARGET = Target(
    name="messages",
    corpus=tuple(messages.encode(message) for message in MESSAGES),
    decode=_decode,
    refusals=(Malformed,),
    mutators=(*MUTATORS, change_a_field, change_a_field, change_a_field, nest),
    # A list of nothing takes one octet on the wire and eight in memory, an empty map in a list many more.
    octets_per_octet=160,
    # What was taken is written again, and msgpack's packer begins with a quarter of a mebibyte.
    octets=(1 << 16) + (1 << 18),
)

if __name__ == "__main__":
    sys.exit(main(TARGET))
