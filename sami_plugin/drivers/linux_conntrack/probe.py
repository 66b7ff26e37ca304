"""What this kernel can do, found out by doing it in a throw-away network namespace."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sami_plugin import errors, privileged
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder
from sami_plugin.drivers.linux_conntrack.encode import Request, dump_request, extras_of, requests
from sami_plugin.drivers.linux_conntrack.netlink import Connection, Octets, failure
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, Template, ZoneRole, helper_octets
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.results import lost_fields
from sami_plugin.model.risk import FUNCTION_OF, FUNCTIONS, HELPERS, LABELS, MASTERS, functions_of

_SHORTAGES = (errno.ENOMEM, errno.ENOBUFS)
_LOCK = threading.Lock()
_FOUND: list[Features] = []


@dataclass(frozen=True, slots=True)
class Features:
    """Abilities that differ between kernels; None where it could not be tried."""

    filters_dump_by_zone: bool | None = None
    keeps_zones: bool | None = None
    functions: frozenset[str] = FUNCTIONS
    """What it keeps of `risk.FUNCTIONS`. Labels always are among them: they are kept where something in the namespace
    sets them, and a namespace of ours cannot tell."""
    optional: frozenset[str] | None = None
    """Templates of protocols that not every kernel tracks (`attributes.OPTIONAL`) and this one does, and of those with
    a NAT that it makes."""
    why_unknown: str = ""


def features() -> Features:
    """What the kernel can do. Tried once per process, and again as long as it could not be tried."""
    with _LOCK:
        if _FOUND:
            return _FOUND[0]
        try:
            _FOUND.append(_try())
        except errors.SamiError as error:
            return Features(why_unknown=str(error))
        return _FOUND[0]


def _try() -> Features:
    zones = {ZoneRole.PORT: 7, ZoneRole.SNAT: 8}
    rows = Batch.joined(TEMPLATES["udp-ipv4"], [_flow(TEMPLATES["udp-ipv4"]).rows] * 2).rows
    rows["zoneRole"] = ZoneRole.PORT, ZoneRole.SNAT
    connection = privileged.in_new_namespace(lambda: Connection(None))
    try:
        batch = Batch(TEMPLATES["udp-ipv4"], rows)
        codes = _tried(connection, requests(Request.INSERT, batch, np.array([7, 8], np.uint16)))
        if codes.any():
            # Without zones the kernel refuses the attribute; there is no more to learn of zones then.
            return Features(
                filters_dump_by_zone=False,
                keeps_zones=False,
                functions=_functions(connection),
                optional=_optional(connection),
            )
        came, found = 0, []
        for messages in connection.dump(dump_request(8)):
            came += len(messages)
            found += [part.batch for part in Decoder(zones).decode(messages) if isinstance(part, Decoded)]
        kept = Batch.joined(batch.template, [part.rows for part in found]).rows
        return Features(
            filters_dump_by_zone=came == 1,
            keeps_zones=bool((kept["zoneRole"] == ZoneRole.SNAT).any()),
            functions=_functions(connection),
            optional=_optional(connection),
        )
    finally:
        connection.close()


def _functions(connection: Connection) -> frozenset[str]:
    """What the kernel keeps of flows each of which needs one function, all of them in zone 0."""
    master, template = _flow(TEMPLATES["tcp-ipv4"]), TEMPLATES["tcp-extended-ipv4"]
    tried = sorted(FUNCTIONS - {LABELS})
    sent = Batch.joined(template, [_flow(template).rows] * len(tried))
    sent.rows["flowMark"] = 0
    sent.rows["sourceTransportPort"] += np.arange(1, 1 + len(sent), dtype=np.uint16)
    _tried(connection, requests(Request.INSERT, master, np.zeros(1, np.uint16)))
    for position, function in enumerate(tried):
        one = Batch(template, sent.rows[position : position + 1])
        for name in (name for name, needs in FUNCTION_OF.items() if needs == function):
            one.rows[name] = helper_octets("ftp") if function == HELPERS else 1
        if function == MASTERS:
            for name in master.template.dtype.names or ():
                field = f"master{name[0].upper()}{name[1:]}"
                if field in (template.dtype.names or ()):
                    one.rows[field] = master.rows[name]
        _tried(connection, requests(Request.INSERT, one, np.zeros(1, np.uint16), int(extras_of(one)[0])))
    kept = {LABELS}
    decoder = Decoder({ZoneRole.PORT: 0})
    for messages in connection.dump(dump_request(None)):
        for part in decoder.decode(messages):
            if isinstance(part, Decoded) and part.batch.template in (template, master.template):
                at = KeyIndex(sent).find(part.batch)
                for number in np.flatnonzero(at >= 0):
                    kept |= functions_of(part.batch.take(np.array([number]))) & {tried[int(at[number])]}
    return frozenset(kept)


def _optional(connection: Connection) -> frozenset[str]:
    """The templates that not every kernel carries of which this one keeps a flow as it was sent."""
    templates = [
        each
        for each in TEMPLATES.values()
        if each.is_flow and (each.is_translated or each.protocol in nl.OPTIONAL) and not each.is_extended
    ]
    for template in templates:
        _tried(connection, requests(Request.INSERT, _flow(template), np.zeros(1, np.uint16)))
    kept = set()
    decoder = Decoder({ZoneRole.PORT: 0})
    for messages in connection.dump(dump_request(None)):
        for part in decoder.decode(messages):
            if isinstance(part, Decoded) and part.batch.template in templates:
                sent = _flow(part.batch.template)
                at = KeyIndex(part.batch).find(sent)
                if at[0] >= 0 and not _lost(sent, part.batch.take(at)):
                    kept.add(part.batch.template.name)
    missing = {each.name for each in templates if each.name not in kept}
    return frozenset(name for name in kept if TEMPLATES[name].plain.name not in missing)


def _tried(connection: Connection, octets: Octets) -> npt.NDArray[np.int32]:
    """What the kernel answers to each.

    :raises DeviceFailed: it lacks something now that it may have later, and what it can is not known by that.
    """
    codes, _ = connection.ask(octets)
    lacking = codes[np.isin(codes, _SHORTAGES)]
    if len(lacking):
        raise failure(int(lacking[0]), "flow that is tried")
    return codes


def _lost(sent: Batch, kept: Batch) -> set[str]:
    """What of the flow is not as it was sent, but for what is tried elsewhere, or in the template without a NAT."""
    lost = int(lost_fields(sent, kept.rows)[0])
    tried = {"flowMark", *(field[0] for field in sent.template.protocol.state if sent.template.is_translated)}
    return {field[0] for position, field in enumerate(sent.template.state) if lost >> position & 1} - tried


def _flow(template: Template) -> Batch:
    """A flow of which no field is 0."""
    rows, protocol = template.empty(1), template.protocol
    identifiers = protocol.identifiers
    for number, name in enumerate(template.end_fields, 1):
        rows[name] = (0x20010DB8 << 32, number) if template.is_ipv6 else 0xC0000200 + number
    for number, field in enumerate(protocol.state, 9):
        rows[field[0]] = number
    # With a NAT its first packet is no plain flow's.
    first, behind = (29, identifiers.behind) if template.is_translated else (9, {})
    for number, name in enumerate((*identifiers.names, *behind.values()), first):
        rows[name] = number
    if identifiers.answered is not None:
        rows[identifiers.answered] = protocol.answers[0][0]
    if protocol.states is not None:
        rows[protocol.state_field] = protocol.states["ESTABLISHED"]
    rows["zoneRole"], rows["protocolIdentifier"] = ZoneRole.PORT, protocol.number
    rows["conntrackStatus"] = FlowStatus.CONFIRMED
    rows["remainingTimeoutSeconds"], rows["flowMark"] = 60, 1
    return Batch(template, rows)
