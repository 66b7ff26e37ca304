"""Scopes of ports that a hypervisor names, as far as this host's own firewall knows them."""

from __future__ import annotations

import abc
import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Self

from sami_plugin.errors import ConfigurationError, NotAvailable, OperatorError
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import DEFAULT_ZONE, Scope
from sami_plugin.scopes.base import ScopeFinder
from sami_plugin.scopes.rules import ANY_DEVICE, BOTH, Knowledge

if TYPE_CHECKING:
    from oslo_config import cfg

LOG = logging.getLogger(__name__)

FRESH_SECONDS = 0.1
"""How long a look at the firewall answers questions, at least: sessions ask many times a second, and often at once.

A look that takes longer answers for as long as it took, so that looking takes half a processor at the most. One that
fails does so too: a tool that hangs would keep all sessions, one after the other.
"""

_ENDS_OF_ONE_PORT = ("tap", "qvb", "qvo", "qbr")
"""Neutron's devices of one port in its hybrid form have the same name after these."""


class LearnedScopes(ScopeFinder):
    """A port is on this host when its device is there and a rule gives the device's packets a zone.

    The hypervisor's word, which may be another host's, names the device. It says of addresses only where nothing else
    does, and counts only in a zone that no other device has, or where the operator trusts it.
    """

    barred_marks = 0
    """As of the scopes."""

    def __init__(self, trust_guest_xml: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._trusts_claims = trust_guest_xml
        self._clock = clock
        self._ports: dict[str, tuple[GuestPort, ...]] = {}
        self._ports_lock = threading.Lock()
        self._looking = threading.Lock()
        self._known = Knowledge()
        self._failure: OperatorError | None = None
        """Of the last look; then nothing is known."""
        self._known_until = -math.inf
        self._said: set[tuple[str, str, str]] = set()

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Takes `[agent] trust_guest_xml`."""
        return cls(trust_guest_xml=conf.agent.trust_guest_xml)

    @abc.abstractmethod
    def _look(self) -> Knowledge:
        """What the kernel says now, in the calling thread's network namespace.

        :raises OperatorError: as `find`.
        """

    def learn(self, guest: str, ports: tuple[GuestPort, ...]) -> None:
        with self._ports_lock:
            if ports:
                self._ports[guest] = ports
            else:
                self._ports.pop(guest, None)
            self._said = {said for said in self._said if said[0] != guest}

    def find(self, guest: str) -> tuple[Scope, ...]:
        learned = self._learned()
        ports = {port.device: port for port in learned.get(guest, ()) if port.device}
        if not ports:
            return ()
        known = self._knowledge()
        found = (self._scope(guest, port, learned, known) for port in ports.values())
        return tuple(scope for scope in found if scope is not None)

    def neighbours(self, scope: Scope) -> Addresses:
        return self._others_in((scope.zones[ZoneRole.PORT],), scope.port, scope.addresses)

    def _others_in(self, zones: Iterable[int], device: str, own: Addresses) -> Addresses:
        """The addresses of the ports in these zones but for the device's, whose own are `own`."""
        known = self._knowledge()
        claims: dict[str, list[GuestPort]] = {}
        for ports in self._learned().values():
            for port in ports:
                claims.setdefault(port.device, []).append(port)
        users = frozenset[str]().union(*(known.users.get(zone, frozenset()) for zone in zones))
        if ANY_DEVICE in users:
            users |= claims.keys()
        found: dict[object, None] = {}
        for other in sorted(_others(users, device) & known.present):
            # The way to a guest that has left is by a device that is no guest's.
            is_guest = other in claims
            found |= dict.fromkeys(address for address in known.own.get(other, ()) if is_guest or address not in own)
            # Nobody gains by a claim here, it only keeps entries from being touched; but not the port's own.
            claimed = (address for port in claims.get(other, ()) for address in port.claimed)
            found |= dict.fromkeys(address for address in claimed if address not in own)
        return tuple(found)

    def namespaces(self) -> tuple[str | None, ...]:
        self._knowledge()  # what cannot be read is better known at the agent's start than at the first migration
        return (None,)

    def _learned(self) -> dict[str, tuple[GuestPort, ...]]:
        with self._ports_lock:
            return dict(self._ports)

    def _knowledge(self) -> Knowledge:
        with self._looking:
            began = self._clock()
            if began >= self._known_until:
                try:
                    self._known, self._failure = self._look(), None
                except OperatorError as error:
                    self._failure = error
                except OSError as error:
                    self._failure = NotAvailable(f"this host's devices and rules cannot be read: {error}")
                ended = self._clock()
                self._known_until = ended + max(FRESH_SECONDS, ended - began)
            if self._failure is not None:
                raise again(self._failure)
            return self._known

    def _scope(
        self, guest: str, port: GuestPort, learned: dict[str, tuple[GuestPort, ...]], known: Knowledge
    ) -> Scope | None:
        device = port.device
        if device not in known.present:
            return None
        name = known.ports.get(device, "")
        if port.interface_id and name and name != port.interface_id:
            self._say(guest, device, f"it is port {name} here, and the guest's description says {port.interface_id}")
            return None
        zones = known.zones.get(device, frozenset())
        if not zones:
            self._say(guest, device, "no rule gives its packets a zone yet")
            return None
        if len(zones) > 1:
            numbers = ", ".join(map(str, sorted(zones)))
            raise ConfigurationError(
                f"{device}: this host's rules give its packets several zones ({numbers}); let all of them give one"
            )
        others = [other for other, ports in learned.items() if other != guest and device in {p.device for p in ports}]
        if others:
            self._say(guest, device, f"guest {others[0]} is said to have it too, so it is taken for neither's")
            return None
        (zone,) = zones
        is_shared = zone == DEFAULT_ZONE or bool(_others(known.users.get(zone, frozenset()), device))
        every, versions = self._addresses(port, zone, is_shared, known), known.versions.get(device, BOTH)
        addresses = tuple(address for address in every if address.version in versions)
        if len(addresses) < len(every):
            (version,) = BOTH - versions
            why = f"no rule gives its IPv{version} packets a zone, so these flows stay behind"
            self._say(guest, device, why, what="is known in part")
        if not addresses:
            self._say(guest, device, f"its zone is {zone}, and nothing that counts here says an address of it")
            return None
        return Scope(
            device,
            guest,
            {ZoneRole.PORT: zone},
            addresses,
            is_shared=is_shared,
            barred_marks=self.barred_marks,
        )

    def _addresses(self, port: GuestPort, zone: int, is_shared: bool, known: Knowledge) -> Addresses:
        """Of each family, what the best of those says that say anything."""
        sources = [known.own.get(port.device, ())]
        if not is_shared:
            sources.append(known.destinations.get(zone, ()))
        if not is_shared or self._trusts_claims:
            sources.append(port.claimed)
        return tuple(_best(sources))

    def _say(self, guest: str, device: str, why: str, what: str = "is not known here") -> None:
        with self._ports_lock:
            is_new = (guest, device, why) not in self._said
            self._said.add((guest, device, why))
        if is_new:
            LOG.info("%s: port %s %s: %s", guest, device, what, why)


def again(error: OperatorError) -> OperatorError:
    """The same error to be raised once more: a traceback is one thread's."""
    fresh = copy.copy(error)
    fresh.__cause__ = error
    return fresh


def _best(sources: list[Addresses]) -> Iterator[object]:
    for version in (4, 6):
        for source in sources:
            found = [address for address in source if address.version == version]
            if found:
                yield from found
                break


def _others(users: frozenset[str], device: str) -> frozenset[str]:
    """Of a zone's users those that are not the device, nor another end of the same port."""
    prefix, port = device[:3], device[3:]
    ends = {f"{one}{port}" for one in _ENDS_OF_ONE_PORT} if prefix in _ENDS_OF_ONE_PORT and port else set()
    return users - ends - {device}
