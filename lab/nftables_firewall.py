"""The firewall of a routing host: one nftables table for both families.

A packet has one zone here too, so two guests of one routed host cannot talk to each other.
"""

from lab.firewall import UPLINK, Firewall
from lab.port import Port, is_ipv6

TABLE = "inet lab"
MASQUERADED = "50000-59999"
"""Ports of a public address that guests' own are translated to."""


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
        coming_in, going_out = [], []
        for port in ports:
            zone = self.zone(port)
            zones.append(f"iifname {port.tap} ct zone set {zone}")
            for address in (*port.addresses, *port.public):
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
            for own, public in zip(port.addresses, port.public, strict=False):
                family = "ip6" if is_ipv6(own) else "ip"
                coming_in.append(f"iifname {UPLINK} {family} daddr {public} dnat {family} to {own}")
                # Never the port of before: nothing but the entry knows it.
                translated = f"{_bracketed(public)}:{MASQUERADED}"
                for protocol in ("tcp", "udp"):
                    words = f"oifname {UPLINK} {family} saddr {own} meta l4proto {protocol} snat {family} to"
                    going_out.append(f"{words} {translated} fully-random")
                going_out.append(f"oifname {UPLINK} {family} saddr {own} snat {family} to {public}")
        raw = "type filter hook prerouting priority raw; policy accept;"
        forward = "type filter hook forward priority filter; policy drop;"
        chains.append(("zones", [raw, f"{neighbours} notrack accept", *zones]))
        chains.append(("forward", [forward, f"{neighbours} accept", *egress, *ingress, f"oifname {UPLINK} accept"]))
        if coming_in:
            chains.append(("coming_in", ["type nat hook prerouting priority dstnat;", *coming_in]))
            chains.append(("going_out", ["type nat hook postrouting priority srcnat;", *going_out]))
        body = "\n".join(f"chain {name} {{\n" + "\n".join(lines) + "\n}" for name, lines in chains)
        return f"table {TABLE} {{\n{body}\n}}\n"


def _bracketed(address: str) -> str:
    return f"[{address}]" if is_ipv6(address) else address


def _accept(protocol: str, port: int | None) -> str:
    if protocol == "icmp":
        return "meta l4proto { icmp, icmpv6 } accept"
    if port is None:
        return f"meta l4proto {protocol} accept"
    return f"{protocol} dport {port} accept"
