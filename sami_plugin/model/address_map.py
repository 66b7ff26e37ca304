"""The same hosts under other addresses: what another domain calls by one prefix is called by another one here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import netaddr
import numpy as np
import numpy.typing as npt

from sami_plugin.errors import ConfigurationError
from sami_plugin.model.flows import Addresses, Batch, holds_any

Mask = npt.NDArray[np.bool_]
Pair = tuple[netaddr.IPNetwork, netaddr.IPNetwork]


@dataclass(frozen=True, slots=True)
class AddressMap:
    """Prefixes of the other domain, each with the one of the same length that stands for it here."""

    pairs: tuple[Pair, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> AddressMap:
        """Reads pairs THEIRS=OURS, such as ``10.1.0.0/24=10.9.0.0/24``.

        :raises ConfigurationError: one is no pair of equally long prefixes, or two of them overlap.
        """
        pairs = tuple(_pair(text) for text in texts)
        for one, other in combinations(pairs, 2):
            for side, whose in enumerate(("their", "our")):
                if one[side] in other[side] or other[side] in one[side]:
                    raise ConfigurationError(f"{whose} prefixes {one[side]} and {other[side]} overlap")
        return cls(pairs)

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def applied(self, batch: Batch) -> tuple[Batch, Mask]:
        """The flows as they are called here, and which of them cannot be: another flow may be called the same.

        Such a flow has an address that is of a prefix of ours, as the other domain calls it, and stands for nothing
        here.
        """
        mapped = batch.copy()
        is_ambiguous = np.zeros(len(batch), bool)
        for field in batch.address_fields:
            before, after = _halves(batch.rows[field]), _halves(mapped.rows[field])
            is_mapped, is_ours = np.zeros(len(batch), bool), np.zeros(len(batch), bool)
            for theirs, ours in self.pairs:
                if (theirs.version == 6) == batch.template.is_ipv6:
                    inside = _is_inside(before, theirs)
                    host_bits = before[inside] & ~_words(theirs.netmask, before)
                    after[inside] = host_bits | _words(ours.network, before)
                    is_mapped |= inside
                    is_ours |= _is_inside(before, ours)
            is_ambiguous |= is_ours & ~is_mapped
        return mapped, is_ambiguous


def peer_sees_another(before: Batch, after: Batch, addresses: Addresses) -> Mask:
    """Which flows have other addresses than before where their peers are, seen from who has `addresses`.

    Behind a translation that the flow itself tells of, peers see what it translates to. What is no flow has no peer.
    """
    if not after.template.is_flow:
        return np.zeros(len(after), bool)
    inner = has_changed(before, after, _ends(after, ("source", "destination")))
    behind = _ends(after, ("postNATSource", "postNATDestination"))
    if not behind:
        return inner
    begins_here = holds_any(after.rows[after.source_field], after.template.is_ipv6, addresses)
    return np.where(begins_here, has_changed(before, after, behind), inner)


def has_changed(before: Batch, after: Batch, fields: Iterable[str]) -> Mask:
    """Which rows differ in one of these address fields."""
    changed = np.zeros(len(before), bool)
    for field in fields:
        changed |= (_halves(before.rows[field]) != _halves(after.rows[field])).any(axis=1)
    return changed


def _ends(batch: Batch, places: tuple[str, ...]) -> list[str]:
    return [field for field in batch.address_fields if field.startswith(places)]


def _pair(text: str) -> Pair:
    theirs, is_pair, ours = text.partition("=")
    try:
        made = netaddr.IPNetwork(theirs.strip()), netaddr.IPNetwork(ours.strip())
    except (netaddr.AddrFormatError, ValueError) as error:
        raise ConfigurationError(f"{text!r} is no pair of prefixes THEIRS=OURS") from error
    if not is_pair or any(prefix.ip != prefix.network for prefix in made):
        raise ConfigurationError(f"{text!r} is no pair of prefixes THEIRS=OURS, without bits behind the prefix")
    if made[0].version != made[1].version or made[0].prefixlen != made[1].prefixlen:
        raise ConfigurationError(f"{text!r}: both prefixes have to be of one family and equally long")
    return made


def _halves(column: npt.NDArray[np.generic]) -> npt.NDArray[np.unsignedinteger]:
    """An address column as rows of words: one of 32 bits, or two of 64. Shares its memory."""
    return column.reshape(len(column), *(column.shape[1:] or (1,)))  # type: ignore[return-value]


def _words(address: netaddr.IPAddress, like: npt.NDArray[np.generic]) -> npt.NDArray[np.unsignedinteger]:
    return np.array(list(_split(address)), like.dtype)


def _split(address: netaddr.IPAddress) -> Iterator[int]:
    if address.version == 6:
        yield int(address) >> 64
        yield int(address) & ((1 << 64) - 1)
    else:
        yield int(address)


def _is_inside(rows: npt.NDArray[np.unsignedinteger], prefix: netaddr.IPNetwork) -> Mask:
    is_inside: Mask = ((rows & _words(prefix.netmask, rows)) == _words(prefix.network, rows)).all(axis=1)
    return is_inside
