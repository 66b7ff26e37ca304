"""Several firewalls of one host as one driver: each kind of state is the first one's that declares it.

Flows of one protocol and family are one kind here, with or without a NAT, helpers, and what these expect.

The first driver is the host's firewall, and its failures are those of a driver that is alone. What another one cannot
do, for whatever reason, costs the migration its own kinds and nothing else: what it did not export is omitted, what it
did not take is refused, each by name.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Capabilities, Changes, FlowDriver, Watch
from sami_plugin.errors import SamiError
from sami_plugin.model.flows import TEMPLATES, Batch, FirewallEvent, Omitted, Template
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.results import Outcome, Reason, Results, has_changed, results
from sami_plugin.model.scope import Scope

LOG = logging.getLogger(__name__)

LONGER_SECONDS = 2
"""What lives so much longer than it was told was given time: a second is begun here and there."""
SHORT_SECONDS, PAUSES_PER_EXPORT = 0.02, 10
"""An export that takes longer than this is made again when so many times as long has passed as it took, so that it
does not keep a core busy."""

T = TypeVar("T")


class SeveralDrivers(FlowDriver):
    """The drivers in the order in which their kinds are exported, put in and purged."""

    def __init__(self, drivers: Sequence[tuple[str, FlowDriver]]) -> None:
        """`drivers` are two or more, by name."""
        self._names = [name for name, _ in drivers]
        self._drivers = [driver for _, driver in drivers]
        self._watches: list[ExportingWatch] = []
        self._owners: dict[str, int] = {}
        """Whose each kind is. One that fails for a while keeps its kinds."""

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        """The kinds of all. Capacity, device and functions are the first one's."""
        owners: dict[str, int] = {}
        templates: set[str] = set()
        shared: dict[str, str] = {}
        notes: list[str] = []
        first = self._drivers[0].capabilities(scope)
        for position, name in enumerate(self._names):
            can = self._tried(position, lambda driver: driver.capabilities(scope), _nothing) if position else first
            if can is None:
                notes.append(f"the driver {name} fails; the agent's log says how")
                former = [kind for kind, owner in self._owners.items() if owner == position]
                owners |= dict.fromkeys(set(former) - owners.keys(), position)
                continue
            if unknown := sorted(can.templates - TEMPLATES.keys()):
                notes.append(f"{name}: {', '.join(unknown)} cannot be carried: its package did not bring the kind")
            known = can.templates & TEMPLATES.keys()
            kinds = {_kind(TEMPLATES[template]) for template in known}
            for kind in sorted(kinds & owners.keys()):
                notes.append(f"{kind} is the driver {self._names[owners[kind]]}'s; {name} could carry it too")
            owners |= dict.fromkeys(kinds - owners.keys(), position)
            own = {one for one in known if owners[_kind(TEMPLATES[one])] == position}
            templates |= own
            shared |= {one: device for one, device in can.shared.items() if one in own}
            notes += can.notes
        self._owners = owners
        return replace(first, templates=frozenset(templates), notes=tuple(notes), shared=shared)

    def attend(self, namespace: str | None) -> None:
        for position in range(len(self._drivers)):
            self._tried(position, lambda driver: driver.attend(namespace), _nothing)

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        for position, name in enumerate(self._names):
            try:
                for piece in self._drivers[position].export(scope):
                    if isinstance(piece, Batch):
                        if self._owner(piece.template) != position:
                            continue
                        for watch in tuple(self._watches):
                            watch.note(self._drivers[position], scope, piece)
                    yield piece
            except Exception as error:
                if not position:
                    raise
                _log(name, error)
                yield Omitted(f"the driver {name} failed, and how much it has is not known: {error}", 0)

    def watch(self, scope: Scope) -> Watch:
        with contextlib.ExitStack() as opened:
            watches: list[Watch] = [opened.enter_context(self._drivers[0].watch(scope))]
            for position in range(1, len(self._drivers)):
                watches.append(opened.enter_context(self._watch_of(position, scope)))
            opened.pop_all()  # who watches closes them
        return _Watches(watches, self._names, self._owner)

    def _watch_of(self, position: int, scope: Scope) -> Watch:
        driver = self._drivers[position]
        try:
            return driver.watch(scope)
        except Exception:  # noqa: BLE001 - it cannot, or cannot now
            return ExportingWatch(driver, scope, self._watches)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        def taken_back() -> Results:  # some of it may be in the device
            victims = batch.identities
            victims.rows["flowId"] = 0
            self.remove(scope, victims)
            return _refused(batch)

        nobodys = functools.partial(results, len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        return self._asked(batch, lambda driver: driver.insert(scope, batch), taken_back, nobodys)

    def renew(self, scope: Scope, batch: Batch) -> Results:
        nobodys = functools.partial(results, len(batch), Outcome.ABSENT)
        return self._asked(batch, lambda driver: driver.renew(scope, batch), lambda: _refused(batch), nobodys)

    def arrived(self, scope: Scope, batch: Batch) -> None:
        self._asked(batch, lambda driver: driver.arrived(scope, batch), _nothing, _nothing)

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        """Of a device that fails nothing is known: its records count as there, as they were asked for."""
        return self._asked(
            batch,
            lambda driver: driver.read_back(scope, batch),
            lambda: (batch.copy(), np.ones(len(batch), bool)),
            lambda: (Batch(batch.template, batch.template.empty(len(batch))), np.zeros(len(batch), bool)),
        )

    def remove(self, scope: Scope, identities: Batch) -> Results:
        nobodys = functools.partial(results, len(identities), Outcome.ABSENT)
        return self._asked(
            identities, lambda driver: driver.remove(scope, identities), lambda: _refused(identities), nobodys
        )

    def _owner(self, template: Template) -> int | None:
        """Whose records of this template are, or the names of some. Flows that nobody declares are the first one's."""
        if not self._owners:
            self.capabilities()
        return self._owners.get(_kind(template), 0 if template.is_flow else None)

    def _asked(
        self, batch: Batch, work: Callable[[FlowDriver], T], failed: Callable[[], T], nobodys: Callable[[], T]
    ) -> T:
        position = self._owner(batch.template)
        return nobodys() if position is None else self._tried(position, work, failed)

    def _tried(self, position: int, work: Callable[[FlowDriver], T], failed: Callable[[], T]) -> T:
        """What the driver answers; `failed` of one that does, but the first."""
        try:
            return work(self._drivers[position])
        except Exception as error:
            if not position:
                raise
            _log(self._names[position], error)
            return failed()


class _Watches(Watch):
    """Those of all drivers. One that fails tells nothing; the first one's failure is all of theirs."""

    def __init__(
        self,
        watches: list[Watch],
        names: list[str],
        owner: Callable[[Template], int | None],
    ) -> None:
        self._watches, self._names, self._owner = watches, names, owner
        self._has_firsts_last = False

    def collect(self) -> Changes:
        return _joined([self._watches[0].collect(), *self._others(lambda watch: watch.collect())])

    def collect_last(self) -> Changes:
        """The first one's, and when called again those of the others: the guest is paused, and they may be slow."""
        if not self._has_firsts_last:
            told = self._watches[0].collect_last()
            self._has_firsts_last = True
            return replace(told, is_all=False)
        return _joined([*self._others(lambda watch: watch.collect_last())])

    def _others(self, how: Callable[[Watch], Changes]) -> Iterator[Changes]:
        for position, watch in enumerate(self._watches[1:], 1):
            try:
                changes = how(watch)
            except Exception as error:  # noqa: BLE001 - as in all that others than the first do
                _log(self._names[position], error)
                continue
            own = [
                tuple(batch for batch in batches if self._owner(batch.template) == position)
                for batches in (changes.removals, changes.upserts)
            ]
            yield Changes(own[0], own[1], changes.is_complete)

    def close(self) -> None:
        for position, watch in enumerate(self._watches[1:], 1):
            try:
                watch.close()
            except Exception as error:  # noqa: BLE001 - as above
                _log(self._names[position], error)
        self._watches[0].close()


class ExportingWatch(Watch):
    """For a driver that cannot watch: what differs from the last export, of which the first is made at once.

    Of what somebody else exports in between it is told when it is gone again, too.
    """

    def __init__(self, driver: FlowDriver, scope: Scope, watches: list[ExportingWatch]) -> None:
        """`watches` are those that are open; this one among them, until it is closed."""
        self._driver, self._scope, self._watches = driver, scope, watches
        self._lock = threading.Lock()
        self._began_at = self._free_at = time.monotonic()
        self._told = FlowTable()
        """As it was told, with the time that it would have had left when the watch began."""
        self._seen = FlowTable()
        """What others have exported since."""
        try:
            for batch in self._exported().batches():
                self._told.put(batch)
        except Exception as error:
            LOG.warning(
                "what there is will be told when it can be read: %s", error, exc_info=not isinstance(error, SamiError)
            )
        watches.append(self)

    def note(self, driver: FlowDriver, scope: Scope, batch: Batch) -> None:
        """Somebody is told this of the device. From any thread."""
        if driver is self._driver and scope.port == self._scope.port:
            with self._lock:
                self._seen.put(batch)

    def collect(self) -> Changes:
        return Changes() if time.monotonic() < self._free_at else self.collect_last()

    def collect_last(self) -> Changes:
        there = self._exported()
        with self._lock:
            seen, self._seen = self._seen, FlowTable()
        try:
            return self._changes(there, seen)
        except Exception:
            with self._lock:  # what was seen meanwhile is newer
                for batch in self._seen.batches():
                    seen.put(batch)
                self._seen = seen
            raise

    def _changes(self, there: FlowTable, seen: FlowTable) -> Changes:
        for batch in self._told.batches():
            seen.put(batch)
        missing = [batch.take(~there.find(batch)[0]) for batch in seen.batches()]
        # An export may run past what is there while others come and go: it is asked for by name.
        gone = [batch.take(~self._is_there(batch)) for batch in missing if len(batch)]
        upserts = [self._changed(batch) for batch in there.batches()]
        for batch in gone:
            self._told.discard(batch)
        for batch in upserts:
            self._told.put(batch)
        age = self._age()
        return Changes(
            tuple(_deleted(batch) for batch in gone if len(batch)),
            tuple(_later(batch, -age) for batch in upserts if len(batch)),
        )

    def _is_there(self, batch: Batch) -> npt.NDArray[np.bool_]:
        found, is_there = self._driver.read_back(self._scope, batch)
        if batch.template.is_flow:
            is_there &= found.rows["flowMark"] & np.uint32(self._scope.barred_marks) == 0
        return is_there

    def _exported(self) -> FlowTable:
        """All that is there, with the time that it would have had left when the watch began."""
        there, at = FlowTable(), time.monotonic()
        for piece in self._driver.export(self._scope):
            if isinstance(piece, Batch):
                there.put(_later(piece, self._age()))
        took = time.monotonic() - at
        self._free_at = time.monotonic() + (PAUSES_PER_EXPORT * took if took > SHORT_SECONDS else 0)
        return there

    def _age(self) -> int:
        return int(time.monotonic() - self._began_at)

    def _changed(self, batch: Batch) -> Batch:
        """What is new or is not what was told, or was given time since."""
        known, rows = self._told.rows_of(batch)
        left, before = (one["remainingTimeoutSeconds"].astype(np.int64) for one in (batch.rows, rows))
        is_same = ~has_changed(batch, rows)
        is_same &= (left <= before + LONGER_SECONDS) & ((left == NEVER_SECONDS) == (before == NEVER_SECONDS))
        return batch.take(~(known & is_same))

    def close(self) -> None:
        if self in self._watches:
            self._watches.remove(self)


def _joined(told: Sequence[Changes]) -> Changes:
    removals = tuple(batch for changes in told for batch in changes.removals)
    upserts = tuple(batch for changes in told for batch in changes.upserts)
    return Changes(removals, upserts, all(changes.is_complete for changes in told))


def _refused(batch: Batch) -> Results:
    return results(len(batch), Outcome.REFUSED, Reason.DEVICE_ERROR)


def _nothing() -> None:
    return None


def _kind(template: Template) -> str:
    if template.is_flow:
        return f"{template.protocol.kind}-{'ipv6' if template.is_ipv6 else 'ipv4'}"
    return template.name.removesuffix("-identity")


def _later(batch: Batch, seconds: int) -> Batch:
    """The records with so many seconds more, or fewer; what has no end keeps that."""
    later = batch.copy()
    left = later.rows["remainingTimeoutSeconds"].astype(np.int64)
    moved = np.clip(left + seconds, 0, NEVER_SECONDS - 1)
    later.rows["remainingTimeoutSeconds"] = np.where(left == NEVER_SECONDS, NEVER_SECONDS, moved)
    return later


def _deleted(batch: Batch) -> Batch:
    names = batch.identities
    names.rows["firewallEvent"] = FirewallEvent.DELETED
    return names


def _log(name: str, error: Exception) -> None:
    # What is none of ours is a fault of the driver's, whose author will want to see where.
    LOG.warning("the driver %s: %s", name, error, exc_info=not isinstance(error, SamiError))
