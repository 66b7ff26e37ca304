"""What this kernel can do, found out by doing it in a throw-away network namespace."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from sami_plugin import errors, privileged
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder
from sami_plugin.drivers.linux_conntrack.encode import Request, dump_request, requests
from sami_plugin.drivers.linux_conntrack.netlink import Connection
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, Template, ZoneRole
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.results import lost_fields

_LOCK = threading.Lock()
_FOUND: list[Features] = []


@dataclass(frozen=True, slots=True)
class Features:
    """Abilities that differ between kernels; None where it could not be tried."""

    filters_dump_by_zone: bool | None = None
    keeps_zones: bool | None = None
    keeps_marks: bool | None = None
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
        codes, _ = connection.ask(requests(Request.INSERT, batch, np.array([7, 8], np.uint16)))
        if codes.any():
            # Without zones the kernel refuses the attribute; there is no more to learn of zones then.
            return Features(filters_dump_by_zone=False, keeps_zones=False, optional=_optional(connection))
        came, found = 0, []
        for messages in connection.dump(dump_request(8)):
            came += len(messages)
            found += [part.batch for part in Decoder(zones).decode(messages) if isinstance(part, Decoded)]
        kept = Batch.joined(batch.template, [part.rows for part in found]).rows
        return Features(
            filters_dump_by_zone=came == 1,
            keeps_zones=bool((kept["zoneRole"] == ZoneRole.SNAT).any()),
            keeps_marks=bool(len(kept) and (kept["flowMark"] == 1).all()),
            optional=_optional(connection),
        )
    finally:
        connection.close()


def _optional(connection: Connection) -> frozenset[str]:
    """The templates that not every kernel carries of which this one keeps a flow as it was sent."""
    templates = [each for each in TEMPLATES.values() if each.is_translated or each.protocol in nl.OPTIONAL]
    for template in templates:
        connection.ask(requests(Request.INSERT, _flow(template), np.zeros(1, np.uint16)))
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
    return frozenset(name for name in kept if name.replace("-nat-", "-") not in missing)


def _lost(sent: Batch, kept: Batch) -> set[str]:
    """What of the flow is not as it was sent, but for what is tried elsewhere, or in the template without a NAT."""
    lost = int(lost_fields(sent, kept.rows)[0])
    tried = {"flowMark", *(field[0] for field in sent.template.protocol.state if sent.template.is_translated)}
    return {field[0] for position, field in enumerate(sent.template.state) if lost >> position & 1} - tried


def _flow(template: Template) -> Batch:
    """A flow of which no field is 0."""
    rows, protocol = template.empty(1), template.protocol
    identifiers = protocol.identifiers
    for number, name in enumerate(template.address_fields, 1):
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
