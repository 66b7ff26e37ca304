"""What Open vSwitch on this host says of its integration bridge: its database, and the flows in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sami_plugin.errors import NotAvailable
from sami_plugin.scopes.command import output_of
from sami_plugin.scopes.ovsdb import Copy, Tables

LOG = logging.getLogger(__name__)

PACKAGE = "openvswitch-switch"
TOOL = "ovs-ofctl"
VERSIONS = "OpenFlow10,OpenFlow13,OpenFlow14"
"""A bridge may be told to speak some versions only."""
COLUMNS = {
    "Bridge": ("name", "ports", "external_ids", "datapath_type"),
    "Port": ("name", "interfaces", "tag", "other_config"),
    "Interface": ("name", "ofport", "external_ids"),
}
DEAD_VLAN = 4095
"""The tag that Neutron's agent gives a port that it has not wired."""

_NUMBER = re.compile(r"0x[0-9a-f]{1,8}|[0-9]{1,10}", re.ASCII)
_LOADED = re.compile(r"\b(?:load|set_field):(0x[0-9a-f]+|[0-9]+)(?:/0x[0-9a-f]+)?->([A-Za-z_0-9]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Interface:
    """A device that the bridge has."""

    name: str
    port: str
    """The network's name of it: the port's UUID, `external_ids:iface-id`; empty where that is not said."""
    number: int
    """In flows."""
    tag: int | None
    is_installed: bool
    """OVN says that the port's flows are in place."""


@dataclass(frozen=True, slots=True)
class Bridge:
    """The integration bridge."""

    interfaces: Mapping[str, Interface]
    """By name, those that are there: it has numbers for no others."""
    external_ids: Mapping[str, str]
    is_in_kernel: bool


@dataclass(frozen=True, slots=True)
class Flow:
    """One flow of a bridge, as ovs-ofctl(8) writes it."""

    table: int
    match: Mapping[str, str]
    """By field; the value of a mere word, such as `ip`, is empty."""
    actions: str


class Integration:
    """The integration bridge of this host."""

    def __init__(self, connection: str, bridge: str) -> None:
        self._name = bridge
        self._copy: Copy[Bridge | None] = Copy(
            connection, "Open_vSwitch", COLUMNS, lambda told: bridge_of(told, bridge)
        )
        kind, _, path = connection.partition(":")
        # Beside the database's socket are those of the bridges.
        self._target = f"unix:{path.rpartition('/')[0]}/{bridge}.mgmt" if kind == "unix" and "/" in path else bridge
        self._has_warned = False

    def look(self) -> Bridge:
        """The bridge now.

        :raises NotAvailable, NotPermitted: as `Copy.current`, or there is no bridge of this name.
        """
        bridge = self._copy.current()
        if bridge is None:
            raise NotAvailable(f"Open vSwitch has no bridge {self._name}; [ovs] integration_bridge names the guests'")
        if not bridge.is_in_kernel and not self._has_warned:
            self._has_warned = True
            LOG.warning(
                "%s has a datapath in user space, which tracks connections by itself: the kernel has none of its ports",
                self._name,
            )
        return bridge

    def flows(self, match: str) -> Iterator[Flow]:
        """The flows that ask for at least this, such as `table=60`.

        :raises NotAvailable, NotPermitted: as `output_of`.
        """
        argv = [TOOL, "-O", VERSIONS, "--no-names", "--no-stats", "dump-flows", self._target, match]
        text, _ = output_of(argv, PACKAGE, "the group that may open Open vSwitch's sockets")
        yield from flows_of(text)

    def close(self) -> None:
        """Ends what `look` has started."""
        self._copy.close()


def bridge_of(tables: Tables, name: str) -> Bridge | None:
    """The bridge of this name in the database Open_vSwitch, see ovs-vswitchd.conf.db(5)."""
    for bridge in tables["Bridge"].rows.values():
        if bridge.name == name:
            found = (_interface(port, one) for port in bridge.ports for one in port.interfaces)
            interfaces = {one.name: one for one in found if one is not None}
            return Bridge(interfaces, dict(bridge.external_ids), bridge.datapath_type in ("", "system"))
    return None


def _interface(port: Any, row: Any) -> Interface | None:
    number = next(iter(row.ofport), -1)
    if number <= 0:  # not opened yet, or there is no such device
        return None
    told = port.other_config.get("tag", "")
    tag: int | None = int(told) if re.fullmatch("[0-9]{1,4}", told) else next(iter(port.tag), None)
    if tag is not None and not 0 < tag < DEAD_VLAN:
        tag = None
    is_installed = row.external_ids.get("ovn-installed") == "true"
    return Interface(row.name, row.external_ids.get("iface-id", ""), number, tag, is_installed)


def flows_of(text: str) -> Iterator[Flow]:
    """The flows of what `ovs-ofctl dump-flows` wrote; what is none is skipped."""
    for line in text.splitlines():
        told, separator, actions = line.partition(" actions=")
        if not separator:
            continue
        match = {}
        for word in re.split(r"[\s,]+", told.strip()):
            field, _, value = word.partition("=")
            match[field] = value
        for word in ("cookie", "priority", "reset_counts", "send_flow_rem", "idle_timeout", "hard_timeout", ""):
            match.pop(word, None)
        table = number_of(match.pop("table", "0"))
        if table is not None:
            yield Flow(table, match, actions)


def number_of(text: str) -> int | None:
    """As ovs-ofctl writes numbers; None for everything else, a value with a mask among it."""
    return int(text, 16 if text.startswith("0x") else 10) if _NUMBER.fullmatch(text) else None


def loaded(actions: str, *registers: str) -> int | None:
    """The number that the actions put into a register last, of which these are the names; None if they put none."""
    numbers = [number for number, register in _LOADED.findall(actions) if register in registers]
    return number_of(numbers[-1]) if numbers else None
