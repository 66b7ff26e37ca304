"""A firewall in memory: the reference of the driver contract, for tests and for trying things out.

A `MemoryDevice` is the firewall; the drivers that use it are ways to it. What it does with a flow is what Linux does:
an entry stands for two tuples, that of its first packet and that of the answer, and no two entries of a zone share one.
Entries are objects in a dictionary here, one by one: it is meant to be read and to be right, not to be fast.

Tests make it misbehave through `Faults`. Time passes only in the `clock` that it is given.
"""

from __future__ import annotations

import enum
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Capabilities, Changes, FlowDriver, Watch
from sami_plugin.errors import DeviceFailed, OutOfSync, UndeclaredAbility
from sami_plugin.model.flows import (
    BARRED,
    TEMPLATES,
    Addresses,
    Batch,
    FirewallEvent,
    Omitted,
    Template,
    ZoneRole,
    answers,
    are_anothers,
    has_end_in,
)
from sami_plugin.model.results import Outcome, Reason, Results, came_out, results
from sami_plugin.model.risk import ACCOUNTED, FUNCTIONS
from sami_plugin.model.scope import Scope

Tuple = bytes
"""Protocol, addresses and ports (or ICMP type, code and identifier), as they stand in a row's key."""
_OF_FLOWS = frozenset(name for name, template in TEMPLATES.items() if not template.is_expectation)
Place = tuple[str | None, int]
"""Namespace and zone."""


@dataclass(slots=True)
class Faults:
    """What goes wrong on a device, as a test wants it. Change it at any time."""

    refuse: Callable[[Batch], npt.NDArray[np.bool_]] | None = None
    """Which flows of an insert the device does not take."""
    refuse_reason: Reason = Reason.INVALID
    drop_fields: frozenset[str] = frozenset()
    """State fields that the device takes and does not keep, such as ``flowMark``."""
    fail_after: int | None = None
    """Inserts and removals until the device fails; it goes on failing until this is changed."""
    lose_events: bool = False
    """Events are lost from now on: watches say that they are not complete."""


@dataclass(slots=True, eq=False)
class Entry:
    """One connection, as the device tracks it."""

    template: Template
    row: np.void
    """Its `zoneRole` and `remainingTimeoutSeconds` say nothing: they are made when the entry is told."""
    flow_id: int
    expires: float
    original: Tuple
    reply: Tuple

    @classmethod
    def of(cls, template: Template, row: np.void, expires: float) -> Entry:
        """That of a row, which it keeps; no device has it yet."""
        return cls(template, row, 0, expires, _original(template, row), _reply(template, row))


@dataclass(slots=True)
class _Zone:
    entries: dict[Tuple, Entry] = field(default_factory=dict)
    """By the tuple of the first packet."""
    tuples: dict[Tuple, Entry] = field(default_factory=dict)
    """By both tuples."""


class Event(enum.Enum):
    """What a device tells its watches of an entry."""

    CREATED = "created"
    CHANGED = "changed"
    REMOVED = "removed"


class MemoryDevice:
    """Entries by namespace and zone. All of it is guarded by one lock."""

    def __init__(
        self,
        name: str = "memory",
        *,
        capacity: int | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        faults: Faults | None = None,
    ) -> None:
        self.name = name
        self.capacity = capacity
        self.clock = clock
        self.faults = faults or Faults()
        self.lock = threading.RLock()
        self._zones: defaultdict[Place, _Zone] = defaultdict(_Zone)
        self._watches: list[_MemoryWatch] = []
        self._next_id = 1 + zlib.crc32(name.encode())  # two devices do not call a flow by the same id
        self.held = 0

    def __repr__(self) -> str:
        return f"MemoryDevice({self.name!r})"

    @property
    def count(self) -> int:
        """Entries of all zones."""
        with self.lock:
            self.expire()
            return self.held

    # What follows is for the driver, its watches, and who plays the traffic; they hold the lock.

    def zone(self, place: Place) -> _Zone:
        return self._zones[place]

    def expire(self) -> None:
        """Drops what has lived to its end by now."""
        now = self.clock()
        for place, zone in self._zones.items():
            for entry in [entry for entry in zone.entries.values() if entry.expires <= now]:
                self.drop(place, entry)

    def create(self, place: Place, entry: Entry) -> None:
        zone = self.zone(place)
        entry.flow_id = self._next_id
        self._next_id += 1
        self.held += 1
        zone.entries[entry.original] = entry
        zone.tuples[entry.original] = zone.tuples[entry.reply] = entry
        self._tell(place, entry, Event.CREATED)

    def drop(self, place: Place, entry: Entry) -> None:
        zone = self.zone(place)
        self.held -= 1
        del zone.entries[entry.original]
        for name in {entry.original, entry.reply}:
            del zone.tuples[name]
        self._tell(place, entry, Event.REMOVED)

    def changed(self, place: Place, entry: Entry) -> None:
        """Traffic has changed the entry's row."""
        self._tell(place, entry, Event.CHANGED)

    def work(self) -> None:
        """Counts one insert or removal towards a failure that a test has asked for."""
        if self.faults.fail_after is None:
            return
        if self.faults.fail_after <= 0:
            raise DeviceFailed(f"{self.name} failed, as its faults want it")
        self.faults.fail_after -= 1

    def attach(self, watch: _MemoryWatch) -> None:
        self._watches.append(watch)

    def detach(self, watch: _MemoryWatch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)

    def _tell(self, place: Place, entry: Entry, event: Event) -> None:
        for watch in self._watches:
            watch.note(place, entry, event)


class MemoryDriver(FlowDriver):
    """A way to a `MemoryDevice`.

    :param templates: names of the templates that it declares; by default all of flows: it has no helpers, which expect.
        It holds records of any kind that is known (`model.kinds`) as well.
    :param can_watch: whether it declares that it can watch.
    """

    def __init__(
        self,
        device: MemoryDevice | None = None,
        *,
        templates: frozenset[str] | None = None,
        can_watch: bool = True,
    ) -> None:
        self.device = device or MemoryDevice()
        self._templates = _OF_FLOWS if templates is None else templates
        self._can_watch = can_watch
        self.functions = FUNCTIONS | {ACCOUNTED}

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        device = self.device
        return Capabilities(
            self._templates, self._can_watch, device.capacity, device.count, device.name, self.functions
        )

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        with self.device.lock:
            self.device.expire()
            told = [
                (entry.template.name, role, entry)
                for role, place in _places(scope)
                for entry in self.device.zone(place).entries.values()
            ]
            batches = _batches(self.device, scope, told)
        undeclared = [batch for batch in batches if batch.template.name not in self._templates]
        barred = 0
        for batch in (batch for batch in batches if batch.template.name in self._templates):
            is_barred = _is_barred(scope, batch)
            barred += int(is_barred.sum())
            if not is_barred.all():
                yield batch.take(~is_barred)
        if barred:
            yield Omitted(BARRED, barred)
        if undeclared:
            yield Omitted("the driver does not carry this kind of flow", sum(map(len, undeclared)))

    def watch(self, scope: Scope) -> Watch:
        if not self._can_watch:
            raise UndeclaredAbility("this driver does not declare that it can watch")
        watch = _MemoryWatch(self.device, scope, self._templates)
        with self.device.lock:
            self.device.expire()
            self.device.attach(watch)
        return watch

    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = self._refusals(scope, batch)
        _refuse(made, _is_barred(scope, batch), Reason.BARRED)
        faults = self.device.faults
        if faults.refuse is not None:
            _refuse(made, faults.refuse(batch), faults.refuse_reason)
        is_neighbours = _has_neighbour(scope, batch)
        with self.device.lock:
            self.device.expire()
            for position in np.flatnonzero(~came_out(made, Outcome.REFUSED)):
                self.device.work()
                made[position] = self._insert(scope, batch, int(position), bool(is_neighbours[position]))
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        made = self._refusals(scope, batch)
        with self.device.lock:
            self.device.expire()
            for position in np.flatnonzero(~came_out(made, Outcome.REFUSED)):
                _, entry = self._find(scope, batch, int(position))
                if entry is None:
                    made[position] = (Outcome.ABSENT, Reason.NONE, 0)
                elif _is_theirs(scope, entry):
                    made[position] = (Outcome.REFUSED, Reason.LOCAL_PORTS_OWN, 0)
                else:
                    entry.expires = self.device.clock() + int(batch.rows["remainingTimeoutSeconds"][position])
        return made

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        assert not batch.template.is_identity, "read_back takes flows, not their names"
        rows = batch.template.empty(len(batch))
        found = np.zeros(len(batch), bool)
        with self.device.lock:
            self.device.expire()
            for position in range(len(batch)):
                _, entry = self._find(scope, batch, position)
                if entry is not None and entry.template == batch.template:
                    _tell(self.device, entry, batch.rows["zoneRole"][position], rows, position)
                    found[position] = True
        return Batch(batch.template, rows), found

    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = results(len(identities), Outcome.ABSENT)
        with self.device.lock:
            self.device.expire()
            for position in range(len(identities)):
                self.device.work()
                place, entry = self._find(scope, identities, position)
                wanted_id = int(identities.rows["flowId"][position])
                if entry is None or place is None or (wanted_id and wanted_id != entry.flow_id):
                    continue
                if _is_theirs(scope, entry):
                    made[position] = (Outcome.REFUSED, Reason.LOCAL_PORTS_OWN, 0)
                    continue
                self.device.drop(place, entry)
                made[position] = (Outcome.REMOVED, Reason.NONE, 0)
        return made

    def _refusals(self, scope: Scope, batch: Batch) -> Results:
        """What can be said without a look at the device: REFUSED, or IMPORTED where it cannot be said yet."""
        made = results(len(batch))
        if batch.template.name not in self._templates:
            return results(len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        _refuse(made, ~scope.has_zone_of(batch), Reason.INVALID)
        _refuse(made, ~has_end_in(batch, scope.addresses), Reason.FOREIGN_ADDRESS)
        return made

    def _find(self, scope: Scope, batch: Batch, position: int) -> tuple[Place | None, Entry | None]:
        place = _place(scope, int(batch.rows["zoneRole"][position]))
        if place is None:
            return None, None
        return place, self.device.zone(place).entries.get(_original(batch.template, batch.rows[position]))

    def _insert(self, scope: Scope, batch: Batch, position: int, is_neighbours: bool) -> tuple[Outcome, Reason, int]:
        row = _single(batch.template, batch.rows[position]).rows[0]
        place = _place(scope, int(row["zoneRole"]))
        assert place is not None
        zone = self.device.zone(place)
        fresh = Entry.of(batch.template, row, self.device.clock() + int(row["remainingTimeoutSeconds"]))
        in_the_way = {
            id(entry): entry for name in (fresh.original, fresh.reply) if (entry := zone.tuples.get(name)) is not None
        }
        if is_neighbours:
            if in_the_way:
                return Outcome.PRESENT, Reason.NONE, 0
            return Outcome.REFUSED, Reason.LOCAL_PORTS_OWN, 0
        if any(_is_theirs(scope, entry) for entry in in_the_way.values()):
            return Outcome.REFUSED, Reason.LOCAL_PORTS_OWN, 0
        if batch.template.is_translated and any(
            are_anothers(_single(entry.template, entry.row), scope.addresses)[0] for entry in in_the_way.values()
        ):
            return Outcome.REFUSED, Reason.TRANSLATION_TAKEN, 0
        capacity = self.device.capacity
        if capacity is not None and self.device.held - len(in_the_way) >= capacity:
            return Outcome.REFUSED, Reason.TABLE_FULL, 0
        for entry in in_the_way.values():
            self.device.drop(place, entry)
        for name in self.device.faults.drop_fields & set(row.dtype.names or ()):
            row[name] = 0
        self.device.create(place, fresh)
        return Outcome.IMPORTED, Reason.NONE, 0


class _MemoryWatch(Watch):
    """Per tuple, the ids that have gone since the last call; what is there now is looked up when it is told."""

    def __init__(self, device: MemoryDevice, scope: Scope, templates: frozenset[str]) -> None:
        self._device = device
        self._scope = scope
        self._templates = templates
        self._roles = {place: role for role, place in _places(scope)}
        self._gone: dict[tuple[Place, Tuple], dict[int, Entry]] = {}
        self._lost = False
        self._closed = False

    def note(self, place: Place, entry: Entry, event: Event) -> None:
        """Called by the device, under its lock."""
        if place not in self._roles or entry.template.name not in self._templates:
            return
        if self._device.faults.lose_events:
            self._lost = True
            return
        gone = self._gone.setdefault((place, entry.original), {})
        if event is Event.REMOVED:
            gone[entry.flow_id] = entry

    def collect(self) -> Changes:
        if self._closed:
            raise OutOfSync("the watch has been closed")
        device = self._device
        with device.lock:
            device.expire()
            noted, self._gone = self._gone, {}
            lost, self._lost = self._lost, False
            removed, upserted = [], []
            for (place, original), gone in noted.items():
                role = self._roles[place]
                removed += [(entry.template.name, role, entry) for entry in gone.values()]
                current = device.zone(place).entries.get(original)
                if current is not None and _is_barred(self._scope, _single(current.template, current.row))[0]:
                    removed.append((current.template.name, role, current))
                elif current is not None:
                    upserted.append((current.template.name, role, current))
            removals = [_deleted(batch) for batch in _batches(device, self._scope, removed)]
            upserts = _batches(device, self._scope, upserted)
        upserts = [batch for batch in upserts if batch.template.name in self._templates]
        return Changes(tuple(removals), tuple(upserts), not lost)

    def close(self) -> None:
        self._closed = True
        with self._device.lock:
            self._device.detach(self)


def _places(scope: Scope) -> list[tuple[ZoneRole, Place]]:
    """The zones of a scope, each once: one that plays two roles is told under the first."""
    places: dict[Place, ZoneRole] = {}
    for role, zone in scope.zones.items():
        places.setdefault((scope.namespace, zone), role)
    return [(role, place) for place, role in places.items()]


def _place(scope: Scope, role: int) -> Place | None:
    for known, zone in scope.zones.items():
        if known == role:
            return scope.namespace, zone
    return None


def _refuse(made: Results, which: npt.NDArray[np.bool_], reason: Reason) -> None:
    if which.any():
        new = which & ~came_out(made, Outcome.REFUSED)
        made["outcome"][new], made["reason"][new] = Outcome.REFUSED, reason


def _has_neighbour(scope: Scope, batch: Batch) -> npt.NDArray[np.bool_]:
    neighbours: Addresses = scope.neighbours if scope.is_shared else ()
    return has_end_in(batch, neighbours)


def _is_barred(scope: Scope, batch: Batch) -> npt.NDArray[np.bool_]:
    if not scope.barred_marks or not batch.template.is_flow:
        return np.zeros(len(batch), bool)
    barred: npt.NDArray[np.bool_] = batch.rows["flowMark"] & np.uint32(scope.barred_marks) != 0
    return barred


def _is_theirs(scope: Scope, entry: Entry) -> bool:
    """Whether an entry is not this port's to change: none of its ends is the port's, or one is a neighbour's."""
    if not scope.is_shared:
        return False
    batch = _single(entry.template, entry.row)
    return not has_end_in(batch, scope.addresses)[0] or bool(has_end_in(batch, scope.neighbours)[0])


def _single(template: Template, row: np.void) -> Batch:
    rows = template.empty(1)
    rows[0] = row
    return Batch(template, rows)


def _tell(device: MemoryDevice, entry: Entry, role: int, rows: npt.NDArray[np.void], position: int) -> None:
    rows[position] = entry.row
    row = rows[position]
    row["zoneRole"], row["flowId"] = role, entry.flow_id
    row["remainingTimeoutSeconds"] = max(0, int(entry.expires - device.clock()))


def _batches(device: MemoryDevice, scope: Scope, told: list[tuple[str, ZoneRole, Entry]]) -> list[Batch]:
    """Entries as batches, one per template, without those of a shared zone that are not the port's."""
    kinds: dict[str, list[tuple[ZoneRole, Entry]]] = {}
    for name, role, entry in told:
        kinds.setdefault(name, []).append((role, entry))
    made = []
    for kind in kinds.values():
        batch = Batch(kind[0][1].template, kind[0][1].template.empty(len(kind)))
        for position, (role, entry) in enumerate(kind):
            _tell(device, entry, role, batch.rows, position)
        if scope.is_shared:
            batch = batch.take(has_end_in(batch, scope.addresses))
        if len(batch):
            made.append(batch)
    return made


def _deleted(batch: Batch) -> Batch:
    names = batch.identities
    names.rows["firewallEvent"] = FirewallEvent.DELETED
    return names


def _original(template: Template, row: np.void) -> Tuple:
    """The tuple of the flow's first packet: its key without the role of its zone. Of other kinds the kind, too."""
    kind = b"" if template.is_flow else template.name.removesuffix("-identity").encode()
    return kind + row.tobytes()[1 : template.key_octets]


def _reply(template: Template, row: np.void) -> Tuple:
    """The tuple of the answer: the original turned round, behind its translation if it has one."""
    return _original(template, answers(_single(template, row)).rows[0])
