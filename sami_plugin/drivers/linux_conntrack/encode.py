"""ctnetlink requests from rows of flows, whole columns at a time.

A request is described once per template as a tree of attributes; of that come the octets that all messages have in
common and a numpy dtype that puts the fields at their places. Messages then cost one copy of the former per row and one
assignment per field and batch.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.netlink import GENERIC_OCTETS, HEADER, HEADER_OCTETS, Octets
from sami_plugin.model import protocols
from sami_plugin.model.flows import Batch, FlowStatus, Template

_NESTED = 0x8000


class Request(enum.Enum):
    """What is asked of the kernel about each flow."""

    INSERT = "insert"
    RENEW = "renew"
    CHECK_WINDOWS = "check windows"
    GET = "get"
    DELETE = "delete"
    DELETE_WITH_ID = "delete with id"


_KINDS = {
    # EXCL: without it an entry that is there is changed instead of refused.
    Request.INSERT: (nl.CT_NEW, nl.NLM_F_REQUEST | nl.NLM_F_CREATE | nl.NLM_F_EXCL),
    Request.RENEW: (nl.CT_NEW, nl.NLM_F_REQUEST),
    Request.CHECK_WINDOWS: (nl.CT_NEW, nl.NLM_F_REQUEST),
    Request.GET: (nl.CT_GET, nl.NLM_F_REQUEST),
    Request.DELETE: (nl.CT_DELETE, nl.NLM_F_REQUEST),
    Request.DELETE_WITH_ID: (nl.CT_DELETE, nl.NLM_F_REQUEST),
}


class Extra(enum.IntFlag):
    """What few flows have, and what a request to insert one tells only where it has it."""

    LABELS = 1
    HELPER = 2
    SYNPROXY = 4
    ADJUSTMENT = 8
    REPLYS_ADJUSTMENT = 16
    MASTER = 32
    """The highest: what is expected goes in behind what it may be expected for."""


def extras_of(batch: Batch) -> npt.NDArray[np.uint8]:
    """Per flow, what it has of `Extra`."""
    extras = np.zeros(len(batch), np.uint8)
    names = batch.rows.dtype.names or ()
    for extra, fields in _EXTRA_FIELDS.items():
        has = np.zeros(len(batch), bool)
        for name in fields:
            if name in names:
                column = batch.rows[name]
                has |= column.any(axis=1) if column.ndim > 1 else column != 0
        extras |= np.where(has, np.uint8(extra), np.uint8(0))
    return extras


_EXTRA_FIELDS: dict[Extra, tuple[str, ...]] = {
    Extra.LABELS: ("conntrackLabels",),
    Extra.HELPER: ("conntrackHelper",),
    Extra.SYNPROXY: nl.OF_SYNPROXY,
    Extra.ADJUSTMENT: nl.ADJUSTMENT,
    Extra.REPLYS_ADJUSTMENT: nl.REPLYS_ADJUSTMENT,
    Extra.MASTER: ("masterProtocolIdentifier",),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of request: the octets that all have in common, and where the fields go."""

    model: Octets
    dtype: np.dtype[np.void]


def requests(request: Request, batch: Batch, zones: npt.NDArray[np.uint16], extras: int = 0) -> Octets:
    """One message per row, shape (n, octets); `zones` has the conntrack zone of each row.

    Length and sequence number are left to the connection. INSERT takes flows, and so does CHECK_WINDOWS, with flags as
    they are to be; the others take identities as well; RENEW needs `remainingTimeoutSeconds`, DELETE_WITH_ID an id.
    The kernel has to have room for what tells the flows apart (MOST_GRE_KEY). `extras`, of INSERT, is what each of the
    flows has of `Extra`.
    """
    made = layout(request, batch.template, bool(zones.any()), extras)
    octets = np.empty((len(batch), len(made.model)), np.uint8)
    octets[:] = made.model
    fields = octets.view(made.dtype)[:, 0]
    rows, names = batch.rows, made.dtype.names or ()
    if "zone" in names:
        fields["zone"] = zones
    for name in names:
        if name in _ROW_FIELDS:
            fields[name] = rows[_ROW_FIELDS[name]]
    source, destination = rows[batch.source_field], rows[batch.destination_field]
    protocol = rows["protocolIdentifier"]
    for direction, ends in (("orig", (source, destination)), ("reply", (destination, source))):
        if f"{direction}.source" not in names:
            continue
        fields[f"{direction}.source"], fields[f"{direction}.destination"] = ends
        fields[f"{direction}.protocol"] = protocol
    of_protocol = batch.template.protocol
    identifiers = of_protocol.identifiers
    for part in nl.IDENTIFIERS[identifiers]:
        fields[f"orig.{part.name}"] = rows[part.field]
        if f"reply.{part.name}" not in names:
            continue
        answered = rows[identifiers.other(part.field)]
        fields[f"reply.{part.name}"] = of_protocol.inverse[answered] if part.field == identifiers.answered else answered
    if request is Request.INSERT:
        if batch.template.is_translated:
            _put_translation(fields, batch)
        # Bits that this kernel does not take at create; CONFIRMED it insists on.
        status = rows["conntrackStatus"] & np.uint32(nl.STATUS_TAKEN)
        if of_protocol is protocols.GRE:
            # Each entry of GRE has timeouts of its own, and only its own first packet sets them
            # (nf_conntrack_proto_gre.c). One that was made by ctnetlink has 0, and would end with the next packet.
            status = status | np.uint32(FlowStatus.FIXED_TIMEOUT)
        fields["status"] = status | np.uint32(FlowStatus.CONFIRMED)
        if "tcp_state" in names:
            fields["tcp_state"] = nl.STATE_TO_KERNEL[rows["tcpConnectionState"]]
            # Without sequence numbers the kernel takes every segment as out of window and stalls the connection,
            # unless it is told to be liberal in both directions.
            fields["flags"] = rows["tcpTrackingFlags"] | np.uint8(nl.FLAG_BE_LIBERAL)
            fields["reply_flags"] = rows["reverseTcpTrackingFlags"] | np.uint8(nl.FLAG_BE_LIBERAL)
        if "sctp_state" in names:
            fields["sctp_state"] = nl.SCTP_STATE_TO_KERNEL[rows["sctpAssociationState"]]
        if extras & Extra.MASTER:
            family = "IPv6" if batch.template.is_ipv6 else "IPv4"
            fields["master.protocol"] = rows["masterProtocolIdentifier"]
            for end in ("source", "destination"):
                fields[f"master.{end}"] = rows[f"master{end.capitalize()}{family}Address"]
                fields[f"master.{end}_port"] = rows[f"master{end.capitalize()}TransportPort"]
    if request is Request.CHECK_WINDOWS:
        for field, flags in (("unset", rows["tcpTrackingFlags"]), ("reply_unset", rows["reverseTcpTrackingFlags"])):
            fields[field][:, 1] = ~flags & np.uint8(nl.FLAG_BE_LIBERAL)
    return octets


def _put_translation(fields: npt.NDArray[np.void], batch: Batch) -> None:
    """What addresses and identifiers are behind the flow's NAT; they are the same where nothing is translated."""
    family, behind = "IPv6" if batch.template.is_ipv6 else "IPv4", batch.template.protocol.identifiers.behind
    for side in _OTHER_SIDE:
        fields[f"behind.{side}"] = batch.rows[f"postNAT{side.capitalize()}{family}Address"]
        for name in _of_side(batch.template, side):
            fields[f"behind.{side}.{name}"] = batch.rows[behind[name]]


_ROW_FIELDS = {
    "timeout": "remainingTimeoutSeconds",
    "mark": "flowMark",
    "id": "flowId",
    "scale": "tcpWindowScale",
    "reply_scale": "reverseTcpWindowScale",
    "tag": "sctpVerificationTag",
    "reply_tag": "reverseSctpVerificationTag",
    "helper": "conntrackHelper",
    "labels": "conntrackLabels",
    **{name: name for name in (*nl.ADJUSTMENT, *nl.REPLYS_ADJUSTMENT, *nl.OF_SYNPROXY)},
}


@functools.cache
def layout(request: Request, template: Template, has_zone: bool, extras: int = 0) -> Layout:
    """Where the fields of such requests go."""
    attributes: list[Any] = [(nl.TUPLE_ORIG, _tuple(template, "orig"), None)]
    if request is Request.INSERT:
        attributes.append((nl.TUPLE_REPLY, _tuple(template, "reply"), None))
        attributes += [(nl.STATUS, "status", ">u4"), (nl.TIMEOUT, "timeout", ">u4"), (nl.MARK, "mark", ">u4")]
        if template.is_translated:
            attributes += [
                (nl.NAT_SRC, _translation(template, "source"), None),
                (nl.NAT_DST, _translation(template, "destination"), None),
            ]
        if template.protocol in _PROTOINFO:
            attributes.append((nl.PROTOINFO, [_PROTOINFO[template.protocol]], None))
        attributes += [made for extra, made in _extras(template).items() if extras & extra]
    if request is Request.RENEW:
        attributes.append((nl.TIMEOUT, "timeout", ">u4"))
    if request is Request.CHECK_WINDOWS:
        attributes.append((nl.PROTOINFO, [(nl.PROTOINFO_TCP, _UNSET_FLAGS, None)], None))
    if request is Request.DELETE_WITH_ID:
        attributes.append((nl.ID, "id", ">u4"))
    # A kernel built without zones refuses the attribute, even for zone 0.
    if has_zone:
        attributes.append((nl.ZONE, "zone", ">u2"))
    return lay_out(*_KINDS[request], nl.AF_OF_FAMILY["ipv6" if template.is_ipv6 else "ipv4"], attributes)


def _extras(template: Template) -> dict[Extra, Any]:
    def numbers(fields: Sequence[str]) -> list[Any]:
        return [(number, name, ">u4") for number, name in enumerate(fields, 1)]

    return {
        # As two of the machine's own numbers.
        Extra.LABELS: (nl.LABELS, "labels", "2u8"),
        Extra.HELPER: (nl.HELP, [(nl.HELP_NAME, "helper", ">2u8")], None),
        Extra.SYNPROXY: (nl.SYNPROXY, numbers(nl.OF_SYNPROXY), None),
        Extra.ADJUSTMENT: (nl.SEQ_ADJUST_ORIG, numbers(nl.ADJUSTMENT), None),
        Extra.REPLYS_ADJUSTMENT: (nl.SEQ_ADJUST_REPLY, numbers(nl.REPLYS_ADJUSTMENT), None),
        Extra.MASTER: (nl.TUPLE_MASTER, tuple_of(template.is_ipv6, "master", ports_of("master")), None),
    }


def ports_of(tuple_: str) -> list[Any]:
    """The ports of a tuple of that name."""
    return [
        (nl.PROTO_SRC_PORT, f"{tuple_}.source_port", ">u2"),
        (nl.PROTO_DST_PORT, f"{tuple_}.destination_port", ">u2"),
    ]


def dump_request(zone: int | None) -> Octets:
    """Asks for all entries of both families; kernels that can, leave out other zones (0 means any to them)."""
    attributes: Sequence[Any] = [(nl.ZONE, "zone", ">u2")] if zone else []
    made = lay_out(nl.CT_GET, nl.NLM_F_REQUEST | nl.NLM_F_DUMP, 0, attributes)
    octets = made.model.copy()
    if zone:
        octets.view(made.dtype)["zone"] = zone
    return octets


def stats_request() -> Octets:
    """Asks for the number of entries and the limit of a namespace."""
    return lay_out(nl.CT_GET_STATS, nl.NLM_F_REQUEST, 0, []).model.copy()


_TCP: list[Any] = [
    (nl.TCP_STATE, "tcp_state", "u1"),
    (nl.TCP_WSCALE_ORIGINAL, "scale", "u1"),
    (nl.TCP_WSCALE_REPLY, "reply_scale", "u1"),
    (nl.TCP_FLAGS_ORIGINAL, "flags", "flags"),
    (nl.TCP_FLAGS_REPLY, "reply_flags", "flags"),
]


# Values, which are 0, and the mask of those that are set to them.
_UNSET_FLAGS: list[Any] = [(nl.TCP_FLAGS_ORIGINAL, "unset", "2u1"), (nl.TCP_FLAGS_REPLY, "reply_unset", "2u1")]
_SCTP: list[Any] = [
    (nl.SCTP_STATE, "sctp_state", "u1"),
    (nl.SCTP_TAG_ORIGINAL, "tag", ">u4"),
    (nl.SCTP_TAG_REPLY, "reply_tag", ">u4"),
]
_PROTOINFO: dict[protocols.Protocol, Any] = {
    protocols.TCP: (nl.PROTOINFO_TCP, _TCP, None),
    protocols.SCTP: (nl.PROTOINFO_SCTP, _SCTP, None),
}


_OTHER_SIDE = {"source": "destination", "destination": "source"}


def _translation(template: Template, side: str) -> list[Any]:
    number, form = (nl.NAT_V6_MIN, ">2u8") if template.is_ipv6 else (nl.NAT_V4_MIN, ">u4")
    made: list[Any] = [(number, f"behind.{side}", form)]
    if ranges := [(nl.NAT_PROTO_MIN, f"behind.{side}.{name}", ">u2") for name in _of_side(template, side)]:
        made.append((nl.NAT_PROTO, ranges, None))
    return made


def _of_side(template: Template, side: str) -> list[str]:
    """Which identifiers a NAT of this side may change; that of ICMP belongs to both."""
    return [name for name in template.protocol.identifiers.behind if not name.startswith(_OTHER_SIDE[side])]


def _tuple(template: Template, direction: str) -> list[Any]:
    parts = nl.IDENTIFIERS[template.protocol.identifiers]
    identifiers = [(part.number, f"{direction}.{part.name}", part.form) for part in parts]
    return tuple_of(template.is_ipv6, direction, identifiers)


def tuple_of(is_ipv6: bool, direction: str, identifiers: Sequence[Any]) -> list[Any]:
    """What is in a tuple: addresses, protocol, and what tells flows apart that have these."""
    if is_ipv6:
        source, destination, address = nl.IP_V6_SRC, nl.IP_V6_DST, ">2u8"
    else:
        source, destination, address = nl.IP_V4_SRC, nl.IP_V4_DST, ">u4"
    protocol: list[Any] = [(nl.PROTO_NUM, f"{direction}.protocol", "u1"), *identifiers]
    addresses = [(source, f"{direction}.source", address), (destination, f"{direction}.destination", address)]
    return [(nl.TUPLE_IP, addresses, None), (nl.TUPLE_PROTO, protocol, None)]


def lay_out(kind: int, flags: int, family: int, attributes: Sequence[Any]) -> Layout:
    """Messages of a type, with these attributes: each a number, the field's name and form, or what is nested in it."""
    names: list[str] = []
    formats: list[Any] = []
    offsets: list[int] = []

    def build(attributes: Sequence[Any], begin: int) -> bytes:
        made = bytearray()
        for number, content, form in attributes:
            at = begin + len(made)
            if form is None:
                payload, number = build(content, at + 4), number | _NESTED
            elif form == "flags":
                payload, form = bytes((0, nl.FLAGS_CARRIED)), "u1"
            else:
                payload = bytes(np.dtype(form).itemsize)
            if isinstance(content, str):
                names.append(content)
                formats.append(form)
                offsets.append(at + 4)
            size = 4 + len(payload)
            made += np.array([size, number], np.uint16).tobytes() + payload + bytes(-size % 4)
        return bytes(made)

    generic = bytes((family, 0, 0, 0))
    body = build(attributes, HEADER_OCTETS + GENERIC_OCTETS)
    header = np.zeros(1, HEADER)
    header["length"] = HEADER_OCTETS + len(generic) + len(body)
    header["type"], header["flags"] = kind, flags
    model = np.frombuffer(header.tobytes() + generic + body, np.uint8)
    dtype = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": len(model)})
    return Layout(model, dtype)
