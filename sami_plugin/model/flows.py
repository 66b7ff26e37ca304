"""Flows as columns.

A batch of flows is one table: a numpy structured array with one row per flow and one field per information element.
The fields carry the names of IANA's IPFIX registry (https://www.iana.org/assignments/ipfix) where it has one; elements
of the reverse direction carry the prefix of RFC 5103. All numbers are big-endian and the rows are packed, so the bytes
of the array are the records of an IPFIX data set, and nothing per flow happens in Python on the way.

The first fields of a row are its key: what identifies the flow inside its zone. No two flows of a zone share a key.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import netaddr
import numpy as np
import numpy.typing as npt

from sami_plugin.model import protocols
from sami_plugin.model.printable import printable
from sami_plugin.model.protocols import Field, Protocol

Rows = npt.NDArray[np.void]


class ZoneRole(enum.IntEnum):
    """What a flow's conntrack zone is for. Zone numbers are local to a host and never travel; roles do."""

    PORT = 1
    DNAT = 2
    SNAT = 3


class FlowStatus(enum.IntFlag):
    """Bits of `conntrackStatus`: the kernel's IPS_* values (include/uapi/linux/netfilter/nf_conntrack_common.h)."""

    EXPECTED = 0x1
    SEEN_REPLY = 0x2
    ASSURED = 0x4
    CONFIRMED = 0x8
    SRC_NAT = 0x10
    DST_NAT = 0x20
    SEQ_ADJUST = 0x40
    SRC_NAT_DONE = 0x80
    DST_NAT_DONE = 0x100
    DYING = 0x200
    FIXED_TIMEOUT = 0x400
    TEMPLATE = 0x800
    UNTRACKED = 0x1000
    HELPER = 0x2000
    OFFLOAD = 0x4000
    HW_OFFLOAD = 0x8000


class FirewallEvent(enum.IntEnum):
    """Values of IANA's `firewallEvent` (element 233) that are used here."""

    IGNORE = 0
    DELETED = 2


@dataclass(frozen=True, slots=True)
class Template:
    """The fields of one kind of record: first those of its key, then those of its state.

    Most are of flows. What else a firewall keeps is of kinds that drivers bring (`model.kinds`); they say what follows
    for flows from the names of their fields.
    """

    name: str
    key: tuple[Field, ...]
    state: tuple[Field, ...]
    ends: tuple[str, ...] = field(default=(), compare=False)
    """Of a kind that is none of flows: the field of its key that holds an address of the guest's port, and those that
    hold others, which may be another port's."""
    words: str = field(default="", compare=False)
    """And how people read a record: a format of the fields of its key, as ``{elementIPv4Address} in {nftSetName}``."""
    is_renewed: bool = field(default=True, compare=False)
    """Whether traffic renews its time, so that it is kept alive where the guest does not run yet."""
    varies: frozenset[str] = field(default=frozenset(), compare=False)
    """Fields of its state that differ from device to device by nature, and that nobody compares."""

    # What follows from them is asked for with every batch, and computed once.
    dtype: np.dtype[np.void] = field(init=False, compare=False, repr=False)
    whole: np.dtype[np.void] = field(init=False, compare=False, repr=False)
    """A row as so many octets: numpy moves rows of fields field by field, ten times slower."""
    key_octets: int = field(init=False, compare=False, repr=False)
    address_fields: tuple[str, ...] = field(init=False, compare=False, repr=False)
    """Wherever an address stands."""
    end_fields: tuple[str, ...] = field(init=False, compare=False, repr=False)
    """Of these, the flow's own ends, before and behind a translation; of what is expected, those of its master."""
    is_ipv6: bool = field(init=False, compare=False, repr=False)
    is_translated: bool = field(init=False, compare=False, repr=False)
    """Whether it has room for a NAT."""
    is_extended: bool = field(init=False, compare=False, repr=False)
    """Whether it has room for what few flows have."""
    is_expectation: bool = field(init=False, compare=False, repr=False)
    """Whether it is of flows that a helper expects and that nobody has begun yet."""
    is_identity: bool = field(init=False, compare=False, repr=False)
    is_flow: bool = field(init=False, compare=False, repr=False)
    """Whether it is of flows, or of what is expected to be one."""

    def __post_init__(self) -> None:
        names = [one[0] for one in self.key + self.state]
        is_flow = not self.ends
        is_expectation = is_flow and any(one[0].startswith("master") for one in self.key)
        for name, value in (
            ("dtype", dtype := _dtype(self.key + self.state)),
            ("whole", np.dtype((np.void, dtype.itemsize))),
            ("key_octets", _dtype(self.key).itemsize),
            ("address_fields", tuple(one for one in names if one.endswith("Address"))),
            (
                "end_fields",
                self.ends
                or tuple(
                    one for one in names if one.endswith("Address") and one.startswith("master") == is_expectation
                ),
            ),
            ("is_ipv6", any(one[0] in (self.ends or ("sourceIPv6Address",)) and len(one) > 2 for one in self.key)),
            ("is_translated", is_flow and any(one.startswith("postNAT") for one in names)),
            ("is_extended", is_flow and "conntrackLabels" in names),
            ("is_expectation", is_expectation),
            ("is_identity", self.state == _IDENTITY),
            ("is_flow", is_flow),
        ):
            object.__setattr__(self, name, value)

    @property
    def protocol(self) -> Protocol:
        """That of its flows."""
        return protocols.of_template(self.name, "ipv6" if self.is_ipv6 else "ipv4")

    @property
    def plain(self) -> Template:
        """That of the same flows without a NAT and without what few have; of names, that of the names of these."""
        if self.is_expectation or not self.is_flow:
            return self
        flows = self.variant()
        return flows.identity if self.is_identity else flows

    def variant(self, *, is_translated: bool = False, is_extended: bool = False) -> Template:
        """The template of flows of the same protocol and family with room for these, or without."""
        words = ("-nat" if is_translated else "") + ("-extended" if is_extended else "")
        return TEMPLATES[f"{self.protocol.kind}{words}-{'ipv6' if self.is_ipv6 else 'ipv4'}"]

    @property
    def usual(self) -> Template:
        """That of the same flows without what few have, by whose name operators admit them; itself of any others."""
        return self.variant(is_translated=self.is_translated) if self.is_extended else self

    def taken_by(self, declared: Collection[str]) -> Template:
        """That under which a device which declares these templates takes such flows: it may have no room for what few
        have, and then they come without."""
        return self if self.name in declared else self.usual

    @property
    def is_read_by_all(self) -> bool:
        """Whether each agent reads it, also one whose firewall does not take it: not so what came later."""
        return self.is_flow and not self.is_expectation

    @property
    def identity(self) -> Template:
        """The template of names of these flows: the key, the source's id of the flow and an event."""
        return _identity(self)

    def empty(self, count: int = 0) -> Rows:
        return np.zeros(count, self.dtype)


@functools.cache
def _dtype(fields: tuple[Field, ...]) -> np.dtype[np.void]:
    return np.dtype(list(fields))


@functools.cache
def _identity(template: Template) -> Template:
    if template.is_identity:
        return template
    return Template(f"{template.name}-identity", template.key, _IDENTITY, template.ends, template.words)


_FLOW_ID: Field = ("flowId", ">u4")
_IDENTITY: tuple[Field, ...] = (_FLOW_ID, ("firewallEvent", "u1"))
_ZONE_AND_PROTOCOL: tuple[Field, ...] = (("zoneRole", "u1"), ("protocolIdentifier", "u1"))
_ADDRESSES: dict[str, tuple[Field, ...]] = {
    "ipv4": (("sourceIPv4Address", ">u4"), ("destinationIPv4Address", ">u4")),
    # Two 64-bit halves each: comparable column by column.
    "ipv6": (("sourceIPv6Address", ">u8", (2,)), ("destinationIPv6Address", ">u8", (2,))),
}
_COMMON_STATE: tuple[Field, ...] = (
    _FLOW_ID,
    ("conntrackStatus", ">u4"),
    ("remainingTimeoutSeconds", ">u4"),
    ("flowMark", ">u4"),
)
_NAT_ADDRESSES: dict[str, tuple[Field, ...]] = {
    "ipv4": (("postNATSourceIPv4Address", ">u4"), ("postNATDestinationIPv4Address", ">u4")),
    "ipv6": (("postNATSourceIPv6Address", ">u8", (2,)), ("postNATDestinationIPv6Address", ">u8", (2,))),
}
_MASTERS_ADDRESSES: dict[str, tuple[Field, ...]] = {
    "ipv4": (("masterSourceIPv4Address", ">u4"), ("masterDestinationIPv4Address", ">u4")),
    "ipv6": (("masterSourceIPv6Address", ">u8", (2,)), ("masterDestinationIPv6Address", ">u8", (2,))),
}
_EXTENSION: dict[str, tuple[Field, ...]] = {
    family: (
        # The 16 octets of its name.
        ("conntrackHelper", ">u8", (2,)),
        # Label 0 is the lowest bit of the first of the two.
        ("conntrackLabels", ">u8", (2,)),
        ("masterProtocolIdentifier", "u1"),
        *addresses,
        ("masterSourceTransportPort", ">u2"),
        ("masterDestinationTransportPort", ">u2"),
    )
    for family, addresses in _MASTERS_ADDRESSES.items()
}
"""What a firewall keeps of few flows: zeros where there is no helper, label, master, or adjustment."""
_EXPECTED: dict[str, tuple[Field, ...]] = {
    family: (
        ("conntrackHelper", ">u8", (2,)),
        (f"expectationSource{mask}Mask", *form),
        ("expectationSourceTransportPortMask", ">u2"),
        ("expectationFlags", ">u4"),
        ("expectationClass", ">u4"),
        ("expectationFunction", "u1"),
        ("expectationNatDirection", "u1"),
        (f"expectationNat{mask}Address", *form),
        ("expectationNatTransportPort", ">u2"),
    )
    for family, mask, form in (("ipv4", "IPv4", (">u4",)), ("ipv6", "IPv6", (">u8", (2,))))
}
"""What a firewall keeps of flows that it expects, beside what it keeps of every flow."""
_COUNTERS = "octetTotalCount", "packetTotalCount", "reverseOctetTotalCount", "reversePacketTotalCount"
COUNTERS = frozenset(_COUNTERS)
"""Fields that only grow: a device that has more than it was given has kept it."""
ACCOUNTING = *_COUNTERS, "flowStartMilliseconds"
"""Fields of extended flows: what the firewall counted, and when it saw the flow first. Zeros where nobody asked it."""
_ACCOUNTING: tuple[Field, ...] = tuple((name, ">u8") for name in ACCOUNTING)
_OF_MASTER = slice(2, 7)
"""The fields of `_EXTENSION` that tell of the master."""


def _templates() -> Iterator[Template]:
    usual = list(_usual_templates())
    yield from usual
    for one in usual:
        family = "ipv6" if one.is_ipv6 else "ipv4"
        name = one.name.replace(f"-{family}", f"-extended-{family}")
        yield Template(name, one.key, one.state + _EXTENSION[family] + one.protocol.extension + _ACCOUNTING)
    for one in usual:
        if one.protocol in (protocols.TCP, protocols.UDP) and not one.is_translated:
            family = "ipv6" if one.is_ipv6 else "ipv4"
            name = one.name.replace(f"-{family}", f"-expectation-{family}")
            yield Template(name, one.key + _EXTENSION[family][_OF_MASTER], _COMMON_STATE + _EXPECTED[family])


def _usual_templates() -> Iterator[Template]:
    for plain, translated in protocols.GENERATIONS:
        for family, addresses in _ADDRESSES.items():
            for word, some in (("", plain), ("nat-", translated)):
                for protocol in some:
                    if family in protocol.families:
                        key = _ZONE_AND_PROTOCOL + addresses + protocol.identifiers.fields
                        behind = tuple(field for _, field in protocol.identifiers.translated)
                        more = _NAT_ADDRESSES[family] + behind if word else ()
                        yield Template(f"{protocol.kind}-{word}{family}", key, _COMMON_STATE + protocol.state + more)


TEMPLATES: dict[str, Template] = {template.name: template for template in _templates()}
"""All flow templates by name. A flow of which the reply is not simply the original turned round is in a `nat` one, and
one that has something that few flows have in an `extended` one. What is in an `expectation` one is no flow yet."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Flows, or names of flows, of one template; `rows` has the template's dtype and any length."""

    template: Template
    rows: Rows

    def __post_init__(self) -> None:
        # numpy.concatenate, of even one array, turns its fields to the machine's byte order; `joined` does not.
        assert self.rows.dtype == self.template.dtype, f"{self.rows.dtype} are no rows of {self.template.name}"

    @classmethod
    def joined(cls, template: Template, parts: Sequence[Rows]) -> Batch:
        """One batch of all rows, in order."""
        rows = template.empty(sum(map(len, parts)))
        if parts:
            np.concatenate([part.view(template.whole) for part in parts], out=rows.view(template.whole))
        return cls(template, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Batch:
        return Batch(self.template, self.rows.view(self.template.whole)[which].view(self.template.dtype))

    def copy(self) -> Batch:
        """The same flows in rows of their own."""
        return Batch(self.template, self.rows.view(self.template.whole).copy().view(self.template.dtype))

    def without_ids(self) -> Batch:
        """The same flows in rows of their own, as who does not know this device's ids calls them."""
        batch = self.copy()
        batch.rows["flowId"] = 0
        return batch

    def under(self, template: Template) -> Batch:
        """The same flows under another template of their protocol and family, without what it has no room for."""
        if template == self.template:
            return self
        rows = template.empty(len(self))
        for name in rows.dtype.names or ():
            if name in (self.rows.dtype.names or ()):
                rows[name] = self.rows[name]
        return Batch(template, rows)

    @property
    def identities(self) -> Batch:
        """The names of these flows, in the same order."""
        if self.template.is_identity:
            return self
        rows = self.template.identity.empty(len(self.rows))
        for name in (*(one[0] for one in self.template.key), "flowId"):
            rows[name] = self.rows[name]
        return Batch(self.template.identity, rows)

    @property
    def address_fields(self) -> tuple[str, ...]:
        """Wherever an address stands."""
        return self.template.address_fields

    @property
    def source_field(self) -> str:
        return "sourceIPv6Address" if self.template.is_ipv6 else "sourceIPv4Address"

    @property
    def destination_field(self) -> str:
        return "destinationIPv6Address" if self.template.is_ipv6 else "destinationIPv4Address"


@dataclass(frozen=True, slots=True)
class Omitted:
    """Flows of the guest that a driver saw and cannot express: why, how many, and the first few by name."""

    reason: str
    count: int
    examples: tuple[str, ...] = ()


BARRED = "the firewall drops it, by its mark"
"""Why a flow is omitted that has a mark of `Scope.barred_marks`."""

Addresses = tuple[netaddr.IPAddress, ...]


def holds_any(column: npt.NDArray[np.generic], is_ipv6: bool, addresses: Addresses) -> npt.NDArray[np.bool_]:
    """Which rows of an address column hold one of `addresses`; no address matches nothing.

    `column` is an address field of a batch: shape (n,) for IPv4 and (n, 2) for IPv6.
    """
    found = np.zeros(len(column), bool)
    for number in _numbers(addresses, is_ipv6):
        found |= _holds(column, is_ipv6, number)
    return found


def _numbers(addresses: Addresses, is_ipv6: bool) -> list[int]:
    return [int(address) for address in addresses if (address.version == 6) == is_ipv6]


def _holds(column: npt.NDArray[np.generic], is_ipv6: bool, number: int) -> npt.NDArray[np.bool_]:
    if is_ipv6:
        high, low = divmod(number, 1 << 64)
        held: npt.NDArray[np.bool_] = (column[:, 0] == np.uint64(high)) & (column[:, 1] == np.uint64(low))
    else:
        held = column == np.uint32(number)
    return held


def has_end_in(batch: Batch, addresses: Addresses) -> npt.NDArray[np.bool_]:
    """Which flows have one of `addresses` at either end, before or behind a translation."""
    found = np.zeros(len(batch), bool)
    is_ipv6 = batch.template.is_ipv6
    for number in _numbers(addresses, is_ipv6):
        for name in batch.template.end_fields:
            found |= _holds(batch.rows[name], is_ipv6, number)
    return found


def is_translated_elsewhere(batch: Batch, addresses: Addresses) -> npt.NDArray[np.bool_]:
    """Which flows have an end translated from or to an address that is none of `addresses`."""
    elsewhere = np.zeros(len(batch), bool)
    behind = [field for field in batch.template.end_fields if field.startswith("postNAT")]
    for before, after in zip((batch.source_field, batch.destination_field), behind, strict=False):
        differs = batch.rows[before] != batch.rows[after]
        is_translated = differs if differs.ndim == 1 else differs.any(axis=1)
        are_own = [holds_any(batch.rows[field], batch.template.is_ipv6, addresses) for field in (before, after)]
        elsewhere |= is_translated & ~(are_own[0] & are_own[1])
    return elsewhere


def is_expected_elsewhere(batch: Batch, addresses: Addresses) -> npt.NDArray[np.bool_]:
    """Which expected flows go to what is neither one of `addresses` nor an end of their master."""
    return ~_is_known_to_master(batch, batch.destination_field, addresses)


def is_expected_behind_another(batch: Batch, addresses: Addresses) -> npt.NDArray[np.bool_]:
    """Which expected flows are to be translated to such an address."""
    (field,) = (name for name in batch.address_fields if name.startswith("expectationNat"))
    has_nat: npt.NDArray[np.bool_] = batch.rows["expectationNatDirection"] != 0
    return has_nat & ~_is_known_to_master(batch, field, addresses)


def _is_known_to_master(batch: Batch, field: str, addresses: Addresses) -> npt.NDArray[np.bool_]:
    known = holds_any(batch.rows[field], batch.template.is_ipv6, addresses)
    for end in batch.template.end_fields:
        same = batch.rows[field] == batch.rows[end]
        known |= same if same.ndim == 1 else same.all(axis=1)
    return known


def are_anothers(batch: Batch, addresses: Addresses) -> npt.NDArray[np.bool_]:
    """Which entries are in use by who has none of `addresses`: somebody has answered, or a NAT has made it somebody's.

    What is left is a stranger's packet, which is nobody's.
    """
    used = int(FlowStatus.SEEN_REPLY | FlowStatus.SRC_NAT | FlowStatus.DST_NAT)
    is_used: npt.NDArray[np.bool_] = batch.rows["conntrackStatus"] & used != 0
    return is_used & ~has_end_in(batch, addresses)


def helper_octets(name: str) -> tuple[int, int]:
    """The value of `conntrackHelper` for a helper of that name, in ASCII and of at most 16 characters."""
    octets = name.encode("ascii").ljust(16, b"\0")
    return int.from_bytes(octets[:8], "big"), int.from_bytes(octets[8:16], "big")


def importance(batch: Batch) -> npt.NDArray[np.int64]:
    """Where there is no place for all, the flows of which this is greater come first.

    First come those that were seen both ways (ASSURED), and of these the ones that have more time left. What is no flow
    comes before them all, for it takes no place of a flow.
    """
    if not batch.template.is_flow:
        return np.full(len(batch), 1 << 40, np.int64)
    is_assured = (batch.rows["conntrackStatus"] & int(FlowStatus.ASSURED)) != 0
    ranks: npt.NDArray[np.int64] = (is_assured.astype(np.int64) << 32) + batch.rows["remainingTimeoutSeconds"]
    return ranks


def names(batch: Batch, limit: int = 20) -> tuple[str, ...]:
    """The first `limit` flows for people: ``tcp 192.0.2.1:40000 > 198.51.100.2:443``."""
    return tuple(_name(batch, row) for row in batch.rows[:limit])


def _name(batch: Batch, row: np.void) -> str:
    if not batch.template.is_flow:
        return said(batch.template, row)
    identifiers = batch.template.protocol.identifiers
    source, destination = (_address(row[field]) for field in (batch.source_field, batch.destination_field))
    if identifiers is protocols.PORTS:
        if batch.template.is_ipv6:
            source, destination = f"[{source}]", f"[{destination}]"
        source += f":{row['sourceTransportPort']}"
        destination += f":{row['destinationTransportPort']}"
    detail = identifiers.said(row)
    expected = "expected " if batch.template.is_expectation else ""
    protocol = protocols.name_of(int(row["protocolIdentifier"]))
    return f"{expected}{protocol} {source} > {destination}{detail and ' ' + detail}"


def said(template: Template, row: np.void) -> str:
    """A record of a kind that is none of flows, for people: the words of its kind."""
    values: dict[str, object] = {}
    for name in row.dtype.names or ():
        if name.endswith("Address"):
            values[name] = _address(row[name])
        elif np.ndim(row[name]):  # octets
            octets = row[name].tobytes().rstrip(bytes(1))
            values[name] = printable(octets.decode("latin-1"), 64) if octets.isascii() else octets.hex()
        else:
            values[name] = row[name]
    return f"{template.name.removesuffix('-identity')} {template.words.format_map(values)}"


def _address(value: np.void) -> str:
    if np.ndim(value):
        return str(netaddr.IPAddress(int(value[0]) << 64 | int(value[1]), 6))
    return str(netaddr.IPAddress(int(value), 4))


def answers(batch: Batch) -> Batch:
    """The keys of what these flows' peers send, where it comes from outside a NAT; the state fields are zero.

    What is no flow is not answered: its own key.
    """
    if not batch.template.is_flow:
        return batch
    template = batch.template.plain
    identifiers, rows = template.protocol.identifiers, template.empty(len(batch))
    behind = _behind(batch.template)
    pairs = {batch.source_field: batch.destination_field, batch.destination_field: batch.source_field}
    pairs |= {name: identifiers.other(name) for name in identifiers.names}
    for name, other in pairs.items():
        rows[name] = batch.rows[behind.get(other, other)]
    if identifiers.answered is not None:
        rows[identifiers.answered] = template.protocol.inverse[rows[identifiers.answered]]
    for name in ("zoneRole", "protocolIdentifier"):
        rows[name] = batch.rows[name]
    return Batch(template, rows)


def _behind(template: Template) -> dict[str, str]:
    """By field of the key, that of what it is behind a NAT; empty where there is none."""
    if not template.is_translated:
        return {}
    ends = {name: f"postNAT{name[0].upper()}{name[1:]}" for name in template.end_fields if "NAT" not in name}
    return ends | template.protocol.identifiers.behind


def turned_round(batch: Batch) -> Batch:
    """The keys of the same flows as their other ends would have begun them; the state fields are the same.

    What is no flow has no other end.
    """
    if not batch.template.is_flow:
        return batch
    turned = batch.copy()
    rows, identifiers = turned.rows, batch.template.protocol.identifiers
    pairs = [(batch.source_field, batch.destination_field)]
    if identifiers.swapped is not None:
        pairs.append(identifiers.swapped)
    for one, other in pairs:
        rows[one], rows[other] = batch.rows[other], batch.rows[one]
    if identifiers.answered is not None:
        rows[identifiers.answered] = batch.template.protocol.inverse[batch.rows[identifiers.answered]]
    return turned
