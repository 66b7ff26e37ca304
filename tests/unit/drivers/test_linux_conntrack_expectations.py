"""What the kernel tells of expectations, and what is asked of it, byte by byte."""

from __future__ import annotations

import struct

import netaddr
import numpy as np
import pytest

from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack import expectations
from sami_plugin.drivers.linux_conntrack.netlink import Messages
from sami_plugin.errors import Malformed
from sami_plugin.model.flows import TEMPLATES, Batch
from sami_plugin.testing.conformance import PORT_ADDRESSES, flows

TEMPLATE_NAMES = sorted(name for name, template in TEMPLATES.items() if template.is_expectation)


def as_messages(octets: bytes) -> Messages:
    length = len(octets)
    raw = np.frombuffer(struct.pack("=I", length) + octets[4:], np.uint8)
    return Messages(raw, np.array([0]), np.array([length]))


def asked(batch: Batch, kind: int = nl.EXP_NEW, tells: expectations._Tells = expectations._WHOLE) -> bytes:
    return expectations._request(kind, batch, 5, tells).tobytes()


def told(octets: bytes, *addresses: str) -> expectations._Found:
    found = expectations._Found(tuple(netaddr.IPAddress(one) for one in addresses) or PORT_ADDRESSES)
    found.read(as_messages(octets), 1)
    return found


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_what_is_asked_for_reads_as_what_was_meant(name: str) -> None:
    sent = flows(TEMPLATES[name], 1)
    rows, family = sent.rows, "IPv6" if sent.template.is_ipv6 else "IPv4"
    rows["flowId"] = 0  # no kernel takes it
    rows["expectationFlags"], rows["expectationClass"], rows["expectationFunction"] = 2, 1, 1
    rows["expectationNatDirection"], rows["expectationNatTransportPort"] = 2, 4444
    rows[f"expectationNat{family}Address"] = rows[f"destination{family}Address"]
    rows[f"expectationSource{family}Mask"] = rows[f"source{family}Address"]
    rows["expectationSourceTransportPortMask"] = 0xFF00
    (batch,) = told(asked(sent)).batches()
    assert batch.template == sent.template
    assert batch.rows.tobytes() == rows.tobytes()


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_removal_always_names_a_tuple(name: str) -> None:
    """One without is a flush."""
    tells = expectations._Tells.TUPLE | expectations._Tells.ID
    octets = asked(flows(TEMPLATES[name], 1), nl.EXP_DELETE, tells)
    size, kind = struct.unpack_from("=HH", octets, 20)
    assert kind & nl.NLA_TYPE_MASK == nl.EXPECT_TUPLE
    assert size > 30


def test_helper_is_named_only_where_it_is_to_read_the_flow() -> None:
    """What is told is the master's helper; what is sent becomes that of the flow."""
    ftp, sip, of_class = flows(TEMPLATES["tcp-expectation-ipv4"], 3).rows
    sip["conntrackHelper"] = tuple(np.frombuffer(b"sip-5060".ljust(16, b"\0"), ">u8"))
    of_class["expectationClass"] = 1
    for row, name in ((ftp, b""), (sip, b"sip-5060"), (of_class, b"ftp")):
        octets = asked(Batch(TEMPLATES["tcp-expectation-ipv4"], row[None]))
        attribute = struct.pack("=HH", 20, nl.EXPECT_HELPER)
        assert (attribute + name.ljust(16, b"\0") in octets) == bool(name)
        assert (attribute in octets) == bool(name)


def test_those_of_other_guests_are_not_read() -> None:
    octets = asked(flows(TEMPLATES["tcp-expectation-ipv4"], 1))
    assert told(octets).rows
    other = told(octets, "192.0.2.77")
    assert not other.rows
    assert not other.omitted


def test_what_no_template_holds_is_counted_by_reason() -> None:
    sent = flows(TEMPLATES["tcp-expectation-ipv4"], 1)
    sent.rows["expectationFunction"] = 1
    octets = asked(sent)
    of_stranger = told(octets.replace(b"nat-follow-master", b"nat-someone-else!"))
    assert of_stranger.omitted == {"what a helper expects for nat-someone-else! is not carried": 1}
    of_gre = told(octets.replace(struct.pack("=HHB", 5, nl.PROTO_NUM, 6), struct.pack("=HHB", 5, nl.PROTO_NUM, 47)))
    assert of_gre.omitted == {"what a helper expects of protocol gre is not carried": 1}
    assert not of_stranger.rows
    assert not of_gre.rows


@pytest.mark.parametrize("cut", [22, 30, 60])
def test_what_is_no_expectation_is_refused(cut: int) -> None:
    octets = asked(flows(TEMPLATES["tcp-expectation-ipv4"], 1))
    with pytest.raises(Malformed):
        told(octets[:cut])
