"""Framing and decoding of ctnetlink messages, recorded and broken. No kernel."""

from __future__ import annotations

import contextlib
import pathlib
import struct
from collections import Counter
from collections.abc import Iterator

import netaddr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sami_plugin import errors
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder, Timeouts
from sami_plugin.drivers.linux_conntrack.netlink import Messages, frame, frame_single
from sami_plugin.model import protocols
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, Omitted, ZoneRole
from sami_plugin.model.protocols import Protocol, SctpState, TcpState

# A dump of Linux 6.18: of each of the six untranslated templates two flows without and two with a mark in zone 5, two
# TCP flows in zone 0, one each of UDP-Lite, translated TCP and translated UDP in zone 5; at last DONE.
RECORDED = pathlib.Path(__file__).with_name("linux_conntrack_dump.bin").read_bytes()
TCP = TEMPLATES["tcp-ipv4"]
SEQUENCE, PORT = 0x11223344, 0x55667788
ENTRIES = 6 * 4 + 2 + 3


def view(octets: bytes) -> np.ndarray:
    return np.frombuffer(octets + bytes(-len(octets) % 4), np.uint8)


def framed(octets: bytes, ends: list[int] | None = None) -> Messages:
    return frame(view(octets), ends or [len(octets)], SEQUENCE, 1, PORT)


def entries(messages: Messages) -> Messages:
    return messages.take(messages.headers()["type"] == nl.CT_NEW)


def walked(octets: bytes) -> list[tuple[int, int]]:
    """Starts and lengths, the slow way."""
    found, at = [], 0
    while at < len(octets):
        (length,) = struct.unpack_from("=I", octets, at)
        found.append((at, length))
        at += (length + 3) & ~3
    return found


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def message(body: bytes, kind: int = nl.CT_NEW, sequence: int = SEQUENCE, port: int = PORT) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, sequence, port) + body


def entry(
    *more: bytes, protocol: int = 6, family: int = 2, extra: bytes = b"", ports: tuple[int, ...] = (40000, 443)
) -> bytes:
    """A message about a TCP flow 192.0.2.10:40000 > 198.51.100.1:443 in zone 5."""

    def side(source: str, destination: str, ports: tuple[int, ...]) -> bytes:
        addresses = attribute(1, netaddr.IPAddress(source).packed) + attribute(2, netaddr.IPAddress(destination).packed)
        proto = attribute(1, bytes([protocol])) + b"".join(
            attribute(2 + number, struct.pack(">H", port)) for number, port in enumerate(ports)
        )
        return attribute(0x8001, addresses) + attribute(0x8002, proto) + extra

    body = bytes([family, 0, 0, 0])
    body += attribute(0x8001, side("192.0.2.10", "198.51.100.1", ports))
    body += attribute(0x8002, side("198.51.100.1", "192.0.2.10", ports[::-1]))
    body += attribute(nl.ZONE, struct.pack(">H", 5))
    return message(body + b"".join(more))


def decoded(octets: bytes, **options: object) -> list[Decoded | Omitted]:
    decoder = Decoder({ZoneRole.PORT: 5}, **options)  # type: ignore[arg-type]
    return list(decoder.decode(entries(framed(octets))))


def test_recorded_dump_is_framed_as_by_walking_it() -> None:
    messages = framed(RECORDED)
    assert list(zip(messages.starts.tolist(), messages.lengths.tolist(), strict=True)) == walked(RECORDED)
    assert len(messages) == ENTRIES + 1


def test_datagrams_are_framed_one_behind_the_other() -> None:
    starts = [start for start, _ in walked(RECORDED)]
    for ends in ([starts[3], starts[9], len(RECORDED)], [*starts[1:], len(RECORDED)]):
        assert framed(RECORDED, ends).starts.tolist() == starts


def test_recorded_dump_is_decoded_by_template_and_the_rest_named() -> None:
    counts: Counter[str] = Counter()
    for part in decoded(RECORDED):
        if isinstance(part, Decoded):
            counts[part.batch.template.name] += len(part.batch)
        else:
            counts[part.reason] += part.count
    plain = {f"{kind}-{family}": 4 for kind in ("tcp", "udp", "icmp") for family in ("ipv4", "ipv6")}
    assert counts == plain | {"tcp-nat-ipv4": 1, "udp-nat-ipv4": 1, "udplite-ipv4": 1}


def test_recorded_tcp_flow_has_its_fields() -> None:
    parts = [part.batch for part in decoded(RECORDED) if isinstance(part, Decoded)]
    rows = Batch.joined(TCP, [batch.rows for batch in parts if batch.template == TCP]).rows
    row = rows[rows["sourceTransportPort"] == 20003][0]
    assert row["zoneRole"] == ZoneRole.PORT
    assert row["protocolIdentifier"] == 6
    assert str(netaddr.IPAddress(int(row["sourceIPv4Address"]))) == "192.0.2.10"
    assert str(netaddr.IPAddress(int(row["destinationIPv4Address"]))) == "198.51.100.1"
    assert row["destinationTransportPort"] == 443
    assert row["conntrackStatus"] == FlowStatus.SEEN_REPLY | FlowStatus.ASSURED | FlowStatus.CONFIRMED
    assert 590 <= row["remainingTimeoutSeconds"] <= 600
    assert row["flowMark"] == 4
    assert row["flowId"] != 0
    assert row["tcpConnectionState"] == TcpState.ESTABLISHED
    assert (row["tcpWindowScale"], row["reverseTcpWindowScale"]) == (7, 8)
    assert row["tcpTrackingFlags"] == row["reverseTcpTrackingFlags"] == 3 | nl.FLAG_BE_LIBERAL


def test_numbers_of_messages_lead_back_to_them() -> None:
    messages = entries(framed(RECORDED))
    seen = []
    for part in Decoder({ZoneRole.PORT: 5, ZoneRole.SNAT: 0}).decode(messages):
        if isinstance(part, Decoded):
            seen += part.numbers.tolist()
            for row, number in zip(part.batch.rows, part.numbers, strict=True):
                start = messages.starts[number]
                raw = messages.octets[start : start + messages.lengths[number]].tobytes()
                assert attribute(nl.ID, int(row["flowId"]).to_bytes(4, "big")) in raw
    assert len(seen) == len(set(seen)) == ENTRIES


def test_zone_zero_is_a_zone_like_others() -> None:
    decoder = Decoder({ZoneRole.SNAT: 0})
    (part,) = decoder.decode(entries(framed(RECORDED)))
    assert isinstance(part, Decoded)
    assert set(part.batch.rows["zoneRole"]) == {ZoneRole.SNAT}
    assert not list(Decoder({}).decode(entries(framed(RECORDED))))


@pytest.mark.parametrize("address", ["192.0.2.10", "203.0.113.1", "198.51.100.1", "2001:db8:1::10"])
def test_addresses_are_looked_for_at_all_four_ends(address: str) -> None:
    wanted = netaddr.IPAddress(address)
    counts: Counter[str] = Counter()
    for part in decoded(RECORDED, addresses=(wanted,)):
        counts[part.batch.template.name if isinstance(part, Decoded) else part.reason] += 1
    if wanted.version == 6:
        assert set(counts) == {"tcp-ipv6", "udp-ipv6", "icmp-ipv6"}
    elif address == "203.0.113.1":
        assert set(counts) == {"tcp-nat-ipv4", "udp-nat-ipv4"}
    else:
        assert "udplite-ipv4" in counts
        assert "tcp-nat-ipv4" in counts
    assert not decoded(RECORDED, addresses=())


@pytest.mark.parametrize(("offload", "liberal"), [(FlowStatus.OFFLOAD, 8), (FlowStatus.HW_OFFLOAD, 8), (0, 0)])
def test_offloaded_flow_is_established_liberal_and_has_the_policys_timeout(offload: int, liberal: int) -> None:
    status = attribute(nl.STATUS, struct.pack(">I", 0xE | offload))
    (part,) = decoded(entry(status), timeouts=Timeouts(1234, 5, 6))
    assert isinstance(part, Decoded)
    row = part.batch.rows[0]
    assert row["remainingTimeoutSeconds"] == (1234 if offload else 0)
    assert row["tcpConnectionState"] == (TcpState.ESTABLISHED if offload else 0)
    assert row["tcpTrackingFlags"] == row["reverseTcpTrackingFlags"] == liberal


@pytest.mark.parametrize(("protocol", "seconds"), [(6, 1234), (17, 5), (47, 6)])
def test_offloaded_flow_has_the_timeout_of_its_protocol(protocol: int, seconds: int) -> None:
    status = attribute(nl.STATUS, struct.pack(">I", 0xE | FlowStatus.OFFLOAD))
    (part,) = decoded(entry(status, protocol=protocol), timeouts=Timeouts(1234, 5, 6))
    assert isinstance(part, Decoded)
    assert part.batch.rows["remainingTimeoutSeconds"].tolist() == [seconds]


@pytest.mark.parametrize(("kernel", "state"), list(enumerate(nl._KERNEL_STATES)))
def test_tcp_states_are_translated_both_ways(kernel: int, state: TcpState) -> None:
    assert nl.STATE_FROM_KERNEL[kernel] == state
    assert nl.STATE_TO_KERNEL[state] == kernel


def test_destroy_events_protoinfo_has_the_state_alone() -> None:
    protoinfo = attribute(0x8004, attribute(0x8001, attribute(1, b"\3")))
    (part,) = decoded(entry(protoinfo))
    assert isinstance(part, Decoded)
    assert part.batch.rows["tcpConnectionState"][0] == TcpState.ESTABLISHED


def sctp(state: int, *tags: int) -> bytes:
    """CTA_PROTOINFO_SCTP as in nfnetlink_conntrack.h: 1 the state, 2 and 3 the tags of both directions."""
    inner = attribute(1, bytes([state]))
    inner += b"".join(attribute(number, struct.pack(">I", tag)) for number, tag in enumerate(tags, 2))
    return attribute(0x8004, attribute(0x8003, inner))


# enum sctp_conntrack of nf_conntrack_sctp.h, in order.
SCTP_STATES = (
    SctpState.NONE,
    SctpState.CLOSED,
    SctpState.COOKIE_WAIT,
    SctpState.COOKIE_ECHOED,
    SctpState.ESTABLISHED,
    SctpState.SHUTDOWN_SENT,
    SctpState.SHUTDOWN_RECEIVED,
    SctpState.SHUTDOWN_ACK_SENT,
    SctpState.HEARTBEAT_SENT,
    SctpState.ESTABLISHED,  # HEARTBEAT_ACKED of older kernels
)


@pytest.mark.parametrize(("kernel", "state"), list(enumerate(SCTP_STATES)))
def test_sctp_flow_has_its_state_and_the_tag_of_each_direction(kernel: int, state: SctpState) -> None:
    (part,) = decoded(entry(sctp(kernel, 0xA1B2C3D4, 7), protocol=132))
    assert isinstance(part, Decoded)
    assert part.batch.template.name == "sctp-ipv4"
    row = part.batch.rows[0]
    assert row["sctpAssociationState"] == state
    assert (row["sctpVerificationTag"], row["reverseSctpVerificationTag"]) == (0xA1B2C3D4, 7)
    assert (row["sourceTransportPort"], row["destinationTransportPort"]) == (40000, 443)


def test_destroy_events_protoinfo_of_sctp_has_the_state_alone() -> None:
    (part,) = decoded(entry(sctp(4), protocol=132))
    assert isinstance(part, Decoded)
    row = part.batch.rows[0]
    assert (row["sctpAssociationState"], row["sctpVerificationTag"]) == (SctpState.ESTABLISHED, 0)


@pytest.mark.parametrize("state", SctpState)
def test_every_state_of_sctp_has_one_that_the_kernel_takes(state: SctpState) -> None:
    kernel = nl.SCTP_STATE_TO_KERNEL[state]
    known = SctpState.ESTABLISHED if state is SctpState.SHUTDOWN_PENDING else state
    assert SCTP_STATES[kernel] == known
    assert kernel < 9, "kernels from 6.3 on have no HEARTBEAT_ACKED"


def test_gre_flow_has_the_key_of_each_direction() -> None:
    """struct nf_conntrack_tuple: the destination's key is that of the packets, the source's that of the answers."""
    (part,) = decoded(entry(protocol=47, ports=(7, 9)))
    assert isinstance(part, Decoded)
    assert part.batch.template.name == "gre-ipv4"
    assert part.batch.rows["greKey"].tolist() == [9]
    assert part.batch.rows["reverseGreKey"].tolist() == [7]


@pytest.mark.parametrize("protocol", [6, 17, 132, 136, 47])
def test_translation_of_any_kind_is_told(protocol: int) -> None:
    octets = entry(protocol=protocol).replace(netaddr.IPAddress("192.0.2.10").packed, b"\xcb\0\x71\1")
    octets = octets.replace(b"\xcb\0\x71\1", netaddr.IPAddress("192.0.2.10").packed, 1)
    (part,) = decoded(octets)
    assert isinstance(part, Decoded)
    assert part.batch.template.name == f"{protocols.BY_NUMBER[protocol].kind}-nat-ipv4"
    assert part.batch.rows["postNATSourceIPv4Address"].tolist() == [0xCB007101]
    assert part.batch.rows["postNATDestinationIPv4Address"].tolist() == [0xC6336401]


def test_translated_key_of_gre_is_omitted_by_name() -> None:
    """As PPTP's helper makes it, for call ids that two clients have in common."""
    reply = entry(protocol=47, ports=(7, 9)).rindex(attribute(nl.PROTO_SRC_PORT, struct.pack(">H", 9)))
    octets = bytearray(entry(protocol=47, ports=(7, 9)))
    octets[reply + 5] = 10
    (part,) = decoded(bytes(octets))
    assert isinstance(part, Omitted)
    assert (part.reason, part.count) == ("translation of anything but addresses is not carried of GRE", 1)


def test_zone_of_one_direction_is_omitted_by_name() -> None:
    (part,) = decoded(entry(extra=attribute(nl.TUPLE_ZONE, struct.pack(">H", 5))))
    assert isinstance(part, Omitted)
    assert part == Omitted("its zone counts in one direction only", 1, ("tcp 192.0.2.10:40000 > 198.51.100.1:443",))


def test_unknown_attributes_are_stepped_over() -> None:
    (part,) = decoded(entry(attribute(77, b"abcde"), attribute(nl.MARK, b"\0\0\0\7")))
    assert isinstance(part, Decoded)
    assert part.batch.rows["flowMark"][0] == 7


def test_protocols_of_one_shape_are_told_apart() -> None:
    parts = decoded(entry(protocol=17) + entry(protocol=33) + entry(protocol=136) + entry(protocol=17))
    assert [part.reason for part in parts if isinstance(part, Omitted)] == ["protocol dccp is not carried"]
    told = {part.batch.template.name: len(part.batch) for part in parts if isinstance(part, Decoded)}
    assert told == {"udp-ipv4": 2, "udplite-ipv4": 1}


@pytest.mark.parametrize("protocol", nl.OPTIONAL, ids=lambda each: each.name)
def test_protocol_that_the_kernel_does_not_know_is_omitted_by_name(protocol: Protocol) -> None:
    """It tracks such entries by their addresses then, and tells nothing else of them."""
    (part,) = decoded(entry(protocol=protocol.number, ports=()))
    name = f"{protocol.name} 192.0.2.10 > 198.51.100.1"
    assert part == Omitted(f"protocol {protocol.name} is not carried", 1, (name,))


def test_entry_of_tcp_without_ports_is_malformed() -> None:
    with pytest.raises(errors.Malformed, match=r"lacks orig\.destination_port"):
        decoded(entry(ports=()))


# --- what looks like a header and is none

LOOKALIKE = struct.pack("=IHHII", 40, nl.CT_NEW, 2, SEQUENCE, PORT)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_bytes_that_look_like_a_header_are_none(copies: int) -> None:
    one = entry(attribute(77, LOOKALIKE * copies), attribute(nl.MARK, b"\0\0\0\7"))
    octets = RECORDED[: walked(RECORDED)[4][0]] + one * 3 + RECORDED[walked(RECORDED)[4][0] :]
    messages = framed(octets)
    assert list(zip(messages.starts.tolist(), messages.lengths.tolist(), strict=True)) == walked(octets)


def test_lookalikes_that_lead_to_a_real_message_are_none_either() -> None:
    # The false header's length reaches exactly to the next message.
    tail = attribute(nl.MARK, b"\0\0\0\7")
    inner = struct.pack("=IHHII", 16 + len(tail), nl.CT_NEW, 2, SEQUENCE, PORT)
    octets = entry(attribute(77, inner), tail) * 4
    messages = framed(octets)
    assert list(zip(messages.starts.tolist(), messages.lengths.tolist(), strict=True)) == walked(octets)


@given(st.lists(st.lists(st.integers(0, 60), max_size=6), min_size=1, max_size=12))
@settings(max_examples=200)
def test_framing_is_walking_whatever_the_messages_hold(bodies: list[list[int]]) -> None:
    octets = b"".join(
        message(bytes(4) + b"".join(struct.pack("=IHHII", size, nl.CT_NEW, 2, SEQUENCE, PORT) for size in body))
        for body in bodies
    )
    messages = framed(octets)
    assert list(zip(messages.starts.tolist(), messages.lengths.tolist(), strict=True)) == walked(octets)


# --- what was counted


def counted(numbers: tuple[int, int, int, int], start: int) -> bytes:
    """Packets and octets of both directions, as Linux tells them, and the start in nanoseconds."""
    pairs = ((nl.COUNTERS_ORIG, numbers[:2]), (nl.COUNTERS_REPLY, numbers[2:]))
    counters = b"".join(
        attribute(0x8000 | kind, b"".join(attribute(number, struct.pack(">Q", n)) for number, n in enumerate(pair, 1)))
        for kind, pair in pairs
    )
    return counters + attribute(0x8000 | nl.TIMESTAMP, attribute(1, struct.pack(">Q", start)))


COUNTED = entry(counted((1, 2**64 - 1, 2**63, 2**32), 1_700_000_000_123_999_999))


@pytest.mark.parametrize("padding", [b"", attribute(nl.MARK, b"\0\0\0\7")])
def test_counters_and_start_are_told_where_they_are_asked_for(padding: bytes) -> None:
    """At any multiple of four octets."""
    more = counted((1, 2**64 - 1, 2**63, 2**32), 1_700_000_000_123_999_999), counted((3, 4, 5, 6), 0)
    octets = b"".join(entry(padding, one, ports=(number, 443)) for number, one in enumerate(more))
    (part,) = decoded(octets, accounting=True)
    assert isinstance(part, Decoded)
    assert part.batch.template.name == "tcp-extended-ipv4"
    rows = part.batch.rows
    assert rows["packetTotalCount"].tolist() == [1, 3]
    assert rows["octetTotalCount"].tolist() == [2**64 - 1, 4]
    assert rows["reversePacketTotalCount"].tolist() == [2**63, 5]
    assert rows["reverseOctetTotalCount"].tolist() == [2**32, 6]
    assert rows["flowStartMilliseconds"].tolist() == [1_700_000_000_123, 0]
    (usual,) = decoded(octets)
    assert isinstance(usual, Decoded)
    assert usual.batch.template == TCP
    assert usual.batch.rows.tobytes() == part.batch.under(TCP).rows.tobytes()


def test_entry_of_which_nothing_was_counted_is_a_usual_flow_among_others() -> None:
    octets = COUNTED + entry(ports=(1, 443)) + entry(counted((1, 2, 3, 4), 5), ports=(2, 443))
    parts = [part for part in decoded(octets, accounting=True) if isinstance(part, Decoded)]
    found = {part.batch.template.name: part.numbers.tolist() for part in parts}
    assert found == {"tcp-ipv4": [1], "tcp-extended-ipv4": [0, 2]}


def test_wrong_counter_costs_nothing_where_nobody_asks_for_it() -> None:
    octets = entry(attribute(0x8000 | nl.COUNTERS_ORIG, attribute(1, bytes(4))))
    assert len(decoded(octets)) == 1
    with pytest.raises(errors.Malformed, match="packetTotalCount has 4 octets instead of 8"):
        decoded(octets, accounting=True)


# --- what is broken


@contextlib.contextmanager
def only_malformed() -> Iterator[None]:
    """Lets nothing out but success and `Malformed` with a place."""
    try:
        yield
    except errors.Malformed as error:
        if "octet" not in error.place:
            raise AssertionError(error.place) from error


def _used(octets: bytes, ends: list[int] | None = None) -> None:
    """All that is done with what a kernel sends."""
    messages = framed(octets, ends)
    for accounting in (False, True):
        list(Decoder({ZoneRole.PORT: 5, ZoneRole.SNAT: 0}, accounting=accounting).decode(entries(messages)))


DUMP = COUNTED + RECORDED


@given(st.integers(1, len(RECORDED) - 1))
@settings(max_examples=300)
def test_truncated_dump_is_malformed_or_a_shorter_dump(length: int) -> None:
    starts = {start for start, _ in walked(RECORDED)}
    if length in starts:
        _used(RECORDED[:length])
        return
    with pytest.raises(errors.Malformed, match="octet"):
        _used(RECORDED[:length])


@given(st.lists(st.tuples(st.integers(0, len(DUMP) - 1), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=1500)
def test_mutated_dump_is_malformed_or_decoded(changes: list[tuple[int, int]]) -> None:
    octets = bytearray(DUMP)
    for place, value in changes:
        octets[place] = value
    with only_malformed():
        _used(bytes(octets))


@given(st.data())
@settings(max_examples=500)
def test_hostile_words_in_places_that_matter(data: st.DataObject) -> None:
    """Lengths and types of headers and attributes, which random octets seldom hit."""
    octets = bytearray(DUMP)
    start, length = data.draw(st.sampled_from(walked(DUMP)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = start + 4 * data.draw(st.integers(0, length // 4 - 1))
        struct.pack_into(
            "=HH",
            octets,
            at,
            data.draw(st.sampled_from([0, 1, 3, 4, 5, 8, 12, 0x7FFF, 0xFFFF])),
            data.draw(st.sampled_from([0, 1, 2, 3, 4, 7, 9, 18, 20, 0x8001, 0x8002, 0x8004, 0xFFFF])),
        )
    with only_malformed():
        _used(bytes(octets))


@given(st.binary(max_size=400), st.lists(st.integers(1, 400), max_size=4))
@settings(max_examples=500)
def test_arbitrary_octets_never_do_more_than_raise(octets: bytes, cuts: list[int]) -> None:
    ends = sorted({cut & ~3 for cut in cuts if 0 < cut & ~3 < len(octets)} | ({len(octets)} if octets else set()))
    if not ends:
        return
    for work in (lambda: _used(octets, ends), lambda: frame_single(view(octets), ends)):
        with only_malformed():
            work()


@pytest.mark.parametrize("length", [0, 15, 33, 2**31, 2**32 - 1])
@pytest.mark.parametrize("number", [0, 5, ENTRIES])
def test_wrong_message_length_is_malformed(length: int, number: int) -> None:
    octets = bytearray(RECORDED)
    struct.pack_into("=I", octets, walked(RECORDED)[number][0], length)
    with pytest.raises(errors.Malformed):
        _used(bytes(octets))


def test_message_for_somebody_else_is_malformed() -> None:
    for place in (8, 12):
        octets = bytearray(RECORDED)
        octets[walked(RECORDED)[3][0] + place] ^= 1
        with pytest.raises(errors.Malformed):
            framed(bytes(octets))


@pytest.mark.parametrize(("sequence", "port"), [(SEQUENCE + 1, PORT), (SEQUENCE - 1, PORT), (SEQUENCE, PORT + 1)])
def test_answer_to_no_request_of_ours_is_malformed_in_a_datagram_of_its_own(sequence: int, port: int) -> None:
    octets = message(bytes(8)) + message(bytes(8), sequence=sequence, port=port)
    with pytest.raises(errors.Malformed, match="octet 24"):
        frame(view(octets), [24, 48], SEQUENCE, 1, PORT)


@pytest.mark.parametrize("size", [0, 3, 9, 12, 0xFFFF])
def test_attribute_that_leaves_its_message_is_malformed(size: int) -> None:
    octets = entry(struct.pack("=HHI", size, 77, 0))
    with pytest.raises(errors.Malformed, match=f"octet {len(octets) - 8}"):
        decoded(octets + entry())


def test_known_attribute_of_another_size_is_malformed_and_named() -> None:
    with pytest.raises(errors.Malformed, match="timeout has 8 octets instead of 4"):
        decoded(entry(attribute(nl.TIMEOUT, bytes(8))))


def test_message_may_not_reach_into_the_next_datagram() -> None:
    two = message(bytes(8)) + message(bytes(8))
    octets = bytearray(two)
    struct.pack_into("=I", octets, 0, len(two))
    with pytest.raises(errors.Malformed, match="octet 0"):
        frame(view(bytes(octets)), [24, 48], SEQUENCE, 1, PORT)


def test_event_framing_takes_any_sequence_and_port() -> None:
    octets = message(bytes(8), sequence=0, port=0) + message(bytes(4), nl.CT_DELETE, 7, 99)
    messages = frame_single(view(octets), [24, 44])
    assert messages.headers()["type"].tolist() == [nl.CT_NEW, nl.CT_DELETE]
    with pytest.raises(errors.Malformed):
        frame_single(view(octets), [44])
