"""ipsets, in their own netlink messages (include/uapi/linux/netfilter/ipset/ip_set.h).

A key is made as that of a concatenation of nf_tables: its parts, as the kernel orders them, each padded to four octets.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.netlink import (
    GENERIC_OCTETS,
    HEADER_OCTETS,
    Connection,
    attributes_of,
    each_attribute,
)
from sami_plugin.drivers.nft_sets.elements import INTERVAL, TIMEOUT, Element, Form, NamedSet, attribute, message
from sami_plugin.drivers.nft_sets.nf_tables import code_of, raw
from sami_plugin.errors import DeviceFailed, NotAvailable

SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
_LIST, _ADD, _DEL = SUBSYSTEM | 7, SUBSYSTEM | 9, SUBSYSTEM | 10
_PROTOCOL_VERSION = b"\7"

# IPSET_ATTR_*, of a message, of what a set was made with, and of an element.
_PROTOCOL, _SETNAME, _TYPENAME, _FAMILY, _FLAGS, _DATA, _ADT = 1, 2, 3, 5, 6, 7, 8
_TIMEOUT, _CADT_FLAGS, _MARKMASK, _BITMASK, _NETMASK = 6, 8, 11, 12, 20
_EACH_MARK = bytes([0xFF] * 4)
_IP, _PORT, _PROTO, _MARK, _ETHER, _IP2 = 1, 4, 7, 10, 17, 20
_BYTES, _PACKETS, _COMMENT, _SKBQUEUE = 24, 25, 26, 29
_NESTED, _NET_BYTEORDER = 0x8000, 0x4000
_LIST_HEADER, _WITH_COUNTERS = 4, 8

_TYPES: dict[str, tuple[int, ...]] = {
    "hash:ip": (_IP,),
    "hash:ip,mark": (_IP, _MARK),
    "hash:ip,port": (_IP, _PORT, _PROTO),
    "hash:ip,port,ip": (_IP, _IP2, _PORT, _PROTO),
    "hash:ip,mac": (_IP, _ETHER),
    "bitmap:ip": (_IP,),
    "bitmap:ip,mac": (_IP, _ETHER),
}
_OCTETS = {_PORT: 2, _PROTO: 1, _MARK: 4, _ETHER: 6}
_ADDRESSES = (_IP, _IP2)
_COUNTER = {1: _BYTES, 2: _PACKETS}
"""By the numbers that nf_tables has for them (NFTA_COUNTER_*)."""
_NOT_THERE = 4103  # IPSET_ERR_EXIST, of an element that is to be taken out
_FULL = 4352  # IPSET_ERR_HASH_FULL
_WITH_PORTS = (6, 17, 132, 136, 1, 58)
"""Of ICMP, type and code."""


def form_of(connection: Connection, named: NamedSet) -> Form | None:
    """What the set is like here; None where there is none."""
    header = _answer(connection, named, attribute(_FLAGS | _NET_BYTEORDER, _LIST_HEADER.to_bytes(4, "big")))
    if not header:
        return None
    told = attributes_of(header[0][HEADER_OCTETS + GENERIC_OCTETS :])
    made = attributes_of(told.get(_DATA, b""))
    typename = _text_of(told.get(_TYPENAME, b""))
    parts = _TYPES.get(typename, ())
    version = 6 if told.get(_FAMILY) == bytes([nl.AF_OF_FAMILY["ipv6"]]) else 4
    octets = 16 if version == 6 else 4
    is_of_networks = _BITMASK in made or made.get(_NETMASK, bytes([8 * octets])) != bytes([8 * octets])
    is_of_networks |= made.get(_MARKMASK, _EACH_MARK) != _EACH_MARK
    places, at = [], 0
    for part in parts:
        if part in _ADDRESSES:
            places.append(at)
        at += octets if part in _ADDRESSES else len(_padded(bytes(_OCTETS[part])))
    flags = (TIMEOUT if _TIMEOUT in made else 0) | (INTERVAL if is_of_networks else 0)
    is_counted = int.from_bytes(made.get(_CADT_FLAGS, b""), "big") & _WITH_COUNTERS
    statements: dict[str, dict[int, int]] = {"counter": {}} if is_counted else {}
    places_of = {version: tuple(places)}
    return Form(at, 0, flags, 0, statements, places_of, parts, typename.startswith("hash"))


def elements_of(
    connection: Connection, named: NamedSet, form: Form, addresses: Sequence[bytes]
) -> list[Element | None]:
    """Those with one of these octets in them; None for one that cannot be told: it has a comment, or marks packets."""
    found: list[Element | None] = []
    for one in _answer(connection, named):
        if any(octets in one for octets in addresses):
            elements = attributes_of(one[HEADER_OCTETS + GENERIC_OCTETS :]).get(_ADT, b"")
            found += (_element(form, element) for _, element in each_attribute(elements) if _has(element, addresses))
    return found


def held(connection: Connection, named: NamedSet, form: Form, keys: Sequence[bytes]) -> list[Element]:
    """What there is of these keys. No element is told without the others."""
    ((version, places),) = form.places.items()
    octets, wanted = 16 if version == 6 else 4, set(keys)
    addresses = {key[at : at + octets] for key in keys for at in places}
    found = elements_of(connection, named, form, tuple(addresses))
    return [one for one in found if one is not None and one.key in wanted]


def is_name(form: Form, key: bytes) -> bool:
    """Whether the kernel calls the element of this key so: it knows no octets between its parts, and no ports of
    protocols that have none."""
    told = dict(zip(form.parts, _values(form, key), strict=True))
    if _PORT in told and told[_PROTO][0] not in _WITH_PORTS and any(told[_PORT]):
        return False
    return key == b"".join(_padded(value) for value in told.values())


def put(
    connection: Connection, named: NamedSet, form: Form, wanted: Mapping[int, Element], former: Sequence[int]
) -> dict[int, int]:
    """Puts in each that the kernel takes, in the place of what is there of the same key.

    :returns: of those that it does not take, its error.
    """
    requests = []
    for element in wanted.values():
        parts = [_parts_of(form, element.key)]
        if form.has_timeouts:
            seconds = -(-element.expiration // 1000) if element.expiration is not None else 0  # 0: for ever
            parts.append(attribute(_TIMEOUT | _NET_BYTEORDER, seconds.to_bytes(4, "big")))
        if "counter" in form.statements:
            for number, kind in _COUNTER.items():
                value = element.statements["counter"].get(number, 0)
                parts.append(attribute(kind | _NET_BYTEORDER, value.to_bytes(8, "big")))
        requests.append(_request(_ADD, named, attribute(_DATA | _NESTED, *parts)))
    codes = zip(wanted, _asked(connection, requests), strict=True)
    is_full = {_FULL} if form.is_hash else set()  # a bitmap means an address that is none of its range
    return {position: errno.ENFILE if code in is_full else code for position, code in codes if code}


def take_out(connection: Connection, named: NamedSet, form: Form, keys: Mapping[int, bytes]) -> list[int]:
    """Takes out elements, and says which were there. :raises DeviceFailed: the kernel does not let them go."""
    requests = [_request(_DEL, named, attribute(_DATA | _NESTED, _parts_of(form, key))) for key in keys.values()]
    codes = dict(zip(keys, _asked(connection, requests), strict=True))
    if failed := [code for code in codes.values() if code not in (0, _NOT_THERE, errno.ENOENT)]:
        raise DeviceFailed(f"{named.words}: the kernel removes no element ({code_of(failed[0])})")
    return [position for position, code in codes.items() if not code]


def _request(kind: int, named: NamedSet, *more: bytes, flags: int = 0) -> bytes:
    body = attribute(_PROTOCOL, _PROTOCOL_VERSION) + attribute(_SETNAME, named.set.encode() + b"\0") + b"".join(more)
    return message(kind, flags, nl.AF_OF_FAMILY["ipv4"], body)


def _answer(connection: Connection, named: NamedSet, *more: bytes) -> list[bytes]:
    """The messages of a listing; none where there is no such set."""
    request = np.frombuffer(_request(_LIST, named, *more, flags=nl.NLM_F_DUMP), np.uint8)
    try:
        return [one for messages in connection.dump(request, _LIST) for one in raw(messages)]
    except DeviceFailed as error:
        if error.errno == errno.ENOENT:
            return []
        raise
    except NotAvailable:  # no ipset at all
        return []


def _asked(connection: Connection, requests: Sequence[bytes]) -> list[int]:
    codes, _ = connection.ask(np.stack([np.frombuffer(one, np.uint8) for one in requests]))
    return [int(code) for code in codes]


def _has(element: bytes, addresses: Sequence[bytes]) -> bool:
    return any(octets in element for octets in addresses)


def _element(form: Form, octets: bytes) -> Element | None:
    told = attributes_of(octets)
    if _COMMENT in told or any(number in told for number in range(_COMMENT + 1, _SKBQUEUE + 1)):
        return None
    key = b""
    for part in form.parts:
        value = told.get(part, b"")
        if part in _ADDRESSES:
            value = next(iter(attributes_of(value).values()), b"")
        key += _padded(value)
    if len(key) != form.key_octets:
        return None
    made = Element(key)
    if seconds := int.from_bytes(told.get(_TIMEOUT, b""), "big"):
        made.expiration = seconds * 1000
    if "counter" in form.statements:
        made.statements["counter"] = {one: int.from_bytes(told.get(kind, b""), "big") for one, kind in _COUNTER.items()}
    return made


def _parts_of(form: Form, key: bytes) -> bytes:
    """The other way round."""
    made = b""
    for part, value in zip(form.parts, _values(form, key), strict=True):
        if part in _ADDRESSES:
            made += attribute(part | _NESTED, attribute((1 if len(value) == 4 else 2) | _NET_BYTEORDER, value))
        else:
            made += attribute(part if part in (_PROTO, _ETHER) else part | _NET_BYTEORDER, value)
    return made


def _values(form: Form, key: bytes) -> Iterator[bytes]:
    """What a key says of each of its parts."""
    address, at = 16 if 6 in form.places else 4, 0
    for part in form.parts:
        octets = address if part in _ADDRESSES else _OCTETS[part]
        yield key[at : at + octets]
        at += len(_padded(bytes(octets)))


def _padded(value: bytes) -> bytes:
    return value.ljust(-(-len(value) // 4) * 4, b"\0")


def _text_of(octets: bytes) -> str:
    return octets.rstrip(b"\0").decode("ascii", "replace")
