"""The firewall of a routing host: one nftables table for both families.

A packet has one zone here too, so two guests of one routed host cannot talk to each other.
"""

from lab.firewall import UPLINK, Firewall
from lab.port import Port, is_ipv6

TABLE = "inet lab"


class NftablesFirewall(Firewall):
    """See Firewall. It owns the table `inet lab` and touches no other."""

    def set_up(self) -> None:
        """Drop everything. Call once, first."""
        self._apply([])

    def _apply(self, ports: list[Port]) -> None:
        # Declared, so that it can be deleted; all in one transaction.
        self._namespace.run(["nft", "-f", "-"], f"table {TABLE}\ndelete table {TABLE}\n{self._render(ports)}")

    def _render(self, ports: list[Port]) -> str:
        neighbours = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }"
        zones, egress, ingress, chains = [], [], [], []
        for port in ports:
            zone = self.zone(port)
            zones.append(f"iifname {port.tap} ct zone set {zone}")
            for address in port.addresses:
                family = "ip6" if is_ipv6(address) else "ip"
                zones.append(f"iifname {UPLINK} {family} daddr {address} ct zone set {zone}")
            egress.append(f"iifname {port.tap} jump out-{port.tap}")
            ingress.append(f"oifname {port.tap} jump in-{port.tap}")
            leaving = ["ct state invalid drop", "ct state established,related return"]
            leaving += ["return"] if port.rules.egress_is_open else []
            coming = ["ct state invalid drop", "ct state established,related accept"]
            coming += [_accept(rule.protocol, rule.port) for rule in sorted(port.rules.ingress, key=str)]
            chains.append((f"out-{port.tap}", [*leaving, "drop"]))
            chains.append((f"in-{port.tap}", [*coming, "drop"]))
        raw = "type filter hook prerouting priority raw; policy accept;"
        forward = "type filter hook forward priority filter; policy drop;"
        chains.append(("zones", [raw, f"{neighbours} notrack accept", *zones]))
        chains.append(("forward", [forward, f"{neighbours} accept", *egress, *ingress, f"oifname {UPLINK} accept"]))
        body = "\n".join(f"chain {name} {{\n" + "\n".join(lines) + "\n}" for name, lines in chains)
        return f"table {TABLE} {{\n{body}\n}}\n"


def _accept(protocol: str, port: int | None) -> str:
    if protocol == "icmp":
        return "meta l4proto { icmp, icmpv6 } accept"
    if port is None:
        return f"meta l4proto {protocol} accept"
    return f"{protocol} dport {port} accept"
