"""Scopes of Neutron's firewall in Open vSwitch (`firewall_driver = openvswitch`): a zone for each network on the host.

A port's zone is its local VLAN tag, which the flows of table 60 put into register 6, and what the port may send from is
in table 71 (neutron/agent/linux/openvswitch_firewall/firewall.py, the same from Zed to 2026.2):

    table=60, priority=100,in_port=1 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,71)
    table=71, priority=65,ip,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.7
        actions=ct(table=72,zone=NXM_NX_REG6[0..15])
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Self

import netaddr

from sami_plugin.model.flows import Addresses
from sami_plugin.scopes.learned import LearnedScopes
from sami_plugin.scopes.open_vswitch import Bridge, Flow, Integration, loaded, number_of
from sami_plugin.scopes.rules import ANY_DEVICE, Knowledge, host_address

if TYPE_CHECKING:
    from oslo_config import cfg

TRANSIENT_TABLE, BASE_EGRESS_TABLE = 60, 71
INVALID_MARK = 0x1
"""Of a flow whose rule has gone: its entry stays until it times out, and its packets are dropped."""

_ASKED = frozenset({"ip", "ipv6", "in_port", "reg5", "dl_src", "nw_src", "ipv6_src"})
_IN_ZONE = re.compile(r"ct\((?:[^()]*,)?zone=(?:NXM_NX_REG6|reg6)\[0\.\.15\][,)]")


class OvsScopes(LearnedScopes):
    """Asks the database of Open vSwitch, and `ovs-ofctl` for two tables of the integration bridge."""

    barred_marks = INVALID_MARK

    def __init__(self, integration: Integration, trust_guest_xml: bool = False) -> None:
        super().__init__(trust_guest_xml)
        self._integration = integration

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Takes `[ovs]`, and `[agent] trust_guest_xml`."""
        return cls(Integration(conf.ovs.ovsdb_connection, conf.ovs.integration_bridge), conf.agent.trust_guest_xml)

    def _look(self) -> Knowledge:
        bridge = self._integration.look()
        zones = zones_of(self._integration.flows(f"table={TRANSIENT_TABLE}"))
        return knowledge_of(bridge, zones, addresses_of(self._integration.flows(f"table={BASE_EGRESS_TABLE}")))

    def close(self) -> None:
        """Ends what was started to look."""
        self._integration.close()


def knowledge_of(bridge: Bridge, zones: Mapping[int, int], addresses: Mapping[int, Addresses]) -> Knowledge:
    """What the bridge's database says, and by number of a port what its flows say: the zone and the port's addresses.

    A zone counts only where both name it: the agent may be about to renumber its networks.
    """
    there = bridge.interfaces.values()
    users = defaultdict[int, set[str]](lambda: {ANY_DEVICE})  # shared even by a network's only port here
    for one in there:
        if one.tag is not None:
            users[one.tag].add(one.name)
    return Knowledge(
        zones={
            one.name: frozenset({one.tag}) for one in there if one.tag is not None and zones.get(one.number) == one.tag
        },
        users={zone: frozenset(names) for zone, names in users.items()},
        own={one.name: addresses.get(one.number, ()) for one in there},
        present=frozenset(bridge.interfaces),
        ports={one.name: one.port for one in there},
    )


def zones_of(flows: Iterable[Flow]) -> dict[int, int]:
    """By number of a port, what the firewall calls its network: the zone of what it tracks."""
    zones = {}
    for flow in flows:
        if flow.table != TRANSIENT_TABLE or set(flow.match) != {"in_port"}:
            continue
        port, zone = number_of(flow.match["in_port"]), loaded(flow.actions, "NXM_NX_REG6", "reg6")
        is_filtered = f"resubmit(,{BASE_EGRESS_TABLE})" in flow.actions
        if port is not None and zone is not None and is_filtered:
            zones[port] = zone
    return zones


def addresses_of(flows: Iterable[Flow]) -> dict[int, Addresses]:
    """By number of a port, the addresses from which it may send what is tracked."""
    found = defaultdict[int, set[netaddr.IPAddress]](set)
    for flow in flows:
        if flow.table != BASE_EGRESS_TABLE or not set(flow.match) <= _ASKED or not _IN_ZONE.search(flow.actions):
            continue
        port = number_of(flow.match.get("in_port", ""))
        address = host_address(flow.match.get("nw_src") or flow.match.get("ipv6_src") or "")
        if port is not None and address is not None:
            found[port].add(address)
    # Sorted: the switch tells its flows in any order, and the same scope is to be the same.
    return {port: tuple(sorted(some)) for port, some in found.items()}
