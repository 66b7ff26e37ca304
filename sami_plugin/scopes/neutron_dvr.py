"""Scopes of Neutron's distributed routers: beside the zone of its port, a guest has one in each router of its network.

A router's part on this host is a network namespace, `qrouter-...`, which tracks all that it routes in its zone 0. Its
devices `qr-...` have, in the integration bridge, the local VLAN tags of the networks that it routes between. Who has a
floating IP is in its table `nat` (neutron/agent/l3/dvr_local_router.py: floating_forward_rules, the same from Zed to
2026.2), on the host where the guest migrates to from when the migration begins (`dest_host`):

    -A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1234abcd-5 -j DNAT --to-destination 192.0.2.7
    -A neutron-l3-agent-float-snat -s 192.0.2.7/32 -j SNAT --to-source 198.51.100.7 --random-fully

What passes `fip-...` is not tracked there (table `raw`: `CT --notrack`).
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import netaddr

from sami_plugin import privileged
from sami_plugin.errors import NotAvailable
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.scopes.bridge_iptables import PACKAGE
from sami_plugin.scopes.command import output_of
from sami_plugin.scopes.open_vswitch import Integration
from sami_plugin.scopes.ovs import OvsScopes
from sami_plugin.scopes.rules import Knowledge, host_address

NAMESPACES = Path("/run/netns")
ROUTERS = "qrouter-*"
ZONE = 0
"""A router's own: Neutron gives its packets no other."""
NAT_RULES = ("iptables-save", "-t", "nat")

_DNAT = re.compile(r"^-A \S+-PREROUTING -d (\S+)(?: -i \S+)? -j DNAT --to-destination (\S+)$", re.MULTILINE)
_SNAT = re.compile(r"^-A \S+-float-snat -s (\S+) -j SNAT --to-source (\S+)(?: --random-fully)?$", re.MULTILINE)


FloatingIps = Mapping[netaddr.IPAddress, Addresses]
"""By a port's own address."""


@dataclass(frozen=True, slots=True)
class Router:
    """A router's part on this host."""

    namespace: str
    """Its path."""
    networks: frozenset[int]
    """The zones of the networks that it routes between."""

    @property
    def name(self) -> str:
        return Path(self.namespace).name


class NeutronDvrScopes(OvsScopes):
    """Asks what `ovs` asks, which devices the routers' namespaces have, and iptables-save in those of a guest."""

    def __init__(
        self, integration: Integration, trust_guest_xml: bool = False, namespaces: str | Path = NAMESPACES
    ) -> None:
        super().__init__(integration, trust_guest_xml)
        self._namespaces = Path(namespaces)
        self._routers: tuple[Router, ...] = ()
        self._floating: dict[str, FloatingIps] = {}
        """By namespace, of those that were asked since the last look."""

    def _look(self) -> Knowledge:
        self._routers, self._floating = tuple(self._routers_now()), {}
        return super()._look()

    def find(self, guest: str) -> tuple[Scope, ...]:
        ports = super().find(guest)
        return ports + tuple(
            self._routed(port, router)
            for router in self._routers
            for port in ports
            if port.zones[ZoneRole.PORT] in router.networks
        )

    def neighbours(self, scope: Scope) -> Addresses:
        if scope.namespace is None:
            return super().neighbours(scope)
        self._knowledge()
        networks = next((router.networks for router in self._routers if router.namespace == scope.namespace), ())
        return self._others_in(networks, scope.port.partition("@")[0], scope.addresses)

    def namespaces(self) -> tuple[str | None, ...]:
        return super().namespaces() + tuple(router.namespace for router in self._routers)

    def _routers_now(self) -> Iterator[Router]:
        interfaces = self._integration.look().interfaces
        for path in sorted(self._namespaces.glob(ROUTERS)):
            with contextlib.suppress(NotAvailable):  # it has gone meanwhile
                devices = privileged.in_namespace(str(path), socket.if_nameindex)
                tags = (interfaces[name].tag for _, name in devices if name in interfaces)
                yield Router(str(path), frozenset(tag for tag in tags if tag is not None))

    def _routed(self, port: Scope, router: Router) -> Scope:
        """What the router tracks of the port; it is shared with all guests behind it."""
        floating = self._floating.get(router.namespace)
        if floating is None:
            rules, _ = privileged.in_namespace(router.namespace, lambda: output_of(NAT_RULES, PACKAGE))
            floating = self._floating[router.namespace] = floating_ips_of(rules)
        return Scope(
            f"{port.port}@{router.name}",
            port.guest,
            {ZoneRole.DNAT: ZONE},
            port.addresses,
            router.namespace,
            is_shared=True,
            translations=tuple(one for address in port.addresses for one in floating.get(address, ())),
        )


def floating_ips_of(rules: str) -> FloatingIps:
    """By a port's own address, the floating ones that it is translated to and from, of what iptables-save wrote."""
    floating = defaultdict[netaddr.IPAddress, dict[netaddr.IPAddress, None]](dict)
    for own, one in _pairs(rules):
        own_address, address = host_address(own), host_address(one)
        if own_address is not None and address is not None:
            floating[own_address][address] = None
    return {own: tuple(some) for own, some in floating.items()}


def _pairs(rules: str) -> Iterator[tuple[str, str]]:
    yield from ((own, one) for one, own in _DNAT.findall(rules))
    yield from _SNAT.findall(rules)
