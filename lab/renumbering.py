"""A guest that one host knows by other addresses: a stateless translation at its tap, and one on the way to that host.

The guest itself keeps its addresses, and so do its peers' views of it. Only the host's firewall and routes have others.
"""

from __future__ import annotations

from collections.abc import Iterable

from lab.namespace import Namespace
from lab.port import is_ipv6

Pairs = Iterable[tuple[str, str]]


def translate(namespace: Namespace, name: str, pairs: Pairs, *, own_side: str, other_side: str = "") -> None:
    """From `own_side` on, packets that are for the second address of a pair go to the first, and back.

    What comes in at `own_side` from the first address is from the second; what leaves there for the second is for the
    first. With `other_side`, where the routing decision follows, what comes in there is translated at once.
    """
    before, behind = [], []
    for inner, outer in pairs:
        family = "ip6" if is_ipv6(inner) else "ip"
        before.append(f"iifname {own_side} {family} saddr {inner} {family} saddr set {outer}")
        if other_side:
            before.append(f"iifname {other_side} {family} daddr {outer} {family} daddr set {inner}")
        else:
            behind.append(f"oifname {own_side} {family} daddr {outer} {family} daddr set {inner}")
    # Before conntrack and zones look at what comes in, and behind them for what goes out.
    chains = {
        "before": ["type filter hook prerouting priority raw - 10;", *before],
        "behind": ["type filter hook postrouting priority srcnat + 10;", *behind],
    }
    body = "\n".join(f"chain {chain} {{\n" + "\n".join(lines) + "\n}" for chain, lines in chains.items())
    stop(namespace, name)
    namespace.run(["nft", "-f", "-"], f"table inet {name} {{\n{body}\n}}\n")


def stop(namespace: Namespace, name: str) -> None:
    """No more. May be repeated."""
    namespace.run(["nft", "-f", "-"], f"table inet {name}\ndelete table inet {name}\n")
