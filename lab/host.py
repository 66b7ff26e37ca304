"""A host: a namespace with a firewall, the taps of the guests that are there, and a file that says which."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab import addresses, renumbering
from lab.fabric import forward, near_end_is_gateway
from lab.firewall import UPLINK, Firewall
from lab.iptables_firewall import IptablesFirewall
from lab.namespace import Namespace
from lab.nftables_firewall import NftablesFirewall
from lab.port import Port, is_ipv6

if TYPE_CHECKING:
    from lab.guest import Guest

BRIDGE = "br0"


class Host:
    """One host of the lab. `number` counts from 0; `scope_file` is kept up to date (see `_write_scope`)."""

    def __init__(self, name: str, number: int, prefix: str, kind: str, folder: Path) -> None:
        self.name = name
        self.number = number
        self.is_routed = kind == "routed"
        self.namespace = Namespace(f"{prefix}host-{name}")
        self.netns_path = self.namespace.path
        self.scope_file = folder / f"scope-{name}.json"
        self._guests: dict[str, Guest] = {}
        self._expected: dict[str, Guest] = {}
        self._renumbered: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()
        firewall = NftablesFirewall if self.is_routed else IptablesFirewall
        self.firewall: Firewall = firewall(self.namespace, number, is_zone_shared=kind == "shared")

    def set_up(self) -> None:
        """Plug the cable in and close the firewall. Call once, after the fabric laid the cable."""
        self.firewall.set_up()
        if self.is_routed:
            forward(self.namespace)
            self.namespace.ip(f"link set {UPLINK} up", *near_end_is_gateway(UPLINK, addresses.cable_mac(self.number)))
        else:
            for family in ("iptables", "ip6tables"):
                self.namespace.sysctl(f"net.bridge.bridge-nf-call-{family}", 1)
            for which in ("all", "default"):
                self.namespace.sysctl(f"net.ipv6.conf.{which}.disable_ipv6", 1)
            self.namespace.ip(
                f"link add {BRIDGE} type bridge mcast_snooping 0 stp_state 0",
                f"link set {BRIDGE} up",
                f"link set {UPLINK} master {BRIDGE} up",
            )
            # Known for good, so that nothing for the outside is flooded to other guests.
            self.namespace.bridge(f"fdb replace {addresses.OUTSIDE_MAC} dev {UPLINK} master static")
        self._write_scope()

    def close(self) -> None:
        """Delete it, its processes included. May be repeated."""
        self.namespace.close()

    def renumber(self, port: Port, addresses: tuple[str, ...]) -> None:
        """The port's guest has these addresses here, as many of each family as it has, and does not know it."""
        self._renumbered[port.id] = addresses
        self.firewall.program(self.as_here(port))
        renumbering.translate(
            self.namespace, f"of_{port.number}", zip(port.addresses, addresses, strict=True), own_side=port.tap
        )

    def as_here(self, port: Port) -> Port:
        """The port, with its addresses here."""
        return dataclasses.replace(port, addresses=self._renumbered.get(port.id, port.addresses))

    def zone(self, guest: Guest) -> int:
        """The conntrack zone of the guest's port here, whether the guest is here or not."""
        return self.firewall.zone(guest.port)

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """See Namespace.sysctl: `host.sysctl("nf_conntrack_tcp_loose", 0)`."""
        return self.namespace.sysctl(name, value)

    def run(self, argv: Sequence[str], text: str | None = None) -> str:
        """See Namespace.run."""
        return self.namespace.run(argv, text)

    def start(self, argv: Sequence[str], **options) -> subprocess.Popen:
        """See Namespace.start."""
        return self.namespace.start(argv, **options)

    @property
    def guests(self) -> list[Guest]:
        """The guests whose tap is here now."""
        with self._lock:
            return list(self._guests.values())

    def expect(self, guest: Guest) -> None:
        """The guest's empty shell runs here: its port is made, as QEMU makes the tap, long before the guest comes."""
        with self._lock:
            self._expected[guest.uuid] = guest
            self._write_scope()

    def expect_no_more(self, guest: Guest) -> None:
        """It will not come, or it is here. May be repeated."""
        with self._lock:
            if self._expected.pop(guest.uuid, None) is not None:
                self._write_scope()

    def welcome(self, guest: Guest) -> None:
        """The guest's tap is in this namespace now: say so in the scope file, connect it, set it up."""
        with self._lock:
            self._expected.pop(guest.uuid, None)
            self._guests[guest.uuid] = guest
            self._write_scope()
        tap, port = guest.tap, self.as_here(guest.port)
        if self.is_routed:
            routes = [
                f"route replace {address}/{128 if is_ipv6(address) else 32} dev {tap}" for address in port.addresses
            ]
            # IPv6 asks for the neighbour behind the translation, IPv4 before it.
            both = dict.fromkeys((*port.addresses, *guest.addresses))
            known = [f"neigh replace {address} lladdr {port.mac} dev {tap} nud permanent" for address in both]
            self.namespace.ip(f"link set {tap} up", *routes, *known)
        else:
            self.namespace.ip(f"link set {tap} master {BRIDGE} up")
            # The bridge may have learned at the uplink where the guest was before; until the guest speaks, and here
            # often only its peer does, the bridge would throw away what is meant for it.
            self.namespace.bridge(f"fdb replace {port.mac} dev {tap} master static")

    def passes_on(self, guest: Guest) -> bool:
        """Whether the bridge takes what the guest says: the kernel notices a link that came up in its own time."""
        if self.is_routed:
            return True
        return '"state":"forwarding"' in self.namespace.run(["bridge", "-j", "link", "show", "dev", guest.tap])

    def release(self, guest: Guest, namespace: Namespace) -> None:
        """Move the guest's tap to another namespace and forget the guest; its port's rules stay."""
        with self._lock:
            self.namespace.ip(f"link set {guest.tap} netns {namespace.name}")
            self._guests.pop(guest.uuid, None)
            self._write_scope()

    def _write_scope(self) -> None:
        """Which ports are here, as `sami_plugin.scopes.static` reads it.

        Replaced by rename, so a reader sees the old or the new text, never a part of it.
        """
        ports = [
            {
                "port": guest.port.id,
                "guest": guest.uuid,
                "namespace": self.netns_path,
                "zone": self.zone(guest),
                "shared": self.firewall.is_zone_shared,
                "addresses": list(self.as_here(guest.port).addresses),
                "translations": list(guest.port.public),
            }
            for guest in {**self._expected, **self._guests}.values()
        ]
        new = self.scope_file.with_suffix(".new")
        new.write_text(json.dumps({"ports": ports}, indent=1))
        os.replace(new, self.scope_file)
