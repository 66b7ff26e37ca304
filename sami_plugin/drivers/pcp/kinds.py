"""Records of mappings: the guest's address and port, what they are behind the device, and by what the guest proves
that the mapping is its own."""

from __future__ import annotations

from sami_plugin.model.flows import Template
from sami_plugin.model.information_elements import CRITICAL, DataType, InformationElement, Origin, Semantics, Units
from sami_plugin.model.kinds import Kinds
from sami_plugin.model.protocols import Field

NONCE_OCTETS = 12


def _template(family: str, address: Field, outer: Field) -> Template:
    words = f"{{source{family}Address}} port {{sourceTransportPort}} (protocol {{protocolIdentifier}})"
    return Template(
        f"pcp-mapping-{family.lower()}",
        (
            ("zoneRole", "u1"),
            ("protocolIdentifier", "u1"),
            address,
            ("sourceTransportPort", ">u2"),
        ),
        (
            ("flowId", ">u4"),
            ("remainingTimeoutSeconds", ">u4"),
            outer,
            ("postNAPTSourceTransportPort", ">u2"),
            ("pcpMappingNonce", ">u4", (NONCE_OCTETS // 4,)),
            ("pcpEpochTime", ">u4"),
        ),
        ends=(address[0],),
        words=words,
        varies=frozenset({"pcpEpochTime"}),
    )


IPV4 = _template("IPv4", ("sourceIPv4Address", ">u4"), ("postNATSourceIPv4Address", ">u4"))
IPV6 = _template("IPv6", ("sourceIPv6Address", ">u8", (2,)), ("postNATSourceIPv6Address", ">u8", (2,)))
KINDS = Kinds(
    (IPV4, IPV6),
    (
        InformationElement(
            "pcpMappingNonce",
            0x5A | CRITICAL,
            DataType.OCTET_ARRAY,
            Semantics.DEFAULT,
            Units.NONE,
            Origin.SAMI,
            "The Mapping Nonce of RFC 6887, section 11.1: only who knows it changes the mapping.",
            NONCE_OCTETS,
        ),
        InformationElement(
            "pcpEpochTime",
            0x5B,
            DataType.UNSIGNED32,
            Semantics.QUANTITY,
            Units.SECONDS,
            Origin.SAMI,
            "The Epoch Time of RFC 6887, section 8.5, of the server that told the mapping, when it did: for a server "
            "that can go on from another one's. The client finds any other one's inconsistent, and asks again for "
            "all that it has.",
        ),
    ),
)
