"""Flows for people: columns become text only for the rows that are shown."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sami_plugin.cli.wording import Absent
from sami_plugin.model.flows import Batch, FlowStatus, ZoneRole, said
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.printable import printable
from sami_plugin.model.protocols import PORTS, name_of

COLUMNS = ("Protocol", "Source", "Destination", "State", "Timeout", "Status", "Mark", "Zone role", "Detail")


def rows(batches: Iterable[Batch], limit: int | None) -> Iterator[tuple[Any, ...]]:
    """One row per flow, as many as `limit` (None: all). The timeout is in seconds."""
    left = limit
    for batch in batches:
        shown = batch.rows if left is None else batch.rows[:left]
        for row in shown:
            yield _row(batch, row)
        if left is not None:
            left -= len(shown)


def _row(batch: Batch, row: np.void) -> tuple[Any, ...]:
    if not batch.template.is_flow:
        seconds = int(row["remainingTimeoutSeconds"])
        left = Absent(None) if seconds == NEVER_SECONDS else seconds
        key = said(batch.template, row).removeprefix(batch.template.name).strip()
        return batch.template.name, "", "", "", left, "", Absent(None), _name(ZoneRole, row["zoneRole"]), key
    fields = row.dtype.names or ()
    family = "IPv6" if batch.template.is_ipv6 else "IPv4"
    protocol = batch.template.protocol
    has_ports = protocol.identifiers is PORTS
    details = [protocol.identifiers.said(row)]
    if batch.template.is_translated:
        behind = "translated to " + " > ".join(
            _end(row[f"postNAT{end}{family}Address"], row[f"postNAPT{end}TransportPort"] if has_ports else None)
            for end in ("Source", "Destination")
        )
        if "postNATIcmpIdentifier" in fields:
            behind += f" id {row['postNATIcmpIdentifier']}"
        details.append(behind)
    if batch.template.is_extended or batch.template.is_expectation:
        details += _what_few_have(row, family)
    state = "EXPECTED" if batch.template.is_expectation else ""
    if protocol.states is not None and protocol.state_field in fields:
        state = _name(protocol.states, row[protocol.state_field])
    return (
        name_of(int(row["protocolIdentifier"])),
        _end(row[batch.source_field], row["sourceTransportPort"] if has_ports else None),
        _end(row[batch.destination_field], row["destinationTransportPort"] if has_ports else None),
        state,
        int(row["remainingTimeoutSeconds"]),
        _bits(int(row["conntrackStatus"])),
        int(row["flowMark"]),
        _name(ZoneRole, row["zoneRole"]),
        ", ".join(one for one in details if one),
    )


def _what_few_have(row: np.void, family: str) -> Iterator[str]:
    if row["conntrackHelper"].any():
        yield f"helper {printable(row['conntrackHelper'].tobytes().rstrip(bytes(1)).decode('latin-1'), 16)}"
    if row["masterProtocolIdentifier"]:
        ends = (_end(row[f"master{end}{family}Address"], row[f"master{end}TransportPort"]) for end in _ENDS)
        yield f"expected by {name_of(int(row['masterProtocolIdentifier']))} {' > '.join(ends)}"
    fields = row.dtype.names or ()
    if "conntrackLabels" in fields and row["conntrackLabels"].any():
        first, second = row["conntrackLabels"].tolist()
        labels = (str(number) for number in range(128) if (second << 64 | first) >> number & 1)
        yield f"labels {' '.join(labels)}"
    if any(row[name] for name in fields if "Offset" in name):
        yield "sequence numbers adjusted"
    if "octetTotalCount" in fields:
        yield from _accounted(row)


def _accounted(row: np.void) -> Iterator[str]:
    for way, packets, octets in (
        ("sent", row["packetTotalCount"], row["octetTotalCount"]),
        ("answered", row["reversePacketTotalCount"], row["reverseOctetTotalCount"]),
    ):
        if packets or octets:
            yield f"{way} {packets} packets of {octets} octets"
    if 0 < row["flowStartMilliseconds"] < _MOST_MILLISECONDS:
        yield f"began {row['flowStartMilliseconds'].astype('datetime64[ms]')}Z"


_MOST_MILLISECONDS = 1 << 63
_ENDS = ("Source", "Destination")


def _end(value: Any, port: Any) -> str:
    if np.ndim(value):
        address = str(ipaddress.IPv6Address(int(value[0]) << 64 | int(value[1])))
        return address if port is None else f"[{address}]:{port}"
    address = str(ipaddress.IPv4Address(int(value)))
    return address if port is None else f"{address}:{port}"


def _name(kind: type[enum.IntEnum], value: Any) -> str:
    try:
        return kind(int(value)).name
    except ValueError:
        return str(int(value))


def _bits(value: int) -> str:
    names = [bit.name or "" for bit in FlowStatus if value & bit]
    unknown = value & ~sum(FlowStatus)
    return ",".join(names + ([hex(unknown)] if unknown else []))
