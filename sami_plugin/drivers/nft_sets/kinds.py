"""Records of set elements: which set by its name, the guest's address in the key, and what else the key has."""

from __future__ import annotations

import enum

from sami_plugin.model.flows import Template
from sami_plugin.model.information_elements import CRITICAL, DataType, InformationElement, Origin, Semantics, Units
from sami_plugin.model.kinds import Kinds
from sami_plugin.model.protocols import Field

NAME_OCTETS = 32
KEY_OCTETS = 64
"""NFT_DATA_VALUE_MAXLEN of include/uapi/linux/netfilter/nf_tables.h, of keys and of what a map gives for them."""


class Statements(enum.IntFlag):
    """Bits of `nftElementStatements`: which statements the element has a state of."""

    COUNTER = 1
    QUOTA = 2
    LIMIT = 4
    CONNLIMIT = 8
    LAST = 16


_STATEMENTS: tuple[Field, ...] = (
    ("nftElementStatements", "u1"),
    ("nftCounterPackets", ">u8"),
    ("nftCounterOctets", ">u8"),
    ("nftQuotaOctets", ">u8"),
    ("nftQuotaConsumedOctets", ">u8"),
    ("nftQuotaFlags", "u1"),
    ("nftLimitRate", ">u8"),
    ("nftLimitUnitSeconds", ">u8"),
    ("nftLimitBurst", ">u4"),
    ("nftLimitType", "u1"),
    ("nftLimitFlags", "u1"),
    ("nftConnectionLimit", ">u4"),
    ("nftConnectionLimitFlags", "u1"),
    ("nftLastMilliseconds", ">u8"),
)


NO_OTHER = 0xFF
"""As `nftOtherAddressOffset`: the key has no second address."""


def _template(family: str, address: Field, other: Field) -> Template:
    return Template(
        f"nft-set-element-{family}",
        (
            ("zoneRole", "u1"),
            ("nftSetName", ">u8", (NAME_OCTETS // 8,)),
            address,
            ("nftAddressOffset", "u1"),
            other,
            ("nftOtherAddressOffset", "u1"),
            ("nftSetKeyOctets", "u1"),
            ("nftSetKey", ">u8", (KEY_OCTETS // 8,)),
        ),
        (
            ("flowId", ">u4"),
            ("remainingTimeoutSeconds", ">u4"),
            ("nftElementTimeoutMilliseconds", ">u8"),
            ("nftSetDataOctets", "u1"),
            ("nftSetData", ">u8", (KEY_OCTETS // 8,)),
            *_STATEMENTS,
        ),
        ends=(address[0], other[0]),
        words=f"{{{address[0]}}} in {{nftSetName}}",
        is_renewed=False,
    )


def _element(
    name: str,
    number: int,
    octets: int,
    semantics: Semantics,
    description: str,
    *,
    units: Units = Units.NONE,
    data_type: DataType | None = None,
) -> InformationElement:
    sizes = {1: DataType.UNSIGNED8, 4: DataType.UNSIGNED32, 8: DataType.UNSIGNED64}
    found = data_type or sizes.get(octets, DataType.OCTET_ARRAY)
    length = octets if found is DataType.OCTET_ARRAY else 0
    return InformationElement(name, number, found, semantics, units, Origin.SAMI, description, length)


_DEFAULT, _QUANTITY, _FLAGS, _IDENTIFIER = (
    Semantics.DEFAULT,
    Semantics.QUANTITY,
    Semantics.FLAGS,
    Semantics.IDENTIFIER,
)
_ELEMENTS = (
    _element(
        "nftSetName",
        0x40 | CRITICAL,
        NAME_OCTETS,
        _DEFAULT,
        "The name by which both hosts call the set, map or ipset ([nft_sets] sets), in ASCII, filled up with zeros.",
    ),
    _element(
        "elementIPv4Address",
        0x41 | CRITICAL,
        4,
        _DEFAULT,
        "The guest's address in the element's key.",
        data_type=DataType.IPV4_ADDRESS,
    ),
    _element(
        "elementIPv6Address",
        0x42 | CRITICAL,
        16,
        _DEFAULT,
        "The guest's address in the element's key.",
        data_type=DataType.IPV6_ADDRESS,
    ),
    _element("nftAddressOffset", 0x43 | CRITICAL, 1, _QUANTITY, "The octet of the key where that address begins."),
    _element(
        "otherIPv4Address",
        0x57 | CRITICAL,
        4,
        _DEFAULT,
        "The first other address in the key: another guest may be its own; 0 where there is none.",
        data_type=DataType.IPV4_ADDRESS,
    ),
    _element(
        "otherIPv6Address",
        0x58 | CRITICAL,
        16,
        _DEFAULT,
        "The first other address in the key: another guest may be its own; 0 where there is none.",
        data_type=DataType.IPV6_ADDRESS,
    ),
    _element(
        "nftOtherAddressOffset",
        0x59 | CRITICAL,
        1,
        _QUANTITY,
        "The octet of the key where that one begins; 255 where there is none.",
    ),
    _element("nftSetKeyOctets", 0x44 | CRITICAL, 1, _QUANTITY, "How many octets the key has."),
    _element(
        "nftSetKey",
        0x45 | CRITICAL,
        KEY_OCTETS,
        _DEFAULT,
        "NFTA_SET_ELEM_KEY of Linux's nf_tables.h with zeros for these addresses, filled up with zeros. Each part "
        "of a concatenation begins at a multiple of four octets. Of an ipset, its parts as a concatenation: addresses, "
        "port and protocol, mark, Ethernet address.",
    ),
    _element(
        "nftElementTimeoutMilliseconds",
        0x46,
        8,
        _QUANTITY,
        "The element's own timeout (NFTA_SET_ELEM_TIMEOUT); 0 where it has its set's.",
    ),
    _element("nftSetDataOctets", 0x47, 1, _QUANTITY, "How many octets a map gives for the key; 0 in a set."),
    _element("nftSetData", 0x48, KEY_OCTETS, _DEFAULT, "What a map gives for the key (NFTA_SET_ELEM_DATA)."),
    _element(
        "nftElementStatements",
        0x49,
        1,
        _FLAGS,
        "Of which statements the element has a state: 1 counter, 2 quota, 4 limit, 8 ct count, 16 last.",
    ),
    _element("nftCounterPackets", 0x4A, 8, _QUANTITY, "Packets that its counter has counted."),
    _element("nftCounterOctets", 0x4B, 8, _QUANTITY, "Octets that its counter has counted."),
    _element("nftQuotaOctets", 0x4C, 8, _QUANTITY, "Its quota."),
    _element("nftQuotaConsumedOctets", 0x4D, 8, _QUANTITY, "What of its quota is used."),
    _element("nftQuotaFlags", 0x4E, 1, _FLAGS, "NFT_QUOTA_F_*: 1 matches over the quota."),
    _element("nftLimitRate", 0x4F, 8, _QUANTITY, "Packets, or octets, per unit of time that its limit lets through."),
    _element("nftLimitUnitSeconds", 0x50, 8, _QUANTITY, "That unit.", units=Units.SECONDS),
    _element("nftLimitBurst", 0x51, 4, _QUANTITY, "How many its limit lets through at once."),
    _element("nftLimitType", 0x52, 1, _IDENTIFIER, "NFT_LIMIT_*: 0 counts packets, 1 octets."),
    _element("nftLimitFlags", 0x53, 1, _FLAGS, "NFT_LIMIT_F_*: 1 matches over the limit."),
    _element("nftConnectionLimit", 0x54, 4, _QUANTITY, "How many connections its ct count lets through."),
    _element("nftConnectionLimitFlags", 0x55, 1, _FLAGS, "NFT_CONNLIMIT_F_*: 1 matches over the limit."),
    _element(
        "nftLastMilliseconds",
        0x56,
        8,
        _QUANTITY,
        "How long ago a packet had it, plus 1, by its statement last; 0: none had.",
    ),
)

IPV4 = _template("ipv4", ("elementIPv4Address", ">u4"), ("otherIPv4Address", ">u4"))
IPV6 = _template("ipv6", ("elementIPv6Address", ">u8", (2,)), ("otherIPv6Address", ">u8", (2,)))
KINDS = Kinds((IPV4, IPV6), _ELEMENTS)
