"""A guest's side, with a firewall that lets in nothing but what it knows, and its peer's: one link, two namespaces."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import netaddr

from lab.deadline import STRETCH, wait_until
from lab.namespace import Namespace
from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.scope import Scope

HERE, THERE = "10.9.0.1", "10.9.0.2"
HERE6, THERE6 = "fd00:9::1", "fd00:9::2"
ZONE = 5
SECONDS = 0.4 * STRETCH
"""Longer than a packet takes, and short enough to wait for one that does not come."""
FIREWALL = f"""table inet firewall {{
  chain out {{ type filter hook output priority raw; ct zone set {ZONE}; }}
  chain in {{ type filter hook prerouting priority raw; ct zone set {ZONE}; }}
  chain guard {{
    type filter hook input priority filter; policy drop;
    ct state established accept; meta l4proto {{ icmp, icmpv6 }} accept;
  }}
}}
"""


@contextlib.contextmanager
def two_sides() -> Iterator[tuple[Namespace, Namespace]]:
    with contextlib.ExitStack() as undo:
        # Tests may run beside each other, in other processes.
        near, far = Namespace(f"kinds-near-{os.getpid()}"), Namespace(f"kinds-far-{os.getpid()}")
        for namespace in (near, far):
            undo.callback(namespace.close)
        near.ip(f"link add eth0 type veth peer name eth0 netns kinds-far-{os.getpid()}")
        for namespace, address, address6 in ((near, HERE, HERE6), (far, THERE, THERE6)):
            namespace.ip(f"address add {address}/24 dev eth0", f"address add {address6}/64 dev eth0 nodad")
            namespace.ip("link set eth0 up")
        near.run(["nft", "-f", "-"], FIREWALL)
        # Before its carrier is there a link drops what is sent, such as a search for a neighbour, and a second is lost.
        shown = ["ip", "-j", "link", "show", "eth0"]
        wait_until(lambda: all('"operstate":"UP"' in one.run(shown) for one in (near, far)), "both ends of the link up")
        yield near, far


def scope_of(near: Namespace) -> Scope:
    return Scope("port", "guest", {ZoneRole.PORT: ZONE}, (netaddr.IPAddress(HERE), netaddr.IPAddress(HERE6)), near.path)
