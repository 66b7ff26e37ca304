"""The registry of elements, against IANA's numbers, the templates, and its own page."""

import pytest

from sami_plugin.drivers.loader import load_kinds
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import TEMPLATES
from tools import element_reference

load_kinds()

# Written out from IANA's registry, not from the code.
IANA_NUMBERS = {
    "protocolIdentifier": (4, "unsigned8"),
    "sourceTransportPort": (7, "unsigned16"),
    "sourceIPv4Address": (8, "ipv4Address"),
    "destinationTransportPort": (11, "unsigned16"),
    "destinationIPv4Address": (12, "ipv4Address"),
    "sourceIPv6Address": (27, "ipv6Address"),
    "destinationIPv6Address": (28, "ipv6Address"),
    "octetTotalCount": (85, "unsigned64"),
    "packetTotalCount": (86, "unsigned64"),
    "flowId": (148, "unsigned64"),
    "flowStartMilliseconds": (152, "dateTimeMilliseconds"),
    "icmpTypeIPv4": (176, "unsigned8"),
    "icmpCodeIPv4": (177, "unsigned8"),
    "icmpTypeIPv6": (178, "unsigned8"),
    "icmpCodeIPv6": (179, "unsigned8"),
    "postNATSourceIPv4Address": (225, "ipv4Address"),
    "postNATDestinationIPv4Address": (226, "ipv4Address"),
    "postNAPTSourceTransportPort": (227, "unsigned16"),
    "postNAPTDestinationTransportPort": (228, "unsigned16"),
    "firewallEvent": (233, "unsigned8"),
    "tcpWindowScale": (238, "unsigned16"),
    "postNATSourceIPv6Address": (281, "ipv6Address"),
    "postNATDestinationIPv6Address": (282, "ipv6Address"),
}
SAMI_NUMBERS = {
    "zoneRole": 0x2001,
    "icmpIdentifier": 0x2002,
    "conntrackStatus": 0x2003,
    "remainingTimeoutSeconds": 4,
    "flowMark": 5,
    "tcpConnectionState": 0x2006,
    "tcpTrackingFlags": 7,
    "reverseTcpTrackingFlags": 0x4007,
    "sctpAssociationState": 0x2010,
    "sctpVerificationTag": 0x2011,
    "reverseSctpVerificationTag": 0x6011,
    "greKey": 0x2012,
    "reverseGreKey": 0x6012,
    "postNATIcmpIdentifier": 0x2013,
    "conntrackHelper": 20,
    "conntrackLabels": 21,
    "masterProtocolIdentifier": 22,
    "tcpCorrectionPosition": 24,
    "reverseTcpCorrectionPosition": 0x4018,
    "tcpOffsetBefore": 25,
    "reverseTcpOffsetBefore": 0x4019,
    "tcpOffsetAfter": 26,
    "reverseTcpOffsetAfter": 0x401A,
    "masterSourceIPv4Address": 27,
    "masterDestinationIPv4Address": 28,
    "masterSourceIPv6Address": 29,
    "masterDestinationIPv6Address": 30,
    "masterSourceTransportPort": 31,
    "masterDestinationTransportPort": 32,
    "synproxySequenceNumber": 33,
    "synproxyTimestamp": 34,
    "synproxyTimestampOffset": 35,
    "expectationSourceIPv4Mask": 0x2024,
    "expectationSourceIPv6Mask": 0x2025,
    "expectationSourceTransportPortMask": 0x2026,
    "expectationFlags": 39,
    "expectationClass": 40,
    "expectationFunction": 41,
    "expectationNatDirection": 42,
    "expectationNatIPv4Address": 43,
    "expectationNatIPv6Address": 44,
    "expectationNatTransportPort": 45,
    "nftSetName": 0x2040,
    "elementIPv4Address": 0x2041,
    "elementIPv6Address": 0x2042,
    "nftAddressOffset": 0x2043,
    "nftSetKeyOctets": 0x2044,
    "nftSetKey": 0x2045,
    "nftElementTimeoutMilliseconds": 70,
    "nftSetDataOctets": 71,
    "nftSetData": 72,
    "nftElementStatements": 73,
    "nftCounterPackets": 74,
    "nftCounterOctets": 75,
    "nftQuotaOctets": 76,
    "nftQuotaConsumedOctets": 77,
    "nftQuotaFlags": 78,
    "nftLimitRate": 79,
    "nftLimitUnitSeconds": 80,
    "nftLimitBurst": 81,
    "nftLimitType": 82,
    "nftLimitFlags": 83,
    "nftConnectionLimit": 84,
    "nftConnectionLimitFlags": 85,
    "nftLastMilliseconds": 86,
    "otherIPv4Address": 0x2057,
    "otherIPv6Address": 0x2058,
    "nftOtherAddressOffset": 0x2059,
    "pcpMappingNonce": 0x205A,
    "pcpEpochTime": 91,
}


def test_iana_elements_have_the_numbers_and_types_of_the_registry() -> None:
    ours = {
        each.name: (each.number, each.data_type.label)
        for each in elements.ELEMENTS.values()
        if each.origin is elements.Origin.IANA
    }
    assert ours == IANA_NUMBERS


def test_numbers_of_our_own_never_change() -> None:
    ours = {each.name: each.number for each in elements.ELEMENTS.values() if each.origin is elements.Origin.SAMI}
    assert ours == SAMI_NUMBERS


def test_reverse_of_an_iana_element_has_its_number_under_29305() -> None:
    reverse = elements.ELEMENTS["reverseTcpWindowScale"]
    assert reverse.enterprise_number(1) == 29305
    assert reverse.number == elements.ELEMENTS["tcpWindowScale"].number


def test_reverse_of_a_critical_element_is_critical() -> None:
    for element in elements.ELEMENTS.values():
        reverse = elements.ELEMENTS.get(elements.reversed_name(element.name))
        if reverse is not None:
            assert reverse.is_critical == element.is_critical
            assert reverse.enterprise_number(7) == (7 if element.origin is elements.Origin.SAMI else 29305)
    assert elements.ELEMENTS["reverseSctpVerificationTag"].is_critical


def test_every_field_of_every_template_is_an_element_and_fits_it() -> None:
    for template in TEMPLATES.values():
        for each in (template, template.identity):
            for name, (dtype, *_) in (each.dtype.fields or {}).items():
                element = elements.ELEMENTS[name]
                assert dtype.itemsize <= element.octets
                assert dtype.itemsize == element.octets or element.may_be_reduced


def test_no_element_goes_unused() -> None:
    used = {name for each in TEMPLATES.values() for name in (*each.dtype.names, *each.identity.dtype.names)}
    assert used == set(elements.ELEMENTS)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ((0, 4), "protocolIdentifier"),
        ((29305, 238), "reverseTcpWindowScale"),
        ((29305, 4), "reverseProtocolIdentifier"),
        ((32473, 0x2001), "zoneRole"),
        ((32473, 1), "element 1 of enterprise 32473"),
        ((0, 1), "IANA's element 1"),
        ((29305, 1), "the reverse of IANA's element 1"),
        ((9, 9), "element 9 of enterprise 9"),
    ],
)
def test_elements_are_called_by_name_where_they_have_one(key: tuple[int, int], name: str) -> None:
    assert elements.name_of(*key, 32473) == name


def test_reference_page_is_current() -> None:
    assert element_reference.PAGE.read_text() == element_reference.page(), "run: python -m tools.element_reference"
