"""Scopes of Neutron's distributed routers, each of which has a network namespace on this host, `qrouter-...`.

It tracks all that it routes in its zone 0. Its devices `qr-...` have, in the integration bridge, the local VLAN tags of
the networks that it routes between. Who has a floating IP is in its table `nat` (neutron/agent/l3/dvr_local_router.py:
floating_forward_rules, the same from Zed to 2026.2), on the host where the guest migrates to from when the migration
begins (`dest_host`):

    -A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1234abcd-5 -j DNAT --to-destination 192.0.2.7
    -A neutron-l3-agent-float-snat -s 192.0.2.7/32 -j SNAT --to-source 198.51.100.7 --random-fully

What passes `fip-...` is not tracked there (table `raw`: `CT --notrack`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from sami_plugin import privileged
from sami_plugin.errors import HasGone, NotAvailable
from sami_plugin.model.flows import ZoneRole
from sami_plugin.scopes.bridge_iptables import PACKAGE
from sami_plugin.scopes.command import output_of
from sami_plugin.scopes.open_vswitch import Integration
from sami_plugin.scopes.ovs import OvsScopes
from sami_plugin.scopes.routed import FloatingIps, RoutedScopes, Router, floating_ips
from sami_plugin.scopes.rules import Knowledge

LOG = logging.getLogger(__name__)

NAMESPACES = Path("/run/netns")
ROUTERS = "qrouter-*"
ZONES = {ZoneRole.DNAT: 0}
"""A router's own: Neutron gives its packets no other."""
NAT_RULES = ("iptables-save", "-t", "nat")
TRIAL = ("iptables-save", "--version")
"""Whether it is there. Its rules are not asked for: the older tables would be made by that, in the host's namespace."""

# Other routers have the same rules without the device, and go on translating for a guest that has left.
_DNAT = re.compile(r"^-A \S+-PREROUTING -d (\S+) -i rfp-\S+ -j DNAT --to-destination (\S+)$", re.MULTILINE)


class NeutronDvrScopes(RoutedScopes, OvsScopes):
    """Asks what `ovs` asks, which devices the routers' namespaces have, and iptables-save in those of a guest."""

    def __init__(
        self, integration: Integration, trust_guest_xml: bool = False, namespaces: str | Path = NAMESPACES
    ) -> None:
        super().__init__(integration, trust_guest_xml)
        self._namespaces = Path(namespaces)

    def _look(self) -> Knowledge:
        self._note_routers(self._routers_now())
        return super()._look()

    def _routers_now(self) -> Iterator[Router]:
        interfaces = self._integration.look().interfaces
        for path in sorted(self._namespaces.glob(ROUTERS)):
            with contextlib.suppress(HasGone):  # meanwhile
                devices = privileged.in_namespace(str(path), socket.if_nameindex)
                tags = (interfaces[name].tag for _, name in devices if name in interfaces)
                networks = frozenset(tag for tag in tags if tag is not None)
                yield Router(path.name, str(path), ZONES, networks)

    def _floating_ips(self, router: Router) -> FloatingIps:
        try:
            rules, _ = privileged.in_namespace(router.namespace, lambda: output_of(NAT_RULES, PACKAGE))
        except NotAvailable as error:
            if (self._namespaces / router.name).exists():
                raise NotAvailable(f"{router.name}: {error}") from error
            LOG.info("router %s has gone: %s", router.name, error)  # its ports are here all the same
            return {}
        return floating_ips_of(rules)

    def namespaces(self) -> tuple[str | None, ...]:
        output_of(TRIAL, PACKAGE)  # a host may have no router yet
        return super().namespaces() + tuple(router.namespace for router in self._routers)


def floating_ips_of(rules: str) -> FloatingIps:
    """By a port's own address, the floating ones that it is translated to and from, of what iptables-save wrote."""
    return floating_ips((own, one) for one, own in _DNAT.findall(rules))
