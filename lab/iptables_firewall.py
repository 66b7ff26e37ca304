"""The firewall of a bridging host: br_netfilter, iptables and physdev.

This kernel has no NF_CONNTRACK_BRIDGE, so nftables' bridge family knows no `ct`; Neutron's Linux bridge agent works the
same way. A packet passes the host's stack once, so it has one zone: with a zone per port, two guests on one host cannot
talk to each other; with a shared zone they can, and their flow is one entry.
"""

from lab.firewall import UPLINK, Firewall
from lab.port import Port, is_ipv6

PHYSDEV = "-m physdev --physdev-is-bridged"
STATE = "-m conntrack --ctstate"
# Neighbour solicitations and advertisements.
NEIGHBOUR_TYPES = (135, 136)


class IptablesFirewall(Firewall):
    """See Firewall. Its chains are its own, so rules added by hand to the built-in chains stay."""

    def _apply(self, ports: list[Port]) -> None:
        self._namespace.run(["iptables-restore", "--noflush"], self._render(ports, False))
        self._namespace.run(["ip6tables-restore", "--noflush"], self._render(ports, True))

    def set_up(self) -> None:
        """Drop everything. Call once, first."""
        for command in ("iptables-restore", "ip6tables-restore"):
            self._namespace.run([command], BASE)
        self._apply([])

    def _render(self, ports: list[Port], v6: bool) -> str:
        lines = ["*raw", ":zones - [0:0]"]
        if v6:
            lines += [f"-A zones -p icmpv6 --icmpv6-type {number} -j CT --notrack" for number in NEIGHBOUR_TYPES]
            lines += [f"-A zones -p icmpv6 --icmpv6-type {number} -j RETURN" for number in NEIGHBOUR_TYPES]
        for port in ports:
            zone = self.zone(port)
            lines.append(f"-A zones -m physdev --physdev-in {port.tap} -j CT --zone {zone}")
            for address in port.addresses:
                if is_ipv6(address) == v6:
                    lines.append(f"-A zones -m physdev --physdev-in {UPLINK} -d {address} -j CT --zone {zone}")
        lines += ["COMMIT", "*filter", ":egress - [0:0]", ":ingress - [0:0]"]
        if v6:
            # In front of both, for they accept for good.
            lines += [f"-A egress -p icmpv6 --icmpv6-type {number} -j ACCEPT" for number in NEIGHBOUR_TYPES]
        for port in ports:
            lines += self._port(port, v6)
        return "\n".join([*lines, "COMMIT", ""])

    def _port(self, port: Port, v6: bool) -> list[str]:
        leaving, coming = f"out-{port.tap}", f"in-{port.tap}"
        icmp = "icmpv6" if v6 else "icmp"
        # What leaves one port may still be for another one of this host, so `egress` returns and `ingress` accepts.
        lines = [
            f":{leaving} - [0:0]",
            f":{coming} - [0:0]",
            f"-A egress {PHYSDEV} --physdev-in {port.tap} -j {leaving}",
            f"-A ingress {PHYSDEV} --physdev-out {port.tap} -j {coming}",
            f"-A {leaving} {STATE} INVALID -j DROP",
            f"-A {leaving} {STATE} RELATED,ESTABLISHED -j RETURN",
            *([f"-A {leaving} -j RETURN"] if port.rules.egress_is_open else []),
            f"-A {leaving} -j DROP",
            f"-A {coming} {STATE} INVALID -j DROP",
            f"-A {coming} {STATE} RELATED,ESTABLISHED -j ACCEPT",
        ]
        for rule in sorted(port.rules.ingress, key=str):
            protocol = icmp if rule.protocol == "icmp" else rule.protocol
            match = f" --dport {rule.port}" if rule.port is not None else ""
            lines.append(f"-A {coming} -p {protocol}{match} -j ACCEPT")
        return [*lines, f"-A {coming} -j DROP"]


BASE = f"""*raw
:zones - [0:0]
-A PREROUTING -j zones
COMMIT
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
:egress - [0:0]
:ingress - [0:0]
-A FORWARD -j egress
-A FORWARD -j ingress
-A FORWARD {PHYSDEV} --physdev-out {UPLINK} -j ACCEPT
COMMIT
"""
