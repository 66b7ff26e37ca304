"""Writes the reference page of the information elements: ``python -m tools.element_reference``.

A test compares the page with what this makes, so the two do not drift apart.
"""

import pathlib
from collections.abc import Iterator

from sami_plugin.drivers.loader import load_kinds
from sami_plugin.model.flows import TEMPLATES
from sami_plugin.model.information_elements import (
    CRITICAL,
    ELEMENTS,
    EXAMPLE_ENTERPRISE,
    REVERSE_ENTERPRISE,
    REVERSED,
    InformationElement,
    Origin,
    Units,
)

load_kinds()

PAGE = pathlib.Path(__file__).parents[1] / "doc" / "source" / "reference" / "information-elements.rst"

_HEAD = f"""\
.. This page is made by "python -m tools.element_reference"; a test fails when it is not current.

====================
Information elements
====================

SAMI writes flows as IPFIX records (:rfc:`7011`). The elements are IANA's (:rfc:`7012`) where IANA has one, elements of
the reverse direction follow :rfc:`5103`, and the rest stand under an enterprise number of our own. Until one is
assigned that is {EXAMPLE_ENTERPRISE}, the number that :rfc:`5612` keeps for documentation; both hosts have to use the
same. A file describes our elements to other readers (:rfc:`5610`).

The number of an element of ours
================================

.. list-table::
   :header-rows: 1

   * - Bits
     - Meaning
   * - ``0x{REVERSED:04x}``
     - The element of the reverse direction, by the convention of :rfc:`5103` section 6.2 that other tools know.
       (Elements of IANA are reversed by the enterprise number {REVERSE_ENTERPRISE} instead.)
   * - ``0x{CRITICAL:04x}``
     - Critical. A reader that does not know the element refuses the records of the template and names the element.
       Without this bit it skips the element and reports that it did.
   * - ``0x1fff``
     - The number.

Elements
========

*Octets* are what SAMI writes. It reads unsigned values of any other length that the data type allows, too.

"""


def page() -> str:
    """The page as reStructuredText."""
    return _HEAD + "\n".join((*_elements(), "", *_templates(), ""))


def _elements() -> Iterator[str]:
    yield from _table_head("Name", "Number", "Data type", "Octets", "Units", "Meaning")
    for element in sorted(ELEMENTS.values(), key=lambda each: (each.origin.value, each.number)):
        units = "" if element.units is Units.NONE else element.units.name.lower()
        cells = (
            f"``{element.name}``",
            _number(element),
            f"{element.data_type.label}, {element.semantics.name.lower()}",
            str(_octets(element)),
            units,
            element.description,
        )
        yield from _row(cells)


def _number(element: InformationElement) -> str:
    match element.origin:
        case Origin.IANA:
            return f"IANA {element.number}"
        case Origin.IANA_REVERSE:
            return f"{REVERSE_ENTERPRISE}/{element.number}"
        case Origin.SAMI:
            return f"SAMI {element.number} (``0x{element.number:04x}``)"


def _octets(element: InformationElement) -> int:
    dtypes = [each.dtype for template in TEMPLATES.values() for each in (template, template.identity)]
    return next(dtype[element.name].itemsize for dtype in dtypes if element.name in (dtype.names or ()))


def _templates() -> Iterator[str]:
    yield from ("Templates", "=========", "")
    yield (
        "A record is one flow, or the name of one: its key, the ``flowId`` and a ``firewallEvent``. "
        "A template's number has\nno meaning; a reader goes by the fields."
    )
    yield ""
    yield from _table_head("Template", "Octets of a record", "Key", "State")
    for template in TEMPLATES.values():
        key, state = (", ".join(f"``{each[0]}``" for each in fields) for fields in (template.key, template.state))
        yield from _row((template.name, str(template.dtype.itemsize), key, state))


def _table_head(*cells: str) -> Iterator[str]:
    yield from (".. list-table::", "   :header-rows: 1", "")
    yield from _row(cells)


def _row(cells: tuple[str, ...]) -> Iterator[str]:
    for position, cell in enumerate(cells):
        yield f"   {'*' if position == 0 else ' '} - {cell}".rstrip()


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
