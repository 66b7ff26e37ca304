"""Conntrack entries from ctnetlink messages, whole columns at a time.

Entries of one kind lie in memory in one shape: the same attributes at the same offsets. So the first message of a kind
is read attribute by attribute, and the shape found there is held against all others by one comparison of their
attribute headers. Where it fits, each field is a column at a fixed offset. What does not fit is the next kind.
"""

from __future__ import annotations

import ipaddress
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin import errors
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.netlink import GENERIC_OCTETS, HEADER_OCTETS, Messages, Offsets
from sami_plugin.model import protocols
from sami_plugin.model.flows import ACCOUNTING, TEMPLATES, Addresses, Batch, Omitted, Template, ZoneRole, holds_any
from sami_plugin.model.protocols import TcpState

Mask = npt.NDArray[np.bool_]

# Attributes that are read: by type, a name and the payload's octets, or what is nested in it.
_Known = Mapping[int, "tuple[str, int] | _Known"]
_HELPER = "helper"  # the only payload that may have fewer
_TUPLE: _Known = {
    nl.TUPLE_IP: {
        nl.IP_V4_SRC: ("source4", 4),
        nl.IP_V4_DST: ("destination4", 4),
        nl.IP_V6_SRC: ("source6", 16),
        nl.IP_V6_DST: ("destination6", 16),
    },
    nl.TUPLE_PROTO: {
        nl.PROTO_NUM: ("protocol", 1),
        **{
            part.number: (part.name, np.dtype(part.form).itemsize)
            for parts in nl.IDENTIFIERS.values()
            for part in parts
        },
    },
    nl.TUPLE_ZONE: ("zone", 2),
}
_ENTRY: _Known = {
    nl.TUPLE_ORIG: _TUPLE,
    nl.TUPLE_REPLY: _TUPLE,
    nl.STATUS: ("status", 4),
    nl.TIMEOUT: ("timeout", 4),
    nl.MARK: ("mark", 4),
    nl.ID: ("id", 4),
    nl.ZONE: ("zone", 2),
    nl.TUPLE_MASTER: _TUPLE,
    nl.LABELS: ("labels", 16),
    nl.HELP: {nl.HELP_NAME: (_HELPER, nl.HELPER_OCTETS)},
    **{
        kind: {number: (name, 4) for number, name in enumerate(names, 1)}
        for kind, names in (
            (nl.SEQ_ADJUST_ORIG, nl.ADJUSTMENT),
            (nl.SEQ_ADJUST_REPLY, nl.REPLYS_ADJUSTMENT),
            (nl.SYNPROXY, nl.OF_SYNPROXY),
        )
    },
    nl.PROTOINFO: {
        nl.PROTOINFO_TCP: {
            nl.TCP_STATE: ("tcp_state", 1),
            nl.TCP_WSCALE_ORIGINAL: ("scale", 1),
            nl.TCP_WSCALE_REPLY: ("reply_scale", 1),
            nl.TCP_FLAGS_ORIGINAL: ("flags", 2),
            nl.TCP_FLAGS_REPLY: ("reply_flags", 2),
        },
        nl.PROTOINFO_SCTP: {
            nl.SCTP_STATE: ("sctp_state", 1),
            nl.SCTP_TAG_ORIGINAL: ("tag", 4),
            nl.SCTP_TAG_REPLY: ("reply_tag", 4),
        },
    },
}
# What was counted is read only where it is asked for: all else that is read is compared in each message.
_ACCOUNTED_ENTRY: _Known = {
    **_ENTRY,
    nl.COUNTERS_ORIG: {nl.COUNTERS_PACKETS: ("packetTotalCount", 8), nl.COUNTERS_OCTETS: ("octetTotalCount", 8)},
    nl.COUNTERS_REPLY: {
        nl.COUNTERS_PACKETS: ("reversePacketTotalCount", 8),
        nl.COUNTERS_OCTETS: ("reverseOctetTotalCount", 8),
    },
    nl.TIMESTAMP: {nl.TIMESTAMP_START: ("flowStartMilliseconds", 8)},
}
_NANOSECONDS_PER_MILLISECOND = 1_000_000
_DIRECTIONS = {nl.TUPLE_ORIG: "orig.", nl.TUPLE_REPLY: "reply.", nl.TUPLE_MASTER: "master."}
_BODY = HEADER_OCTETS + GENERIC_OCTETS
_MOST_SHAPES = 256


@dataclass(frozen=True, slots=True)
class Timeouts:
    """What the kernel would give an entry that tells no timeout because its packets bypass conntrack, in seconds."""

    tcp_established: int = 432_000
    udp_stream: int = 120
    gre_stream: int = 180


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the attributes of one kind of message are: offsets in octets from the message's beginning."""

    length: int
    family: int
    protocol: int
    fields: Mapping[str, int]
    places: npt.NDArray[np.int64]
    """Numbers of the 32-bit words that all messages of this shape have in common,"""
    words: npt.NDArray[np.uint32]
    masks: npt.NDArray[np.uint32]
    """their values, and which bits of them count."""
    helper_octets: int
    """Of the helper's name, where there is one."""
    template: Template | None = field(default=None)
    """Of a flow that is not translated; None for what no template holds."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Entries of one template, and the number of the message that each came in."""

    batch: Batch
    numbers: npt.NDArray[np.intp]


class Decoder:
    """Turns messages about entries into batches. Remembers shapes; one thread at a time."""

    def __init__(
        self,
        zones: Mapping[ZoneRole, int],
        addresses: Addresses | None = None,
        timeouts: Timeouts = Timeouts(),
        *,
        accounting: bool = False,
    ) -> None:
        """Entries of other zones than these, and without one of `addresses` at an end, are left out (None: any).

        With `accounting` what the kernel counted of an entry, and when it began, are told too.
        """
        self._roles = np.zeros(1 << 16, np.uint8)
        for role, zone in sorted(zones.items(), reverse=True):
            self._roles[zone] = role
        self._addresses = addresses
        self._timeouts = timeouts
        self._known = _ACCOUNTED_ENTRY if accounting else _ENTRY
        self._shapes: dict[int, list[Shape]] = {}

    def decode(self, messages: Messages) -> Iterator[Decoded | Omitted]:
        """All entries of the decoder's zones; what no template holds is counted and named.

        Fields that a message does not tell are 0.

        :raises Malformed: a message is not what it claims to be.
        """
        wrong = (messages.lengths < _BODY) | (messages.lengths & 3 != 0)
        if wrong.any():
            raise errors.Malformed("no entry has a message of this length", f"octet {messages.starts[wrong][0]}")
        for numbers, shape in self._by_shape(messages):
            columns = _Columns(messages.octets, messages.starts[numbers], shape)
            yield from self._entries(columns, numbers)

    def _by_shape(self, messages: Messages) -> Iterator[tuple[npt.NDArray[np.intp], Shape]]:
        words = messages.words
        for length in np.unique(messages.lengths):
            left = np.flatnonzero(messages.lengths == length)
            known = self._shapes.setdefault(int(length), [])
            for shape in list(known):
                if not len(left):
                    break
                fits = _fits(words, messages.starts[left], shape)
                if fits.any():
                    yield left[fits], shape
                    left = left[~fits]
            while len(left):
                shape = read_shape(messages.octets, int(messages.starts[left[0]]), int(length), self._known)
                fits = _fits(words, messages.starts[left], shape)
                if not fits[0]:  # cannot be; would not end
                    raise errors.Malformed("a message does not fit its own shape", f"octet {messages.starts[left[0]]}")
                if len(known) < _MOST_SHAPES:
                    known.append(shape)
                yield left[fits], shape
                left = left[~fits]

    def _entries(self, columns: _Columns, numbers: npt.NDArray[np.intp]) -> Iterator[Decoded | Omitted]:
        shape = columns.shape
        half = [name for name in ("orig.zone", "reply.zone") if name in shape.fields]
        role = self._roles[columns.u2("zone")]
        if half:
            # An entry whose zone counts in one direction only cannot be named by a zone of ours.
            for name in half:
                role = role | self._roles[columns.u2(name)]
        if self._addresses is not None:
            role[~columns.has_end_in(self._addresses)] = 0
        here = np.flatnonzero(role)
        if not len(here):
            return
        if len(here) < len(role):
            columns, numbers, role = columns.take(here), numbers[here], role[here]
        if half:
            yield _omit("its zone counts in one direction only", columns, len(here))
            return
        if shape.template is None:
            yield _omit(_why_no_template(shape), columns, len(here))
            return
        is_plain, is_extended = columns.is_plain(), columns.is_extended()
        if is_plain.all() and not is_extended.any():
            yield Decoded(self._rows(shape.template, columns, role), numbers)
            return
        is_carried = is_plain | columns.is_translated_as_carried()
        for translated, extended in itertools.product((False, True), repeat=2):
            at = np.flatnonzero(is_carried & (is_plain != translated) & (is_extended == extended))
            if len(at):
                template = shape.template.variant(is_translated=translated, is_extended=extended)
                yield Decoded(self._rows(template, columns.take(at), role[at]), numbers[at])
        at = np.flatnonzero(~is_carried)
        if len(at):
            label = shape.template.protocol.label
            yield _omit(f"translation of anything but addresses is not carried of {label}", columns.take(at), len(at))

    def _rows(self, template: Template, columns: _Columns, role: npt.NDArray[np.uint8]) -> Batch:
        rows = template.empty(len(columns))
        shape, family = columns.shape, "IPv6" if template.is_ipv6 else "IPv4"
        rows["zoneRole"] = role
        rows["protocolIdentifier"] = shape.protocol
        rows[f"source{family}Address"] = columns.address("orig.source")
        rows[f"destination{family}Address"] = columns.address("orig.destination")
        rows["flowId"] = columns.u4("id")
        rows["conntrackStatus"] = columns.u4("status")
        rows["remainingTimeoutSeconds"] = columns.u4("timeout")
        rows["flowMark"] = columns.u4("mark")
        for part in nl.IDENTIFIERS[template.protocol.identifiers]:
            rows[part.field] = columns.part(f"orig.{part.name}", part)
        is_tcp = template.protocol is protocols.TCP
        if is_tcp and "tcp_state" in shape.fields:
            rows["tcpConnectionState"] = nl.STATE_FROM_KERNEL[columns.u1("tcp_state")]
            rows["tcpWindowScale"] = columns.u1("scale")
            rows["reverseTcpWindowScale"] = columns.u1("reply_scale")
            rows["tcpTrackingFlags"] = columns.u1("flags")
            rows["reverseTcpTrackingFlags"] = columns.u1("reply_flags")
        if template.protocol is protocols.SCTP and "sctp_state" in shape.fields:
            rows["sctpAssociationState"] = nl.SCTP_STATE_FROM_KERNEL[columns.u1("sctp_state")]
            rows["sctpVerificationTag"] = columns.u4("tag")
            rows["reverseSctpVerificationTag"] = columns.u4("reply_tag")
        if "timeout" not in shape.fields:
            self._complete_offloaded(rows, template)
        if template.is_translated:
            rows[f"postNATSource{family}Address"] = columns.address("reply.destination")
            rows[f"postNATDestination{family}Address"] = columns.address("reply.source")
            identifiers = template.protocol.identifiers
            for part in nl.IDENTIFIERS[identifiers]:
                other = identifiers.other(part.field)
                if other in identifiers.behind:
                    rows[identifiers.behind[other]] = columns.part(f"reply.{part.name}", part)
        if template.is_extended:
            rows["conntrackHelper"] = columns.helper().view(">u8")
            rows["conntrackLabels"] = columns.labels().view(np.uint64)
            if "master.protocol" in shape.fields:
                rows["masterProtocolIdentifier"] = columns.u1("master.protocol")
                for end in ("source", "destination"):
                    rows[f"master{end.capitalize()}{family}Address"] = columns.address(f"master.{end}")
                    rows[f"master{end.capitalize()}TransportPort"] = columns.u2(f"master.{end}_port")
            for name, *_ in template.protocol.extension:
                rows[name] = columns.u4(name)
            for name in shape.fields.keys() & ACCOUNTING:
                rows[name] = columns.u8(name)
            rows["flowStartMilliseconds"] //= _NANOSECONDS_PER_MILLISECOND
        return Batch(template, rows)

    def _complete_offloaded(self, rows: npt.NDArray[np.void], template: Template) -> None:
        # The kernel tells neither timeout nor TCP state of an entry whose packets bypass conntrack. Only established
        # flows are offloaded, and nobody has looked at their windows since.
        offloaded = rows["conntrackStatus"] & np.uint32(nl.STATUS_OFFLOADED) != 0
        known = {protocols.TCP: self._timeouts.tcp_established, protocols.GRE: self._timeouts.gre_stream}
        rows["remainingTimeoutSeconds"][offloaded] = known.get(template.protocol, self._timeouts.udp_stream)
        if template.protocol is protocols.TCP:
            rows["tcpConnectionState"][offloaded] = TcpState.ESTABLISHED
            rows["tcpTrackingFlags"][offloaded] |= nl.FLAG_BE_LIBERAL
            rows["reverseTcpTrackingFlags"][offloaded] |= nl.FLAG_BE_LIBERAL


class _Columns:
    """The fields of messages of one shape."""

    def __init__(self, octets: npt.NDArray[np.uint8], starts: Offsets, shape: Shape) -> None:
        self.shape = shape
        self._octets = octets
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, which: npt.NDArray[np.intp]) -> _Columns:
        return _Columns(self._octets, self._starts[which], self.shape)

    def u1(self, name: str) -> npt.NDArray[np.uint8]:
        at = self.shape.fields.get(name)
        return np.zeros(len(self), np.uint8) if at is None else self._octets[self._starts + at]

    def u2(self, name: str) -> npt.NDArray[np.uint16]:
        return self._column(name, ">u2", 1)

    def u4(self, name: str) -> npt.NDArray[np.uint32]:
        return self._column(name, ">u4", 2)

    def u8(self, name: str) -> npt.NDArray[np.uint64]:
        # Attributes begin at multiples of four octets.
        words = self._octets[: len(self._octets) & ~3].view(">u4")
        first = (self._starts + self.shape.fields[name]) >> 2
        return words[first].astype(np.uint64) << np.uint64(32) | words[first + 1]

    def part(self, name: str, part: nl.Part) -> npt.NDArray[Any]:
        return self.u1(name) if part.form == "u1" else self.u2(name)

    def address(self, name: str) -> npt.NDArray[Any]:
        """Of IPv4 shape (n,), of IPv6 shape (n, 2)."""
        if f"{name}4" in self.shape.fields:
            return self.u4(f"{name}4")
        at = (self._starts + self.shape.fields[f"{name}6"]) >> 2
        words = self._octets[: len(self._octets) & ~3].view(np.uint32)
        halves: npt.NDArray[Any] = words[at[:, None] + np.arange(4)].view(">u8")
        return halves

    def helper(self) -> npt.NDArray[np.uint8]:
        """The names of helpers, filled up with zeros: shape (n, HELPER_OCTETS)."""
        names = np.zeros((len(self), nl.HELPER_OCTETS), np.uint8)
        at = self.shape.fields.get(_HELPER)
        if at is not None:
            octets = self.shape.helper_octets
            names[:, :octets] = self._octets[self._starts[:, None] + np.arange(at, at + octets)]
        return names

    def labels(self) -> npt.NDArray[np.uint8]:
        """As two of the machine's 64-bit numbers lie in memory: shape (n, 16)."""
        at = self.shape.fields.get("labels")
        if at is None:
            return np.zeros((len(self), 16), np.uint8)
        found: npt.NDArray[np.uint8] = self._octets[self._starts[:, None] + np.arange(at, at + 16)]
        return found

    def is_extended(self) -> Mask:
        """Which entries have something that few have."""
        fields, found = self.shape.fields, np.zeros(len(self), bool)
        if _HELPER in fields or "master.protocol" in fields or not fields.keys().isdisjoint(ACCOUNTING):
            return ~found
        if "labels" in fields:
            found |= self.labels().any(axis=1)
        assert self.shape.template is not None, "nobody knows what else such an entry may have"
        for name, *_ in self.shape.template.protocol.extension:
            if name in fields:
                found |= self.u4(name) != 0
        return found

    def has_end_in(self, addresses: Addresses) -> Mask:
        """Which entries have one of `addresses` at an end, before or behind a translation."""
        found = np.zeros(len(self), bool)
        for direction in ("orig", "reply"):
            for end in ("source", "destination"):
                for is_ipv6 in (False, True):
                    if f"{direction}.{end}{'6' if is_ipv6 else '4'}" in self.shape.fields:
                        found |= holds_any(self.address(f"{direction}.{end}"), is_ipv6, addresses)
        return found

    def is_plain(self) -> Mask:
        """Which entries' reply is the original turned round."""
        same = np.ones(len(self), bool)
        for one, other in (("orig.source", "reply.destination"), ("orig.destination", "reply.source")):
            equal = self.address(one) == self.address(other)
            same &= equal.all(axis=1) if equal.ndim > 1 else equal
        return same & self._is_answered(changed_by_nat=True) & self._is_answered(changed_by_nat=False)

    def is_translated_as_carried(self) -> Mask:
        """Which entries differ from plain ones in nothing but what a template with a NAT has room for."""
        return self._is_answered(changed_by_nat=False)

    def _is_answered(self, *, changed_by_nat: bool) -> Mask:
        """Which entries' reply has the identifiers of an answer: those that a NAT may change, or the others."""
        assert self.shape.template is not None, "nobody knows what such an entry's reply would be"
        protocol = self.shape.template.protocol
        identifiers, same = protocol.identifiers, np.ones(len(self), bool)
        names = {part.field: part.name for part in nl.IDENTIFIERS[identifiers]}
        for part in nl.IDENTIFIERS[identifiers]:
            other = identifiers.other(part.field)
            if (other in identifiers.behind) is changed_by_nat:
                answer = self.part(f"orig.{names[other]}", part)
                if part.field == identifiers.answered:
                    answer = protocol.inverse[answer]
                same &= answer == self.part(f"reply.{part.name}", part)
        return same

    def _column(self, name: str, dtype: str, shift: int) -> npt.NDArray[Any]:
        at = self.shape.fields.get(name)
        if at is None:
            return np.zeros(len(self), dtype)
        whole = self._octets[: len(self._octets) & ~3].view(dtype)
        column: npt.NDArray[Any] = whole[(self._starts + at) >> shift]
        return column


def read_shape(octets: npt.NDArray[np.uint8], start: int, length: int, attributes: _Known = _ENTRY) -> Shape:
    """The shape of the message at `start`, read attribute by attribute.

    :raises Malformed: its attributes do not fill it exactly, or one that is known has another size.
    """
    raw = octets[start : start + length].tobytes()
    places, fields = [1], {}

    def walk(begin: int, end: int, known: _Known, prefix: str) -> None:
        at = begin
        while at < end:
            size = int.from_bytes(raw[at : at + 2], sys.byteorder) if end - at >= 4 else 0
            kind = int.from_bytes(raw[at + 2 : at + 4], sys.byteorder) & nl.NLA_TYPE_MASK
            if size < 4 or at + size > end:
                raise errors.Malformed("an attribute's length is wrong", f"octet {start + at}")
            places.append(at >> 2)
            meaning = known.get(kind)
            if isinstance(meaning, tuple):
                name, octets_ = meaning
                if not (size == 4 + octets_ or (name == _HELPER and size < 4 + octets_)):
                    raise errors.Malformed(
                        f"attribute {prefix}{name} has {size - 4} octets instead of {octets_}", f"octet {start + at}"
                    )
                fields[prefix + name] = at + 4
            elif meaning is not None:
                inner = _DIRECTIONS.get(kind, prefix) if known is attributes else prefix
                walk(at + 4, at + size, meaning, inner)
            at += (size + 3) & ~3

    walk(_BODY, length, attributes, "")
    family, protocol = raw[HEADER_OCTETS], 0
    words = np.frombuffer(raw[: length & ~3], np.uint32)
    masks = np.full(len(places), 0xFFFFFFFF, np.uint32)
    masks[0] = np.frombuffer(b"\xff\xff\0\0", np.uint32)[0]  # a message's type; its flags may differ
    first_octet = np.frombuffer(b"\xff\0\0\0", np.uint32)[0]
    extra = [HEADER_OCTETS]
    for direction in ("orig.", "reply."):
        if f"{direction}protocol" in fields:
            extra.append(fields[f"{direction}protocol"])
    if "orig.protocol" in fields:
        protocol = raw[fields["orig.protocol"]]
    places.extend(at >> 2 for at in extra)
    masks = np.concatenate([masks, np.full(len(extra), first_octet, np.uint32)])
    at = np.array(places, np.int64)
    helper_octets = 0
    if _HELPER in fields:
        helper_octets = int.from_bytes(raw[fields[_HELPER] - 4 : fields[_HELPER] - 2], sys.byteorder) - 4
    template = _template(family, protocol, fields, raw, start)
    return Shape(length, family, protocol, fields, at, words[at] & masks, masks, helper_octets, template)


def _template(family: int, number: int, fields: Mapping[str, int], raw: bytes, start: int) -> Template | None:
    families = {number: name for name, number in nl.AF_OF_FAMILY.items()}
    protocol = protocols.BY_NUMBER.get(number)
    if family not in families or protocol is None:
        return None
    version = families[family][-1]
    parts = nl.IDENTIFIERS[protocol.identifiers]
    if protocol in nl.OPTIONAL and not any(f"orig.{part.name}" in fields for part in parts):
        return None  # this kernel does not know the protocol
    needed = {"orig.protocol", "reply.protocol"}
    for direction in ("orig.", "reply."):
        needed |= {f"{direction}source{version}", f"{direction}destination{version}"}
        needed |= {f"{direction}{part.name}" for part in parts}
    if any(name.startswith("master.") for name in fields):
        needed |= {f"master.source{version}", f"master.destination{version}", "master.protocol"}
    missing = needed - fields.keys()
    if missing:
        raise errors.Malformed(f"an entry lacks {', '.join(sorted(missing))}", f"octet {start}")
    if raw[fields["reply.protocol"]] != number:
        raise errors.Malformed("the two directions of an entry differ in protocol", f"octet {start}")
    if families[family] not in protocol.families:
        return None
    return TEMPLATES[f"{protocol.kind}-{families[family]}"]


def _fits(words: npt.NDArray[np.uint32], starts: Offsets, shape: Shape) -> Mask:
    found = words[shape.places[:, None] + (starts >> 2)]
    found &= shape.masks[:, None]
    found ^= shape.words[:, None]
    fits: Mask = np.bitwise_or.reduce(found, axis=0) == 0
    return fits


def _why_no_template(shape: Shape) -> str:
    if shape.family not in nl.AF_OF_FAMILY.values():
        return f"address family {shape.family} is not carried"
    return f"protocol {protocols.name_of(shape.protocol)} is not carried"


def _omit(reason: str, columns: _Columns, count: int, examples: int = 5) -> Omitted:
    few = columns.take(np.arange(min(count, examples)))
    return Omitted(reason, count, tuple(_names(few)))


def _names(columns: _Columns) -> Iterator[str]:
    shape = columns.shape
    protocol = protocols.name_of(shape.protocol)
    for number in range(len(columns)):
        one = columns.take(np.array([number]))
        text = [f"protocol {protocol}" if protocol.isdigit() else protocol]
        for end in ("source", "destination"):
            address = "?"
            if f"orig.{end}4" in shape.fields or f"orig.{end}6" in shape.fields:
                address = str(ipaddress.ip_address(one.address(f"orig.{end}").tobytes()))
            if f"orig.{end}_port" in shape.fields:
                address = f"[{address}]" if ":" in address else address
                address += f":{one.u2(f'orig.{end}_port')[0]}"
            text.append(address)
        yield f"{text[0]} {text[1]} > {text[2]}"
