"""Kinds of state that are none of flows: drivers bring them with them.

A package names what its driver brings in the entry points of the namespace ``sami.kinds``::

    nft_sets = sami_plugin.drivers.nft_sets.kinds:KINDS

From then on records of these kinds go the whole way that flows go: they are offered and admitted by their names,
journaled, put in, read back, discarded and purged by their keys, and told in the report by their words. Host and
hypervisor, messages and decisions know nothing of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sami_plugin.errors import ConfigurationError
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import TEMPLATES, Template
from sami_plugin.model.information_elements import DataType, InformationElement
from sami_plugin.model.protocols import Field

NEVER_SECONDS = 0xFFFF_FFFF
"""As `remainingTimeoutSeconds`: it has no end."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_FIRST_OF_KEY: Field = ("zoneRole", "u1")
_FIRST_OF_STATE: tuple[Field, ...] = (("flowId", ">u4"), ("remainingTimeoutSeconds", ">u4"))


@dataclass(frozen=True, slots=True)
class Kinds:
    """What a driver brings: templates with `ends`, and the elements of their fields that SAMI does not know.

    A key begins with ``zoneRole`` and has an address of the guest's port, the first of the `ends`; a state begins with
    ``flowId`` and ``remainingTimeoutSeconds``. A vendor's elements have `Origin.VENDOR`, and its enterprise number as
    their `vendor`.
    """

    templates: tuple[Template, ...]
    elements: tuple[InformationElement, ...] = ()


def bring(kinds: Kinds) -> None:
    """Makes the kinds known, all of them or none. May be repeated.

    :raises ConfigurationError: one is not as it has to be, or cannot be told from another one; says which and why.
    """
    own = {element.name: element for element in kinds.elements}
    new = [template for template in kinds.templates if TEMPLATES.get(template.name) != template]
    known = {frozenset(one.dtype.names or ()): one.name for template in TEMPLATES.values() for one in _both(template)}
    for template in new:
        for complaint in _complaints(template, own, known):
            raise ConfigurationError(f"the kind {template.name} {complaint}")
        known |= {frozenset(one.dtype.names or ()): one.name for one in _both(template)}
    elements.bring(kinds.elements)
    TEMPLATES.update({template.name: template for template in new})


def _both(template: Template) -> tuple[Template, Template]:
    return template, template.identity


def _complaints(
    template: Template, own: dict[str, InformationElement], known: dict[frozenset[str], str]
) -> Iterator[str]:
    if template.name in TEMPLATES or not _NAME.fullmatch(template.name):
        yield "has the name of another one, or one that is none: words of small letters with - between them"
    if not template.ends or any(end not in [one[0] for one in template.key] for end in template.ends):
        yield "needs ends, each a field of its key"
    if not template.varies <= {one[0] for one in template.state}:
        yield f"has no fields {', '.join(sorted(template.varies))} in its state that could vary"
    if template.key[:1] != (_FIRST_OF_KEY,) or template.state[:2] != _FIRST_OF_STATE:
        yield f"needs {_FIRST_OF_KEY} first in its key, and {_FIRST_OF_STATE} first in its state"
    for name, *form in template.key + template.state:
        element = own.get(name) or elements.ELEMENTS.get(name)
        dtype = template.dtype[name]
        if element is None:
            yield f"has a field {name} that is no information element; bring one"
        elif not (dtype.itemsize == element.octets or (element.may_be_reduced and dtype.itemsize < element.octets)):
            yield f"gives {name} {dtype.itemsize} octets, and {element.data_type.label} has {element.octets}"
        elif dtype.base.kind != "u" or dtype.base != dtype.base.newbyteorder(">"):
            yield f"has a field {name} of type {form[0]}; take big-endian unsigned numbers, or several of them"
        elif name in template.ends and element.data_type not in (DataType.IPV4_ADDRESS, DataType.IPV6_ADDRESS):
            yield f"has an end {name} that is no address"
    for one in _both(template):
        fields = frozenset(one.dtype.names or ())
        if fields in known:
            yield f"has the fields of {known[fields]}, so that no reader could tell them apart"
    try:
        template.words.format_map(dict.fromkeys(np.dtype(list(template.key)).names or (), 0))
    except (KeyError, ValueError, IndexError) as error:
        yield f"has words that are no format of its key's fields: {error}"
