"""Scopes of routers on this host: beside the zone of its port, a guest with a floating IP has those in which a router
tracks what it translates for the guest.
"""

from __future__ import annotations

import abc
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import netaddr

from sami_plugin.errors import HasGone, OperatorError
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.scopes.learned import LearnedScopes, again
from sami_plugin.scopes.rules import host_address

FloatingIps = Mapping[netaddr.IPAddress, Addresses]
"""By a port's own address, those that it is translated to and from."""


def floating_ips(pairs: Iterable[tuple[str, str]]) -> FloatingIps:
    """Of a port's own address and a floating one, in each pair; what is no address of one host is skipped."""
    found = defaultdict[netaddr.IPAddress, set[netaddr.IPAddress]](set)
    for own, floating in ((host_address(own), host_address(one)) for own, one in pairs):
        if own is not None and floating is not None:
            found[own].add(floating)
    return {own: tuple(sorted(some)) for own, some in found.items()}


@dataclass(frozen=True, slots=True)
class Router:
    """A router's part on this host."""

    name: str
    namespace: str | None
    zones: Mapping[ZoneRole, int]
    networks: frozenset[int]
    """The zones of the ports that it routes between."""


class RoutedScopes(LearnedScopes):
    """A finder that notes at each look which routers there are."""

    _routers: tuple[Router, ...] = ()
    _floating: dict[str, FloatingIps | OperatorError]
    """By name, of the routers that were asked since they were noted."""

    @abc.abstractmethod
    def _floating_ips(self, router: Router) -> FloatingIps:
        """Those that the router translates here; none where it has gone since it was noted.

        :raises OperatorError: as `find`.
        """

    def _note_routers(self, routers: Iterable[Router]) -> None:
        """These are on this host now."""
        self._routers, self._floating = tuple(routers), {}

    def find(self, guest: str) -> tuple[Scope, ...]:
        ports = super().find(guest)
        return ports + tuple(scope for port in ports for scope in self._routed(port))

    def _routed(self, port: Scope) -> Iterator[Scope]:
        for router in self._routers:
            if port.zones[ZoneRole.PORT] not in router.networks:
                continue
            floating = self._asked(router)
            translations = tuple(one for address in port.addresses for one in floating.get(address, ()))
            if translations:  # else nothing that the router tracks of the port makes a difference to its packets
                yield Scope(
                    f"{port.port}@{router.name}",
                    port.guest,
                    router.zones,
                    port.addresses,
                    router.namespace,
                    is_shared=True,
                    translations=translations,
                )

    def _asked(self, router: Router) -> FloatingIps:
        """Once for each look, which then counts for as long again as the answer took."""
        with self._looking:
            told = self._floating.get(router.name)
            if told is None:
                began = self._clock()
                try:
                    told = self._floating_ips(router)
                except OperatorError as error:
                    told = error
                self._floating[router.name] = told
                ended = self._clock()
                self._known_until = max(self._known_until, ended + ended - began)
        if isinstance(told, OperatorError):
            raise again(told)
        return told

    def neighbours(self, scope: Scope) -> Addresses:
        if scope.is_port:
            return super().neighbours(scope)
        self._knowledge()
        device, _, name = scope.port.partition("@")
        for router in self._routers:  # by its zones: they may be another's by now
            if (router.namespace, dict(router.zones)) == (scope.namespace, dict(scope.zones)):
                return self._others_in(router.networks, device, scope.addresses)
        raise HasGone(f"router {name} is not on this host any more")
