"""Where a port's firewall state lives on this host. Nothing in here travels to another host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sami_plugin.model.flows import Addresses, ZoneRole


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of a device that holds the state of one port of a guest.

    `addresses` are the port's own, by this host's knowledge. `is_shared` says that other ports have flows in the same
    zone; then a flow belongs to the port only if one of its ends is an address of the port, and `neighbours` are the
    addresses of the other local ports of the zone, of which no entry is ever touched.
    """

    port: str
    guest: str
    zones: Mapping[ZoneRole, int]
    addresses: Addresses
    namespace: str | None = None
    """Path of the network namespace that holds the firewall; None is the agent's own."""
    is_shared: bool = False
    neighbours: Addresses = field(default=())
