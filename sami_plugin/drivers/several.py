"""Several firewalls of one host as one driver: each kind of state is the first one's that declares it.

Flows of one protocol and family are one kind here, with or without a NAT, helpers, and what these expect.

The first driver is the host's firewall, and its failures are those of a driver that is alone. What another one cannot
do costs the migration its own kinds and nothing else: what it did not export is omitted, what it did not take is
refused, each by name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Capabilities, Changes, FlowDriver, Watch
from sami_plugin.errors import SamiError, UndeclaredAbility
from sami_plugin.model.flows import TEMPLATES, Batch, FirewallEvent, Omitted, Template
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.kinds import NEVER_SECONDS
from sami_plugin.model.results import Outcome, Reason, Results, lost_fields, results
from sami_plugin.model.scope import Scope

LOG = logging.getLogger(__name__)

LONGER_SECONDS = 2
"""What lives so much longer than it did, for a second has ended in between, was given time."""

T = TypeVar("T")


class SeveralDrivers(FlowDriver):
    """The drivers in the order in which their kinds are exported, put in and purged."""

    def __init__(self, drivers: Sequence[tuple[str, FlowDriver]]) -> None:
        """`drivers` are two or more, by name."""
        self._names = [name for name, _ in drivers]
        self._drivers = [driver for _, driver in drivers]
        self._watches: list[ExportingWatch] = []
        self._owners: dict[str, int] = {}
        """Whose each kind was when they were asked the last time."""

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        """The kinds of all. Capacity, device and functions are the first one's."""
        owners: dict[str, int] = {}
        templates: set[str] = set()
        shared: dict[str, str] = {}
        notes: list[str] = []
        first = self._drivers[0].capabilities(scope)
        for position, name in enumerate(self._names):
            can = self._tried(position, lambda driver: driver.capabilities(scope), None) if position else first
            if can is None:
                notes.append(f"the driver {name} fails; the agent's log says how")
                continue
            kinds = {_kind(TEMPLATES[template]) for template in can.templates}
            for kind in sorted(kinds & owners.keys()):
                notes.append(f"{kind} is the driver {self._names[owners[kind]]}'s; {name} could carry it too")
            owners |= dict.fromkeys(kinds - owners.keys(), position)
            own = {one for one in can.templates if owners[_kind(TEMPLATES[one])] == position}
            templates |= own
            shared |= {one: device for one, device in can.shared.items() if one in own}
            notes += can.notes
        self._owners = owners
        return replace(first, templates=frozenset(templates), notes=tuple(notes), shared=shared)

    def attend(self, namespace: str | None) -> None:
        for position in range(len(self._drivers)):
            self._tried(position, lambda driver: driver.attend(namespace), None)

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
            except SamiError as error:
                if not position:
                    raise
                yield Omitted(f"the driver {name} failed, and how much it has is not known: {error}", 0)

    def watch(self, scope: Scope) -> Watch:
        first = self._drivers[0].watch(scope)
        return _Watches(first, [self._watch_of(position, scope) for position in range(1, len(self._drivers))])

    def _watch_of(self, position: int, scope: Scope) -> Watch:
        driver = self._drivers[position]
        try:
            return driver.watch(scope)
        except UndeclaredAbility:
            return ExportingWatch(driver, scope, self._watches)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        failed = results(len(batch), Outcome.REFUSED, Reason.DEVICE_ERROR)
        made = self._asked(batch, lambda driver: driver.insert(scope, batch), failed)
        if made is failed:  # some of it may be in the device
            victims = batch.identities
            victims.rows["flowId"] = 0
            self._asked(victims, lambda driver: driver.remove(scope, victims), failed)
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        failed = results(len(batch), Outcome.REFUSED, Reason.DEVICE_ERROR)
        return self._asked(batch, lambda driver: driver.renew(scope, batch), failed)

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        """Of a device that fails nothing is known: its records count as there, with nothing in them but their names."""
        unknown = batch.template.empty(len(batch))
        for name in (*(one[0] for one in batch.template.key), "flowId"):
            unknown[name] = batch.rows[name]
        failed = Batch(batch.template, unknown), np.ones(len(batch), bool)
        return self._asked(batch, lambda driver: driver.read_back(scope, batch), failed)

    def remove(self, scope: Scope, identities: Batch) -> Results:
        failed = results(len(identities), Outcome.REFUSED, Reason.DEVICE_ERROR)
        return self._asked(identities, lambda driver: driver.remove(scope, identities), failed)

    def _owner(self, template: Template) -> int:
        """Whose records of this template are, or the names of some; the first one's where nobody declares it."""
        if not self._owners:
            self.capabilities()
        return self._owners.get(_kind(template), 0)

    def _asked(self, batch: Batch, work: Callable[[FlowDriver], T], failed: T) -> T:
        return self._tried(self._owner(batch.template), work, failed)

    def _tried(self, position: int, work: Callable[[FlowDriver], T], failed: T) -> T:
        """What the driver answers; `failed` of one that does, but the first."""
        try:
            return work(self._drivers[position])
        except SamiError as error:
            if not position:
                raise
            LOG.warning("the driver %s: %s", self._names[position], error)
            return failed


class _Watches(Watch):
    """Those of all drivers. One that fails tells nothing; the first one's failure is all of theirs."""

    def __init__(self, first: Watch, others: list[Watch]) -> None:
        self._first, self._others = first, others

    def collect(self) -> Changes:
        told = [self._first.collect()]
        for watch in self._others:
            try:
                told.append(watch.collect())
            except SamiError as error:
                LOG.warning("changes are not known: %s", error)
        removals = tuple(batch for changes in told for batch in changes.removals)
        upserts = tuple(batch for changes in told for batch in changes.upserts)
        return Changes(removals, upserts, all(changes.is_complete for changes in told))

    def close(self) -> None:
        for watch in (self._first, *self._others):
            watch.close()


class ExportingWatch(Watch):
    """For a driver that cannot watch: what differs from the last export, of which the first is made at once.

    Of what somebody else exports in between it is told when it is gone again, too.
    """

    def __init__(self, driver: FlowDriver, scope: Scope, watches: list[ExportingWatch]) -> None:
        """`watches` are those that are open; this one among them, until it is closed."""
        self._driver, self._scope, self._watches = driver, scope, watches
        self._lock = threading.Lock()
        self._seen = FlowTable()
        """What others have exported since."""
        self._told, self._told_at = FlowTable(), time.monotonic()
        try:
            self._told = self._exported()
        except SamiError as error:
            LOG.warning("what there is will be told when it can be read: %s", error)
        watches.append(self)

    def note(self, driver: FlowDriver, scope: Scope, batch: Batch) -> None:
        """Somebody is told this of the device. From any thread."""
        if driver is self._driver and scope.port == self._scope.port:
            with self._lock:
                self._seen.put(batch)

    def collect(self) -> Changes:
        now, there = time.monotonic(), self._exported()
        with self._lock:
            upserts = [self._changed(batch, now - self._told_at) for batch in there.batches()]
            for batch in self._told.batches():
                self._seen.put(batch)
            removals = [_gone(batch.take(~there.find(batch)[0])) for batch in self._seen.batches()]
            self._told, self._told_at, self._seen = there, now, FlowTable()
        return Changes(tuple(filter(len, removals)), tuple(filter(len, upserts)))

    def _exported(self) -> FlowTable:
        there = FlowTable()
        for piece in self._driver.export(self._scope):
            if isinstance(piece, Batch):
                there.put(piece)
        return there

    def _changed(self, batch: Batch, seconds: float) -> Batch:
        known, rows = self._told.rows_of(batch)
        left, before = batch.rows["remainingTimeoutSeconds"], rows["remainingTimeoutSeconds"].astype(np.int64)
        was_given_time = (left > before - int(seconds) + LONGER_SECONDS) & (left != NEVER_SECONDS)
        is_same = (lost_fields(batch, rows) == 0) & (batch.rows["flowId"] == rows["flowId"]) & ~was_given_time
        return batch.take(~(known & is_same))

    def close(self) -> None:
        if self in self._watches:
            self._watches.remove(self)


def _kind(template: Template) -> str:
    if template.is_flow:
        return f"{template.protocol.kind}-{'ipv6' if template.is_ipv6 else 'ipv4'}"
    return template.name.removesuffix("-identity")


def _gone(batch: Batch) -> Batch:
    names = batch.identities
    names.rows["firewallEvent"] = FirewallEvent.DELETED
    return names
