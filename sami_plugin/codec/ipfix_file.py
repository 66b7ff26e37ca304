"""Flows as an IPFIX file (RFC 5655): the messages of one stream, one after the other, that other readers open too.

Such readers do not know our elements, so a file begins with records that describe them (RFC 5610): number, type,
semantics, units, name and meaning. Wireshark and tshark open such a file as they open a capture.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

from sami_plugin.codec import ipfix
from sami_plugin.errors import NotAvailable, NotPermitted
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import Batch

MAX_OCTETS = 1 << 30
MAX_RECORDS = 1 << 24

DESCRIPTION_TEMPLATE = 999
"""The template of the records that describe elements: a number well above those of the flows' templates."""
_SCOPE = ("privateEnterpriseNumber", "informationElementId")
_VALUES = (
    "informationElementDataType",
    "informationElementSemantics",
    "informationElementUnits",
    "informationElementName",
    "informationElementDescription",
)
_FILE_MODE = 0o600  # Whom a guest talks to is nobody else's business.


def write(
    target: str | os.PathLike[str] | BinaryIO,
    batches: Iterable[Batch],
    *,
    export_time: int,
    domain: int = 0,
    enterprise: int = elements.EXAMPLE_ENTERPRISE,
) -> int:
    """Writes a file, batch by batch as they come, and returns the count of records (the descriptions are none).

    A path is created or replaced, readable by its owner only; an open file is written to and stays open.

    :param export_time: seconds since 1970, UTC.
    :raises NotPermitted, NotAvailable: the file cannot be written; what is there of it then is of no use.
    """
    encoder = ipfix.Encoder(domain=domain, enterprise=enterprise)
    count = 0
    with _opened(target, "wb") as file, _operator_errors(target, "written"):
        file.write(encoder.messages(_descriptions(enterprise), export_time=export_time))
        for batch in batches:
            if len(batch):
                file.write(encoder.encode([batch], export_time=export_time))
                count += len(batch)
    return count


def read(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    enterprise: int = elements.EXAMPLE_ENTERPRISE,
    max_octets: int = MAX_OCTETS,
    max_records: int = MAX_RECORDS,
) -> ipfix.Decoded:
    """What a file holds, all of it or nothing; it may come from another exporter.

    :raises RepresentationError: it is no IPFIX file, or holds what is no flow.
    :raises NotPermitted, NotAvailable: the file cannot be read.
    """
    with _opened(source, "rb") as file, _operator_errors(source, "read"):
        # One octet more than is taken tells a file that is too long from one that is not, whatever its size is said
        # to be: a pipe has none.
        payload = file.read(max_octets + 1)
    return ipfix.decode(payload, enterprise=enterprise, max_octets=max_octets, max_records=max_records)


def _descriptions(enterprise: int) -> Iterator[tuple[int, bytes, int, int]]:
    """The options template for descriptions of elements, and those of ours (RFC 5610 section 3.9)."""
    names = (*_SCOPE, *_VALUES)
    fields = [_description_field(name, enterprise) for name in names]
    header = b"".join(number.to_bytes(2, "big") for number in (DESCRIPTION_TEMPLATE, len(fields), len(_SCOPE)))
    yield ipfix.OPTIONS_TEMPLATE_SET, header + b"".join(fields), 0, 0
    ours = [element for element in elements.ELEMENTS.values() if element.origin is elements.Origin.SAMI]
    yield DESCRIPTION_TEMPLATE, b"".join(_description(element, enterprise) for element in ours), 0, len(ours)


def _description_field(name: str, enterprise: int) -> bytes:
    element = elements.ELEMENT_DESCRIPTION[name]
    varies = element.data_type is elements.DataType.STRING
    return ipfix.field_specifier(element, elements.VARIABLE_LENGTH if varies else element.octets, enterprise)


def _description(element: elements.InformationElement, enterprise: int) -> bytes:
    values = (enterprise, element.number, element.data_type, element.semantics, element.units)
    numbers = [
        value.to_bytes(elements.ELEMENT_DESCRIPTION[name].octets, "big")
        for name, value in zip((*_SCOPE, *_VALUES[:3]), values, strict=True)
    ]
    return b"".join(numbers) + _string(element.name) + _string(element.description)


def _string(text: str) -> bytes:
    """A value of variable length (RFC 7011 section 7): its length goes before it, in one octet or in three."""
    octets = text.encode()
    if len(octets) < 0xFF:
        return bytes([len(octets)]) + octets
    return b"\xff" + len(octets).to_bytes(2, "big") + octets


@contextlib.contextmanager
def _opened(file: str | os.PathLike[str] | BinaryIO, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
    if not isinstance(file, str | os.PathLike):
        yield file
        return
    with _operator_errors(file, "opened"):
        flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.fdopen(os.open(pathlib.Path(file), flags | os.O_CLOEXEC, _FILE_MODE), mode)
    # Closing flushes, and so can fail as writing does.
    with _operator_errors(file, "closed"), opened:
        yield opened


@contextlib.contextmanager
def _operator_errors(file: str | os.PathLike[str] | BinaryIO, done: str) -> Iterator[None]:
    name = file if isinstance(file, str | os.PathLike) else getattr(file, "name", "the file")
    try:
        yield
    except PermissionError as error:
        raise NotPermitted(f"{name} cannot be {done}: {error.strerror}; run as a user who may") from error
    except OSError as error:
        raise NotAvailable(f"{name} cannot be {done}: {error.strerror or error}") from error
