"""Scopes of OVN: a zone of its own for each logical port, which ovn-controller writes into the integration bridge.

    external_ids:ct-zone-1234abcd-5e00-4000-8000-000000000007="8"

It writes the key once the switch has acknowledged that the zone was emptied, so a flow that is put in after that stays.
What the port may send from is in table 73 of the bridge, by numbers that the flow of table 0 gives the port
(OFTABLE_CHK_IN_PORT_SEC, since OVN 22.09); allowed address pairs are there too:

    table=0, priority=100,in_port=1 actions=load:0x8->NXM_NX_REG13[],...,load:0x1->OXM_OF_METADATA[],
        load:0x1->NXM_NX_REG14[],resubmit(,8)
    table=73, priority=90,ip,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.7 actions=...

The southbound database says the same, and the addresses of ports without port security as well.

A router between a port's switch and others is where table 65 leads to, with its own two zones; what it translates is in
its flows, on the host that translates it. For a distributed floating IP that is the host where its port is bound:

    table=65, priority=100,reg15=0x2,metadata=0x1 actions=clone(ct_clear,...,set_field:0x2->reg11,
        set_field:0x4->reg12,set_field:0x2->metadata,...)
    table=45, priority=161,ip,reg15=0x2,metadata=0x2,nw_src=192.0.2.7
        actions=set_field:fa:16:3e:00:03:07->eth_src,ct(commit,table=46,zone=NXM_NX_REG11[0..15],nat(src=198.51.100.7))
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Self

import netaddr

from sami_plugin.errors import ConfigurationError, NotAvailable
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.scopes.open_vswitch import Bridge, Flow, Integration, loaded, number_of
from sami_plugin.scopes.ovsdb import Copy, Credentials, Tables
from sami_plugin.scopes.routed import FloatingIps, RoutedScopes, Router, floating_ips
from sami_plugin.scopes.rules import Knowledge, host_address

if TYPE_CHECKING:
    from oslo_config import cfg

LOG = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long a port is not found because the southbound database has not told it yet."""
ZONE_PREFIX = "ct-zone-"
PHYSICAL_TABLE, TO_PHYSICAL_TABLE, PORT_SECURITY_TABLE = 0, 65, 73
BLOCKED_MARK = 0x1
"""ct_mark.blocked (OVN 22.03 and later): the rule that admitted the flow has gone, and its packets are dropped."""

_ASKED = frozenset({"ip", "ipv6", "reg14", "metadata", "dl_src", "nw_src", "ipv6_src"})
# Where a router on another host translates, it does so without the floating IP's own hardware address; it goes on with
# that when the guest has left.
_NAT = re.compile(
    r"(?:->eth_src|mod_dl_src:[0-9a-f:]+|->NXM_OF_ETH_SRC\[\]),.*ct\(commit,[^()]*zone=NXM_NX_REG1[12]\[0\.\.15\],"
    r"nat\(src=([0-9a-f.:]+)\)",
    re.ASCII,
)
_ZONE = re.compile("[1-9][0-9]{0,4}", re.ASCII)
_BINDINGS = {"Port_Binding": ("logical_port", "mac", "port_security")}

Ports = Mapping[str, Addresses]
"""By name of a logical port, its addresses."""


class OvnScopes(RoutedScopes):
    """Asks the database of Open vSwitch, `ovs-ofctl` for three tables of the integration bridge and the flows of the
    routers of a guest, and OVN's southbound database where the operator names it.
    """

    barred_marks = BLOCKED_MARK

    def __init__(self, integration: Integration, southbound: Copy[Ports] | None = None) -> None:
        super().__init__()
        self._integration = integration
        self._southbound = southbound
        self._datapaths: Mapping[str, int] = {}
        """By name of a router, its number."""
        self._told: frozenset[str] = frozenset()
        """Names of ports here of which the southbound database has said what it has, or was not waited for longer."""
        self._untold: dict[str, float] = {}
        """By name, ports of which it may say so soon, and since when."""
        self._awaited: frozenset[str] = frozenset()
        """Their devices, as far as nothing else here says addresses of them."""

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Takes `[ovs]` and `[ovn]`.

        :raises ConfigurationError: some of the files for TLS are named, and others are not.
        """
        southbound = None
        if conf.ovn.ovn_sb_connection:
            southbound = southbound_of(conf.ovn.ovn_sb_connection, _credentials(conf))
        return cls(Integration(conf.ovs.ovsdb_connection, conf.ovs.integration_bridge), southbound)

    def _look(self) -> Knowledge:
        bridge = self._integration.look()
        numbers = numbers_of(self._integration.flows(f"table={PHYSICAL_TABLE}"))
        addresses = addresses_of(self._integration.flows(f"table={PORT_SECURITY_TABLE}"))
        known = knowledge_of(bridge, numbers, addresses, self._bound(bridge))
        self._awaited = frozenset(
            one.name for one in bridge.interfaces.values() if one.port in self._untold and not known.own.get(one.name)
        )
        adjacent = adjacent_of(self._integration.flows(f"table={TO_PHYSICAL_TABLE}"))
        routers = routers_of(bridge, numbers, adjacent, known)
        self._datapaths = {router.name: datapath for datapath, router in routers.items()}
        self._note_routers(routers.values())
        return known

    def _floating_ips(self, router: Router) -> FloatingIps:
        datapath = self._datapaths.get(router.name)
        return {} if datapath is None else floating_ips_of(self._integration.flows(f"metadata={datapath:#x}"))

    def _bound(self, bridge: Bridge) -> Ports:
        if self._southbound is None:
            return {}
        names = sorted({one.port for one in bridge.interfaces.values() if one.port})
        self._southbound.restrict("Port_Binding", [["logical_port", "==", name] for name in names])
        is_awaited = self._southbound.is_awaited("Port_Binding")  # before what it told is taken, not to miss any
        told = self._southbound.latest()
        self._note_untold(frozenset(names), is_awaited, told is not None)
        return told or {}

    def _note_untold(self, names: frozenset[str], is_awaited: bool, is_connected: bool) -> None:
        now = self._clock()
        self._told = names if is_connected and not is_awaited else self._told & names
        self._untold = {name: self._untold.get(name, now) for name in names - self._told if is_awaited}
        for name in [name for name, since in self._untold.items() if now - since >= ANSWER_SECONDS]:
            LOG.warning(
                "port %s: OVN's southbound database has not told it within %g s; is it slow? Where the bridge does not "
                "say its addresses, the guest's description does, without allowed address pairs",
                name,
                ANSWER_SECONDS,
            )
            self._told |= {name}
            del self._untold[name]

    def find(self, guest: str) -> tuple[Scope, ...]:
        """As the base class.

        :raises NotAvailable: also where only the guest's description says addresses, and the southbound database may
            soon: a port's addresses are not asked for again, and the description has no allowed address pairs.
        """
        found = super().find(guest)
        for scope in found:
            if scope.port in self._awaited:
                raise NotAvailable(f"{scope.port}: OVN's southbound database has not said yet which addresses it has")
        return found

    def close(self) -> None:
        """Ends what was started to look."""
        self._integration.close()
        if self._southbound is not None:
            self._southbound.close()


def _credentials(conf: cfg.ConfigOpts) -> Credentials | None:
    names = ("ovn_sb_private_key", "ovn_sb_certificate", "ovn_sb_ca_cert")
    files = {name: conf.ovn[name] for name in names}
    missing = [name for name, file in files.items() if not file]
    if len(missing) == len(names):
        return None
    if missing:
        raise ConfigurationError(f"[ovn] {', '.join(missing)}: name all three files, or none")
    return Credentials(*files.values())


def southbound_of(connection: str, credentials: Credentials | None = None) -> Copy[Ports]:
    """The ports of OVN's southbound database, of which it is asked for none at first."""
    made: Copy[Ports] = Copy(connection, "OVN_Southbound", _BINDINGS, bound_of, credentials)
    made.restrict("Port_Binding", [])
    return made


def knowledge_of(
    bridge: Bridge, numbers: Mapping[int, tuple[int, int]], addresses: Mapping[tuple[int, int], Addresses], bound: Ports
) -> Knowledge:
    """What the bridge's database says, its flows, and the southbound database.

    A port counts once OVN says, beside its zone, that all its flows are in place. It says so on the host where a guest
    migrates to as well, before the guest is there; but what the port may send from, its bridge is sure to have only
    when the port is bound there, which is after the guest has come. Until then the addresses are those of the
    southbound database, or of the guest's description.
    """
    # Of a port that is bound elsewhere ovn-controller writes these flows when it hears of it, and leaves them out when
    # it computes all anew (controller/lflow.c: lflow_handle_flows_for_lport, add_port_sec_flows; 23.03.1 to 26.03.2).
    zones, own = dict[str, frozenset[int]](), dict[str, Addresses]()
    for one in bridge.interfaces.values():
        zone = bridge.external_ids.get(f"{ZONE_PREFIX}{one.port}", "") if one.port else ""
        place = numbers.get(one.number)
        here = addresses.get(place, ()) if place is not None else ()
        own[one.name] = tuple(sorted({*here, *bound.get(one.port, ())}))
        if one.is_installed and _ZONE.fullmatch(zone) and int(zone) <= 0xFFFF:
            zones[one.name] = frozenset({int(zone)})
    users = defaultdict[int, set[str]](set)
    for name, some in zones.items():
        for number in some:
            users[number].add(name)
    return Knowledge(
        zones=zones,
        users={zone: frozenset(names) for zone, names in users.items()},
        own=own,
        present=frozenset(bridge.interfaces),
        ports={one.name: one.port for one in bridge.interfaces.values()},
    )


def numbers_of(flows: Iterable[Flow]) -> dict[int, tuple[int, int]]:
    """By number of a port in the bridge, its datapath's in OVN and its own there."""
    found = {}
    for flow in flows:
        if flow.table != PHYSICAL_TABLE or set(flow.match) != {"in_port"}:
            continue
        port = number_of(flow.match["in_port"])
        datapath = loaded(flow.actions, "OXM_OF_METADATA", "metadata")
        number = loaded(flow.actions, "NXM_NX_REG14", "reg14")
        if port is not None and datapath is not None and number is not None:
            found[port] = datapath, number
    return found


def addresses_of(flows: Iterable[Flow]) -> dict[tuple[int, int], Addresses]:
    """By a port's numbers in OVN, the addresses from which it may send. Flows that say so differ in nothing else."""
    found = defaultdict[tuple[int, int], set[netaddr.IPAddress]](set)
    for flow in flows:
        if flow.table != PORT_SECURITY_TABLE or not set(flow.match) <= _ASKED:
            continue
        if loaded(flow.actions, "NXM_NX_REG10", "reg10"):  # its bit says that the packet is dropped
            continue
        place = number_of(flow.match.get("metadata", "")), number_of(flow.match.get("reg14", ""))
        address = host_address(flow.match.get("nw_src") or flow.match.get("ipv6_src") or "")
        datapath, number = place
        if datapath is not None and number is not None and address is not None:
            found[datapath, number].add(address)
    # Sorted: the switch tells its flows in any order, and the same scope is to be the same.
    return {place: tuple(sorted(some)) for place, some in found.items()}


Zones = Mapping[ZoneRole, int]


def adjacent_of(flows: Iterable[Flow]) -> dict[int, dict[int, Zones]]:
    """By number of a datapath, those that its packets go on to, with the zones in which these translate."""
    found = defaultdict[int, dict[int, Zones]](dict)
    for flow in flows:
        if flow.table != TO_PHYSICAL_TABLE or set(flow.match) != {"reg15", "metadata"}:
            continue
        here, there = number_of(flow.match["metadata"]), loaded(flow.actions, "OXM_OF_METADATA", "metadata")
        dnat = loaded(flow.actions, "NXM_NX_REG11", "reg11")
        snat = loaded(flow.actions, "NXM_NX_REG12", "reg12")
        if here is not None and there is not None and dnat and snat:
            found[here][there] = {ZoneRole.DNAT: dnat, ZoneRole.SNAT: snat}
    return dict(found)


def routers_of(
    bridge: Bridge,
    numbers: Mapping[int, tuple[int, int]],
    adjacent: Mapping[int, Mapping[int, Zones]],
    known: Knowledge,
) -> dict[int, Router]:
    """By number of its datapath, the routers that ports of this host are behind, once their zones have been emptied."""
    networks = defaultdict[int, set[int]](set)
    zones: dict[int, Zones] = {}
    for one in bridge.interfaces.values():
        datapath, _ = numbers.get(one.number, (None, None))
        for router, its_zones in adjacent.get(datapath, {}).items() if datapath is not None else ():
            networks[router] |= known.zones.get(one.name, frozenset())
            zones[router] = its_zones
    names = {router: _name(bridge, its_zones) for router, its_zones in zones.items()}
    return {
        router: Router(name, None, zones[router], frozenset(networks[router]))
        for router, name in names.items()
        if name is not None
    }


def _name(bridge: Bridge, zones: Zones) -> str | None:
    """What ovn-controller calls a router: the number of its datapath's row, or, as Neutron names it, in later ones."""
    dnat, snat = str(zones[ZoneRole.DNAT]), str(zones[ZoneRole.SNAT])
    for key, zone in bridge.external_ids.items():
        name = key.removeprefix(ZONE_PREFIX).removesuffix("_dnat")
        if key == f"{ZONE_PREFIX}{name}_dnat" and zone == dnat:
            return name if bridge.external_ids.get(f"{ZONE_PREFIX}{name}_snat") == snat else None
    return None


def floating_ips_of(flows: Iterable[Flow]) -> FloatingIps:
    """By a port's own address, those that a router translates it to and from, of the router's flows."""
    return floating_ips(
        (flow.match.get("nw_src") or flow.match.get("ipv6_src") or "", one)
        for flow in flows
        for one in _NAT.findall(flow.actions)
    )


def bound_of(tables: Tables) -> Ports:
    """The ports of OVN's southbound database, see ovn-sb(5), Port_Binding."""
    rows = tables["Port_Binding"].rows.values()
    # The column port_security is there since OVN 22.09.
    return {row.logical_port: _said([*row.mac, *getattr(row, "port_security", ())]) for row in rows}


def _said(texts: Iterable[str]) -> Addresses:
    """Of texts such as `fa:16:3e:00:00:07 192.0.2.7 2001:db8::7`; words that are no address of one host are skipped."""
    words = dict.fromkeys(word for text in texts for word in text.split())
    found = (host_address(word) for word in words)
    return tuple(dict.fromkeys(address for address in found if address is not None))
