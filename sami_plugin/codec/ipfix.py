"""Flows as IPFIX messages (RFC 7011), whole columns at a time.

A *payload* is one or more messages back to back: a message ends at 65,535 octets, a batch seldom does. A payload is
self-contained: the templates come first. The records of a data set are the bytes of a structured array as it stands,
so nothing here is done per flow.

A reader takes what any exporter may write: fields in any order, unsigned values in more or fewer octets than ours
(section 6.2), padding, withdrawals, several observation domains. It wants all the fields of one of our templates and
no others that it knows, because a field that is left out has no value, and zero is one. Only what was counted may be
left out, or be told where there is no room for it, and then it is skipped. So are elements that it does not know, by
name, unless their sender marked them as critical; see `information_elements`.

All or nothing: `decode` returns everything or raises a `RepresentationError`. It takes time and memory in proportion
to the payload, whatever is in it.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sami_plugin.errors import Malformed, NotUnderstood, RepresentationError
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import ACCOUNTING, TEMPLATES, Batch, FirewallEvent, Rows, Template, ZoneRole
from sami_plugin.model.protocols import STATES

VERSION = 10
MOST_MESSAGE_OCTETS = 0xFFFF
TEMPLATE_SET = 2
OPTIONS_TEMPLATE_SET = 3
FIRST_DATA_SET = 256
ENTERPRISE_BIT = 0x8000
_FIRST_BROUGHT = 0x8000
"""The first number of templates that drivers bring; there are as many more."""

MAX_OCTETS = 16 << 20
"""The most that a payload may have where the caller does not say: what RabbitMQ 4 lets through."""
MAX_RECORDS = 1 << 20
MOST_ODDITIES = 1024
"""The most templates at a time, domains, gaps, and things passed over. An honest payload has a few of each."""
MOST_WINDOW_SCALE = 14
"""RFC 7323 section 2.3. Linux shifts by what it is given without a look at it."""

_MESSAGE = struct.Struct("!HHIII")
_SET = struct.Struct("!HH")
_PAIR = struct.Struct("!HH")
_ENTERPRISE = struct.Struct("!I")
_WRAP = 1 << 32

Octets = bytes | bytearray | memoryview


# Kinds of records: what a wire template can turn out to be.


@dataclass(frozen=True, eq=False)
class _Kind:
    """Records of one set of fields. Flows are of one template; names of flows are told apart by their protocol."""

    name: str
    fields: dict[str, tuple[int, int]]
    """Offset and octets in a row, in order."""
    dtype: np.dtype[np.void]
    templates: tuple[tuple[int, Template], ...]
    """With the protocol that each is for; what is no flow has none, and no other template of its fields."""

    @property
    def is_of_flows(self) -> bool:
        return self.templates[0][1].is_flow

    @functools.cached_property
    def domains(self) -> tuple[tuple[str, npt.NDArray[np.bool_]], ...]:
        """By field, the values that it can have; of the others all."""
        protocols = [("protocolIdentifier", _table(protocol for protocol, _ in self.templates))]
        others = [(name, table) for name, table in _DOMAINS.items() if name in self.fields]
        return (*(protocols if self.is_of_flows else ()), *others)


def _plain(template: Template) -> Template:
    """What `template` is on the wire: names of translated flows are those of any others."""
    return template.plain if template.is_identity else template


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """All kinds of records that there are."""

    kinds: tuple[_Kind, ...]
    of_fields: dict[frozenset[str], _Kind]
    """Without those of accounting."""
    ids: dict[np.dtype[np.void], int]
    """Always the same for the same fields, so payloads that are joined to one stream do not define one number twice."""


def _known() -> _Known:
    return _known_of(len(TEMPLATES))


@functools.lru_cache(maxsize=1)
def _known_of(count: int) -> _Known:
    """`count` is that of the templates: drivers bring some, and none goes."""
    kinds = _kinds()
    ids = {kind.dtype: FIRST_DATA_SET + position for position, kind in enumerate(kinds) if kind.is_of_flows}
    # What drivers bring differs from host to host: its numbers come from the names.
    for kind in sorted((kind for kind in kinds if not kind.is_of_flows), key=lambda kind: kind.name):
        number = zlib.crc32(kind.name.encode()) % _FIRST_BROUGHT
        while _FIRST_BROUGHT + number in ids.values():
            number = (number + 1) % _FIRST_BROUGHT
        ids[kind.dtype] = _FIRST_BROUGHT + number
    return _Known(kinds, {frozenset(kind.fields).difference(ACCOUNTING): kind for kind in kinds}, ids)


def _kinds() -> tuple[_Kind, ...]:
    found: dict[np.dtype[np.void], list[Template]] = {}
    for template in TEMPLATES.values():
        found.setdefault(template.dtype, []).append(template)
        plain = _plain(template.identity)
        if plain not in found.setdefault(plain.dtype, []):
            found[plain.dtype].append(plain)
    return tuple(
        _Kind(
            "/".join(template.name for template in templates),
            {name: (place[1], place[0].itemsize) for name, place in (dtype.fields or {}).items()},
            dtype,
            tuple((template.protocol.number if template.is_flow else 0, template) for template in templates),
        )
        for dtype, templates in found.items()
    )


# Writing.


def field_specifier(element: elements.InformationElement, octets: int, enterprise: int) -> bytes:
    """One field of a template record (RFC 7011 section 3.2)."""
    number = element.enterprise_number(enterprise)
    if number == elements.IANA:
        return _PAIR.pack(element.number, octets)
    return _PAIR.pack(element.number | ENTERPRISE_BIT, octets) + _ENTERPRISE.pack(number)


@functools.lru_cache(maxsize=256)
def _template_record(dtype: np.dtype[np.void], enterprise: int) -> bytes:
    kind = next(kind for kind in _known().kinds if kind.dtype == dtype)
    fields = [field_specifier(elements.ELEMENTS[name], place[1], enterprise) for name, place in kind.fields.items()]
    return _PAIR.pack(_known().ids[dtype], len(fields)) + b"".join(fields)


class Encoder:
    """Writes one stream of messages of one observation domain: each template once, sequence numbers in a row."""

    def __init__(self, *, domain: int = 0, sequence: int = 0, enterprise: int = elements.EXAMPLE_ENTERPRISE) -> None:
        elements.check_enterprise(enterprise)
        self.sequence = sequence % _WRAP
        """The sequence number of the next message: the records before it, modulo 2**32 (RFC 7011 section 3.1)."""
        self._domain = domain
        self._enterprise = enterprise
        self._defined: set[np.dtype[np.void]] = set()

    def encode(self, batches: Iterable[Batch], *, export_time: int) -> bytes:
        """The messages that hold `batches`, in order; at least one message, so the bytes are never none.

        :param export_time: seconds since 1970, UTC.
        """
        chosen = [batch for batch in batches if len(batch)]
        return self.messages(self._sets(chosen), export_time=export_time)

    def messages(self, sets: Iterable[tuple[int, Octets, int, int]], *, export_time: int) -> bytes:
        """Messages of these sets: set id, records, octets of one record (0: the set stays whole), count of records.

        Sets of fixed-length records are divided among messages as they fill.
        """
        out: list[Octets] = []
        body: list[Octets] = []
        octets, records = _MESSAGE.size, 0

        def end_message() -> None:
            nonlocal octets, records
            out.append(_MESSAGE.pack(VERSION, octets, export_time % _WRAP, self.sequence, self._domain))
            out.extend(body)
            self.sequence = (self.sequence + records) % _WRAP
            body.clear()
            octets, records = _MESSAGE.size, 0

        for set_id, content, size, count in sets:
            done = 0
            while done < len(content):
                room = MOST_MESSAGE_OCTETS - octets - _SET.size
                take = min(room - room % size if size else room, len(content) - done)
                if take <= 0 or (not size and take < len(content)):
                    end_message()
                    continue
                body += _SET.pack(set_id, _SET.size + take), content[done : done + take]
                octets += _SET.size + take
                records += take // size if size else count
                done += take
        if body or not out:
            end_message()
        return b"".join(out)

    def _sets(self, batches: list[Batch]) -> Iterable[tuple[int, Octets, int, int]]:
        new = dict.fromkeys(batch.template.dtype for batch in batches if batch.template.dtype not in self._defined)
        if new:
            self._defined.update(new)
            yield TEMPLATE_SET, b"".join(_template_record(dtype, self._enterprise) for dtype in new), 0, 0
        for batch in batches:
            dtype = batch.template.dtype
            assert batch.rows.dtype == dtype, f"rows of {batch.template.name} have another template's fields"
            rows = np.ascontiguousarray(batch.rows)
            yield _known().ids[dtype], rows.view(np.uint8).data, dtype.itemsize, len(rows)


def encode(
    batches: Iterable[Batch],
    *,
    export_time: int,
    sequence: int = 0,
    domain: int = 0,
    enterprise: int = elements.EXAMPLE_ENTERPRISE,
) -> bytes:
    """A payload of these batches, templates first. Empty batches leave no trace.

    The next payload of a stream has the sequence number `sequence` plus the number of all records.

    :param export_time: seconds since 1970, UTC.
    :param enterprise: the enterprise number of our own elements; the reader has to use the same.
    """
    return Encoder(domain=domain, sequence=sequence, enterprise=enterprise).encode(batches, export_time=export_time)


# Reading.


@dataclass(frozen=True, slots=True)
class Gap:
    """Records that the sender counted before a message and that are not here."""

    domain: int
    expected: int
    found: int
    octet: int
    """Where the message begins."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """All that a payload holds."""

    batches: tuple[Batch, ...]
    """One per template of ours, in the order in which they first appear; the rows are writable.

    Rows are in the order of the payload, but those of a second wire template for the same fields come after all of
    the first.
    """
    skipped: tuple[str, ...] = ()
    """Elements, options records and sets that are unknown here and were passed over."""
    gaps: tuple[Gap, ...] = ()
    sequences: Mapping[int, int] = field(default_factory=dict)
    """Per observation domain, the sequence number to expect next; the argument of the next `decode` of the stream."""
    export_time: int = 0
    """Of the last message: seconds since 1970, UTC."""

    def __len__(self) -> int:
        return sum(map(len, self.batches))


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """What a template's records are: computed once, however often the template is seen."""

    octets: int
    """Of one record; 0 where a field is of variable length."""
    kind: _Kind | None = None
    is_exact: bool = False
    """The records are rows already."""
    places: tuple[tuple[str, int, int], ...] = ()
    """Field, offset in a record, octets there; for records that are not exact."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Enterprise and number of unknown elements."""
    is_options: bool = False
    wrong: str = ""
    """Why records of this template are no flows."""
    not_understood: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Of each field of options records."""
    described: tuple[int, int, int] | None = None
    """In options records that describe elements: the fields of enterprise, number and name (RFC 5610)."""


class _Decoder:
    def __init__(self, enterprise: int, sequences: Mapping[int, int], max_records: int) -> None:
        self.enterprise = enterprise
        self.sequences: dict[int, int] = dict(sequences)
        self.max_records = max_records
        self.records = 0
        self.templates: dict[tuple[int, int], tuple[bool, bytes]] = {}
        # Their numbers by domain and whether they are of options: to withdraw all looks at no others.
        self.numbers: dict[tuple[int, bool], set[int]] = {}
        self.layouts: dict[tuple[int, int], _Layout] = {}
        self.pieces: dict[_Kind, dict[_Layout, list[memoryview]]] = {}
        self.gaps: list[Gap] = []
        # Ordered sets: what was passed over, and the names that the payload itself has for elements.
        self.skipped: dict[tuple[int, int], None] = {}
        self.skipped_sets: dict[str, None] = {}
        self.names: dict[tuple[int, int], str] = {}

    def read(self, payload: memoryview) -> Decoded:
        at, export_time = 0, 0
        while at < len(payload):
            if len(payload) - at < _MESSAGE.size:
                raise Malformed(f"{len(payload) - at} octets are no message header", f"octet {at}")
            version, octets, export_time, sequence, domain = _MESSAGE.unpack_from(payload, at)
            if version != VERSION:
                raise Malformed(f"version {version} is not IPFIX", f"octet {at}")
            if not _MESSAGE.size <= octets <= len(payload) - at:
                raise Malformed(f"a message of {octets} octets does not fit", f"octet {at}")
            self._count(domain, sequence, at)
            self._message(payload[: at + octets], at + _MESSAGE.size, domain)
            at += octets
        if not at:
            raise Malformed("no message", "octet 0")
        batches = [batch for kind, pieces in self.pieces.items() for batch in _batches(kind, pieces)]
        return Decoded(tuple(batches), self._skipped(), tuple(self.gaps), self.sequences, export_time)

    def _count(self, domain: int, sequence: int, at: int) -> None:
        expected = self.sequences.get(domain)
        if expected is not None and expected != sequence:
            self.gaps.append(Gap(domain, expected, sequence, at))
        self.sequences[domain] = sequence
        _limit(len(self.gaps), "gaps", f"octet {at}")
        _limit(len(self.sequences), "observation domains", f"octet {at}")

    def _message(self, message: memoryview, at: int, domain: int) -> None:
        while at < len(message):
            if len(message) - at < _SET.size:
                raise Malformed("no room for a set's header", f"octet {at}")
            set_id, octets = _SET.unpack_from(message, at)
            if not _SET.size <= octets <= len(message) - at:
                raise Malformed(f"a set of {octets} octets does not fit", f"octet {at}, set {set_id}")
            content = message[at + _SET.size : at + octets]
            if set_id >= FIRST_DATA_SET:
                self._data(content, at, domain, set_id)
            elif set_id in (TEMPLATE_SET, OPTIONS_TEMPLATE_SET):
                self._define(content, at, domain, set_id)
            else:
                self.skipped_sets[f"set {set_id}, which no one has defined"] = None
            at += octets

    def _define(self, content: memoryview, at: int, domain: int, set_id: int) -> None:
        """Template records, withdrawals (RFC 7011 section 8.1) and padding."""
        is_options = set_id == OPTIONS_TEMPLATE_SET
        place = f"octet {at}, set {set_id}"
        here = 0
        while len(content) - here >= _PAIR.size:
            number, count = _PAIR.unpack_from(content, here)
            if not count:
                if not number and not any(content[here:]):
                    return
                self._withdraw(domain, number, is_options, place)
                here += _PAIR.size
                continue
            if number < FIRST_DATA_SET:
                raise Malformed(f"{number} is no template's number", place)
            end = _end_of_fields(content, here + _PAIR.size + 2 * is_options, count, f"{place}, template {number}")
            record = bytes(content[here:end])
            former = self.templates.setdefault((domain, number), (is_options, record))
            if former != (is_options, record):
                raise Malformed(f"template {number} is defined anew without having been withdrawn", place)
            self.numbers.setdefault((domain, is_options), set()).add(number)
            _limit(len(self.templates), "templates", place)
            here = end
        if any(content[here:]):
            raise Malformed("octets behind the last template", place)

    def _withdraw(self, domain: int, number: int, is_options: bool, place: str) -> None:
        if number == (OPTIONS_TEMPLATE_SET if is_options else TEMPLATE_SET):
            for each in self.numbers.pop((domain, is_options), ()):
                del self.templates[domain, each]
                self.layouts.pop((domain, each), None)
            return
        former = self.templates.get((domain, number))
        if former is None or former[0] != is_options:
            raise Malformed(f"template {number} is withdrawn and was never defined", place)
        self.numbers[domain, is_options].remove(number)
        del self.templates[domain, number]
        self.layouts.pop((domain, number), None)

    def _data(self, content: memoryview, at: int, domain: int, set_id: int) -> None:
        place = f"octet {at}, set {set_id}"
        layout = self._layout(domain, set_id, place)
        if layout.not_understood:
            raise NotUnderstood(layout.not_understood)
        if layout.wrong:
            raise Malformed(layout.wrong, place)
        if layout.octets:
            count, rest = divmod(len(content), layout.octets)
            if rest and any(content[len(content) - rest :]):
                raise Malformed("octets behind the last record", place)
        else:
            count = 0
        self._take(count, place)
        if layout.is_options:
            count = self._options(content, layout, count, set_id, place)
        elif count:
            assert layout.kind is not None
            self.skipped.update(dict.fromkeys(layout.skipped))
            _limit(len(self.skipped), "unknown elements", place)
            pieces = self.pieces.setdefault(layout.kind, {})
            pieces.setdefault(layout, []).append(content[: count * layout.octets])
        self.sequences[domain] = (self.sequences[domain] + count) % _WRAP

    def _layout(self, domain: int, set_id: int, place: str) -> _Layout:
        found = self.layouts.get((domain, set_id))
        if found is None:
            template = self.templates.get((domain, set_id))
            if template is None:
                raise Malformed(f"records of template {set_id}, which is not defined", place)
            is_options, record = template
            # Short ones are of the usual exporters and come again; long ones would only fill the cache.
            interpret = _layout if len(record) <= 512 else _layout.__wrapped__
            found = self.layouts[domain, set_id] = interpret(record, is_options, self.enterprise, _known())
        return found

    def _take(self, count: int, place: str) -> None:
        self.records += count
        if self.records > self.max_records:
            raise Malformed(f"more than {self.max_records} records", place)

    def _options(self, content: memoryview, layout: _Layout, count: int, set_id: int, place: str) -> int:
        """Walks over options records, which are no flows, and keeps the names that they give to elements."""
        if layout.described is None:
            self.skipped_sets[f"options records of template {set_id}"] = None
            _limit(len(self.skipped_sets), "kinds of options records", place)
            if layout.octets:
                return count
        here, walked = 0, 0
        # What is shorter than any record is padding.
        least = sum(1 if octets == elements.VARIABLE_LENGTH else octets for octets in layout.lengths)
        while len(content) - here >= least:
            values: list[memoryview] = []
            for octets in layout.lengths:
                here, octets = _length(content, here, octets, place)
                values.append(content[here : here + octets])
                here += octets
            if layout.described is not None:
                enterprise_number, number, name = (values[position] for position in layout.described)
                self._learn(enterprise_number, number, name)
            walked += 1
            if not layout.octets:
                self._take(1, place)
        if any(content[here:]):
            raise Malformed("octets behind the last record", place)
        return walked

    def _learn(self, enterprise_number: memoryview, number: memoryview, name: memoryview) -> None:
        text = bytes(name[:64]).decode("ascii", "replace")
        if text.isidentifier() and len(self.names) < MOST_ODDITIES:
            key = (int.from_bytes(enterprise_number, "big"), int.from_bytes(number, "big") & ~ENTERPRISE_BIT)
            self.names.setdefault(key, text)

    def _skipped(self) -> tuple[str, ...]:
        named = []
        for key in self.skipped:
            known = elements.name_of(*key, self.enterprise)
            given = self.names.get(key)
            named.append(f"{given} ({known})" if given else known)
        return (*named, *self.skipped_sets)


def _limit(count: int, what: str, place: str) -> None:
    if count > MOST_ODDITIES:
        raise Malformed(f"more than {MOST_ODDITIES} {what}", place)


def _end_of_fields(content: memoryview, here: int, count: int, place: str) -> int:
    for _ in range(count):
        if len(content) - here < _PAIR.size:
            raise Malformed("the set ends inside a template", place)
        here += _PAIR.size + (_ENTERPRISE.size if content[here] & 0x80 else 0)
    if here > len(content):
        raise Malformed("the set ends inside a template", place)
    return here


def _length(content: memoryview, here: int, octets: int, place: str) -> tuple[int, int]:
    """Where a value begins and how long it is: octets before it say so if its length varies (RFC 7011 section 7)."""
    if octets == elements.VARIABLE_LENGTH:
        if len(content) - here < 1:
            raise Malformed("a record ends before its last field", place)
        octets = content[here]
        here += 1
        if octets == 0xFF:
            if len(content) - here < 2:
                raise Malformed("a record ends before its last field", place)
            octets = content[here] << 8 | content[here + 1]
            here += 2
    if octets > len(content) - here:
        raise Malformed("a record ends before its last field", place)
    return here, octets


@functools.lru_cache(maxsize=512)
def _layout(record: bytes, is_options: bool, enterprise: int, known: _Known) -> _Layout:
    """What records of this template are. Raises nothing: to define a wrong template is no harm, to use it is."""
    template_id, count = _PAIR.unpack_from(record, 0)
    specifiers: list[tuple[int, int, int]] = []
    here = _PAIR.size + 2 * is_options
    for _ in range(count):
        number, octets = _PAIR.unpack_from(record, here)
        here += _PAIR.size
        enterprise_number = elements.IANA
        if number & ENTERPRISE_BIT:
            (enterprise_number,) = _ENTERPRISE.unpack_from(record, here)
            here += _ENTERPRISE.size
        specifiers.append((enterprise_number, number & ~ENTERPRISE_BIT, octets))
    unknown = [
        elements.name_of(vendor, number, enterprise)
        for vendor, number, _ in specifiers
        if elements.must_be_understood(vendor, number, enterprise) and elements.find(vendor, number, enterprise) is None
    ]
    if unknown:
        return _Layout(0, not_understood=tuple(dict.fromkeys(unknown)))
    lengths = tuple(octets for _, _, octets in specifiers)
    total = 0 if elements.VARIABLE_LENGTH in lengths else sum(lengths)
    if 0 in lengths:
        # No value fits in there, and a walk over fields that take no room would not end with the payload.
        vendor, number, _ = specifiers[lengths.index(0)]
        return _Layout(
            0, wrong=f"template {template_id} gives {elements.name_of(vendor, number, enterprise)} no octets"
        )
    if is_options:
        scopes = record[_PAIR.size] << 8 | record[_PAIR.size + 1]
        if not 0 < scopes <= count:
            return _Layout(0, wrong=f"options template {template_id} has {scopes} scope fields among {count}")
        return _Layout(total, is_options=True, lengths=lengths, described=_description_places(specifiers))
    return _flow_layout(template_id, specifiers, total, enterprise, known)


def _description_places(specifiers: list[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    numbers = [number if vendor == elements.IANA else None for vendor, number, _ in specifiers]
    wanted = [
        elements.ELEMENT_DESCRIPTION[name].number
        for name in ("privateEnterpriseNumber", "informationElementId", "informationElementName")
    ]
    if not set(wanted) <= set(numbers):
        return None
    enterprise_number, number, name = (numbers.index(each) for each in wanted)
    return enterprise_number, number, name


def _flow_layout(
    template_id: int, specifiers: list[tuple[int, int, int]], total: int, enterprise: int, known: _Known
) -> _Layout:
    places: dict[str, tuple[int, int]] = {}
    skipped: list[tuple[int, int]] = []
    varying: list[str] = []
    offset = 0
    for vendor, number, octets in specifiers:
        element = elements.find(vendor, number, enterprise)
        if (
            element is not None
            and element.name in ACCOUNTING
            and (element.name in places or not _holds(element, octets))
        ):
            element = None  # it may be left out
        if element is None or element.name not in elements.ELEMENTS:
            if octets == elements.VARIABLE_LENGTH:
                varying.append(f"{elements.name_of(vendor, number, enterprise)} of variable length")
            if (vendor, number) != (elements.IANA, elements.PADDING_OCTETS):
                skipped.append((vendor, number))
        else:
            if element.name in places:
                return _Layout(0, wrong=f"template {template_id} has {element.name} twice")
            if not _holds(element, octets):
                words = "a variable length" if octets == elements.VARIABLE_LENGTH else f"{octets} octets"
                return _Layout(0, wrong=f"template {template_id} gives {element.name} {words}")
            places[element.name] = offset, octets
        offset += octets
    kind = known.of_fields.get(frozenset(places).difference(ACCOUNTING))
    if kind is None:
        strangers = [elements.name_of(*each, enterprise) for each in skipped]
        return _Layout(0, wrong=_no_kind(known.kinds, template_id, set(places), strangers))
    for name in sorted(places.keys() - kind.fields.keys()):
        del places[name]
        skipped.append((elements.ELEMENTS[name].enterprise_number(enterprise), elements.ELEMENTS[name].number))
    if varying:
        # Well-formed, and its sender may be right to send it; but it would take a walk over every record.
        return _Layout(0, not_understood=tuple(varying))
    is_exact = (
        not skipped and total == kind.dtype.itemsize and all(kind.fields[name] == places[name] for name in places)
    )
    return _Layout(
        total,
        kind,
        is_exact,
        tuple((name, *place) for name, place in places.items()),
        tuple(skipped),
    )


def _holds(element: elements.InformationElement, octets: int) -> bool:
    return (1 if element.may_be_reduced else element.octets) <= octets <= element.octets


def _no_kind(kinds: Iterable[_Kind], template_id: int, fields: set[str], strangers: list[str]) -> str:
    nearest = min(kinds, key=lambda kind: len(fields.symmetric_difference(kind.fields)))
    parts = []
    if missing := [name for name in nearest.fields if name not in fields]:
        parts.append(f"lacks {', '.join(missing)}")
    if surplus := sorted(fields.difference(nearest.fields)):
        parts.append(f"has {', '.join(surplus)}, which is not for it")
    if strangers:
        some = ", ".join(strangers[:5])
        parts.append(f"has unknown elements ({some}); both hosts need the same enterprise number")
    return f"template {template_id} is no kind of flow known here: for {nearest.name} it {'; it '.join(parts)}"


def _batches(kind: _Kind, pieces: dict[_Layout, list[memoryview]]) -> list[Batch]:
    made = [_rows(kind, layout, octets) for layout, octets in pieces.items()]
    rows = made[0] if len(made) == 1 else Batch.joined(kind.templates[0][1], made).rows
    _check(kind, rows)
    if not kind.is_of_flows:
        return [Batch(kind.templates[0][1], rows)]
    protocols = rows["protocolIdentifier"]
    batches = []
    for protocol, template in kind.templates:
        which = protocols == protocol
        if which.all():
            return [Batch(template, rows)]
        if which.any():
            batches.append(Batch(template, rows).take(which))
    return batches


def _rows(kind: _Kind, layout: _Layout, pieces: list[memoryview]) -> Rows:
    raw = bytearray().join(pieces)
    if layout.is_exact:
        exact: Rows = np.frombuffer(raw, kind.dtype)
        return exact
    records = np.frombuffer(raw, np.uint8).reshape(-1, layout.octets)
    rows: Rows = np.zeros(len(records), kind.dtype)
    octets = rows.view(np.uint8).reshape(len(rows), kind.dtype.itemsize)
    for name, source, length in layout.places:
        offset, size = kind.fields[name]
        surplus = max(length - size, 0)
        if surplus:
            too_large = records[:, source : source + surplus].any(axis=1)
            if too_large.any():
                raise _bad_value(kind, int(too_large.argmax()), name, f"needs more than {size} octets")
        kept = length - surplus
        octets[:, offset + size - kept : offset + size] = records[:, source + surplus : source + length]
    return rows


def _table(values: Iterable[int]) -> npt.NDArray[np.bool_]:
    allowed = np.zeros(256, bool)
    allowed[list(values)] = True
    return allowed


_SCALES = _table(range(MOST_WINDOW_SCALE + 1))
_DOMAINS: dict[str, npt.NDArray[np.bool_]] = {
    "zoneRole": _table(ZoneRole),
    **{name: _table(states) for name, states in STATES.items()},
    "tcpWindowScale": _SCALES,
    "reverseTcpWindowScale": _SCALES,
    "firewallEvent": _table(FirewallEvent),
    "expectationNatDirection": _table(range(3)),
}


def _check(kind: _Kind, rows: Rows) -> None:
    """Raise `Malformed` where a value is none that its element can have in a flow of this kind."""
    for name, table in kind.domains:
        allowed = table[rows[name]]
        if not allowed.all():
            record = int(allowed.argmin())
            raise _bad_value(kind, record, name, f"cannot be {rows[name][record]}")


def _bad_value(kind: _Kind, record: int, name: str, what: str) -> RepresentationError:
    return Malformed(f"{name} {what} in {kind.name}", f"record {record} of {kind.name}, {name}")


def decode(
    payload: Octets,
    *,
    enterprise: int = elements.EXAMPLE_ENTERPRISE,
    sequences: Mapping[int, int] | None = None,
    max_octets: int = MAX_OCTETS,
    max_records: int = MAX_RECORDS,
) -> Decoded:
    """What a payload holds. Each distinct payload has one answer; nothing is kept between calls.

    Names of flows come back under the identity of the plain template of their protocol: translated or not, they have
    the same fields.

    :param enterprise: the enterprise number of our own elements; the writer has to have used the same.
    :param sequences: `Decoded.sequences` of the payload before this one in the stream, to see gaps between the two.
    :raises Malformed: the bytes are no IPFIX messages, or hold what is no flow; `place` says where.
    :raises NotUnderstood: elements that the sender marked as critical, or whose length varies, are unknown here.
    """
    elements.check_enterprise(enterprise)
    octets = memoryview(payload).cast("B")
    if len(octets) > max_octets:
        raise Malformed(f"{len(octets)} octets are more than the {max_octets} that are taken", "octet 0")
    return _Decoder(enterprise, sequences or {}, max_records).read(octets)
