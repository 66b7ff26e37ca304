"""The network between the hosts: a bridge, or a router for routed hosts; and the client outside."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from lab import addresses, renumbering
from lab.deadline import wait_until
from lab.firewall import UPLINK
from lab.namespace import Namespace
from lab.port import Port, is_ipv6

if TYPE_CHECKING:
    from lab.host import Host

BRIDGE = "fabric"
BROADCAST_MAC = b"\xff" * 6
ALL_NODES_MAC = b"\x33\x33\x00\x00\x00\x01"
ETH_ARP, ETH_IPV6 = 0x0806, 0x86DD

# What the flood of flows and the echo programs send to must not be answered with port unreachable.
SILENCE = """table inet quiet {
  chain in { type filter hook prerouting priority raw; policy accept;
    udp dport 20000-59999 drop
  }
}
"""


class BridgedFabric:
    """One bridge; it learns where a guest is from the guest's announcements."""

    def __init__(self, prefix: str) -> None:
        self.namespace = Namespace(f"{prefix}fabric")
        self.outside = Namespace(f"{prefix}outside")
        _filter_bridges(self.namespace, False)
        _filter_bridges(self.outside, False)
        self.namespace.ip(
            f"link add {BRIDGE} type bridge mcast_snooping 0 stp_state 0",
            f"link set {BRIDGE} up",
            f"link add to-outside type veth peer name eth0 netns {self.outside.name} address {addresses.OUTSIDE_MAC}",
            f"link set to-outside master {BRIDGE} up",
        )
        self.outside.ip(
            f"address add {addresses.OUTSIDE_V4}/24 dev eth0",
            f"address add {addresses.OUTSIDE_V6}/64 dev eth0 nodad",
            "link set eth0 up",
        )
        self.outside.run(["nft", "-f", "-"], SILENCE)

    def connect(self, host: Host) -> None:
        """Lay the cable to a host: its end is called `uplink` there, and is up."""
        self.namespace.ip(
            f"link add to-{host.name} type veth peer name {UPLINK} netns {host.namespace.name}",
            f"link set to-{host.name} master {BRIDGE} up",
        )

    def introduce(self, port: Port) -> None:
        """Tell the outside a new guest's hardware address, so that nothing waits for its resolution."""
        self.outside.ip(*_neighbours(port, port.mac))

    def announce(self, port: Port, host: Host) -> None:
        """Say on the guest's behalf that it is at `host`; return when the fabric believes it. Raises DeadlinePassed."""
        # Written to the uplink itself, so no firewall sees it; the guest's own link is down at that moment.
        with host.namespace.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packet:
            packet.bind((UPLINK, 0))
            for address in port.addresses:
                packet.send(_announcement(port.mac, address))

        def is_learned() -> bool:
            entry = self.namespace.run(["bridge", "fdb", "get", port.mac, "br", BRIDGE])
            return re.search(rf"\bdev to-{re.escape(host.name)}\b", entry) is not None

        wait_until(is_learned, f"the fabric to learn that {port.mac} is at {host.name}")

    def close(self) -> None:
        """Delete it. May be repeated."""
        self.outside.close()
        self.namespace.close()


class RoutedFabric:
    """A router with one point-to-point link per host; a guest's /32 and /128 point to the host where it is."""

    def __init__(self, prefix: str) -> None:
        self.namespace = Namespace(f"{prefix}fabric")
        self.outside = Namespace(f"{prefix}outside")
        _filter_bridges(self.namespace, False)
        _filter_bridges(self.outside, False)
        forward(self.namespace)
        self.namespace.ip(
            f"link add to-outside address {addresses.CABLE_OUT_MAC} type veth "
            f"peer name eth0 netns {self.outside.name} address {addresses.OUTSIDE_MAC}",
            "link set to-outside up",
            *far_end("to-outside", addresses.OUTSIDE_MAC),
            *routes_via_far_end("to-outside", (addresses.OUTSIDE_V4, addresses.OUTSIDE_V6)),
        )
        self.outside.ip(
            f"address add {addresses.OUTSIDE_V4}/32 dev eth0",
            f"address add {addresses.OUTSIDE_V6}/128 dev eth0 nodad",
            "link set eth0 up",
            *near_end_is_gateway("eth0", addresses.CABLE_OUT_MAC),
        )
        self.outside.run(["nft", "-f", "-"], SILENCE)

    def connect(self, host: Host) -> None:
        """Lay the cable to a host: its end is called `uplink` there."""
        self.namespace.ip(
            f"link add to-{host.name} address {addresses.cable_mac(host.number)} type veth "
            f"peer name {UPLINK} netns {host.namespace.name} address {addresses.uplink_mac(host.number)}",
            f"link set to-{host.name} up",
            *far_end(f"to-{host.name}", addresses.uplink_mac(host.number)),
        )

    def introduce(self, port: Port) -> None:
        """Nothing to tell: the outside knows its gateway only."""

    def announce(self, port: Port, host: Host) -> None:
        """Route the guest's addresses to `host`; to where they are others, translate them on the way."""
        there, way = host.as_here(port).addresses, f"to-{host.name}"
        table = f"of_{port.number}"
        if there == port.addresses:
            renumbering.stop(self.namespace, table)
        else:
            pairs = zip(there, port.addresses, strict=True)
            renumbering.translate(self.namespace, table, pairs, own_side=way, other_side="to-outside")
        self.namespace.ip(*routes_via_far_end(way, (*there, *port.public)))

    def close(self) -> None:
        """Delete it. May be repeated."""
        self.outside.close()
        self.namespace.close()


def forward(namespace: Namespace) -> None:
    """Let a namespace route both families."""
    namespace.sysctl("net.ipv4.ip_forward", 1)
    namespace.sysctl("net.ipv6.conf.all.forwarding", 1)
    for which in ("all", "default"):
        namespace.sysctl(f"net.ipv4.conf.{which}.send_redirects", 0)


def far_end(device: str, mac: str) -> list[str]:
    """`ip` commands: who is at the other end of a point-to-point link of the fabric."""
    return [
        f"neigh replace {addresses.FAR_V4} lladdr {mac} dev {device} nud permanent",
        f"neigh replace {addresses.FAR_V6} lladdr {mac} dev {device} nud permanent",
    ]


def routes_via_far_end(device: str, destinations: tuple[str, ...]) -> list[str]:
    """`ip` commands: these addresses are behind that link."""
    return [
        f"route replace {address}/128 via {addresses.FAR_V6} dev {device} onlink"
        if is_ipv6(address)
        else f"route replace {address}/32 via {addresses.FAR_V4} dev {device} onlink"
        for address in destinations
    ]


def near_end_is_gateway(device: str, mac: str) -> list[str]:
    """`ip` commands: everything else is behind the fabric's end of that link."""
    return [
        f"neigh replace {addresses.NEAR_V4} lladdr {mac} dev {device} nud permanent",
        f"neigh replace {addresses.NEAR_V6} lladdr {mac} dev {device} nud permanent",
        f"route replace default via {addresses.NEAR_V4} dev {device} onlink",
        f"route replace ::/0 via {addresses.NEAR_V6} dev {device} onlink",
    ]


def _filter_bridges(namespace: Namespace, is_on: bool) -> None:
    if not is_on and not Path("/proc/sys/net/bridge").exists():  # a kernel without br_netfilter filters none
        return
    for family in ("iptables", "ip6tables", "arptables"):
        namespace.sysctl(f"net.bridge.bridge-nf-call-{family}", int(is_on))


def _neighbours(port: Port, mac: str) -> list[str]:
    return [f"neigh replace {address} lladdr {mac} dev eth0 nud permanent" for address in port.addresses]


def _announcement(mac: str, address: str) -> bytes:
    """A gratuitous ARP, or an unsolicited neighbour advertisement (RFC 4861 section 4.4), as a frame."""
    hardware = bytes.fromhex(mac.replace(":", ""))
    if not is_ipv6(address):
        packed = socket.inet_pton(socket.AF_INET, address)
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + hardware + packed + bytes(6) + packed
        return BROADCAST_MAC + hardware + struct.pack("!H", ETH_ARP) + arp
    packed = socket.inet_pton(socket.AF_INET6, address)
    all_nodes = socket.inet_pton(socket.AF_INET6, "ff02::1")
    override = 0x20000000
    body = struct.pack("!BBHI", 136, 0, 0, override) + packed + b"\x02\x01" + hardware
    pseudo = packed + all_nodes + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    checksum = _checksum(pseudo + body)
    body = body[:2] + struct.pack("!H", checksum) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + packed + all_nodes
    return ALL_NODES_MAC + hardware + struct.pack("!H", ETH_IPV6) + header + body


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
