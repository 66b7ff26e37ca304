"""Sets and their elements in nf_tables' netlink messages (include/uapi/linux/netfilter/nf_tables.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.netlink import GENERIC_OCTETS, HEADER_OCTETS, attributes_of, each_attribute
from sami_plugin.drivers.nft_sets.kinds import KEY_OCTETS, Statements
from sami_plugin.errors import Malformed

SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
NEWSET, GETSET = SUBSYSTEM | 9, SUBSYSTEM | 10
NEWSETELEM, GETSETELEM, DELSETELEM = SUBSYSTEM | 12, SUBSYSTEM | 13, SUBSYSTEM | 14
BATCH_BEGIN, BATCH_END = 0x10, 0x11

FAMILIES = {"ip": 2, "inet": 1, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
"""NFPROTO_*, by nft's names of them."""

CONSTANT, INTERVAL, MAP, TIMEOUT, OBJECT = 0x2, 0x4, 0x8, 0x10, 0x40
"""NFT_SET_*."""

MOST_AT_ONCE = 500
"""Requests: answers to all of them have to fit into a socket's buffer."""

_NESTED = 0x8000
_ATTRIBUTE = struct.Struct("=HH")
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("!BBH")

# libnftables' numbers of data types (enum datatypes of its datatype.h), of which the kernel keeps that of a key: 6 bits
# for each part of a concatenation. Other types have one of four octets or fewer, which is padded to four.
_IPADDR, _IP6ADDR = 7, 8
_OCTETS_OF_TYPE = {_IP6ADDR: 16, 9: 8, 41: 16, 29: 16}  # ether_addr, ifname, ct_label
_UNKNOWN_TYPES = (0, 2, 3, 4, 5, 6)  # of no fixed length: bit masks, integers, strings, link-layer addresses
_IFINDEX, _IFNAME = 20, 41
_VERDICT_DATA = 0xFFFF_FF00

_COUNTER, _QUOTA, _LIMIT, _CONNLIMIT, _LAST = "counter", "quota", "limit", "connlimit", "last"


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A set or map: where it is, as a command of nft has it, and what both hosts call it. An ipset has no family."""

    name: str
    family: int | None
    table: str
    set: str

    @property
    def words(self) -> str:
        if self.family is None:
            return f"the ipset {self.set}"
        family = next(word for word, number in FAMILIES.items() if number == self.family)
        return f"the set {family} {self.table} {self.set}"


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel says of a set."""

    key_octets: int
    data_octets: int
    flags: int
    timeout: int
    """Milliseconds that its elements live by default; 0: for ever."""
    statements: Mapping[str, dict[int, int]]
    """Those that each element has, as they are set, in the order in which the kernel wants to be given them."""
    places: Mapping[int, tuple[int, ...]]
    """By IP version, the octets of a key where an address may begin."""
    parts: tuple[int, ...] = ()
    """Of an ipset, what its keys consist of (IPSET_ATTR_*)."""
    is_hash: bool = False
    """Of an ipset, that it is one, and no bitmap."""

    @property
    def has_timeouts(self) -> bool:
        return bool(self.flags & TIMEOUT)


@dataclass(slots=True)
class Element:
    """One element. Times are milliseconds."""

    key: bytes
    data: bytes = b""
    timeout: int = 0
    """0: its set's."""
    expiration: int | None = None
    """None: never."""
    statements: dict[str, dict[int, int]] = field(default_factory=dict)
    """By name, the numbers of its state by the kernel's number of each."""


# Which numbers of a statement's state stand in which field, and in how many octets the kernel has them.
STATES: dict[str, tuple[Statements, tuple[tuple[int, str, int], ...]]] = {
    _COUNTER: (Statements.COUNTER, ((2, "nftCounterPackets", 8), (1, "nftCounterOctets", 8))),
    _QUOTA: (
        Statements.QUOTA,
        ((1, "nftQuotaOctets", 8), (4, "nftQuotaConsumedOctets", 8), (2, "nftQuotaFlags", 4)),
    ),
    _LIMIT: (
        Statements.LIMIT,
        (
            (1, "nftLimitRate", 8),
            (2, "nftLimitUnitSeconds", 8),
            (3, "nftLimitBurst", 4),
            (4, "nftLimitType", 4),
            (5, "nftLimitFlags", 4),
        ),
    ),
    _CONNLIMIT: (Statements.CONNLIMIT, ((1, "nftConnectionLimit", 4), (2, "nftConnectionLimitFlags", 4))),
    _LAST: (Statements.LAST, ((2, "nftLastMilliseconds", 8),)),
}
_LAST_SET, _LAST_MSECS = 1, 2
_QUOTA_FLAGS, _OVER = 2, 1
_USED: dict[str, tuple[int, ...]] = {
    _COUNTER: (1, 2),
    _QUOTA: (4,),
    _LIMIT: (),
    _CONNLIMIT: (),
    _LAST: (_LAST_SET, _LAST_MSECS),
}
"""What of a statement's numbers is its state, and not how it is set."""


def attribute(kind: int, *content: bytes) -> bytes:
    """One attribute, padded."""
    body = b"".join(content)
    return _ATTRIBUTE.pack(4 + len(body), kind) + body + bytes(-len(body) % 4)


def message(kind: int, flags: int, family: int, body: bytes = b"", resource: int = 0) -> bytes:
    """One message; who sends it fills in its sequence number."""
    octets = HEADER_OCTETS + GENERIC_OCTETS + len(body)
    return _HEADER.pack(octets, kind, flags | nl.NLM_F_REQUEST, 0, 0) + _GENERIC.pack(family, 0, resource) + body


def get_set(named: NamedSet) -> bytes:
    """The request for a set's form."""
    return message(GETSET, 0, _family(named), attribute(1, _text(named.table)) + attribute(2, _text(named.set)))


def dump_elements(named: NamedSet) -> bytes:
    """The request for all elements of a set."""
    return message(GETSETELEM, nl.NLM_F_DUMP, _family(named), _place(named))


def new_element(named: NamedSet, form: Form, element: Element) -> bytes:
    """The request that puts an element in. One that is there stays as it is."""
    parts = [attribute(1 | _NESTED, attribute(1, element.key))]
    if form.flags & MAP:
        parts.append(attribute(2 | _NESTED, attribute(1, element.data)))
    if form.has_timeouts:
        timeout, left = element.timeout, element.expiration
        if left is None:  # said so, or it would get the set's
            parts.append(attribute(4, bytes(8)))
        elif timeout or not form.timeout:
            parts.append(attribute(4, (timeout or left).to_bytes(8, "big")))
        if left is not None:
            parts.append(attribute(5, left.to_bytes(8, "big")))
    told = [attribute(1 | _NESTED, _statement(name, state)) for name, state in element.statements.items()]
    if len(told) == 1:
        parts.append(attribute(7 | _NESTED, told[0][4:]))
    elif told:
        parts.append(attribute(11 | _NESTED, *told))
    body = _place(named) + attribute(3 | _NESTED, attribute(1 | _NESTED, *parts))
    return message(NEWSETELEM, nl.NLM_F_CREATE | nl.NLM_F_ACK, _family(named), body)


def delete_element(named: NamedSet, key: bytes) -> bytes:
    """The request that takes out an element, by its key."""
    names = attribute(1 | _NESTED, attribute(1 | _NESTED, attribute(1, key)))
    return message(DELSETELEM, nl.NLM_F_ACK, _family(named), _place(named) + attribute(3 | _NESTED, names))


def form_of(raw: bytes) -> Form:
    """What the message of a set says. :raises Malformed: it is none."""
    told = attributes_of(raw[HEADER_OCTETS + GENERIC_OCTETS :])
    numbers = {kind: int.from_bytes(told.get(kind, b""), "big") for kind in (3, 4, 5, 6, 7, 11)}
    octets = numbers[5]
    if not 0 < octets <= KEY_OCTETS:
        raise Malformed(f"a set has keys of {octets} octets", "NFTA_SET_KEY_LEN")
    is_plain_map = numbers[3] & MAP and not numbers[3] & OBJECT and numbers[6] != _VERDICT_DATA
    is_plain_map = is_plain_map and not {_IFINDEX, _IFNAME} & set(_parts(numbers[6]))
    statements = _statements(_expressions(told, 17, 18))
    places = _places(numbers[4], octets)
    return Form(octets, numbers[7] if is_plain_map else 0, numbers[3], numbers[11], statements, places)


def get_element(named: NamedSet, key: bytes) -> bytes:
    """The request for one element, by its key."""
    names = attribute(1 | _NESTED, attribute(1 | _NESTED, attribute(1, key)))
    return message(GETSETELEM, 0, _family(named), _place(named) + attribute(3 | _NESTED, names))


def why_not_carried(form: Form) -> str:
    """Why elements of such a set cannot be carried; nothing where they can."""
    if form.flags & (INTERVAL | CONSTANT):
        return "it is of intervals, or constant: traffic adds nothing to it"
    if form.flags & OBJECT or (form.flags & MAP and not form.data_octets):
        return "it maps to verdicts, objects or interfaces, which are of one host"
    if not any(form.places.values()):
        return "there is no address in its keys, or not at one place, or an index of an interface is"
    return ""


def _places(key_type: int, octets: int) -> dict[int, tuple[int, ...]]:
    """Where in a key addresses begin. Of one part of unknown length it follows from the others."""
    parts = _parts(key_type)
    lengths = [None if part in _UNKNOWN_TYPES else _OCTETS_OF_TYPE.get(part, 4) for part in parts]
    rest = (octets + 3 & ~3) - sum(length for length in lengths if length is not None)
    if lengths.count(None) > 1 or (None not in lengths and rest) or rest < 0 or _IFINDEX in parts:
        return {}
    found: dict[int, tuple[int, ...]] = {4: (), 6: ()}
    at = 0
    for part, length in zip(parts, lengths, strict=True):
        version = {_IPADDR: 4, _IP6ADDR: 6}.get(part)
        if version:
            found[version] += (at,)
        at += rest if length is None else length
    return found


def _parts(data_type: int) -> list[int]:
    """The types of a concatenation's parts."""
    parts: list[int] = []
    while data_type:
        parts.insert(0, data_type & 0x3F)
        data_type >>= 6
    return parts


def elements_of(raw: bytes, wanted: Sequence[bytes]) -> Iterator[Element | None]:
    """The elements of one message that have one of these octets anywhere; None for one that cannot be told.

    :raises Malformed: it is no message of elements.
    """
    if not any(octets in raw for octets in wanted):  # most messages: nothing is done for each of their elements
        return
    lists = attributes_of(raw[HEADER_OCTETS + GENERIC_OCTETS :]).get(3, b"")
    for _, one in each_attribute(lists):
        if any(octets in one for octets in wanted):
            yield _element(attributes_of(one))


def _element(told: dict[int, bytes]) -> Element | None:
    key = attributes_of(told.get(1, b"")).get(1)
    if key is None or told.get(3) or 10 in told:  # catches all, ends an interval, is an interval of a concatenation
        return None
    made = Element(key, attributes_of(told.get(2, b"")).get(1, b""), int.from_bytes(told.get(4, b""), "big"))
    if 5 in told:
        made.expiration = int.from_bytes(told[5], "big")
    made.statements = _statements(_expressions(told, 7, 11))
    return None if made.statements.keys() - STATES.keys() else made


def _expressions(told: dict[int, bytes], single: int, several: int) -> list[bytes]:
    """Statements, which the kernel tells under one number where there is one, and else under another."""
    if several in told:
        return [one for _, one in each_attribute(told[several])]
    return [told[single]] if single in told else []


def _statements(expressions: list[bytes]) -> dict[str, dict[int, int]]:
    """By name, the numbers of each."""
    made = {}
    for expression in map(attributes_of, expressions):
        name = expression.get(1, b"").rstrip(b"\0").decode("ascii", "replace")
        numbers = attributes_of(expression.get(2, b""))
        made[name] = {kind: int.from_bytes(value, "big") for kind, value in numbers.items()}
    return made


def _statement(name: str, state: dict[int, int]) -> bytes:
    octets = {kind: size for kind, _, size in STATES[name][1]} | ({_LAST_SET: 4} if name == _LAST else {})
    numbers = [attribute(kind, value.to_bytes(octets[kind], "big")) for kind, value in state.items() if kind in octets]
    return attribute(1, _text(name)) + attribute(2 | _NESTED, *numbers)


def fill(row: np.void, element: Element) -> None:
    """Writes what an element's statements know into its record."""
    for name, state in element.statements.items():
        flag, numbers = STATES[name]
        row["nftElementStatements"] |= flag
        for kind, where, _ in numbers:
            row[where] = state.get(kind, 0)
        if name == _QUOTA:
            row["nftQuotaFlags"] &= _OVER  # that it is used up the kernel finds itself, and wants not to be told
        if name == _LAST:
            row["nftLastMilliseconds"] = state.get(_LAST_MSECS, 0) + 1 if state.get(_LAST_SET) else 0


def statements_of(row: np.void, form: Form) -> dict[str, dict[int, int]]:
    """The other way round. Where the set here has statements of its own, a record says only what is used of them."""
    made: dict[str, dict[int, int]] = {}
    for name, (flag, numbers) in STATES.items():
        if int(row["nftElementStatements"]) & flag:
            made[name] = {kind: int(row[where]) for kind, where, _ in numbers}
    if _LAST in made:
        milliseconds = made[_LAST][_LAST_MSECS]
        made[_LAST] = {_LAST_SET: 1, _LAST_MSECS: milliseconds - 1} if milliseconds else {_LAST_SET: 0}
    if not form.statements:
        return made
    ours = {name: dict(state) for name, state in form.statements.items() if name in STATES}
    for name, state in ours.items():
        used = made.get(name, {})
        state |= {kind: used.get(kind, 0) for kind in _USED[name]}
        if name == _QUOTA:
            state[_QUOTA_FLAGS] &= _OVER
    return ours


def _family(named: NamedSet) -> int:
    assert named.family is not None
    return named.family


def _place(named: NamedSet) -> bytes:
    return attribute(1, _text(named.table)) + attribute(2, _text(named.set))


def _text(word: str) -> bytes:
    return word.encode() + b"\0"
