"""What a source keeps of each port of a guest that leaves: its watch, and what the other host has been told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from sami_plugin.drivers.base import Changes, FlowDriver, Watch
from sami_plugin.model.domain import Domain
from sami_plugin.model.flows import Batch, Omitted, importance
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.results import has_changed
from sami_plugin.model.risk import functions_of
from sami_plugin.model.scope import Scope


@dataclass(slots=True)
class Leaving:
    """One port of the guest that leaves."""

    scope: Scope
    watch: Watch | None
    """None where the driver cannot watch: then only another export tells what changed."""
    exported: FlowTable = field(default_factory=FlowTable)
    """What the other host was told of."""
    withheld: FlowTable = field(default_factory=FlowTable)
    """What it was not told of, for its domain is not to have it. It is purged all the same."""

    former: FlowTable = field(default_factory=FlowTable)
    """What another session, with which this one goes on, told of; the firewall may not have it any more."""
    unplaced: FlowTable = field(default_factory=FlowTable)
    """What it was not told of, for it has no place for it. It is purged all the same."""

    stays: frozenset[str] = frozenset()
    """Kinds that a device keeps which the other host has as well, or may have."""

    overtaken: FlowTable = field(default_factory=FlowTable)
    """Names of what changed since it was exported, and before it was sent: what was exported of it says nothing now."""

    def untold(self) -> tuple[FlowTable, FlowTable]:
        """What is the guest's, and the other host does not know of."""
        return self.withheld, self.unplaced

    def told(self) -> FlowTable:
        """What the other host was told of by now, or by the session with which this one goes on."""
        for batch in self.exported.batches():
            self.former.put(batch)
        return self.former

    def changes(self, *, is_last: bool) -> Changes:
        """What changed since the last call."""
        if self.watch is None:
            return Changes(is_complete=False)
        told = self.watch.collect_last() if is_last else self.watch.collect()
        if not self.stays:
            return told
        removals, upserts = (tuple(filter(self.leaves, batches)) for batches in (told.removals, told.upserts))
        return replace(told, removals=removals, upserts=upserts)

    def leaves(self, batch: Batch) -> bool:
        """Whether records of this kind leave with the guest."""
        return batch.template.name.removesuffix("-identity") not in self.stays

    def close(self) -> None:
        """Ends the watch. May be repeated."""
        if self.watch is not None:
            self.watch.close()


Piece = tuple[Leaving, Batch]
"""Some flows of one port."""


KEPT = "kept at the source for guests that stay there, or come"
NOT_FOR_THAT_DOMAIN = "this kind may not go to that domain (kinds_out)"


@dataclass(slots=True)
class Inventory:
    """What a guest has, counted for another host."""

    counts: Counter[str] = field(default_factory=Counter)
    """Flows by kind, of those that the other host may have."""
    left_out: Counter[str] = field(default_factory=Counter)
    """By reason, those that it will not be given."""
    functions: set[str] = field(default_factory=set)

    def add(self, piece: Batch | Omitted, domain: Domain | None) -> None:
        """Counts what a driver has exported; `domain` is the other host's."""
        if isinstance(piece, Omitted):
            self.left_out[piece.reason] += piece.count
        elif domain is not None and not domain.gives(piece.template.usual.name):
            self.left_out[NOT_FOR_THAT_DOMAIN] += len(piece)
        else:
            self.counts[piece.template.name] += len(piece)
            self.functions |= functions_of(piece)

    def told(self) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
        """As the messages have it: kinds and counts, functions, reasons and how many are left out by each."""
        return (
            tuple(self.counts),
            tuple(self.counts.values()),
            tuple(sorted(self.functions)),
            tuple(self.left_out),
            tuple(self.left_out.values()),
        )


class Sweep:
    """A whole export beside the session's other work, compared with what was told so far."""

    def __init__(self, ports: list[Leaving], driver: FlowDriver) -> None:
        self._driver = driver
        self._seen = {port.scope.port: FlowTable() for port in ports}
        self._ports = ports
        self._pieces = (
            (port, piece)
            for port in ports
            for piece in driver.export(port.scope)
            if not isinstance(piece, Omitted) and port.leaves(piece)
        )

    def advance(self, flows: int) -> bool:
        """Exports about so many flows more; whether that was all."""
        pieces, is_all = taken(self._pieces, flows)
        for port, batch in merged(pieces):
            self._seen[port.scope.port].put(batch)
        return is_all

    def difference(self) -> Iterator[tuple[Leaving, list[Batch], list[Batch]]]:
        """Per port: the names of what is gone, and what is new or is not what was told."""
        for port in self._ports:
            seen = self._seen[port.scope.port]
            gone: list[Batch] = []
            for told in chain(*(table.batches() for table in (port.exported, *port.untold()))):
                missing = told.take(~seen.find(told)[0])
                if len(missing):
                    # The export ran past some buckets before newer flows came into them: ask for each by name.
                    found, there = self._driver.read_back(port.scope, missing)
                    if found.template.is_flow:  # it may be there and barred, since the firewall marked it
                        there &= found.rows["flowMark"] & np.uint32(port.scope.barred_marks) == 0
                    gone.append(missing.take(~there).identities)
            yield port, gone, [_changed(batch, port.exported, *port.untold()) for batch in seen.batches()]


def _changed(batch: Batch, *tables: FlowTable) -> Batch:
    """The flows that are in none of the tables, or only as something else but for their timeout."""
    is_same = np.zeros(len(batch), bool)
    for table in tables:
        known, rows = table.rows_of(batch)
        is_same |= known & ~has_changed(batch, rows)
    return batch.take(~is_same)


def foremost(pieces: Iterable[Piece], places: int) -> tuple[list[Piece], list[Piece]]:
    """The flows for which there are places, and the others; see `importance`."""
    whole = [piece for piece in merged(pieces) if len(piece[1])]
    if not whole:
        return [], []
    ranked = np.argsort(-np.concatenate([importance(batch) for _, batch in whole]), kind="stable")
    which = np.repeat(np.arange(len(whole)), [len(batch) for _, batch in whole])
    at = np.concatenate([np.arange(len(batch)) for _, batch in whole])
    first, rest = (
        [(port, batch.take(at[some][which[some] == number])) for number, (port, batch) in enumerate(whole)]
        for some in (ranked[:places], ranked[places:])
    )
    return first, rest


def taken(pieces: Iterator[Piece], flows: int) -> tuple[list[Piece], bool]:
    """Pieces of about so many flows, and whether there are no more."""
    some: list[Piece] = []
    count = 0
    for piece in pieces:
        some.append(piece)
        count += len(piece[1])
        if count >= flows:
            return some, False
    return some, True


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same flows with one batch per port and template."""
    groups: dict[tuple[str, str], list[Piece]] = {}
    for port, batch in pieces:
        groups.setdefault((port.scope.port, batch.template.name), []).append((port, batch))
    for group in groups.values():
        yield group[0][0], Batch.joined(group[0][1].template, [batch.rows for _, batch in group])


def split(batches: Iterable[Batch], flows: int) -> list[list[Batch]]:
    """The same flows in the same order, in lists of at most so many; one empty list where there are none."""
    lists: list[list[Batch]] = [[]]
    room = flows
    for batch in batches:
        at = 0
        while at < len(batch):
            if not room:
                lists.append([])
                room = flows
            part = Batch(batch.template, batch.rows[at : at + room])
            lists[-1].append(part)
            at += len(part)
            room -= len(part)
    return lists
