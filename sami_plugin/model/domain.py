"""Another administrative domain, as this host's operator describes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sami_plugin.model.address_map import AddressMap
from sami_plugin.model.settings import Files


@dataclass(frozen=True, slots=True)
class Domain:
    """Whose hosts these are, how they are reached, who vouches for them, and what may pass between them and this one.

    Patterns are those of `fnmatch`.
    """

    name: str
    hosts: tuple[str, ...]
    """Patterns of its hosts' names. Nobody else speaks for it, and they speak for no other."""
    credentials: Files
    """This host's own certificate, and the domain's authorities."""
    transport_url: str = ""
    """The broker at which its hosts listen; empty: the one at which this host does."""
    address_map: AddressMap = AddressMap()  # noqa: RUF009, a frozen value
    peers_follow: bool = False
    """Whether peers go on to see a renumbered guest by the address that they know."""
    kinds_in: tuple[str, ...] = ("*",)
    """Patterns of the kinds of flows (`Template.name`) that are taken from it."""
    kinds_out: tuple[str, ...] = ("*",)
    policy: str = ""
    """Name of the policy for guests that come from it; empty: this host's default."""

    def has(self, host: str) -> bool:
        return _is_one_of(host, self.hosts)

    def takes(self, kind: str) -> bool:
        return _is_one_of(kind, self.kinds_in)

    def gives(self, kind: str) -> bool:
        return _is_one_of(kind, self.kinds_out)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
