"""A guest's port as a host's firewall sees it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    """`number` counts the lab's guests from 0; `tap` is the host's end of the guest's link; `public` is what its
    first addresses are translated to, one of each family, if they are."""

    id: str
    number: int
    tap: str
    mac: str
    addresses: tuple[str, ...]
    rules: Rules
    public: tuple[str, ...] = ()


class Ruled(ABC):
    """Who has rules that can be changed; a change is in all kernels when the call returns."""

    def allow(self, protocol: str, port: int | None = None) -> None:
        """Let new flows in: tcp, udp or icmp, to this port if one is given."""
        self._change(lambda rules: {"ingress": rules.ingress | {Rule(protocol, port)}})

    def revoke(self, protocol: str, port: int | None = None) -> None:
        """Take such a rule away; flows that it admitted go on as long as their entry lives. May be repeated."""
        self._change(lambda rules: {"ingress": rules.ingress - {Rule(protocol, port)}})

    def open_egress(self) -> None:
        """The guest may begin any flow."""
        self._change(lambda rules: {"egress_is_open": True})

    def close_egress(self) -> None:
        """The guest may only answer in established flows."""
        self._change(lambda rules: {"egress_is_open": False})

    @abstractmethod
    def _change(self, change: Callable[[Rules], dict]) -> None:
        """Replace the fields of the rules that `change` gives, on every host."""


def is_ipv6(address: str) -> bool:
    """True for an IPv6 address."""
    return ":" in address
