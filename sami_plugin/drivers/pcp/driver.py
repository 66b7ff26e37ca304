"""The mappings of a PCP server as a SAMI driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import netaddr
import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Capabilities, FlowDriver, Watch
from sami_plugin.drivers.pcp import leases
from sami_plugin.drivers.pcp.kinds import IPV4, IPV6
from sami_plugin.drivers.pcp.leases import Lease
from sami_plugin.drivers.pcp.messages import External, Internal, ResultCode, Server
from sami_plugin.errors import DeviceFailed, NotPermitted, UndeclaredAbility
from sami_plugin.model.flows import Batch, Omitted, Template, has_end_in
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.results import Outcome, Reason, Results, results
from sami_plugin.model.scope import Scope

_TEMPLATES = {4: IPV4, 6: IPV6}
_NAMES = frozenset(template.name for template in _TEMPLATES.values())
_REASONS: dict[int, Reason] = {
    ResultCode.NOT_AUTHORIZED: Reason.NOT_AUTHORIZED,
    ResultCode.NO_RESOURCES: Reason.DEVICE_FULL,
    ResultCode.UNSUPP_PROTOCOL: Reason.NOT_SUPPORTED,
    ResultCode.USER_EX_QUOTA: Reason.DEVICE_FULL,
    ResultCode.CANNOT_PROVIDE_EXTERNAL: Reason.TRANSLATION_TAKEN,
}
_PROTOCOLS = (6, 17)
"""miniupnpd 2.3.1 makes of a mapping of any other protocol a rule for all of that protocol's packets."""
_MOST_TRIES = 3
MOST_MAPPINGS = 256
"""Of one guest and family: each costs messages, and it is the guest who says how many there are."""
_NAMESPACE = "{namespace}"
"""In the path of a lease file: each network namespace has a server of its own, and the agent's own may have none."""


class PcpDriver(FlowDriver):
    """Exports, inserts and removes the mappings that the guest made by PCP, as a third party that keeps its nonces.

    The server is asked from the network namespace of the scope. Each mapping costs an exchange of messages, for PCP has
    no other way: a guest may have MOST_MAPPINGS.
    """

    def __init__(self, server: str = "127.0.0.1", lease_files: Sequence[str] = (), device: str | None = None) -> None:
        """``{namespace}`` in a lease file's path stands for the last part of that of the scope's network namespace.

        `device` is the server's name where it serves several hosts, the same on each of them.
        """
        self._address, self._files, self._shared_device = server, tuple(lease_files), device
        self._servers: dict[str | None, Server] = {}
        self._known: dict[str | None, tuple[leases.Signature, _Held]] = {}
        """By network namespace, what was read of it last, of files that were so."""
        self._lock = threading.Lock()

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        namespace = scope.namespace if scope is not None else None
        notes = []
        is_here = scope is not None or not any(_NAMESPACE in path for path in self._files)
        if self._files and is_here and not self._server(namespace).serves_third_parties():
            raise NotPermitted(
                f"the PCP server at {self._address} takes no mappings for others (THIRD_PARTY); miniupnpd does with "
                "pcp_allow_thirdparty=yes"
            )
        if not self._files:
            notes.append(
                "PCP lists no mappings: name the server's lease files in [pcp] lease_files, or they stay behind"
            )
        kinds = _NAMES if self._files or self._shared_device else frozenset()
        return Capabilities(
            templates=kinds,
            can_watch=False,
            capacity=None,
            in_use=0,
            device=self._shared_device or f"PCP server {self._address} of {namespace or 'the agent'}",
            functions=frozenset(),
            notes=tuple(notes),
            shared=dict.fromkeys(kinds, self._shared_device) if self._shared_device else {},
        )

    def watch(self, scope: Scope) -> Watch:
        raise UndeclaredAbility("a PCP server tells no changes")

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        if not self._files or not scope.zones:
            return
        held = self._held(scope)
        own = [lease for lease in held.leases if lease.internal.address in scope.addresses]
        if others := sum(lease.nonce is None for lease in own):
            yield Omitted("mappings that were not made by PCP, but by UPnP or NAT-PMP", others)
        if held.unknown:
            yield Omitted("lines of lease files of other protocols than TCP and UDP, whosever they are", held.unknown)
        mapped = [lease for lease in own if lease.nonce is not None]
        chosen = [lease for lease in mapped if held.of(lease.internal) == lease]
        if further := len(mapped) - len(chosen):
            yield Omitted("further mappings of ports that have one already", further)
        for version, template in _TEMPLATES.items():
            its = [one for one in chosen if one.internal.address.version == version]
            if len(its) > MOST_MAPPINGS:
                yield Omitted(f"mappings of a guest that has more than {MOST_MAPPINGS}", len(its) - MOST_MAPPINGS)
            if its:
                yield self._rows(scope, template, its[:MOST_MAPPINGS], held)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = self._refusals(scope, batch)
        wanted = np.flatnonzero(made["outcome"] == Outcome.IMPORTED).tolist()
        if not wanted:
            return made
        server, held = self._server(scope.namespace), self._held(scope)
        outer = None if batch.template.is_ipv6 else server.external_address()
        version = 6 if batch.template.is_ipv6 else 4
        own = [one for one in held.leases if one.internal.address in scope.addresses]
        room = MOST_MAPPINGS - sum(one.internal.address.version == version for one in own)
        for position in wanted:
            row = batch.rows[position]
            room -= held.of(_internal(batch.template, row)) is None
            reason = _put(server, batch.template, row, outer, held) if room >= 0 else Reason.DEVICE_FULL
            if reason:
                made[position] = (Outcome.REFUSED, reason, 0)
        # Of what its files do not tell nobody would ever know again: it is given back now.
        told = self._held(scope)
        for position in np.flatnonzero(made["outcome"] == Outcome.IMPORTED).tolist():
            row = batch.rows[position]
            internal = _internal(batch.template, row)
            if told.of(internal) is None:
                server.unmap(internal, row["pcpMappingNonce"].tobytes())
                made[position] = (Outcome.REFUSED, Reason.VANISHED, 0)
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        """Asks once more for what is there and has less than half of the time that it is to have."""
        made = results(len(batch), Outcome.ABSENT)
        found, is_there = self.read_back(scope, batch)
        made["outcome"][is_there] = Outcome.PRESENT
        wanted = batch.rows["remainingTimeoutSeconds"].copy()
        is_short = is_there & (found.rows["remainingTimeoutSeconds"] < wanted // 2 + 1)
        found.rows["remainingTimeoutSeconds"] = wanted
        made[is_short] = self.insert(scope, found.take(is_short))
        return made

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        rows, is_there = batch.template.empty(len(batch)), np.zeros(len(batch), bool)
        if batch.template.name in _NAMES and self._files and len(batch):
            held, is_own = self._held(scope), scope.owns(batch)
            found = {
                position: lease
                for position, row in enumerate(batch.rows)
                if is_own[position] and (lease := held.of(_internal(batch.template, row))) and lease.nonce is not None
            }
            if found:
                is_there[list(found)] = True
                rows[list(found)] = self._rows(scope, batch.template, list(found.values()), held).rows
        return Batch(batch.template, rows), is_there

    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = results(len(identities), Outcome.ABSENT)
        template = next((one for one in _TEMPLATES.values() if one.key == identities.template.key), None)
        if template is None or not self._files or not len(identities):
            return made
        server, held = self._server(scope.namespace), self._held(scope)
        refused: dict[int, int] = {}
        for position in np.flatnonzero(scope.owns(identities)).tolist():
            for lease in held.all_of(_internal(template, identities.rows[position])):
                result = _given_back(server, lease)
                if result == ResultCode.SUCCESS:
                    made["outcome"][position] = Outcome.REMOVED
                else:
                    refused[position] = result
        if refused:  # unless it has ended meanwhile
            left = self._held(scope)
            for position, result in refused.items():
                if left.of(_internal(template, identities.rows[position])) is not None:
                    made[position] = (Outcome.REFUSED, _reason(result), 0)
        return made

    def _refusals(self, scope: Scope, batch: Batch) -> Results:
        if batch.template.name not in _NAMES or not self._files:
            return results(len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        made = results(len(batch))
        rows = batch.rows
        is_known = np.isin(rows["protocolIdentifier"], _PROTOCOLS)
        is_sound = (rows["sourceTransportPort"] != 0) & (rows["postNAPTSourceTransportPort"] != 0)
        for reason, which in (
            (Reason.FOREIGN_ADDRESS, ~has_end_in(batch, scope.addresses)),
            (Reason.NOT_SUPPORTED, ~is_known),
            (Reason.EXPIRED, rows["remainingTimeoutSeconds"] == 0),
            (Reason.INVALID, ~(is_sound & scope.has_zone_of(batch))),
        ):
            made["outcome"][which], made["reason"][which] = Outcome.REFUSED, reason
        return made

    def _held(self, scope: Scope) -> _Held:
        """What the server has now. Nothing is asked of it while its files are as they were.

        While it answers, it changes nothing: what a line that is just being written anew lacks in the files that are
        read before its answer, those have that are read after it, or the other way round. A server that starts reads
        its own files before it answers, and its epoch time tells.
        """
        server, paths = self._server(scope.namespace), self._paths(scope)
        seen = leases.signature(paths)
        if (known := self._known.get(scope.namespace)) is not None and known[0] == seen:
            return known[1].now()
        for _ in range(_MOST_TRIES):
            server.announce()
            before = leases.signature(paths)
            first, _ = leases.read(paths)
            epoch, has_begun_anew = server.announce()
            second, unknown = leases.read(paths)
            if not has_begun_anew:
                # Of one that was renewed in between, as it is now.
                found = {(one.internal, one.external_port): one for one in (*first, *second)}
                held = _Held(tuple(found.values()), unknown, epoch)
                if before == leases.signature(paths):
                    self._known[scope.namespace] = before, held
                return held.now()
        raise DeviceFailed(f"the PCP server at {self._address} begins anew faster than what it has can be read")

    def _paths(self, scope: Scope) -> list[str]:
        name = (scope.namespace or "").rpartition("/")[2]
        return [path.replace(_NAMESPACE, name) for path in self._files]

    def _server(self, namespace: str | None) -> Server:
        with self._lock:
            return self._servers.setdefault(namespace, Server(self._address, namespace))

    def _rows(self, scope: Scope, template: Template, chosen: list[Lease], held: _Held) -> Batch:
        rows = template.empty(len(chosen))
        now = time.time()
        family = "IPv6" if template.is_ipv6 else "IPv4"
        outer = None if template.is_ipv6 else self._server(scope.namespace).external_address()
        rows["zoneRole"], rows["pcpEpochTime"] = int(min(scope.zones, default=0)), held.epoch
        for row, lease in zip(rows, chosen, strict=True):
            row["protocolIdentifier"], row["sourceTransportPort"] = lease.internal.protocol, lease.internal.port
            row[f"source{family}Address"] = _number(lease.internal.address)
            row[f"postNATSource{family}Address"] = _number(outer or lease.internal.address)
            row["postNAPTSourceTransportPort"] = lease.external_port
            row["remainingTimeoutSeconds"] = max(1, lease.expiry - int(now)) if lease.expiry else NEVER_SECONDS
            row["pcpMappingNonce"] = np.frombuffer(lease.nonce or bytes(12), ">u4")
        return Batch(template, rows)


class _Held:
    """What a server has, by whose it is."""

    def __init__(self, every: Sequence[Lease], unknown: int, epoch: int) -> None:
        """`unknown` is how many lines of its files tell nothing that is known."""
        self.leases, self.unknown, self.epoch = every, unknown, epoch
        self._by_internal: dict[Internal, list[Lease]] = {}
        self._by_place: dict[tuple[int, int], Internal] = {}
        for lease in every:
            self.put(lease)

    def now(self) -> _Held:
        """That of it which has not ended."""
        now = time.time()
        return _Held([one for one in self.leases if not one.expiry or one.expiry > now], self.unknown, self.epoch)

    def put(self, lease: Lease) -> None:
        self._by_internal.setdefault(lease.internal, []).append(lease)
        if lease.internal.address.version == 4:  # behind an IPv6 firewall each has its own address
            self._by_place[lease.internal.protocol, lease.external_port] = lease.internal

    def drop(self, internal: Internal) -> None:
        self._by_internal.pop(internal, None)

    def of(self, internal: Internal) -> Lease | None:
        """The mapping of this port, one of PCP's if there is one: UPnP may give it several places."""
        its = self._by_internal.get(internal, [])
        return next((one for one in its if one.nonce is not None), its[0] if its else None)

    def all_of(self, internal: Internal) -> list[Lease]:
        """Those that are PCP's."""
        return [one for one in self._by_internal.get(internal, []) if one.nonce is not None]

    def is_anothers(self, internal: Internal, outer_port: int) -> bool:
        """Whether the place is given to something else."""
        whose = self._by_place.get((internal.protocol, outer_port), internal)
        return internal.address.version == 4 and whose != internal and bool(self._by_internal.get(whose))


def _internal(template: Template, row: np.void) -> Internal:
    address = _address(row["sourceIPv6Address" if template.is_ipv6 else "sourceIPv4Address"])
    return Internal(int(row["protocolIdentifier"]), address, int(row["sourceTransportPort"]))


def _put(server: Server, template: Template, row: np.void, outer: netaddr.IPAddress | None, held: _Held) -> Reason:
    """Gets the mapping from the server, in the place of what the guest had there; NONE, or why not."""
    internal, nonce = _internal(template, row), row["pcpMappingNonce"].tobytes()
    address = _address(row["postNATSourceIPv6Address" if template.is_ipv6 else "postNATSourceIPv4Address"])
    external, seconds = External(address, int(row["postNAPTSourceTransportPort"])), int(row["remainingTimeoutSeconds"])
    if address != (outer or internal.address) or held.is_anothers(internal, external.port):
        return Reason.TRANSLATION_TAKEN
    former = held.of(internal)
    is_same = former is not None and (former.nonce, former.external_port) == (nonce, external.port)
    # What is only to be renewed is renewed, but not in an IPv6 firewall: miniupnpd up to 2.3.11, lease_file6_update(),
    # gives all lines of its file one id when a hole is renewed, and takes out all of that id when one is closed.
    is_in_the_way = former is not None and (template.is_ipv6 or not is_same)
    if former is not None and is_in_the_way:
        is_gone = former.nonce is not None and server.unmap(internal, former.nonce).result == ResultCode.SUCCESS
        if not is_gone and not is_same:
            return Reason.EXISTS
        held.drop(internal)
    try:
        answer = server.map(internal, nonce, external, seconds)
        if answer.result == ResultCode.SUCCESS and answer.external == external:
            held.put(Lease(internal, external.port, int(time.time()) + seconds, nonce))
            return Reason.NONE
        if answer.result == ResultCode.SUCCESS:
            # miniupnpd 2.3.1 gives another port, PREFER_FAILURE or not, where it finds that this one is in use.
            server.unmap(internal, nonce)
            return _given_again(server, former, address, Reason.TRANSLATION_TAKEN)
        return _given_again(server, former, address, _reason(answer.result))
    except DeviceFailed:
        server.ask_again()
        _given_again(server, former, address, Reason.DEVICE_ERROR)
        raise


def _given_again(server: Server, former: Lease | None, address: netaddr.IPAddress, reason: Reason) -> Reason:
    """Puts back what made way in vain."""
    if former is not None and former.nonce is not None:
        left = max(1, former.expiry - int(time.time())) if former.expiry else NEVER_SECONDS
        server.map(former.internal, former.nonce, External(address, former.external_port), left)
    return reason


def _given_back(server: Server, lease: Lease) -> int:
    """Ends a mapping, and says what the server answered."""
    assert lease.nonce is not None
    result = server.unmap(lease.internal, lease.nonce).result
    if lease.internal.address.version == 6 and result == ResultCode.NOT_AUTHORIZED:
        # miniupnpd forgets the nonce of a hole that its guest renews. It still takes another time.
        server.map(lease.internal, lease.nonce, External(lease.internal.address, lease.external_port), 1)
    return result


def _reason(result: int) -> Reason:
    return _REASONS.get(result, Reason.DEVICE_ERROR)


def _address(column: Any) -> netaddr.IPAddress:
    if np.ndim(column):
        return netaddr.IPAddress(int.from_bytes(column.tobytes(), "big"), 6)
    return netaddr.IPAddress(int(column), 4)


def _number(address: netaddr.IPAddress) -> int | tuple[int, int]:
    return divmod(int(address), 1 << 64) if address.version == 6 else int(address)
