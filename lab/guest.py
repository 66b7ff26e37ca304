"""A guest: a namespace with real processes and one link, the other end of which is a tap of its host."""

from __future__ import annotations

import dataclasses
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lab import addresses
from lab.deadline import wait_until
from lab.namespace import Namespace
from lab.port import Port, Ruled, is_ipv6

if TYPE_CHECKING:
    from lab.host import Host

LINK = "eth0"


class Guest(Ruled):
    """`port` is its port with the rules as they are now; `host` is where its tap is.

    Rules hold on every host, present and future; a change is in all kernels when the call returns.
    """

    def __init__(self, name: str, uuid: str, port: Port, prefix: str, is_routed: bool, program: Callable[[Port], None]):
        self.name = name
        self.uuid = uuid
        self.port = port
        self.tap = port.tap
        self.addresses = port.addresses
        self.namespace = Namespace(f"{prefix}guest-{name}")
        self.netns_path = self.namespace.path
        self.host: Host | None = None
        self.moves_to: Host | None = None
        """Where its last migration went, or was to go."""
        self.migrating = threading.Lock()
        self._program = program
        self._is_routed = is_routed
        self._rules_lock = threading.Lock()
        self._known: list[tuple[tuple[str, ...], str]] = []
        self.know((addresses.OUTSIDE_V4, addresses.OUTSIDE_V6), addresses.OUTSIDE_MAC)

    @property
    def v4(self) -> str:
        """Its first IPv4 address."""
        return next(address for address in self.addresses if not is_ipv6(address))

    @property
    def v6(self) -> str:
        """Its first IPv6 address."""
        return next(address for address in self.addresses if is_ipv6(address))

    def address(self, family: int) -> str:
        """Its first address of family 4 or 6."""
        return self.v6 if family == 6 else self.v4

    def public(self, family: int) -> str:
        """What the outside knows its first address of family 4 or 6 by."""
        known = [address for address in self.port.public if is_ipv6(address) == (family == 6)]
        return known[0] if known else self.address(family)

    def start(self, argv: Sequence[str], **options) -> subprocess.Popen:
        """See Namespace.start. Blocks while the guest is paused."""
        return self.namespace.start(argv, **options)

    def run(self, argv: Sequence[str], text: str | None = None) -> str:
        """See Namespace.run; for what is over before the next migration."""
        return self.namespace.run(argv, text)

    def close(self) -> None:
        """Delete it, its processes and its link. May be repeated."""
        self.namespace.close()

    def know(self, others: tuple[str, ...], mac: str) -> None:
        """Note a neighbour's hardware address; it counts from the next `link_up` on."""
        self._known.append((others, mac))

    def plug_in(self, host: Host) -> None:
        """Make the link, its other end in the host. Call once."""
        gateway = f"address {addresses.GATEWAY_MAC}" if self._is_routed else ""
        self.namespace.ip(
            f"link add {LINK} address {self.port.mac} type veth "
            f"peer name {self.tap} netns {host.namespace.name} {gateway}"
        )
        self.host = host

    def link_down(self) -> None:
        """Nothing goes out or comes in until `link_up`; the kernel forgets neighbours and routes, not connections."""
        self.namespace.ip(f"link set {LINK} down")

    def link_up(self) -> None:
        """Link, addresses, neighbours, routes as they were; its host passes on what it says. May be repeated."""
        commands = [f"link set {LINK} up"]
        for address in self.addresses:
            v6 = is_ipv6(address)
            length = (128 if v6 else 32) if self._is_routed else (64 if v6 else 24)
            commands.append(f"address replace {address}/{length} dev {LINK}{' nodad' if v6 else ''}")
        if self._is_routed:
            for gateway in (addresses.GATEWAY_V4, addresses.GATEWAY_V6):
                everything = "::/0" if is_ipv6(gateway) else "0.0.0.0/0"
                commands.append(f"neigh replace {gateway} lladdr {addresses.GATEWAY_MAC} dev {LINK} nud permanent")
                commands.append(f"route replace {everything} via {gateway} dev {LINK} onlink")
        else:
            for others, mac in self._known:
                commands += [f"neigh replace {other} lladdr {mac} dev {LINK} nud permanent" for other in others]
        self.namespace.ip(*commands)
        if self.host is not None:
            wait_until(lambda: self.host.passes_on(self), f"the bridge to take what {self.name} says")

    def pause(self) -> None:
        """Stop all processes; return when every thread of them is stopped. `go_on` must follow in the same thread."""
        # Who starts a process meanwhile waits, else one that is half started would be missed.
        self.namespace.starting.acquire()
        try:
            self.namespace.stop_processes()
        except BaseException:
            self.go_on()
            raise

    def go_on(self) -> None:
        """Let the processes of a paused guest run again."""
        self.namespace.continue_processes()
        self.namespace.starting.release()

    def _change(self, change: Callable) -> None:
        with self._rules_lock:
            rules = dataclasses.replace(self.port.rules, **change(self.port.rules))
            self.port = dataclasses.replace(self.port, rules=rules)
            self._program(self.port)
