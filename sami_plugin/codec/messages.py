"""What the agents say to each other, as bytes: msgpack maps with a version, a kind and the fields of the message.

Unknown fields are skipped, so a newer peer may add some; a field that is missing or of another type is refused.
"""

from __future__ import annotations

import itertools
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import msgpack

from sami_plugin.errors import Malformed
from sami_plugin.model import migration
from sami_plugin.model.migration import PROTOCOL_VERSION, Message

MOST_OCTETS = 16 * 1024 * 1024
"""RabbitMQ 4 refuses more."""
MOST_CHARACTERS = 1024
MOST_ENTRIES = 256
"""Of a text and of a list in a message: reasons and names go into logs and journals."""
MOST_FIELDS = 64
"""Of a message and of a map in it. No kind has a quarter of that; the others are for newer peers."""
MOST_CONTAINERS = 64
"""Lists and maps in a message, nested ones too. An empty one is an octet on the wire, and 64 and more as an object."""

KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in typing.get_args(migration.Message)}
_Check = Callable[[object], bool]
_SIZES: dict[object, tuple[Callable[[Any], int], int]] = {str: (len, MOST_CHARACTERS), int: (operator.neg, 0)}
"""How large a text or a number is, and may be; none is negative."""


def _check(hint: object) -> _Check:
    """Whether a value is of that type, and no longer than it may be."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        first, second = map(_check, typing.get_args(hint))
        return lambda value: first(value) or second(value)
    if origin is tuple:
        kind, _ = typing.get_args(hint)
        size, most = _SIZES[kind]
        return lambda value: (
            type(value) is tuple
            and len(value) <= MOST_ENTRIES
            and {kind}.issuperset(map(type, value))
            and max(map(size, value), default=0) <= most
        )
    if hint in (str, int):
        size, most = _SIZES[hint]
        return lambda value: type(value) is hint and size(value) <= most
    return lambda value: type(value) is hint


_FIELDS: dict[type[Message], tuple[tuple[str, bool, object, _Check], ...]] = {
    kind: tuple(
        (field.name, field.default is MISSING, hint, _check(hint))
        for field in fields(kind)
        for hint in (typing.get_type_hints(kind)[field.name],)
    )
    for kind in KINDS.values()
}
"""Name, whether it may not be left out, type, and whether a value is of it."""


def encode(message: Message) -> bytes:
    """The message as bytes."""
    body = {"version": PROTOCOL_VERSION, "kind": type(message).__name__}
    for name, *_ in _FIELDS[type(message)]:
        value = getattr(message, name)
        body[name] = value[:MOST_CHARACTERS] if isinstance(value, str) else value
    packed: bytes = msgpack.packb(body)
    return packed


def decode(octets: bytes) -> Message:
    """The message that these bytes hold.

    :raises Malformed: they hold none; names the kind and the field.
    """
    if len(octets) > MOST_OCTETS:
        raise Malformed(f"a message of {len(octets)} octets is too long", f"octet {MOST_OCTETS}")
    try:
        body = _unpacked(octets)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise Malformed(f"not a message: {error or type(error).__name__}", "octet 0") from error
    if not isinstance(body, dict):
        raise Malformed("a message is a map", "octet 0")
    named = body.get("kind")
    kind = KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise Malformed(f"unknown kind of message {_short(named)}; upgrade this host", "field kind")
    values = {}
    for name, is_needed, hint, fits in _FIELDS[kind]:
        if name not in body:
            if is_needed:
                raise Malformed("a field is missing", f"{kind.__name__}.{name}")
            continue
        value = body[name]
        if not fits(value):
            raise Malformed(f"{_short(value)} is no {hint}", f"{kind.__name__}.{name}")
        values[name] = value
    return kind(**values)


def _unpacked(octets: bytes) -> object:
    """What the octets hold, which takes little more room than they do, fields that nobody here knows included."""
    number = itertools.count(1)

    def counted(container: object) -> object:
        if next(number) > MOST_CONTAINERS:
            raise ValueError(f"more than {MOST_CONTAINERS} lists and maps")
        return container

    return msgpack.unpackb(
        octets,
        use_list=False,
        strict_map_key=True,
        object_hook=counted,
        list_hook=counted,
        max_array_len=MOST_ENTRIES,
        max_map_len=MOST_FIELDS,
        max_str_len=4 * MOST_CHARACTERS,
        max_ext_len=0,
    )


def _short(value: object) -> str:
    """The value for people, of any that a message may hold: long or deeply nested ones are named by what they are."""
    if isinstance(value, tuple | dict):
        return "a list" if isinstance(value, tuple) else "a map"
    text = ascii(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else text[:57] + "..."
