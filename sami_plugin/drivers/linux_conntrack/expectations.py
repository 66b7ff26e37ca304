"""What helpers expect: flows that nobody has begun yet, and that are let in as related to their masters when they come.

There are few of them, so they are read and asked for one by one. The kernel does not tell in which zone one is; that is
found out by asking for it in each of a scope's zones.
"""

from __future__ import annotations

import enum
import errno
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin import errors
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.encode import Layout, lay_out, ports_of, tuple_of
from sami_plugin.drivers.linux_conntrack.netlink import (
    GENERIC_OCTETS,
    HEADER_OCTETS,
    Connection,
    Messages,
    Torn,
    attributes_of,
)
from sami_plugin.model import protocols
from sami_plugin.model.flows import TEMPLATES, Addresses, Batch, FirewallEvent, Omitted, Rows
from sami_plugin.model.scope import Scope

Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int32]

FUNCTIONS = ("", "nat-follow-master", "sip", "Q.931", "callforwarding")
"""By number: the symbols by which the kernel's modules call what is done with the flow when it comes."""
_READ_BY_HELPER = ("sip", "H.245", "Q.931", "RAS")
"""Helpers that read the flows that they expect. The kernel tells the master's helper, and not whether it is to."""
_MOST_DUMPS = 5
_MOST_DIRECTION = 2


class _Tells(enum.Flag):
    """What is in a request."""

    TUPLE = enum.auto()
    TIME = enum.auto()
    WHOLE = enum.auto()
    HELPER = enum.auto()
    NAT = enum.auto()
    ID = enum.auto()


_WHOLE = _Tells.TUPLE | _Tells.TIME | _Tells.WHOLE
"""The kernel wants all of it also where it changes but the time."""


@dataclass(slots=True)
class _Found:
    """Expectations for flows of some addresses, or of any."""

    addresses: Addresses | None
    rows: dict[str, list[Rows]] = field(default_factory=dict)
    """By template."""
    omitted: dict[str, int] = field(default_factory=dict)
    """By reason, those that no template holds."""

    @classmethod
    def of(cls, scope: Scope) -> _Found:
        """Those of a scope; one that is alone in its zone, and says no addresses, has whatever is there."""
        return cls(scope.addresses if scope.addresses or scope.is_shared else None)

    def batches(self) -> list[Batch]:
        return [Batch.joined(TEMPLATES[name], rows) for name, rows in self.rows.items()]

    def read(self, messages: Messages, role: int = 0) -> None:
        """Takes from messages what is expected for the addresses."""
        for start, length in zip(messages.starts.tolist(), messages.lengths.tolist(), strict=True):
            self._read(messages.octets[start : start + length].tobytes(), role)

    def _read(self, raw: bytes, role: int) -> None:
        told = attributes_of(raw[HEADER_OCTETS + GENERIC_OCTETS :])
        expected, master, mask = (
            _Tuple(told.get(number, b"")) for number in (nl.EXPECT_TUPLE, nl.EXPECT_MASTER, nl.EXPECT_MASK)
        )
        ends = {(len(octets), int.from_bytes(octets, "big")) for octets in master.addresses}
        own = self.addresses
        if own is not None and not ends & {(16 if one.version == 6 else 4, int(one)) for one in own}:
            return
        protocol = protocols.BY_NUMBER.get(expected.protocol)
        function = _text(told.get(nl.EXPECT_FUNCTION, b""))
        if protocol not in (protocols.TCP, protocols.UDP):
            reason = f"what a helper expects of protocol {protocols.name_of(expected.protocol)} is not carried"
            self.omitted[reason] = self.omitted.get(reason, 0) + 1
            return
        if function not in FUNCTIONS:
            reason = f"what a helper expects for {function} is not carried"
            self.omitted[reason] = self.omitted.get(reason, 0) + 1
            return
        is_ipv6 = len(expected.addresses[0]) == 16
        family = "IPv6" if is_ipv6 else "IPv4"
        template = TEMPLATES[f"{protocol.kind}-expectation-{family.lower()}"]
        rows = template.empty(1)
        rows["zoneRole"] = role
        for prefix, one in (("", expected), ("master", master)):
            values = {
                "protocolIdentifier": one.protocol,
                f"source{family}Address": _number(one.addresses[0]),
                f"destination{family}Address": _number(one.addresses[1]),
                "sourceTransportPort": one.ports[0],
                "destinationTransportPort": one.ports[1],
            }
            for name, value in values.items():
                rows[f"{prefix}{name[0].upper()}{name[1:]}" if prefix else name] = value
        rows["flowId"] = _u4(told.get(nl.EXPECT_ID))
        rows["remainingTimeoutSeconds"] = _u4(told.get(nl.EXPECT_TIMEOUT))
        helper = told.get(nl.EXPECT_HELPER, b"").partition(b"\0")[0]
        rows["conntrackHelper"] = np.frombuffer(helper.ljust(nl.HELPER_OCTETS, b"\0"), ">u8", 2)
        rows[f"expectationSource{family}Mask"] = _number(mask.addresses[0])
        rows["expectationSourceTransportPortMask"] = mask.ports[0]
        rows["expectationFlags"] = _u4(told.get(nl.EXPECT_FLAGS))
        rows["expectationClass"] = _u4(told.get(nl.EXPECT_CLASS))
        rows["expectationFunction"] = FUNCTIONS.index(function)
        if nl.EXPECT_NAT in told:
            nat = attributes_of(told[nl.EXPECT_NAT])
            behind = _Tuple(nat.get(nl.EXPECT_NAT_TUPLE, b""))
            rows["expectationNatDirection"] = 1 + _u4(nat.get(nl.EXPECT_NAT_DIRECTION))
            rows[f"expectationNat{family}Address"] = _number(behind.addresses[0])
            rows["expectationNatTransportPort"] = behind.ports[0]
        self.rows.setdefault(template.name, []).append(rows)


def exported(connection: Connection, scope: Scope) -> Iterator[Batch | Omitted]:
    """What is expected for flows of the scope's addresses in its zones.

    :raises DeviceFailed: the expectations changed under every dump.
    """
    everywhere = _Found.of(scope)
    _dump(connection, everywhere)
    for batch in everywhere.batches():
        for role in scope.zones:
            named = batch.identities
            named.rows["zoneRole"] = int(role)
            found, is_there = read_back(connection, scope, named.take(np.unique(named.rows, return_index=True)[1]))
            if is_there.any():
                yield found.take(is_there)
    yield from (Omitted(reason, count) for reason, count in everywhere.omitted.items())


def is_known(batch: Batch) -> Mask:
    """Which of them have a function and a NAT of which the numbers mean something here."""
    is_function: Mask = batch.rows["expectationFunction"] < len(FUNCTIONS)
    return is_function & (batch.rows["expectationNatDirection"] <= _MOST_DIRECTION)


def insert(connection: Connection, scope: Scope, batch: Batch) -> Codes:
    """Creates them, and gives each the time that is left of it; one that is there, that alone. An errno for each."""
    codes = _asked(connection, scope, batch, nl.EXP_NEW, _WHOLE, nl.NLM_F_CREATE | nl.NLM_F_EXCL)[0]
    is_there = np.flatnonzero((codes == 0) | (codes == errno.EEXIST))
    renewed = renew(connection, scope, batch.take(is_there))
    # Of what is there, what is another master's stays as it is.
    codes[is_there] = np.where(renewed == errno.ENOENT, errno.EEXIST, renewed)
    return codes


def renew(connection: Connection, scope: Scope, batch: Batch) -> Codes:
    """Sets the time that is left of those that are there, of the same master."""
    codes = np.full(len(batch), errno.ENOENT, np.int32)
    its = np.flatnonzero(read_back(connection, scope, batch)[1])
    codes[its] = _asked(connection, scope, batch.take(its), nl.EXP_NEW, _WHOLE)[0]
    return codes


def remove(connection: Connection, scope: Scope, identities: Batch) -> Codes:
    """Removes those that are there, of the same master and with the same id where one is named."""
    found, is_there = read_back(connection, scope, identities)
    wanted = identities.rows["flowId"]
    victims = np.flatnonzero(is_there & ((wanted == 0) | (wanted == found.rows["flowId"])))
    codes = np.full(len(identities), errno.ENOENT, np.int32)
    codes[victims] = _asked(connection, scope, found.take(victims), nl.EXP_DELETE, _Tells.TUPLE | _Tells.ID)[0]
    return codes


def read_back(connection: Connection, scope: Scope, batch: Batch) -> tuple[Batch, Mask]:
    """What the kernel holds of these, and which are there, of the same master."""
    template = TEMPLATES[batch.template.name.removesuffix("-identity")]
    rows, is_there = template.empty(len(batch)), np.zeros(len(batch), bool)
    key = [name for name, *_ in template.key]
    for messages, number in _asked(connection, scope, batch, nl.EXP_GET, _Tells.TUPLE)[1]:
        found = _Found.of(scope)
        found.read(messages, int(batch.rows["zoneRole"][number]))
        for one in found.rows.get(template.name, ()):
            if one[key] == batch.rows[key][number : number + 1]:
                rows[number], is_there[number] = one[0], True
    return Batch(template, rows), is_there


class ExpectationEvents:
    """Which expectations of a scope changed."""

    def __init__(
        self, connection: Connection, scope: Scope, lend: Callable[[], AbstractContextManager[Connection]]
    ) -> None:
        """Takes `connection` over; `lend` lends another one to ask with."""
        self._connection, self._scope, self._lend = connection, scope, lend
        connection.join(*nl.EXPECTATION_GROUPS)

    def collect(self) -> tuple[list[Batch], list[Batch], bool]:
        """Names of what is gone, what is there, and whether the kernel told all."""
        chunks, is_complete = self._connection.events()
        touched = _Found.of(self._scope)
        for messages in chunks:
            for role in self._scope.zones:  # which of them it is, is asked
                touched.read(messages, int(role))
        gone, there = [], []
        for batch in touched.batches():
            named = batch.identities
            named = named.take(np.unique(named.rows, return_index=True)[1])
            with self._lend() as asking:
                found, is_there = read_back(asking, self._scope, named)
            is_it = is_there & (found.rows["flowId"] == named.rows["flowId"])
            gone.append(named.take(~is_it))
            gone[-1].rows["firewallEvent"] = FirewallEvent.DELETED
            there.append(found.take(is_it))
        return [one for one in gone if len(one)], [one for one in there if len(one)], is_complete

    def close(self) -> None:
        """May be repeated."""
        self._connection.close()


def _asked(
    connection: Connection, scope: Scope, batch: Batch, kind: int, tells: _Tells, flags: int = 0
) -> tuple[Codes, list[tuple[Messages, int]]]:
    """An errno for each, and the answers, each with the number of the row that it belongs to."""
    codes = np.full(len(batch), errno.ENOENT, np.int32)
    answers: list[tuple[Messages, int]] = []
    for number, role in enumerate(batch.rows["zoneRole"].tolist()):
        if role in scope.zones:
            one = batch.take(np.array([number]))
            (codes[number],), entries = connection.ask(_request(kind, one, scope.zones[role], tells, flags)[None, :])
            answers += [(messages, number) for messages, _ in entries]
    return codes, answers


def _dump(connection: Connection, found: _Found) -> None:
    """All of the namespace that is expected for flows of these addresses; of which zone is not told."""
    request = lay_out(nl.EXP_GET, nl.NLM_F_REQUEST | nl.NLM_F_DUMP, 0, []).model.copy()
    for _ in range(_MOST_DUMPS):
        found.rows, found.omitted = {}, {}
        try:
            for messages in connection.dump(request, nl.EXP_NEW):
                found.read(messages)
        except Torn:
            continue
        return
    raise errors.DeviceFailed(f"the expectations changed under {_MOST_DUMPS} dumps, so none is complete")


# --- messages


def _request(kind: int, one: Batch, zone: int, tells: _Tells, flags: int = 0) -> npt.NDArray[np.uint8]:
    row, is_ipv6 = one.rows[0], one.template.is_ipv6
    family = "IPv6" if is_ipv6 else "IPv4"
    function = 0
    if _Tells.WHOLE in tells:
        function = int(row["expectationFunction"])
        if row["expectationNatDirection"]:
            tells |= _Tells.NAT
        if row["expectationClass"] or _text(row["conntrackHelper"].tobytes()).startswith(_READ_BY_HELPER):
            tells |= _Tells.HELPER
    made = _layout(kind, flags, is_ipv6, bool(zone), tells, function)
    octets = made.model.copy()
    fields = octets.view(made.dtype)
    for name in made.dtype.names or ():
        if name == "zone":
            fields[name] = zone
        elif name == "nat_direction":
            fields[name] = row["expectationNatDirection"] - 1
        elif name in _FIELDS:
            fields[name] = row[_FIELDS[name].format(family=family)]
    return octets


_FIELDS = {
    "tuple.source": "source{family}Address",
    "tuple.destination": "destination{family}Address",
    "tuple.protocol": "protocolIdentifier",
    "tuple.source_port": "sourceTransportPort",
    "tuple.destination_port": "destinationTransportPort",
    "master.source": "masterSource{family}Address",
    "master.destination": "masterDestination{family}Address",
    "master.protocol": "masterProtocolIdentifier",
    "master.source_port": "masterSourceTransportPort",
    "master.destination_port": "masterDestinationTransportPort",
    "mask.source": "expectationSource{family}Mask",
    "mask.source_port": "expectationSourceTransportPortMask",
    "mask.protocol": "protocolIdentifier",
    "timeout": "remainingTimeoutSeconds",
    "flags": "expectationFlags",
    "class": "expectationClass",
    "helper": "conntrackHelper",
    "id": "flowId",
    "nat.source": "expectationNat{family}Address",
    "nat.source_port": "expectationNatTransportPort",
    "nat.protocol": "protocolIdentifier",
}
"""By field of a request. Of a mask the kernel takes the source's part alone."""


@functools.cache
def _layout(kind: int, flags: int, is_ipv6: bool, has_zone: bool, tells: _Tells, function: int) -> Layout:
    def whole_tuple(name: str) -> list[Any]:
        return tuple_of(is_ipv6, name, ports_of(name))

    nat = [(nl.EXPECT_NAT_DIRECTION, "nat_direction", ">u4"), (nl.EXPECT_NAT_TUPLE, whole_tuple("nat"), None)]
    symbol = FUNCTIONS[function].encode() + b"\0"
    attributes: dict[_Tells, list[Any]] = {
        _Tells.TUPLE: [(nl.EXPECT_TUPLE, whole_tuple("tuple"), None)],
        _Tells.TIME: [(nl.EXPECT_TIMEOUT, "timeout", ">u4"), (nl.EXPECT_FLAGS, "flags", ">u4")],
        _Tells.WHOLE: [
            (nl.EXPECT_MASTER, whole_tuple("master"), None),
            (nl.EXPECT_MASK, whole_tuple("mask"), None),
            (nl.EXPECT_CLASS, "class", ">u4"),
        ],
        _Tells.HELPER: [(nl.EXPECT_HELPER, "helper", ">2u8")],
        _Tells.NAT: [(nl.EXPECT_NAT, nat, None)],
        _Tells.ID: [(nl.EXPECT_ID, "id", ">u4")],
    }
    chosen = [one for part, some in attributes.items() if part in tells for one in some]
    if function:
        chosen.append((nl.EXPECT_FUNCTION, "function", f"S{len(symbol)}"))
    if has_zone:
        chosen.append((nl.EXPECT_ZONE, "zone", ">u2"))
    made = lay_out(kind, nl.NLM_F_REQUEST | flags, nl.AF_OF_FAMILY["ipv6" if is_ipv6 else "ipv4"], chosen)
    if function:
        model = made.model.copy()
        model.view(made.dtype)["function"] = symbol
        made = Layout(model, made.dtype)
    return made


class _Tuple:
    """What is in an attribute that holds a tuple.

    :raises Malformed: it lacks something.
    """

    def __init__(self, raw: bytes) -> None:
        parts = attributes_of(raw)
        address, ends = attributes_of(parts.get(nl.TUPLE_IP, b"")), attributes_of(parts.get(nl.TUPLE_PROTO, b""))
        version = (nl.IP_V6_SRC, nl.IP_V6_DST) if nl.IP_V6_SRC in address else (nl.IP_V4_SRC, nl.IP_V4_DST)
        self.addresses: tuple[bytes, ...] = tuple(address.get(number, b"") for number in version)
        if {len(one) for one in self.addresses} not in ({4}, {16}):
            raise errors.Malformed("a tuple of an expectation lacks addresses", "attribute 1")
        self.protocol = int.from_bytes(ends.get(nl.PROTO_NUM, b""), "big")
        self.ports = tuple(int.from_bytes(ends.get(one, b""), "big") for one in (nl.PROTO_SRC_PORT, nl.PROTO_DST_PORT))


def _text(octets: bytes) -> str:
    return octets.partition(b"\0")[0].decode("ascii", "replace")


def _u4(octets: bytes | None) -> int:
    return int.from_bytes(octets or b"", "big") & 0xFFFF_FFFF


def _number(octets: bytes) -> int | tuple[int, int]:
    """As a row has it: of IPv6 two halves."""
    whole = int.from_bytes(octets, "big")
    return divmod(whole, 1 << 64) if len(octets) == 16 else whole
