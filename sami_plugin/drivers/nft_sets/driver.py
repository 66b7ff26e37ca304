"""nftables' sets and maps, and ipsets, as a SAMI driver."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Capabilities, FlowDriver, Watch
from sami_plugin.drivers.linux_conntrack.netlink import Connection
from sami_plugin.drivers.nft_sets import elements as nft
from sami_plugin.drivers.nft_sets import ipsets, nf_tables
from sami_plugin.drivers.nft_sets.elements import Element, Form, NamedSet
from sami_plugin.drivers.nft_sets.kinds import IPV4, IPV6, KEY_OCTETS, NAME_OCTETS, NO_OTHER
from sami_plugin.errors import ConfigurationError, UndeclaredAbility
from sami_plugin.model.flows import Batch, Omitted, Template, has_end_in
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.results import Outcome, Reason, Results, results
from sami_plugin.model.scope import Scope

_TEMPLATES = {4: IPV4, 6: IPV6}
_NAMES = frozenset(template.name for template in _TEMPLATES.values())
_REASONS = {
    errno.ENFILE: Reason.SET_FULL,
    errno.ENOSPC: Reason.SET_FULL,
    errno.ENOMEM: Reason.OUT_OF_MEMORY,
    errno.EPERM: Reason.NOT_PERMITTED,
    errno.EOPNOTSUPP: Reason.NOT_SUPPORTED,
    errno.EEXIST: Reason.EXISTS,
    errno.ENOENT: Reason.NO_ZONE,
    errno.EBUSY: Reason.BUSY,
}
_IPSET = "ipset"
A_LIMIT_IS_FULL = "how much of its `limit` is used the kernel does not tell: after a move it lets through a burst again"


class NftSetsDriver(FlowDriver):
    """Exports, inserts and removes the elements of named sets that have an address of the port in their keys.

    Needs CAP_NET_ADMIN, as linux_conntrack does. The kernel tells no changes that packets make to a set.
    """

    def __init__(self, sets: Sequence[str] = ()) -> None:
        """`sets` are ``[NAME=]FAMILY TABLE SET`` or ``[NAME=]ipset SET`` each; NAME is what both hosts call it, and by
        default SET.

        :raises ConfigurationError: one is not; says which.
        """
        self._sets = {named.name: named for named in map(_named, sets)}
        if len(self._sets) != len(sets):
            raise ConfigurationError("[nft_sets] sets: two have one name; write NAME=FAMILY TABLE SET for one of them")

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        namespace = scope.namespace if scope is not None else None
        notes = [] if self._sets else ["no set is named; name those that traffic adds to in [nft_sets] sets"]
        with _connected(namespace) as connection:
            for named in self._sets.values():
                form = _kernel(named).form_of(connection, named)
                if form is not None and (why := nft.why_not_carried(form)):
                    notes.append(f"{named.words} is not carried: {why}")
                elif form is not None and "limit" in form.statements:
                    notes.append(f"{named.words}: {A_LIMIT_IS_FULL}")
        kinds = _NAMES if self._sets else frozenset()
        return Capabilities(kinds, False, None, 0, f"nft_sets of {namespace or 'the agent'}", frozenset(), tuple(notes))

    def watch(self, scope: Scope) -> Watch:
        raise UndeclaredAbility("the kernel tells no changes that packets make to a set")

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        with _connected(scope.namespace) as connection:
            for named in self._sets.values():
                form = _kernel(named).form_of(connection, named)
                if form is not None:
                    yield from _told(connection, scope, named, form)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = self._refusals(scope, batch)
        with _connected(scope.namespace) as connection:
            for place, positions in self._by_set(connection, batch, made["outcome"] == Outcome.IMPORTED):
                if place is None:
                    made[positions] = results(len(positions), Outcome.REFUSED, Reason.NO_ZONE)
                    continue
                named, form = place
                fitting = positions[_fits(scope, named, form, batch, positions, made)]
                held = _held(connection, scope, named, form, batch.template, batch.take(fitting))
                is_there = KeyIndex(held).find(batch.take(fitting)) >= 0
                is_theirs = has_end_in(batch.take(fitting), scope.neighbours) & scope.is_shared
                made[fitting[is_theirs]] = results(int(is_theirs.sum()), Outcome.REFUSED, Reason.LOCAL_PORTS_OWN)
                made[fitting[is_theirs & is_there]] = results(int((is_theirs & is_there).sum()), Outcome.PRESENT)
                there = dict(zip(fitting.tolist(), is_there.tolist(), strict=True))
                for some in _pieces(fitting[~is_theirs]):
                    _put_in(connection, named, form, batch, some, there, made)
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        """Leaves their time to the elements: no traffic would have renewed it."""
        made = self._refusals(scope, batch)
        _, is_there = self.read_back(scope, batch)
        is_asked = made["outcome"] != Outcome.REFUSED
        made["outcome"][is_asked] = np.where(is_there[is_asked], Outcome.PRESENT, Outcome.ABSENT)
        return made

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        rows, is_there = batch.template.empty(len(batch)), np.zeros(len(batch), bool)
        if batch.template.name not in _NAMES:
            return Batch(batch.template, rows), is_there
        with _connected(scope.namespace) as connection:
            for place, positions in self._by_set(connection, batch, scope.owns(batch)):
                if place is None:
                    continue
                held = _held(connection, scope, *place, batch.template, batch.take(positions))
                at = KeyIndex(held).find(batch.take(positions))
                rows[positions[at >= 0]], is_there[positions[at >= 0]] = held.rows[at[at >= 0]], True
        return Batch(batch.template, rows), is_there

    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = results(len(identities), Outcome.ABSENT)
        template = next((one for one in _TEMPLATES.values() if one.key == identities.template.key), None)
        if template is None:
            return made
        with _connected(scope.namespace) as connection:
            for place, positions in self._by_set(connection, identities, scope.owns(identities)):
                if place is None:
                    continue
                held = KeyIndex(_held(connection, scope, *place, template, identities.take(positions)))
                victims = positions[held.find(identities.take(positions)) >= 0]
                is_theirs = has_end_in(identities.take(victims), scope.neighbours) & scope.is_shared
                made[victims[is_theirs]] = results(int(is_theirs.sum()), Outcome.REFUSED, Reason.LOCAL_PORTS_OWN)
                victims = victims[~is_theirs]
                for some in _pieces(victims):
                    named, form = place
                    keys = {one: _key(identities.rows[one]) for one in some}
                    gone = _kernel(named).take_out(connection, named, form, keys)
                    made["outcome"][gone] = Outcome.REMOVED
        return made

    def _refusals(self, scope: Scope, batch: Batch) -> Results:
        if batch.template.name not in _NAMES or not self._sets:
            return results(len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        made = results(len(batch))
        is_zoned = scope.has_zone_of(batch)
        for reason, which in (
            (Reason.FOREIGN_ADDRESS, ~has_end_in(batch, scope.addresses)),
            (Reason.INVALID, ~is_zoned),
        ):
            made["outcome"][which], made["reason"][which] = Outcome.REFUSED, reason
        return made

    def _by_set(
        self, connection: Connection, batch: Batch, which: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[tuple[NamedSet, Form] | None, npt.NDArray[np.intp]]]:
        """The positions of these records by set, each with the set and its form; None where there is none here."""
        if not which.any():
            return
        names, is_nobodys = batch.rows["nftSetName"], which.copy()
        for named in self._sets.values():
            is_its = which & (names == _octets(named.name.encode(), NAME_OCTETS)).all(axis=1)
            form = _kernel(named).form_of(connection, named) if is_its.any() else None
            if form is not None and not nft.why_not_carried(form):
                is_nobodys &= ~is_its
                yield (named, form), np.flatnonzero(is_its)
        if is_nobodys.any():
            yield None, np.flatnonzero(is_nobodys)


def _named(text: str) -> NamedSet:
    name, is_named, words = text.rpartition("=")
    parts = words.split()
    is_ipset = len(parts) == 2 and parts[0] == _IPSET
    if not is_ipset and (len(parts) != 3 or parts[0] not in nft.FAMILIES):
        raise ConfigurationError(
            f"[nft_sets] sets: {text!r} is no [NAME=]FAMILY TABLE SET and no [NAME=]{_IPSET} SET; "
            f"FAMILY is one of {', '.join(nft.FAMILIES)}"
        )
    name = name.strip() if is_named else parts[-1]
    if not name or not name.isascii() or not name.isprintable() or len(name) > NAME_OCTETS:
        raise ConfigurationError(
            f"[nft_sets] sets: {text!r}: a name has 1 to {NAME_OCTETS} ASCII characters; write NAME=FAMILY TABLE SET"
        )
    return NamedSet(name, None, "", parts[1]) if is_ipset else NamedSet(name, nft.FAMILIES[parts[0]], *parts[1:])


class _Kernel(Protocol):
    """What is asked of the kernel about sets of one sort; the modules say what each does."""

    def form_of(self, connection: Connection, named: NamedSet) -> Form | None: ...

    def is_name(self, form: Form, key: bytes) -> bool: ...

    def elements_of(
        self, connection: Connection, named: NamedSet, form: Form, addresses: Sequence[bytes]
    ) -> list[Element | None]: ...

    def held(self, connection: Connection, named: NamedSet, form: Form, keys: Sequence[bytes]) -> list[Element]: ...

    def put(
        self,
        connection: Connection,
        named: NamedSet,
        form: Form,
        wanted: Mapping[int, Element],
        former: Sequence[int],
    ) -> dict[int, int]: ...

    def take_out(self, connection: Connection, named: NamedSet, form: Form, keys: Mapping[int, bytes]) -> list[int]: ...


def _kernel(named: NamedSet) -> _Kernel:
    """Who knows how the kernel is asked of such a set."""
    return ipsets if named.family is None else nf_tables


def _connected(namespace: str | None) -> contextlib.closing[Connection]:
    """A socket for one call: it would keep the namespace alive, and entering one costs less than a set's dump."""
    return contextlib.closing(Connection(namespace))


def _told(connection: Connection, scope: Scope, named: NamedSet, form: Form) -> Iterator[Batch | Omitted]:
    """The set's elements that are the port's."""
    packed = [address.packed for address in scope.addresses]
    found = _kernel(named).elements_of(connection, named, form, packed) if packed and scope.zones else []
    if why := nft.why_not_carried(form):
        if found:
            yield Omitted(f"{named.words}: {why}", len(found))
        return
    unclear = sum(element is None for element in found)
    if unclear:
        yield Omitted(f"{named.words}: elements with statements that are not known here, or of intervals", unclear)
    for template in _TEMPLATES.values():
        batch = _rows(scope, named, form, template, [element for element in found if element is not None])
        if len(batch):
            yield batch


def _held(
    connection: Connection, scope: Scope, named: NamedSet, form: Form, template: Template, wanted: Batch
) -> Batch:
    """What there is of these names."""
    found: list[Element] = []
    keys = [key for row in wanted.rows if len(key := _key(row)) == form.key_octets]
    if keys:
        found = _kernel(named).held(connection, named, form, keys)
    return _rows(scope, named, form, template, found)


def _put_in(
    connection: Connection,
    named: NamedSet,
    form: Form,
    batch: Batch,
    positions: list[int],
    is_there: dict[int, bool],
    made: Results,
) -> None:
    wanted = {one: _element(batch.rows[one], _key(batch.rows[one]), form) for one in positions}
    former = [one for one in positions if is_there[one]]
    for position, code in _kernel(named).put(connection, named, form, wanted, former).items():
        made[position] = (Outcome.REFUSED, _REASONS.get(code, Reason.INVALID), 0)


def _rows(scope: Scope, named: NamedSet, form: Form, template: Template, elements: list[Element]) -> Batch:
    """The records of those elements that have an address of the port where the set has addresses of this family."""
    version, size = (6, 16) if template.is_ipv6 else (4, 4)
    places = form.places.get(version, ())
    own = {address.packed for address in scope.addresses if address.version == version}
    chosen: list[tuple[Element, int, int]] = []
    for element in elements:
        at = next((at for at in places if element.key[at : at + size] in own), None)
        if at is not None:
            chosen.append((element, at, next((place for place in places if place != at), NO_OTHER)))
    rows = template.empty(len(chosen))
    rows["zoneRole"] = int(min(scope.zones, default=0))
    rows["nftSetName"] = _octets(named.name.encode(), NAME_OCTETS)
    for row, (element, at, other) in zip(rows, chosen, strict=True):
        key = bytearray(element.key)
        for end, place in zip(template.ends, (at, other), strict=True):
            if place != NO_OTHER:
                address = bytes(key[place : place + size])
                row[end] = np.frombuffer(address, ">u8") if template.is_ipv6 else int.from_bytes(address, "big")
                key[place : place + size] = bytes(size)
        row["nftAddressOffset"], row["nftOtherAddressOffset"] = at, other
        row["nftSetKeyOctets"], row["nftSetKey"] = len(element.key), _octets(bytes(key), KEY_OCTETS)
        row["nftSetDataOctets"], row["nftSetData"] = len(element.data), _octets(element.data, KEY_OCTETS)
        row["nftElementTimeoutMilliseconds"] = element.timeout
        never = element.expiration is None
        row["remainingTimeoutSeconds"] = NEVER_SECONDS if never else max(1, -(-(element.expiration or 0) // 1000))
        nft.fill(row, element)
    return Batch(template, rows)


def _key(row: np.void) -> bytes:
    """The key of a record, with its addresses in their places."""
    key = bytearray(row["nftSetKey"].tobytes()[: int(row["nftSetKeyOctets"])])
    for end, offset in (("element", "nftAddressOffset"), ("other", "nftOtherAddressOffset")):
        at = int(row[offset])
        if at != NO_OTHER:
            address = _address(row, end)
            key[at : at + len(address)] = address
    return bytes(key)


def _address(row: np.void, end: str) -> bytes:
    if f"{end}IPv6Address" in (row.dtype.names or ()):
        return row[f"{end}IPv6Address"].tobytes()
    return int(row[f"{end}IPv4Address"]).to_bytes(4, "big")


def _fits(
    scope: Scope, named: NamedSet, form: Form, batch: Batch, positions: npt.NDArray[np.intp], made: Results
) -> npt.NDArray[np.bool_]:
    """Which records are of such a set, each named as it would be named here, and have time left; others are refused."""
    rows = batch.take(positions).rows
    fits = (rows["nftSetKeyOctets"] == form.key_octets) & (rows["nftSetDataOctets"] == form.data_octets)
    names = [Element(_key(row)) if is_fit else None for row, is_fit in zip(rows, fits, strict=True)]
    ours = _rows(scope, named, form, batch.template, [one for one in names if one is not None])
    # Another name of the same element would never be found again.
    fits &= KeyIndex(ours).find(Batch(batch.template, rows)) >= 0
    fits &= [one is not None and _kernel(named).is_name(form, one.key) for one in names]
    is_over = fits & (rows["remainingTimeoutSeconds"] == 0)
    # It would be there for ever.
    would_stay = fits & ~is_over & (rows["remainingTimeoutSeconds"] != NEVER_SECONDS) & (not form.has_timeouts)
    for reason, which in ((Reason.INVALID, ~fits), (Reason.EXPIRED, is_over), (Reason.NO_TIMEOUTS, would_stay)):
        made[positions[which]] = results(int(which.sum()), Outcome.REFUSED, reason)
    return np.asarray(fits & ~is_over & ~would_stay)


def _pieces(positions: npt.NDArray[np.intp]) -> Iterator[list[int]]:
    """So many as one change has: answers to all of them have to fit into a socket's buffer."""
    for first in range(0, len(positions), nft.MOST_AT_ONCE):
        yield positions[first : first + nft.MOST_AT_ONCE].tolist()


def _element(row: np.void, key: bytes, form: Form) -> Element:
    seconds = int(row["remainingTimeoutSeconds"])
    timeout, left = int(row["nftElementTimeoutMilliseconds"]), None if seconds == NEVER_SECONDS else seconds * 1000
    if left is not None:
        left = min(left, timeout or form.timeout or left)  # rounded up, it may be more than the kernel takes
    data = row["nftSetData"].tobytes()[: int(row["nftSetDataOctets"])]
    return Element(key, data, timeout, left, nft.statements_of(row, form))


def _octets(content: bytes, octets: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(content.ljust(octets, b"\0"), ">u8")
