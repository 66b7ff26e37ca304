"""Where a port's firewall state lives on this host. Nothing in here travels to another host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import netaddr
import numpy as np
import numpy.typing as npt

from sami_plugin.model.flows import Addresses, Batch, ZoneRole, has_end_in

DEFAULT_ZONE = 0
"""Of all that nobody gave a zone. In the host's own network namespace the host's own connections are in it, so there it
is shared whoever else has it."""


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
    translations: Addresses = ()
    """Addresses that this host's firewall translates the port's own to and from: a floating one, that of a masquerade.
    A flow that is translated to any other is not put in."""
    barred_marks: int = 0
    """Bits of an entry's mark by which this host's firewall says that it drops the flow's packets, although the entry
    is there: a rule that admitted it has gone. Such an entry is not told, and none is put in."""

    @property
    def is_port(self) -> bool:
        """Whether it is the port's own, and not a router's that translates for the port."""
        return ZoneRole.PORT in self.zones

    def owns(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which flows belong to the port here: in a zone of their role, with an end in its addresses."""
        return self.has_zone_of(batch) & has_end_in(batch, self.addresses)

    def has_zone_of(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which flows are of a role that has a zone here."""
        has_zone = np.zeros(len(batch), bool)
        for role in self.zones:
            has_zone |= batch.rows["zoneRole"] == int(role)
        return has_zone

    def as_dict(self) -> dict[str, Any]:
        """For the journal, which only this host reads; without the neighbours, who come and go."""
        return {
            "port": self.port,
            "guest": self.guest,
            "zones": {int(role): zone for role, zone in self.zones.items()},
            "addresses": list(map(_written, self.addresses)),
            "namespace": self.namespace,
            "is_shared": self.is_shared,
            "translations": list(map(_written, self.translations)),
            "barred_marks": self.barred_marks,
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """What `as_dict` made."""
        return cls(
            told["port"],
            told["guest"],
            {ZoneRole(int(role)): zone for role, zone in told["zones"].items()},
            tuple(netaddr.IPAddress(address) for address in told["addresses"]),
            told["namespace"],
            told["is_shared"],
            # What agents of before these wrote does not have them.
            translations=tuple(netaddr.IPAddress(address) for address in told.get("translations", ())),
            barred_marks=told.get("barred_marks", 0),
        )


@functools.lru_cache(maxsize=1024)  # a guest's are written many times
def _written(address: netaddr.IPAddress) -> str:
    return str(address)
