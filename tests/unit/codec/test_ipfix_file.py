"""IPFIX files, written and read again."""

from __future__ import annotations

import io
import pathlib
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.codec import ipfix, ipfix_file
from sami_plugin.errors import Malformed, NotAvailable, RepresentationError
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import TEMPLATES, Batch
from sami_plugin.testing.conformance import flows
from tests.unit.codec.flow_strategies import any_batch

NOW = 1_700_000_000


@given(st.lists(any_batch, max_size=5))
def test_what_is_written_is_read(batches: list[Batch]) -> None:
    file = io.BytesIO()
    assert ipfix_file.write(file, batches, export_time=NOW) == sum(map(len, batches))
    decoded = ipfix_file.read(io.BytesIO(file.getvalue()))
    rows = b"".join(batch.rows.tobytes() for batch in decoded.batches)
    assert sorted(rows) == sorted(b"".join(batch.rows.tobytes() for batch in batches))
    assert decoded.skipped == decoded.gaps == ()


def test_file_is_for_its_owner_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "flows.ipfix"
    ipfix_file.write(path, [flows(TEMPLATES["tcp-ipv4"], 3)], export_time=NOW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(ipfix_file.read(path)) == 3
    ipfix_file.write(str(path), [flows(TEMPLATES["tcp-ipv4"], 1)], export_time=NOW)
    assert len(ipfix_file.read(str(path))) == 1


def test_file_that_is_not_there_or_has_no_place_is_an_operators_matter(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotAvailable, match="cannot be opened"):
        ipfix_file.read(tmp_path / "none")
    with pytest.raises(NotAvailable, match="cannot be opened"):
        ipfix_file.write(tmp_path, [], export_time=NOW)


def test_file_that_is_none_is_refused() -> None:
    for octets in (b"", b"PK\x03\x04 and so on, for a while", bytes(100)):
        with pytest.raises(RepresentationError):
            ipfix_file.read(io.BytesIO(octets))


def test_file_that_is_too_long_is_refused() -> None:
    file = io.BytesIO()
    ipfix_file.write(file, [flows(TEMPLATES["tcp-ipv4"], 3)], export_time=NOW)
    size = len(file.getvalue())
    assert len(ipfix_file.read(io.BytesIO(file.getvalue()), max_octets=size)) == 3
    with pytest.raises(Malformed, match="more than"):
        ipfix_file.read(io.BytesIO(file.getvalue()), max_octets=size - 1)


def test_file_describes_all_elements_of_ours_and_no_others() -> None:
    file = io.BytesIO()
    ipfix_file.write(file, [], export_time=NOW, enterprise=55555)
    octets = file.getvalue()
    at = octets.index(struct.pack("!HH", 999, 7)) + 34
    _, length = struct.unpack_from("!HH", octets, at)
    end, described = at + length, {}
    at += 4
    while at < end:
        enterprise, number, data_type, semantics, units = struct.unpack_from("!IHBBH", octets, at)
        at += 10
        texts = []
        for _ in range(2):
            size, at = octets[at], at + 1
            if size == 255:
                size, at = struct.unpack_from("!H", octets, at)[0], at + 2
            texts.append(octets[at : at + size].decode())
            at += size
        assert enterprise == 55555
        described[texts[0]] = (number, data_type, semantics, units, texts[1])
    assert described == {
        each.name: (each.number, each.data_type, each.semantics, each.units, each.description)
        for each in elements.ELEMENTS.values()
        if each.origin is elements.Origin.SAMI
    }


def test_names_that_a_file_gives_to_strangers_elements_are_used_when_they_are_skipped() -> None:
    names = ("privateEnterpriseNumber", "informationElementId", "informationElementName")
    fields = b"".join(
        ipfix.field_specifier(each, 65535 if each.data_type is elements.DataType.STRING else each.octets, 32473)
        for each in map(elements.ELEMENT_DESCRIPTION.__getitem__, names)
    )
    options = struct.pack("!HHH", 500, 3, 2) + fields
    description = struct.pack("!IH", 9, 12) + b"\x0aciscoThing"
    batch = flows(TEMPLATES["udp-ipv4"], 1)
    plain = ipfix.encode([batch], export_time=NOW)
    template = bytearray(plain[20 : 20 + struct.unpack_from("!H", plain, 18)[0] - 4])
    struct.pack_into("!H", template, 2, struct.unpack_from("!H", template, 2)[0] + 1)
    template += struct.pack("!HHI", 12 | 0x8000, 2, 9)
    sets = [(3, options), (500, description), (2, bytes(template))]
    (number,) = struct.unpack_from("!H", template)
    sets.append((number, batch.rows.tobytes() + b"\1\2"))
    body = b"".join(struct.pack("!HH", number, 4 + len(content)) + content for number, content in sets)
    decoded = ipfix.decode(struct.pack("!HHIII", 10, 16 + len(body), NOW, 0, 0) + body)
    assert decoded.skipped == ("ciscoThing (element 12 of enterprise 9)",)
    assert decoded.batches[0].rows.tobytes() == batch.rows.tobytes()
    assert decoded.sequences == {0: 2}
