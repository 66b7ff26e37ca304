"""A guest's port as a host's firewall sees it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rule:
    """New flows of this protocol (tcp, udp, or icmp of both families) may come in, to this destination port if any."""

    protocol: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What may begin. Established flows go on in any case, everything else is dropped."""

    egress_is_open: bool = True
    ingress: frozenset[Rule] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class Port:
    """`number` counts the lab's guests from 0; `tap` is the host's end of the guest's link."""

    id: str
    number: int
    tap: str
    mac: str
    addresses: tuple[str, ...]
    rules: Rules


def is_ipv6(address: str) -> bool:
    """True for an IPv6 address."""
    return ":" in address
