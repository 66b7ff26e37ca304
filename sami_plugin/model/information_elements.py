"""The information elements that flows are written in, and what each means on the wire.

Most are IANA's (https://www.iana.org/assignments/ipfix, RFC 7012). What IANA lacks stands under an enterprise number of
our own. None has been assigned yet, so the number is a parameter wherever bytes are made or read, and it defaults to
the one that RFC 5612 keeps for documentation; both ends have to use the same.

The 15 bits of an identifier of ours are used like this::

    0x4000   the element of the reverse direction
    0x2000   critical: who does not know the element must refuse the record (everyone else skips and says so)
    0x1fff   the number

RFC 5103 section 6.2 leaves it to an enterprise how it numbers its reverse elements. Its example, and libfixbuf for
the elements of an enterprise, take 0x4000 as the reverse bit, and so do we: tools that know the convention pair them.
IANA's elements are reversed as section 6.1 wants: the same number under the enterprise 29305.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from sami_plugin.errors import ConfigurationError

IANA = 0
REVERSE_ENTERPRISE = 29305
EXAMPLE_ENTERPRISE = 32473
"""The enterprise number of RFC 5612: for documentation, and for us until one is assigned."""
MOST_ENTERPRISE = 0xFFFF_FFFF

REVERSED = 0x4000
CRITICAL = 0x2000
VARIABLE_LENGTH = 0xFFFF
PADDING_OCTETS = 210


class DataType(enum.IntEnum):
    """Abstract data types (RFC 7012 section 3.1) with their numbers (RFC 5610 section 3.1)."""

    OCTET_ARRAY = 0
    UNSIGNED8 = 1
    UNSIGNED16 = 2
    UNSIGNED32 = 3
    UNSIGNED64 = 4
    STRING = 13
    DATE_TIME_MILLISECONDS = 15
    IPV4_ADDRESS = 18
    IPV6_ADDRESS = 19

    @property
    def label(self) -> str:
        """The type's name as IANA's registry writes it."""
        first, *rest = self.name.lower().split("_")
        return first + "".join(map(str.capitalize, rest))


OCTETS: dict[DataType, int] = {
    DataType.OCTET_ARRAY: 16,
    DataType.UNSIGNED8: 1,
    DataType.UNSIGNED16: 2,
    DataType.UNSIGNED32: 4,
    DataType.UNSIGNED64: 8,
    DataType.DATE_TIME_MILLISECONDS: 8,
    DataType.IPV4_ADDRESS: 4,
    DataType.IPV6_ADDRESS: 16,
}
"""Octets of a value in full. Only the unsigned types may be written shorter (RFC 7011 section 6.2). An octetArray is as
long as its element says, and by itself so long."""


class Semantics(enum.IntEnum):
    """Data type semantics (RFC 7012 section 3.2) with their numbers (RFC 5610 section 3.2)."""

    DEFAULT = 0
    QUANTITY = 1
    TOTAL_COUNTER = 2
    IDENTIFIER = 4
    FLAGS = 5


class Units(enum.IntEnum):
    """Units with their numbers (RFC 5610 section 3.3)."""

    NONE = 0
    OCTETS = 2
    PACKETS = 3
    SECONDS = 5
    MILLISECONDS = 6


class Origin(enum.Enum):
    """Who numbered the element: which enterprise number stands before it on the wire."""

    IANA = "IANA"
    IANA_REVERSE = "IANA, reversed (RFC 5103)"
    SAMI = "SAMI"
    VENDOR = "a vendor"


@dataclass(frozen=True, slots=True)
class InformationElement:
    """One element: its number, what its values are, and what they mean."""

    name: str
    number: int
    """The 15 bits of the identifier on the wire, with our critical and reverse bits where it has them."""
    data_type: DataType
    semantics: Semantics
    units: Units
    origin: Origin
    description: str
    length: int = 0
    """Octets of an octetArray; 0: as many as most have."""
    vendor: int = 0
    """The enterprise number of the vendor whose element it is."""

    @property
    def is_critical(self) -> bool:
        """A reader that does not know the element would take the flow for another one, or for one in another state."""
        return self.origin is Origin.SAMI and bool(self.number & CRITICAL)

    @property
    def may_be_reduced(self) -> bool:
        """Values may be written in fewer octets than the type has (RFC 7011 section 6.2)."""
        return DataType.UNSIGNED8 <= self.data_type <= DataType.UNSIGNED64

    @property
    def octets(self) -> int:
        """Octets of a value in full."""
        return self.length or OCTETS[self.data_type]

    def enterprise_number(self, enterprise: int) -> int:
        """The number of the element's enterprise, where `enterprise` is our own; 0 is IANA."""
        match self.origin:
            case Origin.IANA:
                return IANA
            case Origin.IANA_REVERSE:
                return REVERSE_ENTERPRISE
            case Origin.SAMI:
                return enterprise
            case Origin.VENDOR:
                return self.vendor


def _iana(
    name: str,
    number: int,
    data_type: DataType,
    semantics: Semantics,
    description: str,
    units: Units = Units.NONE,
) -> InformationElement:
    return InformationElement(name, number, data_type, semantics, units, Origin.IANA, description)


def _sami(
    name: str,
    number: int,
    data_type: DataType,
    semantics: Semantics,
    description: str,
    units: Units = Units.NONE,
) -> InformationElement:
    return InformationElement(name, number, data_type, semantics, units, Origin.SAMI, description)


def reversed_name(name: str) -> str:
    """The name of the element of the reverse direction (RFC 5103 section 6.1)."""
    return "reverse" + name[0].upper() + name[1:]


def reversed_element(element: InformationElement) -> InformationElement:
    """The same element of the reverse direction."""
    is_ours = element.origin is Origin.SAMI
    return InformationElement(
        reversed_name(element.name),
        element.number | REVERSED if is_ours else element.number,
        element.data_type,
        element.semantics,
        element.units,
        Origin.SAMI if is_ours else Origin.IANA_REVERSE,
        f"As {element.name}, of the reverse direction: packets from the flow's destination to its source.",
    )


_U8, _U16, _U32, _U64 = DataType.UNSIGNED8, DataType.UNSIGNED16, DataType.UNSIGNED32, DataType.UNSIGNED64
_IPV4, _IPV6, _OCTETS = DataType.IPV4_ADDRESS, DataType.IPV6_ADDRESS, DataType.OCTET_ARRAY
_DEFAULT, _QUANTITY, _COUNTER = Semantics.DEFAULT, Semantics.QUANTITY, Semantics.TOTAL_COUNTER
_IDENTIFIER, _FLAGS = Semantics.IDENTIFIER, Semantics.FLAGS

_WINDOW_SCALE = _iana(
    "tcpWindowScale",
    238,
    _U16,
    _QUANTITY,
    "The shift count of the TCP window scale option (RFC 7323). 0 to 14; written in one octet.",
)
_TRACKING_FLAGS = _sami(
    "tcpTrackingFlags",
    7,
    _U8,
    _FLAGS,
    "What the firewall noted of the sender of this direction: IP_CT_TCP_FLAG_* of Linux's nf_conntrack_tcp.h "
    "(1 window scaling offered, 2 SACK permitted, 4 FIN sent, 8 be liberal about windows).",
)
_VERIFICATION_TAG = _sami(
    "sctpVerificationTag",
    17 | CRITICAL,
    _U32,
    _IDENTIFIER,
    "The verification tag of SCTP packets of this direction (RFC 9260 section 8.5); 0 where none was seen. "
    "Critical: packets of an association with another tag are dropped.",
)
_GRE_KEY = _sami(
    "greKey",
    18 | CRITICAL,
    _U32,
    _IDENTIFIER,
    "The key of GRE packets of this direction (RFC 2890; in PPTP the call ID of RFC 2637), which tells tunnels apart; "
    "0 where the firewall does not look at it. Critical: it is a part of the key.",
)
_CORRECTION_POSITION = _sami(
    "tcpCorrectionPosition",
    24,
    _U32,
    _DEFAULT,
    "The sequence number of this direction behind which a NAT's last change of the payload's length counts; 0, as the "
    "offsets are, where it changed none.",
)
_OFFSET_BEFORE = _sami(
    "tcpOffsetBefore",
    25,
    _U32,
    _QUANTITY,
    "What the firewall adds to sequence numbers of this direction up to tcpCorrectionPosition, modulo 2**32.",
)
_OFFSET_AFTER = _sami(
    "tcpOffsetAfter",
    26,
    _U32,
    _QUANTITY,
    "What the firewall adds to sequence numbers of this direction behind tcpCorrectionPosition, modulo 2**32.",
)
_OCTET_COUNT = _iana(
    "octetTotalCount",
    85,
    _U64,
    _COUNTER,
    "Octets of all packets of this direction that the firewall counted, with their IP headers; 0 where it counts none.",
    Units.OCTETS,
)
_PACKET_COUNT = _iana(
    "packetTotalCount",
    86,
    _U64,
    _COUNTER,
    "Packets of this direction that the firewall counted; 0 where it counts none.",
    Units.PACKETS,
)
_ALL = (
    _iana("protocolIdentifier", 4, _U8, _IDENTIFIER, "The protocol number of the IP header."),
    _iana("sourceTransportPort", 7, _U16, _IDENTIFIER, "The source port of the flow's first packet."),
    _iana("sourceIPv4Address", 8, _IPV4, _DEFAULT, "The source address of the flow's first packet."),
    _iana("destinationTransportPort", 11, _U16, _IDENTIFIER, "The destination port of the flow's first packet."),
    _iana("destinationIPv4Address", 12, _IPV4, _DEFAULT, "The destination address of the flow's first packet."),
    _iana("sourceIPv6Address", 27, _IPV6, _DEFAULT, "The source address of the flow's first packet."),
    _iana("destinationIPv6Address", 28, _IPV6, _DEFAULT, "The destination address of the flow's first packet."),
    _OCTET_COUNT,
    reversed_element(_OCTET_COUNT),
    _PACKET_COUNT,
    reversed_element(_PACKET_COUNT),
    _iana(
        "flowId",
        148,
        _U64,
        _IDENTIFIER,
        "The exporting device's identifier of the flow: another one means another flow of the same tuple. "
        "Written in four octets.",
    ),
    _iana(
        "flowStartMilliseconds",
        152,
        DataType.DATE_TIME_MILLISECONDS,
        _DEFAULT,
        "When the firewall saw the flow's first packet, in milliseconds since 1970, UTC; 0 where it does not note it.",
        Units.MILLISECONDS,
    ),
    _iana("icmpTypeIPv4", 176, _U8, _IDENTIFIER, "The type of the flow's first ICMP message."),
    _iana("icmpCodeIPv4", 177, _U8, _IDENTIFIER, "The code of the flow's first ICMP message."),
    _iana("icmpTypeIPv6", 178, _U8, _IDENTIFIER, "The type of the flow's first ICMPv6 message."),
    _iana("icmpCodeIPv6", 179, _U8, _IDENTIFIER, "The code of the flow's first ICMPv6 message."),
    _iana("postNATSourceIPv4Address", 225, _IPV4, _DEFAULT, "The source address behind the translation."),
    _iana("postNATDestinationIPv4Address", 226, _IPV4, _DEFAULT, "The destination address behind the translation."),
    _iana("postNAPTSourceTransportPort", 227, _U16, _IDENTIFIER, "The source port behind the translation."),
    _iana("postNAPTDestinationTransportPort", 228, _U16, _IDENTIFIER, "The destination port behind the translation."),
    _iana(
        "firewallEvent",
        233,
        _U8,
        _DEFAULT,
        "What happened to the flow. 0: nothing, the record only names it; 2: it was deleted. Others are refused.",
    ),
    _WINDOW_SCALE,
    reversed_element(_WINDOW_SCALE),
    _iana("postNATSourceIPv6Address", 281, _IPV6, _DEFAULT, "The source address behind the translation."),
    _iana("postNATDestinationIPv6Address", 282, _IPV6, _DEFAULT, "The destination address behind the translation."),
    _sami(
        "zoneRole",
        1 | CRITICAL,
        _U8,
        _IDENTIFIER,
        "What the flow's conntrack zone is for. 1: the port's own; 2: destination NAT; 3: source NAT. "
        "Critical: without it the flow would be put where it is not looked for.",
    ),
    _sami(
        "icmpIdentifier",
        2 | CRITICAL,
        _U16,
        _IDENTIFIER,
        "The identifier of ICMP or ICMPv6 query messages (RFC 792, RFC 4443), which tells flows apart as ports do. "
        "Critical: it is a part of the key.",
    ),
    _sami(
        "conntrackStatus",
        3 | CRITICAL,
        _U32,
        _FLAGS,
        "Linux's IPS_* bits (nf_conntrack_common.h), such as 2 seen reply and 4 assured. "
        "Critical: without it an unanswered flow would pass for an admitted one.",
    ),
    _sami(
        "remainingTimeoutSeconds",
        4,
        _U32,
        _QUANTITY,
        "How long the flow still lives without traffic, when the record was made.",
        Units.SECONDS,
    ),
    _sami("flowMark", 5, _U32, _DEFAULT, "The mark of the flow, less the bits that mean something on one host only."),
    _sami(
        "tcpConnectionState",
        6 | CRITICAL,
        _U8,
        _IDENTIFIER,
        "How far the connection is: the numbers of RFC 4022's tcpConnectionState 1 to 11; 128 both ends have sent a "
        "SYN; 129 nothing was seen. Critical: without it a half-open connection would pass for an established one.",
    ),
    _TRACKING_FLAGS,
    reversed_element(_TRACKING_FLAGS),
    _sami(
        "sctpAssociationState",
        16 | CRITICAL,
        _U8,
        _IDENTIFIER,
        "How far the SCTP association is, as the end that began it would tell: the numbers of RFC 3873's "
        "sctpAssocState 1 to 8; 128 a HEARTBEAT began the flow, another path of an association; 129 nothing was seen. "
        "Critical: without it an association that is being set up or ended would pass for an established one.",
    ),
    _VERIFICATION_TAG,
    reversed_element(_VERIFICATION_TAG),
    _GRE_KEY,
    reversed_element(_GRE_KEY),
    _sami(
        "postNATIcmpIdentifier",
        19 | CRITICAL,
        _U16,
        _IDENTIFIER,
        "The icmpIdentifier behind the translation. Critical: answers carry it.",
    ),
    _sami(
        "conntrackHelper",
        20,
        _OCTETS,
        _DEFAULT,
        "The name of what reads the flow's payload and expects other flows for it, such as ftp, in ASCII, filled up "
        "with zeros; zeros alone where nothing does.",
    ),
    _sami(
        "conntrackLabels",
        21,
        _OCTETS,
        _FLAGS,
        "The flow's labels: two 64-bit numbers, of which label 0 is the lowest bit of the first.",
    ),
    _sami(
        "masterProtocolIdentifier",
        22,
        _U8,
        _IDENTIFIER,
        "The protocol of the flow that this one was expected for, its master; 0 where there is none, and in all else "
        "that is told of the master.",
    ),
    *(
        _sami(f"master{end}{kind}", number, data_type, semantics, f"The {end.lower()} {what} of the flow's master.")
        for kind, data_type, semantics, what, first in (
            ("IPv4Address", _IPV4, _DEFAULT, "address", 27),
            ("IPv6Address", _IPV6, _DEFAULT, "address", 29),
            ("TransportPort", _U16, _IDENTIFIER, "port", 31),
        )
        for number, end in enumerate(("Source", "Destination"), first)
    ),
    _CORRECTION_POSITION,
    reversed_element(_CORRECTION_POSITION),
    _OFFSET_BEFORE,
    reversed_element(_OFFSET_BEFORE),
    _OFFSET_AFTER,
    reversed_element(_OFFSET_AFTER),
    _sami(
        "synproxySequenceNumber",
        33,
        _U32,
        _DEFAULT,
        "The sequence number with which the firewall answered the client's SYN on the server's behalf (SYN proxy).",
    ),
    _sami(
        "synproxyTimestamp",
        34,
        _U32,
        _DEFAULT,
        "The TCP timestamp of that SYN (RFC 7323), which holds what the client had offered.",
    ),
    _sami(
        "synproxyTimestampOffset",
        35,
        _U32,
        _QUANTITY,
        "What the firewall takes from the server's TCP timestamps, modulo 2**32, for the client has seen its own.",
    ),
    _sami(
        "expectationSourceIPv4Mask",
        36 | CRITICAL,
        _U32,
        _FLAGS,
        "Which bits of the source address an expected flow has to have; of its destination it has to have all. "
        "Critical: with others, other flows would be let in.",
    ),
    _sami("expectationSourceIPv6Mask", 37 | CRITICAL, _OCTETS, _FLAGS, "As expectationSourceIPv4Mask."),
    _sami(
        "expectationSourceTransportPortMask",
        38 | CRITICAL,
        _U16,
        _FLAGS,
        "Which bits of the source port an expected flow has to have; of its destination port it has to have all.",
    ),
    _sami(
        "expectationFlags",
        39,
        _U32,
        _FLAGS,
        "Linux's NF_CT_EXPECT_* bits (nf_conntrack_common.h): 1 is not in force yet, 2 stays when a flow has come.",
    ),
    _sami(
        "expectationClass",
        40,
        _U32,
        _IDENTIFIER,
        "Which of its kinds of expectation it is to the helper, by the helper's own numbers: the first has 0.",
    ),
    _sami(
        "expectationFunction",
        41,
        _U8,
        _IDENTIFIER,
        "What is done with the flow when it comes. 0: nothing; 1: it is translated as its master (nat-follow-master); "
        "2: as SIP's NAT does (sip); 3, 4: as H.323's does (Q.931, callforwarding).",
    ),
    _sami(
        "expectationNatDirection",
        42,
        _U8,
        _IDENTIFIER,
        "Where the translation of the flow is to be made. 0: there is none; 1: in the direction in which the master "
        "was begun; 2: in the other.",
    ),
    _sami("expectationNatIPv4Address", 43, _IPV4, _DEFAULT, "The address to which the flow is to be translated."),
    _sami("expectationNatIPv6Address", 44, _IPV6, _DEFAULT, "The address to which the flow is to be translated."),
    _sami("expectationNatTransportPort", 45, _U16, _IDENTIFIER, "The port to which the flow is to be translated."),
)

ELEMENTS: dict[str, InformationElement] = {element.name: element for element in _ALL}
"""Every element that a flow record may hold, by name."""

ELEMENT_DESCRIPTION: dict[str, InformationElement] = {
    element.name: element
    for element in (
        _iana("informationElementId", 303, _U16, _IDENTIFIER, "The number of the element that is described."),
        _iana("informationElementDataType", 339, _U8, _DEFAULT, "Its abstract data type."),
        _iana("informationElementDescription", 340, DataType.STRING, _DEFAULT, "What it means."),
        _iana("informationElementName", 341, DataType.STRING, _DEFAULT, "Its name."),
        _iana("informationElementSemantics", 344, _U8, _DEFAULT, "Its semantics."),
        _iana("informationElementUnits", 345, _U16, _DEFAULT, "Its units."),
        _iana("privateEnterpriseNumber", 346, _U32, _IDENTIFIER, "The enterprise that numbered it."),
    )
}
"""The elements in which a file tells other readers what ours are (RFC 5610)."""

_BY_NUMBER: dict[tuple[Origin, int, int], InformationElement] = {
    (element.origin, element.vendor, element.number): element for element in (*_ALL, *ELEMENT_DESCRIPTION.values())
}

_VENDORS: set[int] = set()
"""Enterprise numbers of the vendors whose elements are known."""


def bring(brought: Iterable[InformationElement]) -> None:
    """Makes elements known beside those that stand here; see `model.kinds`.

    :raises ConfigurationError: one has a name or a number that another one has.
    """
    by_name, by_number = dict(ELEMENTS), dict(_BY_NUMBER)
    for element in brought:
        place = (element.origin, element.vendor, element.number)
        for other in (by_name.get(element.name), by_number.get(place)):
            if other not in (None, element):
                words = f"has the name or the number of {other.name}"
                raise ConfigurationError(f"the information element {element.name} {words}")
        by_name[element.name] = by_number[place] = element
    ELEMENTS.update(by_name)
    _BY_NUMBER.update(by_number)
    _VENDORS.update(element.vendor for element in by_name.values() if element.vendor)


def check_enterprise(enterprise: int) -> None:
    """Raise `ConfigurationError` unless `enterprise` can stand before elements of ours."""
    if enterprise in _VENDORS:
        raise ConfigurationError(
            f"{enterprise} is the enterprise number of a vendor's elements, which an installed package brings; "
            "take another one for SAMI's"
        )
    if not 0 < enterprise <= MOST_ENTERPRISE or enterprise == REVERSE_ENTERPRISE:
        raise ConfigurationError(
            f"{enterprise} cannot be the enterprise number of SAMI's elements; take one that IANA assigned to you, "
            f"or {EXAMPLE_ENTERPRISE}"
        )


def origin_of(enterprise_number: int, enterprise: int) -> Origin:
    """Whose an element under `enterprise_number` is, where `enterprise` is our own."""
    if enterprise_number == IANA:
        return Origin.IANA
    if enterprise_number == enterprise:
        return Origin.SAMI
    return Origin.IANA_REVERSE if enterprise_number == REVERSE_ENTERPRISE else Origin.VENDOR


def find(enterprise_number: int, number: int, enterprise: int) -> InformationElement | None:
    """The element of these numbers on the wire, or None where it is none that we know."""
    origin = origin_of(enterprise_number, enterprise)
    return _BY_NUMBER.get((origin, enterprise_number if origin is Origin.VENDOR else 0, number))


def must_be_understood(enterprise_number: int, number: int, enterprise: int) -> bool:
    """Whether the sender wants records refused by a reader that does not know this element."""
    return enterprise_number == enterprise and bool(number & CRITICAL)


def name_of(enterprise_number: int, number: int, enterprise: int) -> str:
    """What to call an element, known or not: ``zoneRole``, ``element 9 of enterprise 9``."""
    known = find(enterprise_number, number, enterprise)
    if known is not None:
        return known.name
    if enterprise_number == IANA:
        return f"IANA's element {number}"
    if enterprise_number == REVERSE_ENTERPRISE:
        forward = _BY_NUMBER.get((Origin.IANA, 0, number))
        return reversed_name(forward.name) if forward else f"the reverse of IANA's element {number}"
    return f"element {number} of enterprise {enterprise_number}"
