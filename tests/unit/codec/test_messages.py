"""Messages to bytes and back, and bytes that are no message."""

from __future__ import annotations

import contextlib
import tracemalloc
import typing
from dataclasses import MISSING, fields

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

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

EVERY = (
    Open("guest", "host-b", (1, 2), ("tcp-ipv4",), ("zstd", "zlib"), None),
    Open("guest", "host-b", (), (), (), 0, after=("session", "another")),
    Offer(2, 2, ("tcp-ipv4", "udp-ipv6"), (3, 0), ("marks",)),
    Answer(4, 600, ("tcp-ipv4",), ("there was no free place for it",), (2,), "proceed"),
    Room(3, "traffic"),
    Check("guest", ("tcp-ipv4",), (6,), ()),
    Flows(b"\x00\xff"),
    InSync(2**40),
    FlowChanges(b"", is_last=True),
    FlowChanges(b"x", is_last=False),
    Complete(3, 0),
    Arrived(),
    Purged(3, 0),
    Stays("the guest runs here"),
    AskAgain("6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4"),
    GivesUp("größer"),
)
KINDS = {type(message).__name__: message for message in EVERY}
FIELDS = [(kind, field.name) for kind, message in KINDS.items() for field in fields(message)]

WRONG: dict[str, list[object]] = {
    "str": [None, 1, b"bytes", ("a",), {}, True],
    "int": [None, "1", -1, True, 1.0, (), b""],
    "bytes": [None, "text", 1, ()],
    "bool": [None, 0, 1, "yes"],
    "tuple[int, ...]": [None, 1, "1", ("1",), (1, -1), (True,), {}],
    "tuple[str, ...]": [None, "text", (1,), (b"a",), {}],
    "int | None": ["1", -1, True, 1.5, ()],
}
"""Values that are not of the type."""


def body_of(message: Message) -> dict[str, object]:
    unpacked: dict[str, object] = msgpack.unpackb(messages.encode(message), use_list=False)
    return unpacked


def decode(body: object) -> Message:
    return messages.decode(msgpack.packb(body))


def test_every_kind_is_tried() -> None:
    assert set(KINDS) == {kind.__name__ for kind in typing.get_args(Message)}


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_message_is_read_as_it_was_written(message: Message) -> None:
    assert messages.decode(messages.encode(message)) == message


VECTORS = {
    Arrived(): "82a776657273696f6e02a46b696e64a741727269766564",
    Complete(3, 0): "84a776657273696f6e02a46b696e64a8436f6d706c657465a8696d706f7274656403a77265667573656400",
    FlowChanges(b"\x01", is_last=True): (
        "84a776657273696f6e02a46b696e64ab466c6f774368616e676573a77061796c6f6164c40101a769735f6c617374c3"
    ),
}


@pytest.mark.parametrize(("message", "octets"), VECTORS.items(), ids=lambda each: type(each).__name__)
def test_vector(message: Message, octets: str) -> None:
    assert messages.encode(message).hex() == octets
    assert messages.decode(bytes.fromhex(octets)) == message


def test_message_of_version_1_is_understood() -> None:
    octets = "83a776657273696f6e01a46b696e64a54f66666572a5706f72747302"
    assert messages.decode(bytes.fromhex(octets)) == Offer(1, 2)


REQUIRED = [
    (kind, field.name) for kind, message in KINDS.items() for field in fields(message) if field.default is MISSING
]


@pytest.mark.parametrize(("kind", "field"), REQUIRED)
def test_missing_field_is_refused_by_kind_and_name(kind: str, field: str) -> None:
    body = body_of(KINDS[kind])
    del body[field]
    with pytest.raises(Malformed, match="missing") as caught:
        decode(body)
    assert caught.value.place == f"{kind}.{field}"


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_field_of_another_type_is_refused_by_kind_and_name(kind: str, field: str) -> None:
    body = body_of(KINDS[kind])
    (hint,) = (one.type for one in fields(KINDS[kind]) if one.name == field)
    for wrong in WRONG[str(hint)]:
        with pytest.raises(Malformed) as caught:
            decode({**body, field: wrong})
        assert caught.value.place == f"{kind}.{field}", wrong


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_field_that_is_unknown_is_skipped(message: Message) -> None:
    assert decode({**body_of(message), "since_version_9": {"a": [1, None]}}) == message


@pytest.mark.parametrize("kind", [None, "Closed", "open", 7, b"Open", ("Open",), {"Open": 1}, "message", "K" * 1024])
def test_unknown_kind_is_refused_in_few_words(kind: object) -> None:
    with pytest.raises(Malformed, match="unknown kind of message") as caught:
        decode({"version": 1, "kind": kind})
    assert caught.value.place == "field kind"
    assert len(str(caught.value)) < 200


def test_body_without_kind_is_refused() -> None:
    with pytest.raises(Malformed, match="unknown kind"):
        decode({})


@pytest.mark.parametrize("field", ["kind", "reason"])
def test_nested_value_is_refused_however_deep(field: str) -> None:
    for depth in (10, 100, 400, 500, 900, 1000, 1020, 10_000, 1_000_000):
        nested = b"\x91" * depth + b"\xc0"
        other = msgpack.packb("kind") + msgpack.packb("Stays") if field == "reason" else b""
        octets = (b"\x82" if other else b"\x81") + other + msgpack.packb(field) + nested
        with pytest.raises(Malformed):
            messages.decode(octets)


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\xc1",
        msgpack.packb(7),
        msgpack.packb(["Arrived"]),
        msgpack.packb({1: "Arrived"}),
        messages.encode(Arrived()) + b"\x00",
        messages.encode(Arrived())[:-1],
        b"\x81\xa4kind\xa2\xff\xfe",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_bytes_that_are_no_message_are_refused(octets: bytes) -> None:
    with pytest.raises(Malformed):
        messages.decode(octets)


def test_message_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(Malformed, match="too long"):
        messages.decode(bytes(messages.MOST_OCTETS + 1))


ENTRIES, FIELDS_OF_A_MAP, TEXT = messages.MOST_ENTRIES, messages.MOST_FIELDS, 4 * messages.MOST_CHARACTERS


@pytest.mark.parametrize(
    ("value", "takes"),
    [
        ([1] * ENTRIES, True),
        ([1] * (ENTRIES + 1), False),
        ({str(number): number for number in range(FIELDS_OF_A_MAP)}, True),
        ({str(number): number for number in range(FIELDS_OF_A_MAP + 1)}, False),
        ([[]] * (messages.MOST_CONTAINERS - 2), True),
        ([[]] * (messages.MOST_CONTAINERS - 1), False),
        ([{}] * (messages.MOST_CONTAINERS - 1), False),
        ("x" * TEXT, True),
        ("x" * (TEXT + 1), False),
    ],
)
def test_field_that_is_unknown_is_skipped_unless_it_holds_more_than_any_of_ours(value: object, takes: bool) -> None:
    body = {**body_of(Arrived()), "since_version_9": value}
    if takes:
        assert decode(body) == Arrived()
        return
    with pytest.raises(Malformed, match="not a message: "):
        decode(body)


@pytest.mark.parametrize("nested", [[{}] * 500_000, [[{}] * 250] * 250, [[["ab"] * 60] * 60] * 60])
def test_message_takes_little_more_room_than_its_octets(nested: object) -> None:
    octets = msgpack.packb({**body_of(GivesUp("x")), "since_version_9": nested})
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            messages.decode(octets)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(octets)
    finally:
        tracemalloc.stop()


def test_longest_message_of_ours_is_taken() -> None:
    texts, numbers = ("ß" * messages.MOST_CHARACTERS,) * ENTRIES, (2**63,) * ENTRIES
    for message in (
        Open("guest", "host-b", numbers, texts, texts, 0, after=texts, devices=texts),
        Offer(2, 1, texts, numbers, texts, texts, numbers, texts),
        FlowChanges(bytes(8 << 20), is_last=True),
    ):
        assert messages.decode(messages.encode(message)) == message


@given(st.binary(max_size=64))
def test_any_bytes_are_taken_or_refused(octets: bytes) -> None:
    with contextlib.suppress(Malformed):
        messages.decode(octets)


def test_open_without_a_token_is_one_of_a_guest_that_has_none() -> None:
    body = body_of(KINDS["Open"])
    del body["token"]
    said = decode(body)
    assert isinstance(said, Open)
    assert said.token == ""
