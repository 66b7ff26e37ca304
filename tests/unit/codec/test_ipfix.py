"""Flows to octets and back, octets of others, and octets of nobody."""

from __future__ import annotations

import pathlib
import struct
import time
from collections.abc import Sequence

import netaddr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.codec import ipfix
from sami_plugin.errors import ConfigurationError, Malformed, NotUnderstood
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import ACCOUNTING, TEMPLATES, Batch, FirewallEvent, Template
from sami_plugin.testing.conformance import flows
from tests.unit.codec.flow_strategies import FLOW_TEMPLATES, NAME_TEMPLATES, any_batch, any_template, batches_of

VECTORS = pathlib.Path(__file__).parent / "vectors"
TCP = TEMPLATES["tcp-ipv4"]
NOW = 1_700_000_000
SAMI = elements.EXAMPLE_ENTERPRISE
KINDS = {each.name: each for each in FLOW_TEMPLATES + NAME_TEMPLATES}


def by_template(batches: Sequence[Batch]) -> dict[str, bytes]:
    """Octets of all rows of each template, in order: what a payload keeps of a list of batches."""
    whole: dict[str, bytes] = {}
    for batch in batches:
        if len(batch):
            whole[batch.template.name] = whole.get(batch.template.name, b"") + batch.rows.tobytes()
    return whole


# Messages written by hand.

Specifier = tuple[int, int, int]
"""Enterprise, number, octets."""


def message(*sets: bytes, sequence: int = 0, domain: int = 0) -> bytes:
    return struct.pack("!HHIII", 10, 16 + sum(map(len, sets)), NOW, sequence, domain) + b"".join(sets)


def set_of(number: int, *contents: bytes) -> bytes:
    return struct.pack("!HH", number, 4 + sum(map(len, contents))) + b"".join(contents)


def template_record(number: int, specifiers: Sequence[Specifier]) -> bytes:
    made = struct.pack("!HH", number, len(specifiers))
    for enterprise, element, octets in specifiers:
        made += struct.pack("!HH", element | (0x8000 if enterprise else 0), octets)
        made += struct.pack("!I", enterprise) if enterprise else b""
    return made


def specifiers_of(template: Template) -> list[Specifier]:
    return [
        (each.enterprise_number(SAMI), each.number, template.dtype[name].itemsize)
        for name in template.dtype.names or ()
        for each in [elements.ELEMENTS[name]]
    ]


def record_of(batch: Batch, row: int = 0) -> dict[str, bytes]:
    octets = batch.rows[row].tobytes()
    return {
        name: octets[place[1] : place[1] + place[0].itemsize] for name, place in (batch.rows.dtype.fields or {}).items()
    }


def specifier(name: str, octets: int | None = None) -> Specifier:
    element = elements.ELEMENTS[name]
    default = next(each.dtype[name].itemsize for each in KINDS.values() if name in (each.dtype.names or ()))
    return element.enterprise_number(SAMI), element.number, default if octets is None else octets


# Vectors.


def read_vector(name: str) -> tuple[bytes, Template, dict[str, str]]:
    octets, values = b"", {}
    for line in (VECTORS / f"{name}.hex").read_text().splitlines():
        text, _, comment = line.partition("#")
        octets += bytes.fromhex(text)
        field, is_value, value = comment.strip().partition(" = ")
        if is_value:
            values[field] = value
    return octets, KINDS[name], values


def rows_of(template: Template, values: dict[str, str]) -> Batch:
    rows = template.empty(1)
    assert list(values) == list(rows.dtype.names or ())
    for field, value in values.items():
        number = int(netaddr.IPAddress(value)) if field.endswith("Address") else int(value)
        dtype = template.dtype[field]
        values_of_it = np.frombuffer(number.to_bytes(dtype.itemsize, "big"), dtype.base)
        rows[field] = values_of_it if dtype.shape else values_of_it[0]
    return Batch(template, rows)


VECTOR_NAMES = sorted(path.stem for path in VECTORS.glob("*.hex"))


def test_there_is_a_vector_for_every_kind_of_record() -> None:
    layouts = {each.dtype for each in KINDS.values()}
    assert {KINDS[name].dtype for name in VECTOR_NAMES} == layouts


@pytest.mark.parametrize("name", VECTOR_NAMES)
def test_vector_is_what_is_written(name: str) -> None:
    octets, template, values = read_vector(name)
    written = ipfix.encode([rows_of(template, values)], export_time=NOW, sequence=7, domain=3)
    assert written.hex() == octets.hex()


@pytest.mark.parametrize("name", VECTOR_NAMES)
def test_vector_is_read(name: str) -> None:
    octets, template, values = read_vector(name)
    decoded = ipfix.decode(octets)
    (batch,) = decoded.batches
    assert batch.template == template
    assert batch.rows.tobytes() == rows_of(template, values).rows.tobytes()
    assert (decoded.skipped, decoded.gaps, decoded.sequences) == ((), (), {3: 8})
    assert decoded.export_time == NOW


# There and back.


@given(st.lists(any_batch, max_size=6), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_what_is_written_is_read(batches: list[Batch], sequence: int, domain: int) -> None:
    payload = ipfix.encode(batches, export_time=NOW, sequence=sequence, domain=domain)
    decoded = ipfix.decode(payload)
    assert by_template(decoded.batches) == by_template(batches)
    assert all(batch.rows.dtype == batch.template.dtype for batch in decoded.batches)
    assert decoded.gaps == decoded.skipped == ()
    assert decoded.sequences == {domain: (sequence + sum(map(len, batches))) % 2**32}
    assert len(decoded) == sum(map(len, batches))


def test_nothing_is_one_message_without_sets() -> None:
    payload = ipfix.encode([Batch(TCP, TCP.empty())], export_time=NOW)
    assert len(payload) == 16
    assert ipfix.decode(payload).batches == ()


@pytest.mark.parametrize("template", FLOW_TEMPLATES, ids=lambda each: each.name)
def test_many_flows_are_several_messages_and_one_batch(template: Template) -> None:
    rows = flows(template, 1000).rows[np.arange(5000) % 1000]
    rows["flowId"] = np.arange(5000)
    payload = ipfix.encode([Batch(template, rows)], export_time=NOW)
    at, lengths = 0, []
    while at < len(payload):
        lengths.append(int.from_bytes(payload[at + 2 : at + 4], "big"))
        at += lengths[-1]
    assert at == len(payload)
    assert len(lengths) > 1
    assert all(65535 - template.dtype.itemsize < length <= 65535 for length in lengths[:-1])
    (batch,) = ipfix.decode(payload).batches
    assert batch.rows.tobytes() == rows.tobytes()


def test_rows_that_were_read_belong_to_the_reader() -> None:
    payload = bytearray(ipfix.encode([flows(TCP, 3)], export_time=NOW))
    (batch,) = ipfix.decode(payload).batches
    before = batch.rows.copy()
    payload[:] = bytes(len(payload))
    assert batch.rows.tobytes() == before.tobytes()
    assert batch.rows.flags.writeable


def test_strided_rows_are_written() -> None:
    batch = Batch(TCP, flows(TCP, 10).rows[::3])
    assert by_template(ipfix.decode(ipfix.encode([batch], export_time=NOW)).batches) == by_template([batch])


def test_names_of_translated_flows_come_back_as_names_of_plain_ones() -> None:
    names = flows(TEMPLATES["udp-nat-ipv6"], 3).identities
    names.rows["firewallEvent"] = FirewallEvent.DELETED
    (batch,) = ipfix.decode(ipfix.encode([names], export_time=NOW)).batches
    assert batch.template == TEMPLATES["udp-ipv6"].identity
    assert batch.rows.tobytes() == names.rows.tobytes()


def test_names_of_several_protocols_under_one_template_are_told_apart() -> None:
    names = [flows(TEMPLATES[name], 2).identities for name in ("tcp-ipv4", "udp-ipv4", "tcp-ipv4")]
    decoded = ipfix.decode(ipfix.encode(names, export_time=NOW))
    assert {batch.template.name: len(batch) for batch in decoded.batches} == {
        "tcp-ipv4-identity": 4,
        "udp-ipv4-identity": 2,
    }


def test_stream_defines_each_template_once_and_counts_on() -> None:
    encoder = ipfix.Encoder()
    first = encoder.encode([flows(TCP, 3)], export_time=NOW)
    second = encoder.encode([flows(TCP, 2, first=10)], export_time=NOW)
    assert len(ipfix.decode(first + second)) == 5
    assert encoder.sequence == 5
    with pytest.raises(Malformed, match="not defined"):
        ipfix.decode(second)


def test_payloads_put_together_are_one_stream() -> None:
    first = ipfix.encode([flows(TCP, 3)], export_time=NOW)
    second = ipfix.encode([flows(TEMPLATES["icmp-ipv6"], 2), flows(TCP, 1)], export_time=NOW, sequence=3)
    decoded = ipfix.decode(first + second)
    assert len(decoded) == 6
    assert decoded.gaps == ()


# What other exporters write.


@given(any_template.flatmap(lambda each: st.tuples(batches_of(each), st.data())))
def test_other_layouts_of_the_same_values_are_read(case: tuple[Batch, st.DataObject]) -> None:
    """Any order, any length that holds the values, unknown elements in between."""
    batch, data = case
    names = data.draw(st.permutations(list(batch.rows.dtype.names or ())))
    chosen: list[tuple[str | None, Specifier]] = []
    for name in names:
        element = elements.ELEMENTS[name]
        octets = batch.rows.dtype[name].itemsize
        if element.may_be_reduced:
            highest = int(batch.rows[name].max())
            octets = data.draw(st.integers(max(1, (highest.bit_length() + 7) // 8), element.octets))
        chosen.append((name, specifier(name, octets)))
    for _ in range(data.draw(st.integers(0, 3))):
        unknown = data.draw(st.sampled_from([(0, 1, 8), (0, 210, 3), (9, 9, 1), (29305, 1, 4), (SAMI, 0x1FFF, 2)]))
        chosen.insert(data.draw(st.integers(0, len(chosen))), (None, unknown))
    records = b""
    for row in range(len(batch)):
        values = record_of(batch, row)
        for chosen_name, (_, _, octets) in chosen:
            value = values[chosen_name] if chosen_name else bytes([171]) * octets
            records += value[-octets:].rjust(octets, b"\0")
    padding = bytes(data.draw(st.integers(0, 3)))
    payload = message(
        set_of(2, template_record(300, [each for _, each in chosen]), padding), set_of(300, records, padding)
    )
    decoded = ipfix.decode(payload)
    assert by_template(decoded.batches) == by_template([batch])
    wanted = {elements.name_of(*each[:2], SAMI) for name, each in chosen if name is None and each[1] != 210}
    assert set(decoded.skipped) == wanted


def one_flow(specifiers: Sequence[Specifier], *contents: bytes) -> bytes:
    return message(set_of(2, template_record(256, specifiers)), set_of(256, *contents))


ROW = flows(TCP, 1).rows.tobytes()
SPECIFIERS = specifiers_of(TCP)


def test_two_layouts_of_one_template_come_back_as_one_batch() -> None:
    payload = message(
        set_of(2, template_record(256, SPECIFIERS), template_record(257, [*SPECIFIERS, (0, 210, 5)])),
        set_of(256, ROW),
        set_of(257, ROW, bytes(5)),
        set_of(256, ROW),
    )
    (batch,) = ipfix.decode(payload).batches
    assert batch.rows.tobytes() == ROW * 3


@pytest.mark.parametrize("left_out", list(TCP.dtype.names or ()))
def test_template_that_lacks_a_field_is_refused_by_name(left_out: str) -> None:
    chosen = [each for each in SPECIFIERS if each != specifier(left_out)]
    with pytest.raises(Malformed, match=rf"lacks {left_out}|has .*{left_out}|no kind of flow"):
        ipfix.decode(one_flow(chosen, bytes(sum(each[2] for each in chosen))))


EXTENDED = TEMPLATES["udp-extended-ipv6"]


def test_flow_of_which_nobody_tells_what_was_counted_counts_nothing() -> None:
    """As agents of before write them, and devices that do not count."""
    sent = flows(EXTENDED, 2)
    chosen = [each for each in specifiers_of(EXTENDED) if each not in [specifier(name) for name in ACCOUNTING]]
    octets = EXTENDED.dtype.itemsize - 8 * len(ACCOUNTING)
    records = [row.tobytes()[:octets] for row in sent.rows]
    decoded = ipfix.decode(message(set_of(2, template_record(256, chosen)), set_of(256, *records)))
    for name in ACCOUNTING:
        sent.rows[name] = 0
    assert by_template(decoded.batches) == by_template([sent])
    assert decoded.skipped == ()


@pytest.mark.parametrize(
    "counted",
    [
        [specifier("reverseOctetTotalCount")],
        [specifier("octetTotalCount"), specifier("octetTotalCount")],
        [specifier("flowStartMilliseconds", 4)],
        [specifier("octetTotalCount", 4), specifier("packetTotalCount", 4)],
    ],
)
def test_what_was_counted_of_a_flow_without_room_for_it_is_skipped_by_name(counted: list[Specifier]) -> None:
    """However it is told: a collector's file has it in its own ways."""
    octets = sum(each[2] for each in counted)
    decoded = ipfix.decode(one_flow([*counted, *SPECIFIERS], bytes(range(octets)), ROW))
    (batch,) = decoded.batches
    assert batch.rows.tobytes() == ROW
    assert set(decoded.skipped) == {elements.name_of(vendor, number, SAMI) for vendor, number, _ in counted}


def test_known_element_too_many_is_refused_by_name() -> None:
    with pytest.raises(Malformed, match="has postNATSourceIPv4Address"):
        ipfix.decode(one_flow([*SPECIFIERS, specifier("postNATSourceIPv4Address")], ROW, bytes(4)))


def test_element_that_comes_twice_is_refused_by_name() -> None:
    with pytest.raises(Malformed, match="flowMark twice"):
        ipfix.decode(one_flow([*SPECIFIERS, specifier("flowMark")], ROW, bytes(4)))


@pytest.mark.parametrize(
    ("name", "octets", "words"),
    [
        ("flowMark", 5, "flowMark 5 octets"),
        ("flowMark", 65535, "flowMark a variable length"),
        ("sourceIPv4Address", 3, "sourceIPv4Address 3 octets"),
        ("flowId", 0, "flowId no octets"),
        ("flowId", 9, "flowId 9 octets"),
    ],
)
def test_length_that_no_value_has_is_refused_by_name(name: str, octets: int, words: str) -> None:
    chosen = [specifier(name, octets) if each == specifier(name) else each for each in SPECIFIERS]
    with pytest.raises(Malformed, match=words):
        ipfix.decode(one_flow(chosen, ROW * 3))


def test_template_that_is_not_used_may_be_anything() -> None:
    payload = message(
        set_of(2, template_record(256, SPECIFIERS), template_record(257, [(SAMI, 0x2FFF, 1), (0, 82, 65535)])),
        set_of(256, ROW),
    )
    assert len(ipfix.decode(payload)) == 1


def test_unknown_element_is_skipped_and_named() -> None:
    decoded = ipfix.decode(one_flow([*SPECIFIERS, (SAMI, 99, 2), (0, 1, 8)], ROW, bytes(10)))
    assert decoded.skipped == (f"element 99 of enterprise {SAMI}", "IANA's element 1")
    assert decoded.batches[0].rows.tobytes() == ROW


def test_unknown_critical_element_is_refused_by_name() -> None:
    with pytest.raises(NotUnderstood) as caught:
        ipfix.decode(one_flow([*SPECIFIERS, (SAMI, 0x2063, 2), (0, 1, 8)], ROW, bytes(10)))
    assert caught.value.elements == (f"element {0x2063} of enterprise {SAMI}",)


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("sctp-ipv4", "sctpAssociationState"),
        ("sctp-ipv4", "sctpVerificationTag"),
        ("sctp-ipv6", "reverseSctpVerificationTag"),
        ("gre-ipv4", "greKey"),
        ("gre-ipv6", "reverseGreKey"),
    ],
)
def test_reader_that_does_not_know_what_makes_it_another_flow_refuses_it_by_name(
    template: str, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = ipfix.encode([flows(TEMPLATES[template], 2)], export_time=NOW)
    element = elements.ELEMENTS[left_out]
    monkeypatch.delitem(elements._BY_NUMBER, (element.origin, element.vendor, element.number))
    with monkeypatch.context() as fresh:
        fresh.setattr(ipfix, "_layout", ipfix._layout.__wrapped__)
        with pytest.raises(NotUnderstood) as caught:
            ipfix.decode(payload)
    assert caught.value.elements == (f"element {element.number} of enterprise {SAMI}",)


def test_critical_bit_means_nothing_under_a_strangers_number() -> None:
    decoded = ipfix.decode(one_flow([*SPECIFIERS, (9, 0x2063, 2)], ROW, bytes(2)))
    assert decoded.skipped == ("element 8291 of enterprise 9",)


def test_unknown_element_of_variable_length_is_refused_by_name() -> None:
    with pytest.raises(NotUnderstood, match="IANA's element 82 of variable length"):
        ipfix.decode(one_flow([*SPECIFIERS, (0, 82, 65535)], ROW, b"\x02lo"))


def test_both_ends_need_the_same_enterprise_number() -> None:
    payload = ipfix.encode([flows(TCP, 2)], export_time=NOW, enterprise=55555)
    assert len(ipfix.decode(payload, enterprise=55555)) == 2
    with pytest.raises(Malformed, match=r"lacks zoneRole.*same enterprise number"):
        ipfix.decode(payload)


@pytest.mark.parametrize("number", [0, -1, 29305, 2**32])
def test_number_that_cannot_be_an_enterprise_of_ours_is_refused(number: int) -> None:
    with pytest.raises(ConfigurationError):
        ipfix.encode([], export_time=NOW, enterprise=number)
    with pytest.raises(ConfigurationError):
        ipfix.decode(b"", enterprise=number)


def test_options_and_reserved_sets_are_skipped_and_named() -> None:
    options = struct.pack("!HHH", 400, 2, 1) + struct.pack("!HHHH", 149, 4, 41, 8)
    varying = struct.pack("!HHH", 401, 2, 1) + struct.pack("!HHHH", 149, 4, 82, 65535)
    payload = message(
        set_of(3, options, varying),
        set_of(400, bytes(12), bytes(12)),
        set_of(401, bytes(4), b"\x03eth", bytes(4), b"\xff\x00\x02lo"),
        set_of(2, template_record(256, SPECIFIERS)),
        set_of(5, b"anything"),
        set_of(256, ROW),
    )
    decoded = ipfix.decode(payload)
    assert decoded.batches[0].rows.tobytes() == ROW
    assert decoded.skipped == (
        "options records of template 400",
        "options records of template 401",
        "set 5, which no one has defined",
    )
    assert decoded.sequences == {0: 5}


def test_withdrawn_template_may_be_defined_anew() -> None:
    other = specifiers_of(TEMPLATES["udp-ipv4"])
    row = flows(TEMPLATES["udp-ipv4"], 1).rows.tobytes()
    for withdrawal in (struct.pack("!HH", 256, 0), struct.pack("!HH", 2, 0)):
        payload = message(
            set_of(2, template_record(256, SPECIFIERS)),
            set_of(256, ROW),
            set_of(2, withdrawal),
            set_of(2, template_record(256, other)),
            set_of(256, row),
        )
        assert [batch.template.name for batch in ipfix.decode(payload).batches] == ["tcp-ipv4", "udp-ipv4"]


def test_all_templates_of_one_domain_and_sort_are_withdrawn_and_no_others() -> None:
    options = struct.pack("!HHHHH", 257, 1, 1, 1, 4)
    defined = message(set_of(2, template_record(256, SPECIFIERS)), set_of(3, options), domain=1)
    elsewhere = message(set_of(2, template_record(256, SPECIFIERS), struct.pack("!HH", 2, 0)), domain=2)
    assert len(ipfix.decode(defined + elsewhere + message(set_of(256, ROW), domain=1))) == 1
    with pytest.raises(Malformed, match="template 256, which is not defined"):
        ipfix.decode(defined + elsewhere + message(set_of(256, ROW), domain=2))
    withdrawn = message(set_of(2, struct.pack("!HH", 2, 0)), set_of(257, bytes(4)), domain=1)
    assert ipfix.decode(defined + withdrawn).skipped == ("options records of template 257",)
    with pytest.raises(Malformed, match="template 256, which is not defined"):
        ipfix.decode(defined + withdrawn + message(set_of(256, ROW), domain=1))


def test_withdrawal_costs_no_more_beside_many_templates_of_another_domain() -> None:
    def seconds(templates: int) -> float:
        defined = b"".join(template_record(256 + number, [(0, 4, 1)]) for number in range(templates))
        payload = message(set_of(2, defined), domain=1) + message(set_of(2, struct.pack("!HH", 2, 0) * 10_000))
        begun = time.process_time()
        ipfix.decode(payload)
        return time.process_time() - begun

    assert min(seconds(1000) for _ in range(3)) < 8 * min(seconds(1) for _ in range(3))


def test_template_may_be_repeated_and_not_changed() -> None:
    again = message(
        set_of(2, template_record(256, SPECIFIERS)), set_of(2, template_record(256, SPECIFIERS)), set_of(256, ROW)
    )
    assert len(ipfix.decode(again)) == 1
    with pytest.raises(Malformed, match="defined anew"):
        ipfix.decode(
            message(set_of(2, template_record(256, SPECIFIERS)), set_of(2, template_record(256, SPECIFIERS[:-1])))
        )


def test_template_belongs_to_its_observation_domain() -> None:
    defined = message(set_of(2, template_record(256, SPECIFIERS)), domain=1)
    assert len(ipfix.decode(defined + message(set_of(256, ROW), domain=1))) == 1
    with pytest.raises(Malformed, match="not defined"):
        ipfix.decode(defined + message(set_of(256, ROW), domain=2))


def test_gaps_in_the_sequence_are_reported_and_no_error() -> None:
    defined = message(set_of(2, template_record(256, SPECIFIERS)), set_of(256, ROW, ROW), sequence=2**32 - 1)
    decoded = ipfix.decode(defined + message(set_of(256, ROW), sequence=5))
    assert decoded.gaps == (ipfix.Gap(domain=0, expected=1, found=5, octet=len(defined)),)
    assert len(decoded) == 3
    later = ipfix.encode([flows(TCP, 1)], export_time=NOW, sequence=9)
    assert ipfix.decode(later, sequences=decoded.sequences).gaps == (ipfix.Gap(0, 6, 9, 0),)


# What is no flow.


@pytest.mark.parametrize(
    ("template", "field", "value"),
    [
        ("tcp-ipv4", "zoneRole", 0),
        ("tcp-ipv4", "zoneRole", 4),
        ("tcp-ipv4", "protocolIdentifier", 17),
        ("udp-ipv4", "protocolIdentifier", 6),
        ("icmp-ipv4", "protocolIdentifier", 58),
        ("icmp-ipv6", "protocolIdentifier", 1),
        ("tcp-nat-ipv6", "protocolIdentifier", 0),
        ("tcp-ipv4", "tcpConnectionState", 0),
        ("tcp-ipv4", "tcpConnectionState", 12),
        ("tcp-nat-ipv4", "tcpWindowScale", 15),
        ("tcp-ipv6", "reverseTcpWindowScale", 255),
        ("udp-ipv4", "protocolIdentifier", 132),
        ("sctp-ipv4", "protocolIdentifier", 6),
        ("gre-ipv6", "protocolIdentifier", 6),
        ("sctp-ipv4", "sctpAssociationState", 0),
        ("sctp-ipv6", "sctpAssociationState", 9),
        ("udp-ipv4-identity", "firewallEvent", 1),
        ("udp-ipv4-identity", "protocolIdentifier", 1),
        ("icmp-ipv6-identity", "protocolIdentifier", 1),
    ],
)
def test_value_that_its_element_cannot_have_is_refused_by_record_and_name(
    template: str, field: str, value: int
) -> None:
    batch = flows(TEMPLATES[template.removesuffix("-identity")], 5)
    if template.endswith("-identity"):
        batch = batch.identities
    batch.rows[field][3] = value
    with pytest.raises(Malformed) as caught:
        ipfix.decode(ipfix.encode([batch], export_time=NOW))
    assert field in caught.value.place
    assert "record 3" in caught.value.place
    assert str(value) in caught.value.what


def test_number_that_needs_more_octets_than_ours_is_refused_by_record_and_name() -> None:
    chosen = [specifier("flowId", 8) if each == specifier("flowId") else each for each in SPECIFIERS]
    values = record_of(flows(TCP, 1))
    fits = b"".join(bytes(4) + value if name == "flowId" else value for name, value in values.items())
    not_fits = b"".join(b"\0\0\0\1" + value if name == "flowId" else value for name, value in values.items())
    assert ipfix.decode(one_flow(chosen, fits, fits)).batches[0].rows.tobytes() == ROW * 2
    with pytest.raises(Malformed, match=r"flowId needs more than 4 octets.*record 1"):
        ipfix.decode(one_flow(chosen, fits, not_fits))


GOOD = one_flow(SPECIFIERS, ROW)


def changed(at: int, octets: bytes) -> bytes:
    return GOOD[:at] + octets + GOOD[at + len(octets) :]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "no message"),
        (GOOD[:15], "no message header"),
        (GOOD + b"\0", "no message header"),
        (GOOD[:-1], "does not fit"),
        (changed(0, b"\0\x09"), "version 9"),
        (changed(2, b"\0\x0f"), "message of 15 octets"),
        (changed(2, b"\xff\xff"), "message of 65535 octets"),
        (changed(18, b"\0\x03"), "set of 3 octets"),
        (changed(18, b"\xff\xff"), "set of 65535 octets"),
        (message(b"\0\2\0"), "set's header"),
        (message(set_of(2, struct.pack("!HH", 256, 5))), "ends inside a template"),
        (message(set_of(2, struct.pack("!HHHH", 256, 1, 0x8001, 1))), "ends inside a template"),
        (message(set_of(2, struct.pack("!HHHH", 255, 1, 1, 1))), "no template's number"),
        (message(set_of(2, struct.pack("!HH", 256, 0))), "never defined"),
        (message(set_of(2, b"\0\0\1")), "behind the last template"),
        (message(set_of(256, ROW)), "not defined"),
        (one_flow(SPECIFIERS, ROW, b"\1"), "behind the last record"),
        (message(set_of(3, struct.pack("!HHHHH", 400, 1, 0, 149, 4)), set_of(400, bytes(4))), "scope fields"),
        (message(set_of(3, struct.pack("!HHHHH", 400, 1, 1, 82, 65535)), set_of(400, b"\5abc")), "before its last"),
        (message(set_of(2, template_record(256, [(0, 1, 8)])), set_of(256, bytes(8))), "no kind of flow"),
    ],
)
def test_octets_that_are_no_messages_are_refused(payload: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        ipfix.decode(payload)


def test_nothing_of_a_bad_payload_is_used() -> None:
    with pytest.raises(Malformed):
        ipfix.decode(GOOD + message(set_of(256, ROW[:-1] + b"\xff", b"\1")))


def test_limits_are_kept() -> None:
    payload = ipfix.encode([flows(TCP, 100)], export_time=NOW)
    with pytest.raises(Malformed, match="octets"):
        ipfix.decode(payload, max_octets=len(payload) - 1)
    with pytest.raises(Malformed, match="more than 99 records"):
        ipfix.decode(payload, max_records=99)
    assert len(ipfix.decode(payload, max_octets=len(payload), max_records=100)) == 100


def test_oddities_without_end_are_refused() -> None:
    many = b"".join(template_record(256 + number, [(0, 1, 8)]) for number in range(1100))
    with pytest.raises(Malformed, match="more than 1024 templates"):
        ipfix.decode(message(set_of(2, many)))
    with pytest.raises(Malformed, match="more than 1024 observation domains"):
        ipfix.decode(b"".join(message(domain=number) for number in range(1100)))
    with pytest.raises(Malformed, match="more than 1024 gaps"):
        ipfix.decode(b"".join(message(sequence=2 * number) for number in range(1100)))
    strangers = [(9, number, 1) for number in range(1100)]
    with pytest.raises(Malformed, match="more than 1024 unknown elements"):
        ipfix.decode(one_flow([*SPECIFIERS, *strangers], ROW, bytes(1100)))
