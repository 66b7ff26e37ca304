"""The protocols whose flows are carried, each described in one place.

A kind of flow is a protocol: its number, what tells its flows apart between two addresses, and what a firewall knows of
how far they are. Templates (`model.flows`), codec, drivers, conformance suite and command line go by what stands here.
To add a kind takes an entry in `GENERATIONS`, the elements of its fields in `model.information_elements`, and in a
driver what its device calls them.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, field

import numpy as np

Field = tuple[str, str] | tuple[str, str, tuple[int, ...]]
"""Name and numpy type of a field, and its shape where it has one."""


class TcpState(enum.IntEnum):
    """Values of `tcpConnectionState`: the numbers of RFC 4022's tcpConnectionState, the names of RFC 9293.

    A firewall between the ends tells fewer states apart than the ends do. SYN_SENT_SIMULTANEOUS (both sides have sent
    a SYN, RFC 9293 section 3.5) and NONE (nothing seen yet) have no number there and stand above its range.
    """

    CLOSED = 1
    LISTEN = 2
    SYN_SENT = 3
    SYN_RECEIVED = 4
    ESTABLISHED = 5
    FIN_WAIT_1 = 6
    FIN_WAIT_2 = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    CLOSING = 10
    TIME_WAIT = 11
    SYN_SENT_SIMULTANEOUS = 128
    NONE = 129


class SctpState(enum.IntEnum):
    """Values of `sctpAssociationState`: the numbers of RFC 3873's sctpAssocState, the names of RFC 9260 section 4.

    A firewall takes the end that sent the INIT for the one whose state it tells: SHUTDOWN_SENT is a SHUTDOWN of that
    end, SHUTDOWN_RECEIVED one of the other. SHUTDOWN_PENDING is of an end alone: it has sent nothing yet.
    HEARTBEAT_SENT (a HEARTBEAT began the flow: another path of an association) and NONE (nothing seen yet) have no
    number there and stand above its range.
    """

    CLOSED = 1
    COOKIE_WAIT = 2
    COOKIE_ECHOED = 3
    ESTABLISHED = 4
    SHUTDOWN_PENDING = 5
    SHUTDOWN_SENT = 6
    SHUTDOWN_RECEIVED = 7
    SHUTDOWN_ACK_SENT = 8
    HEARTBEAT_SENT = 128
    NONE = 129


@dataclass(frozen=True, slots=True)
class Identifiers:
    """What tells flows of a protocol apart that have the same two addresses: the last fields of their keys."""

    fields: tuple[Field, ...]
    words: str
    """How people read the values, in the order of the fields; empty where they stand behind the addresses, as ports."""
    swapped: tuple[str, str] | None = None
    """Two fields that change places when the flow is seen from its other end."""
    answered: str | None = None
    """The field that is another one in an answer: see `Protocol.answers`."""
    translated: tuple[tuple[str, Field], ...] = ()
    """Those of them that a NAT may change, each with the field of what it is behind the NAT."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one[0] for one in self.fields)

    @property
    def behind(self) -> dict[str, str]:
        """`translated`, by name."""
        return {name: field[0] for name, field in self.translated}

    def other(self, name: str) -> str:
        """The field that has the value of `name` when the flow is seen from its other end."""
        if self.swapped is not None and name in self.swapped:
            return self.swapped[1 - self.swapped.index(name)]
        return name

    def said(self, row: np.void) -> str:
        """The values for people: ``type 8 code 0 id 1``; nothing for ports."""
        return self.words.format(*(row[name] for name in self.names)) if self.words else ""


def _icmp(family: str) -> Identifiers:
    kind = f"icmpType{family}"
    fields: tuple[Field, ...] = ((kind, "u1"), (f"icmpCode{family}", "u1"), ("icmpIdentifier", ">u2"))
    translated = (("icmpIdentifier", ("postNATIcmpIdentifier", ">u2")),)
    return Identifiers(fields, "type {} code {} id {}", answered=kind, translated=translated)


PORTS = Identifiers(
    (("sourceTransportPort", ">u2"), ("destinationTransportPort", ">u2")),
    "",
    swapped=("sourceTransportPort", "destinationTransportPort"),
    translated=(
        ("sourceTransportPort", ("postNAPTSourceTransportPort", ">u2")),
        ("destinationTransportPort", ("postNAPTDestinationTransportPort", ">u2")),
    ),
)
GRE_KEYS = Identifiers(
    (("greKey", ">u4"), ("reverseGreKey", ">u4")), "key {} reverse key {}", ("greKey", "reverseGreKey")
)


@dataclass(frozen=True, slots=True)
class Protocol:
    """One protocol of those whose flows are carried."""

    name: str
    """As conntrack(8) calls it."""
    label: str
    """As a sentence calls it."""
    number: int
    """IANA's, that of the IP header."""
    kind: str
    """The first word in the names of its templates."""
    identifiers: Identifiers
    families: tuple[str, ...] = ("ipv4", "ipv6")
    state: tuple[Field, ...] = ()
    """What a firewall keeps of its flows beside what it keeps of every flow."""
    extension: tuple[Field, ...] = ()
    """What it keeps of few of them, beside what it may keep of a few flows of any protocol."""
    states: type[enum.IntEnum] | None = None
    """The values of `state_field`; ESTABLISHED is one of them."""
    state_field: str | None = None
    answers: tuple[tuple[int, int], ...] = ()
    """Pairs of values of `identifiers.answered`: a question and its answer."""

    inverse: np.ndarray[tuple[int], np.dtype[np.uint8]] = field(init=False, compare=False, repr=False)
    """What answers each value of `identifiers.answered`; itself where nothing else does."""

    def __post_init__(self) -> None:
        inverse = np.arange(256, dtype=np.uint8)
        for one, other in self.answers:
            inverse[one], inverse[other] = other, one
        inverse.flags.writeable = False
        object.__setattr__(self, "inverse", inverse)


TCP = Protocol(
    "tcp",
    "TCP",
    6,
    "tcp",
    PORTS,
    state=(
        ("tcpConnectionState", "u1"),
        ("tcpWindowScale", "u1"),
        ("reverseTcpWindowScale", "u1"),
        ("tcpTrackingFlags", "u1"),
        ("reverseTcpTrackingFlags", "u1"),
    ),
    extension=(
        ("tcpCorrectionPosition", ">u4"),
        ("tcpOffsetBefore", ">u4"),
        ("tcpOffsetAfter", ">u4"),
        ("reverseTcpCorrectionPosition", ">u4"),
        ("reverseTcpOffsetBefore", ">u4"),
        ("reverseTcpOffsetAfter", ">u4"),
        ("synproxySequenceNumber", ">u4"),
        ("synproxyTimestamp", ">u4"),
        ("synproxyTimestampOffset", ">u4"),
    ),
    states=TcpState,
    state_field="tcpConnectionState",
)
UDP = Protocol("udp", "UDP", 17, "udp", PORTS)
# A query is answered by another type (RFC 792, RFC 4443, RFC 4620); firewalls track no others.
ICMP = Protocol("icmp", "ICMP", 1, "icmp", _icmp("IPv4"), ("ipv4",), answers=((8, 0), (13, 14), (15, 16), (17, 18)))
ICMPV6 = Protocol("icmpv6", "ICMP", 58, "icmp", _icmp("IPv6"), ("ipv6",), answers=((128, 129), (139, 140)))

SCTP = Protocol(
    "sctp",
    "SCTP",
    132,
    "sctp",
    PORTS,
    state=(
        ("sctpAssociationState", "u1"),
        ("sctpVerificationTag", ">u4"),
        ("reverseSctpVerificationTag", ">u4"),
    ),
    states=SctpState,
    state_field="sctpAssociationState",
)
"""RFC 9260. Each path of an association is a flow."""
UDPLITE = Protocol("udplite", "UDP-Lite", 136, "udplite", PORTS)
"""RFC 3828: UDP of which a part is covered by the checksum. Its ports are not UDP's."""
GRE = Protocol("gre", "GRE", 47, "gre", GRE_KEYS)
"""RFC 2784. A firewall that does not look at keys has 0 for both, and one flow for all tunnels of two addresses."""

GENERATIONS: tuple[tuple[tuple[Protocol, ...], tuple[Protocol, ...]], ...] = (
    ((TCP, UDP, ICMP, ICMPV6), (TCP, UDP)),
    ((SCTP, UDPLITE, GRE), ()),
    ((), (ICMP, ICMPV6, SCTP, UDPLITE, GRE)),
)
"""All of them: those that got templates of plain flows, and those that got some of flows with a NAT. The numbers of
templates on the wire follow this order, so what is added stands in a group behind."""

PROTOCOLS: tuple[Protocol, ...] = tuple(protocol for plain, _ in GENERATIONS for protocol in plain)
BY_NUMBER: dict[int, Protocol] = {protocol.number: protocol for protocol in PROTOCOLS}
STATES: dict[str, type[enum.IntEnum]] = {
    protocol.state_field: protocol.states
    for protocol in PROTOCOLS
    if protocol.state_field is not None and protocol.states is not None
}
"""By field, the states that a flow may be in."""

_OTHERS = {2: "igmp", 33: "dccp", 50: "esp", 51: "ah"}
"""Names of some that are not carried."""


def name_of(number: int) -> str:
    """What to call a protocol, carried or not: ``tcp``, or ``99`` where it has no name here."""
    known = BY_NUMBER.get(number)
    return known.name if known is not None else _OTHERS.get(number, str(number))


@functools.cache
def of_template(name: str, family: str) -> Protocol:
    """The protocol of a template: the one of which its name begins with the kind."""
    kind = name.partition("-")[0]
    found = [protocol for protocol in PROTOCOLS if protocol.kind == kind and family in protocol.families]
    assert len(found) == 1, f"no protocol, or several, of {family} are called {kind}"
    return found[0]
