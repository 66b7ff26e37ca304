"""What a hypervisor says of a guest's ports. It may have come with the guest from elsewhere: a claim, not knowledge."""

from __future__ import annotations

from dataclasses import dataclass

from sami_plugin.model.flows import Addresses


@dataclass(frozen=True, slots=True)
class GuestPort:
    """One network interface of a guest."""

    device: str
    """The host's end, the name of a tap."""
    mac: str = ""
    bridge: str | None = None
    claimed: Addresses = ()
    """Addresses that the guest's own description gives the port."""
    interface_id: str = ""
    """By which the network knows the port, in Open vSwitch `external_ids:iface-id`; empty where nothing says it."""
