"""What this kernel can do, found out by doing it in a throw-away network namespace."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from sami_plugin import errors, privileged
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder
from sami_plugin.drivers.linux_conntrack.encode import Request, dump_request, requests
from sami_plugin.drivers.linux_conntrack.netlink import Connection
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, ZoneRole

_LOCK = threading.Lock()
_FOUND: list[Features] = []


@dataclass(frozen=True, slots=True)
class Features:
    """Abilities that differ between kernels; None where it could not be tried."""

    filters_dump_by_zone: bool | None = None
    keeps_zones: bool | None = None
    keeps_marks: bool | None = None
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
    rows = TEMPLATES["udp-ipv4"].empty(2)
    rows["zoneRole"] = ZoneRole.PORT, ZoneRole.SNAT
    rows["protocolIdentifier"] = 17
    rows["sourceIPv4Address"], rows["destinationIPv4Address"] = 0xC0000201, 0xC0000202
    rows["sourceTransportPort"], rows["destinationTransportPort"] = 9, 9
    rows["conntrackStatus"] = FlowStatus.CONFIRMED
    rows["remainingTimeoutSeconds"], rows["flowMark"] = 60, 1
    zones = {ZoneRole.PORT: 7, ZoneRole.SNAT: 8}
    connection = privileged.in_new_namespace(lambda: Connection(None))
    try:
        batch = Batch(TEMPLATES["udp-ipv4"], rows)
        codes, _ = connection.ask(requests(Request.INSERT, batch, np.array([7, 8], np.uint16)))
        if codes.any():
            # Without zones the kernel refuses the attribute; there is no more to learn then.
            return Features(filters_dump_by_zone=False, keeps_zones=False)
        came, found = 0, []
        for messages in connection.dump(dump_request(8)):
            came += len(messages)
            found += [part.batch for part in Decoder(zones).decode(messages) if isinstance(part, Decoded)]
        kept = Batch.joined(batch.template, [part.rows for part in found]).rows
        return Features(
            filters_dump_by_zone=came == 1,
            keeps_zones=bool((kept["zoneRole"] == ZoneRole.SNAT).any()),
            keeps_marks=bool(len(kept) and (kept["flowMark"] == 1).all()),
        )
    finally:
        connection.close()
