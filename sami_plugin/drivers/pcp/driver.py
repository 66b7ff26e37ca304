"""The mappings of a PCP server as a SAMI driver."""

from __future__ import annotations

import logging
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
from sami_plugin.drivers.pcp.messages import Clock, External, Internal, ResultCode, Server
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
_NAMESPACE = "{namespace}"
"""In the path of a lease file: each network namespace has a server of its own, and the agent's own may have none."""

LOG = logging.getLogger(__name__)


class PcpDriver(FlowDriver):
    """Exports, inserts and removes the mappings that the guest made by PCP, as a third party that keeps its nonces.

    The server is asked from the network namespace of the scope. A mapping costs an exchange of messages each, for PCP
    has no other way; guests have a few.
    """

    def __init__(self, server: str = "127.0.0.1", lease_files: Sequence[str] = (), device: str | None = None) -> None:
        """``{namespace}`` in a lease file's path stands for the last part of that of the scope's network namespace.

        `device` is the server's name where it serves several hosts, the same on each of them.
        """
        self._address, self._files, self._shared_device = server, tuple(lease_files), device
        self._clocks: dict[str | None, Clock] = {}
        self._lock = threading.Lock()

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        namespace = scope.namespace if scope is not None else None
        notes = []
        is_here = scope is not None or not any(_NAMESPACE in path for path in self._files)
        if self._files and is_here and not Server(self._address, namespace).serves_third_parties():
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
        held, unknown, epoch = self._held(scope)
        own = [lease for lease in held.values() if lease.internal.address in scope.addresses]
        if others := sum(lease.nonce is None for lease in own):
            yield Omitted("mappings that were not made by PCP, but by UPnP or NAT-PMP", others)
        if unknown:
            yield Omitted("lines of lease files of other protocols than TCP and UDP, whosever they are", unknown)
        for version, template in _TEMPLATES.items():
            chosen = [one for one in own if one.nonce is not None and one.internal.address.version == version]
            if chosen:
                yield self._rows(scope, template, chosen, epoch)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = self._refusals(scope, batch)
        wanted = np.flatnonzero(made["outcome"] == Outcome.IMPORTED).tolist()
        if wanted:
            server, (held, _, _) = Server(self._address, scope.namespace), self._held(scope)
            outer = None if batch.template.is_ipv6 else server.external_address()
            for position in wanted:
                if reason := _put(server, batch.template, batch.rows[position], outer, held):
                    made[position] = (Outcome.REFUSED, reason, 0)
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        """Asks for what is there once more: the server's restart may have cost it, whatever its file says."""
        made = results(len(batch), Outcome.ABSENT)
        found, is_there = self.read_back(scope, batch)
        found.rows["remainingTimeoutSeconds"] = batch.rows["remainingTimeoutSeconds"]
        made[is_there] = self.insert(scope, found.take(is_there))
        return made

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        rows, is_there = batch.template.empty(len(batch)), np.zeros(len(batch), bool)
        if batch.template.name in _NAMES and self._files and len(batch):
            held, _, epoch = self._held(scope)
            is_own = scope.owns(batch)
            for position, row in enumerate(batch.rows):
                lease = held.get(_internal(batch.template, row)) if is_own[position] else None
                if lease is not None and lease.nonce is not None:
                    rows[position] = self._rows(scope, batch.template, [lease], epoch).rows[0]
                    is_there[position] = True
        return Batch(batch.template, rows), is_there

    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = results(len(identities), Outcome.ABSENT)
        template = next((one for one in _TEMPLATES.values() if one.key == identities.template.key), None)
        if template is None or not self._files or not len(identities):
            return made
        server, (held, _, _) = Server(self._address, scope.namespace), self._held(scope)
        for position in np.flatnonzero(scope.owns(identities)).tolist():
            lease = held.get(_internal(template, identities.rows[position]))
            if lease is not None and lease.nonce is not None:
                result = server.unmap(lease.internal, lease.nonce).result
                if result == ResultCode.SUCCESS:
                    made["outcome"][position] = Outcome.REMOVED
                elif lease.internal in self._held(scope)[0]:
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

    def _held(self, scope: Scope) -> tuple[dict[Internal, Lease], int, int]:
        """What the server has now, how many lines tell nothing that is known, and its epoch time.

        While it answers, it changes nothing: what a line that is just being written anew lacks in the files that are
        read before its answer, those have that are read after it, or the other way round. A server that starts reads
        its own files before it answers, and its epoch time tells.
        """
        server = Server(self._address, scope.namespace)
        for _ in range(_MOST_TRIES):
            self._epoch(server, scope.namespace)
            before, unknown = self._listed(scope)
            epoch, has_begun_anew = self._epoch(server, scope.namespace)
            after, _ = self._listed(scope)
            if not has_begun_anew:
                now = time.time()
                found = [one for one in (*before, *after) if not one.expiry or one.expiry > now]
                # Those of PCP come last: UPnP may give a port of the guest's several outer ones.
                found.sort(key=lambda one: one.nonce is not None)
                return {one.internal: one for one in found}, unknown, epoch
        raise DeviceFailed(f"the PCP server at {self._address} begins anew faster than what it has can be read")

    def _listed(self, scope: Scope) -> tuple[list[Lease], int]:
        name = (scope.namespace or "").rpartition("/")[2]
        read = [leases.read(path.replace(_NAMESPACE, name)) for path in self._files]
        return [lease for found, _ in read for lease in found], sum(unknown for _, unknown in read)

    def _epoch(self, server: Server, namespace: str | None) -> tuple[int, bool]:
        epoch = server.announce().epoch
        with self._lock:
            has_begun_anew = self._clocks.setdefault(namespace, Clock()).has_begun_anew(epoch, time.monotonic())
        if has_begun_anew:
            LOG.warning("the PCP server at %s has begun anew: what it had may be lost", self._address)
        return epoch, has_begun_anew

    def _rows(self, scope: Scope, template: Template, chosen: list[Lease], epoch: int) -> Batch:
        rows = template.empty(len(chosen))
        now = time.time()
        family = "IPv6" if template.is_ipv6 else "IPv4"
        outer = None if template.is_ipv6 else Server(self._address, scope.namespace).external_address()
        rows["zoneRole"], rows["pcpEpochTime"] = int(min(scope.zones, default=0)), epoch
        for row, lease in zip(rows, chosen, strict=True):
            row["protocolIdentifier"], row["sourceTransportPort"] = lease.internal.protocol, lease.internal.port
            row[f"source{family}Address"] = _number(lease.internal.address)
            row[f"postNATSource{family}Address"] = _number(outer or lease.internal.address)
            row["postNAPTSourceTransportPort"] = lease.external_port
            row["remainingTimeoutSeconds"] = max(1, lease.expiry - int(now)) if lease.expiry else NEVER_SECONDS
            row["pcpMappingNonce"] = np.frombuffer(lease.nonce or bytes(12), ">u4")
        return Batch(template, rows)


def _internal(template: Template, row: np.void) -> Internal:
    address = _address(row["sourceIPv6Address" if template.is_ipv6 else "sourceIPv4Address"])
    return Internal(int(row["protocolIdentifier"]), address, int(row["sourceTransportPort"]))


def _put(
    server: Server, template: Template, row: np.void, outer: netaddr.IPAddress | None, held: dict[Internal, Lease]
) -> Reason:
    """Gets the mapping from the server, in the place of what the guest had there; NONE, or why not."""
    internal, nonce = _internal(template, row), row["pcpMappingNonce"].tobytes()
    address = _address(row["postNATSourceIPv6Address" if template.is_ipv6 else "postNATSourceIPv4Address"])
    external, seconds = External(address, int(row["postNAPTSourceTransportPort"])), int(row["remainingTimeoutSeconds"])
    if address != (outer or internal.address) or _is_anothers(internal, external, held):
        return Reason.TRANSLATION_TAKEN
    former = held.get(internal)
    # What is only to be renewed is renewed, but not in an IPv6 firewall: miniupnpd up to 2.3.11, lease_file6_update(),
    # gives all lines of its file one id when a hole is renewed, and takes out all of that id when one is closed.
    is_in_the_way = former is not None and (
        template.is_ipv6 or (former.nonce, former.external_port) != (nonce, external.port)
    )
    if former is not None and is_in_the_way:
        if former.nonce is None or server.unmap(internal, former.nonce).result != ResultCode.SUCCESS:
            return Reason.EXISTS
        del held[internal]
    answer = server.map(internal, nonce, external, seconds)
    if answer.result == ResultCode.SUCCESS and answer.external == external:
        held[internal] = Lease(internal, external.port, int(time.time()) + seconds, nonce)
        return Reason.NONE
    if answer.result == ResultCode.SUCCESS:
        # miniupnpd 2.3.1 gives another port, PREFER_FAILURE or not, where it finds that this one is in use.
        server.unmap(internal, nonce)
    if former is not None and is_in_the_way and former.nonce is not None:
        left = max(1, former.expiry - int(time.time()))
        server.map(internal, former.nonce, External(address, former.external_port), left)
    return Reason.TRANSLATION_TAKEN if answer.result == ResultCode.SUCCESS else _reason(answer.result)


def _reason(result: int) -> Reason:
    return _REASONS.get(result, Reason.DEVICE_ERROR)


def _is_anothers(internal: Internal, external: External, held: dict[Internal, Lease]) -> bool:
    """Whether the outer port is given to something else. Behind an IPv6 firewall each has its own address."""
    return internal.address.version == 4 and any(
        one.external_port == external.port and other != internal and other.protocol == internal.protocol
        for other, one in held.items()
        if other.address.version == 4
    )


def _address(column: Any) -> netaddr.IPAddress:
    if np.ndim(column):
        return netaddr.IPAddress(int.from_bytes(column.tobytes(), "big"), 6)
    return netaddr.IPAddress(int(column), 4)


def _number(address: netaddr.IPAddress) -> int | tuple[int, int]:
    return divmod(int(address), 1 << 64) if address.version == 6 else int(address)
