"""What happens to a guest's flows when it moves, from the first word of the migration to the purge.

 1. The destination's hypervisor says that a guest is about to come. `DestinationSession` asks the source for its flows.
 2. The source has the guest in an outgoing job: `SourceSession` begins to watch the guest's scope, exports it, and
    sends it batch by batch while the guest runs (`_start_export`, `_export_next`).
 3. The destination imports each batch as soon as the port's scope is known there, reads back what its device kept, and
    keeps it from running out of time (`_import`, `_find_scope`, `_verify`, `_renew`).
 4. The source sends what changes, again and again (`_export_changes`, `_resync`).
 5. The guest is paused: the source sends its last changes. The destination applies and verifies them and says COMPLETE.
 6. The guest runs at the destination, which says ARRIVED.
 7. The source removes by name what it exported, and proves by another export that it is gone (`_purge`).

When the guest stays, the destination removes by name what it put in (`_discard`), and the source keeps everything.
When to do which is decided in `migration.source` and `migration.destination`; here is only how.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin.codec import compression, ipfix
from sami_plugin.drivers.base import Watch
from sami_plugin.migration import destination, source
from sami_plugin.migration.decision import (
    Action,
    Discard,
    Done,
    Event,
    ExportChanges,
    ExportNext,
    FindScope,
    Import,
    PeerSaid,
    Purge,
    Renew,
    Resync,
    StartExport,
    Verify,
)
from sami_plugin.model.flows import Addresses, Batch, FirewallEvent, Omitted, has_end_in, names
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.migration import (
    PROTOCOL_VERSION,
    Arrived,
    Complete,
    FlowChanges,
    Flows,
    InSync,
    Message,
    MigrationEvent,
    Open,
    Phase,
    Purged,
)
from sami_plugin.model.results import WORDS, Outcome, Reason, Results, is_in_device, lost_fields, results
from sami_plugin.model.scope import Scope
from sami_plugin.session import Host, Session

Actions = Mapping[type[Action], Callable[[Any], Done | None]]


# ------------------------------------------------------------------------------------------------ the guest leaves


@dataclass(slots=True)
class _Leaving:
    """One port of the guest that leaves: its watch, and what was exported of it."""

    scope: Scope
    watch: Watch
    exported: FlowTable = field(default_factory=FlowTable)


class SourceSession(Session):
    """The source's part."""

    role = "source"

    def __init__(
        self, host: Host, session: str, guest: str, peer: str, ended: Callable[[Session], None], *, is_outgoing: bool
    ) -> None:
        super().__init__(host, session, guest, peer, ended)
        limits = host.settings.limits
        self._known = source.Source(limits, time.monotonic() + limits.session_seconds, is_outgoing=is_outgoing)
        self._ports: list[_Leaving] = []
        self._compression = "zlib"
        self._export: Iterator[tuple[_Leaving, Batch]] = iter(())
        self._sweep: _Sweep | None = None
        self._removed = self._late = self._left = self._kept = 0

    def _state(self) -> str:
        return self._known.state.value

    def _begin(self) -> None:
        """Everything begins with the destination's Open, which is in the queue."""

    def _step(self, event: Event, now: float) -> list[Action]:
        self._known, actions = source.step(self._known, event, now)
        if isinstance(event, PeerSaid):
            self._note_message(event.message)
        return actions

    def _note_message(self, message: Message) -> None:
        match message:
            case Open(compressions=offered):
                self.note("asked")
                self._compression = compression.choose(offered)
            case Complete():
                self.note("complete")
            case _:
                self.note(type(message).__name__.lower())

    def _note_phase(self, event: MigrationEvent) -> None:
        self.note(event.phase.value)

    def _actions(self) -> Actions:
        return {
            StartExport: self._start_export,
            ExportNext: self._export_next,
            ExportChanges: self._export_changes,
            Resync: self._resync,
            Purge: self._purge,
        }

    def _start_export(self, action: StartExport) -> Done:
        """Watches before it exports, so that no change falls between the two."""
        self.note("export began")
        for scope in self.host.scopes.find(self.guest):
            self._ports.append(_Leaving(scope, self.host.driver.watch(scope)))
        self._export = self._export_all()
        return Done("StartExport", len(self._ports))

    def _export_all(self) -> Iterator[tuple[_Leaving, Batch]]:
        for port in self._ports:
            for piece in self.host.driver.export(port.scope):
                if isinstance(piece, Omitted):
                    self.report.name(f"not exported: {piece.reason}", piece.count, piece.examples)
                else:
                    yield port, piece

    def _export_next(self, action: ExportNext) -> Done:
        pieces, is_all = _take(self._export, self.host.settings.batch_flows)
        sent = 0
        for port, batch in _merged(pieces):
            port.exported.put(batch)
            self._claim(port, batch)
            sent += len(batch)
        if sent:
            self._say(Flows(self._packed([batch for _, batch in pieces])))
        if is_all:
            self.note("export ended")
        return Done("ExportNext", sent, is_all=is_all)

    def _claim(self, port: _Leaving, batch: Batch) -> None:
        with self.host.deciding(port.scope):
            self.host.leaving.claim(self.id, port.scope, batch)

    def _export_changes(self, action: ExportChanges) -> Done:
        """Sends what changed since the last time; if the device lost changes, the difference of a whole export."""
        removals: list[Batch] = []
        upserts: list[Batch] = []
        for port in self._ports:
            changes = port.watch.collect()
            for batch in changes.removals:
                self._take_out(port, batch, removals)
            for batch in changes.upserts:
                self._put_in(port, batch, upserts)
            if not changes.is_complete:
                sweep = _Sweep([port], self.host)
                while not sweep.advance(self.host.settings.batch_flows):
                    pass
                self._send_difference(sweep, removals, upserts)
        self._sweep = None
        if removals or upserts or action.is_last:
            self._say(FlowChanges(self._packed([*removals, *upserts]), action.is_last))
        if action.is_last:
            # What is deleted here from now on says nothing, and the purge's own events would only cost time.
            for port in self._ports:
                port.watch.close()
            self.note("last changes sent")
        return Done("ExportChanges", sum(map(len, upserts)))

    def _take_out(self, port: _Leaving, gone: Batch, removals: list[Batch]) -> None:
        """A flow that was never sent needs no removal; one that took the same tuple since is not meant."""
        known, ids = port.exported.find(gone)
        named = gone.rows["flowId"]
        gone = gone.take(known & ((named == 0) | (ids == named)))
        if len(gone):
            gone.rows["firewallEvent"] = FirewallEvent.DELETED
            port.exported.discard(gone)
            removals.append(gone)

    def _put_in(self, port: _Leaving, batch: Batch, upserts: list[Batch]) -> None:
        if len(batch):
            port.exported.put(batch)
            self._claim(port, batch)
            upserts.append(batch)

    def _resync(self, action: Resync) -> Done:
        """Exports again, a slice at a time, and sends the difference.

        A kernel does not tell the changes of entries that are older than the first listener, nor that traffic renews
        a timeout; looking again finds the first and refreshes the second.
        """
        if self._sweep is None:
            self._sweep = _Sweep(self._ports, self.host)
        if not self._sweep.advance(self.host.settings.batch_flows):
            return Done("Resync", is_all=False)
        removals: list[Batch] = []
        upserts: list[Batch] = []
        self._send_difference(self._sweep, removals, upserts)
        self._sweep = None
        if removals or upserts:
            self._say(FlowChanges(self._packed([*removals, *upserts]), is_last=False))
        return Done("Resync")

    def _send_difference(self, sweep: _Sweep, removals: list[Batch], upserts: list[Batch]) -> None:
        for port, gone, changed in sweep.difference():
            for batch in gone:
                self._take_out(port, batch, removals)
            for batch in changed:
                self._put_in(port, batch, upserts)

    def _packed(self, batches: Iterable[Batch]) -> bytes:
        octets = ipfix.encode(batches, export_time=int(time.time()), enterprise=self.host.settings.enterprise)
        payload = compression.compress(octets, self._compression)
        self.keep_payload(payload)
        return payload

    def _purge(self, action: Purge) -> Done:
        """Removes what was exported, except what a guest that stays still needs, and looks whether it is gone."""
        if self._guest_is_back():
            # What it brought has replaced what it left. A kernel gives ids again: even by id, that could be hit.
            self.report.remarks.append("the guest was back before the purge; nothing was removed")
            return Done("Purge")
        for port in self._ports:
            with self.host.deciding(port.scope):
                stay = self.host.scopes.neighbours(port.scope)
                for batch in port.exported.batches():
                    victims = self._ours_alone(port, batch, stay)
                    self._kept += len(batch) - len(victims)
                    removed = self.host.driver.remove(port.scope, victims.identities)
                    self._removed += int(np.count_nonzero(removed["outcome"] == Outcome.REMOVED))
                self.note("purged")
                self._prove(port, stay)
                self.host.leaving.release(self.id, port.scope)
        self.note("proved")
        return Done("Purge", self._removed, refused=self._left)

    def _ours_alone(self, port: _Leaving, batch: Batch, stay: Addresses) -> Batch:
        batch = self.host.leaving.unclaimed_by_others(self.id, port.scope, batch)
        return batch.take(~has_end_in(batch, stay)) if port.scope.is_shared else batch

    def _prove(self, port: _Leaving, stay: Addresses) -> None:
        """What is still there goes by name too: packets of peers made it after the pause. Then nothing may be left."""
        for attempt in range(2):
            self._left = 0
            for piece in self.host.driver.export(port.scope):
                if isinstance(piece, Omitted):
                    continue
                left = self._ours_alone(port, piece, stay)
                self._left += len(left)
                if len(left) and attempt == 0:
                    self._late += len(left)
                    self.report.name("removed at the source, made there after the pause", len(left), names(left))
                    self.host.driver.remove(port.scope, left.identities)
            if not self._left:
                return

    def _guest_is_back(self) -> bool:
        return self.guest in self.host.arriving_guests or bool(self.host.scopes.find(self.guest))

    def _counts(self) -> dict[str, int]:
        return {
            "exported": sum(len(port.exported) for port in self._ports),
            "purged": self._removed,
            "kept for other guests": self._kept,
            "late": self._late,
            "left_behind": self._left,
        }

    def _clean_up(self) -> None:
        for port in self._ports:
            port.watch.close()
            with self.host.deciding(port.scope):
                self.host.leaving.release(self.id, port.scope)


class _Sweep:
    """A whole export beside the session's other work, compared with what was sent so far."""

    def __init__(self, ports: list[_Leaving], host: Host) -> None:
        self._host = host
        self._seen = {port.scope.port: FlowTable() for port in ports}
        self._ports = ports
        self._pieces = self._export()

    def _export(self) -> Iterator[tuple[_Leaving, Batch]]:
        for port in self._ports:
            for piece in self._host.driver.export(port.scope):
                if isinstance(piece, Batch):
                    yield port, piece

    def advance(self, flows: int) -> bool:
        """Exports about so many flows more; whether that was all."""
        pieces, is_all = _take(self._pieces, flows)
        for port, batch in _merged(pieces):
            self._seen[port.scope.port].put(batch)
        return is_all

    def difference(self) -> Iterator[tuple[_Leaving, list[Batch], list[Batch]]]:
        """Per port: names of what is gone, and what is new or is not what was sent."""
        for port in self._ports:
            seen = self._seen[port.scope.port]
            gone: list[Batch] = []
            for sent in port.exported.batches():
                missing = sent.take(~seen.find(sent)[0])
                if len(missing):
                    # The export ran past some buckets before newer flows came into them: ask for each by name.
                    _, there = self._host.driver.read_back(port.scope, missing)
                    gone.append(missing.take(~there).identities)
            yield port, gone, [_changed(batch, port.exported) for batch in seen.batches()]


def _changed(batch: Batch, sent: FlowTable) -> Batch:
    """The flows that were not sent, or were sent as something else but for their timeout."""
    known, rows = sent.rows_of(batch)
    return batch.take(~known | (lost_fields(batch, rows) != 0) | (batch.rows["flowId"] != rows["flowId"]))


def _take(pieces: Iterator[tuple[_Leaving, Batch]], flows: int) -> tuple[list[tuple[_Leaving, Batch]], bool]:
    """Pieces of about so many flows, and whether there are no more."""
    taken: list[tuple[_Leaving, Batch]] = []
    count = 0
    for piece in pieces:
        taken.append(piece)
        count += len(piece[1])
        if count >= flows:
            return taken, False
    return taken, True


def _merged(pieces: Iterable[tuple[_Leaving, Batch]]) -> Iterator[tuple[_Leaving, Batch]]:
    """The same flows with one batch per port and template."""
    groups: dict[tuple[str, str], list[tuple[_Leaving, Batch]]] = {}
    for port, batch in pieces:
        groups.setdefault((port.scope.port, batch.template.name), []).append((port, batch))
    for group in groups.values():
        yield group[0][0], Batch.joined(group[0][1].template, [batch.rows for _, batch in group])


# -------------------------------------------------------------------------------------------------- the guest comes


@dataclass(frozen=True, slots=True)
class _Unverified:
    """Flows that were put in, what the device answered, and what it holds: looked up while more is being put in."""

    port: _Arriving
    batch: Batch
    made: Results
    look: Future[tuple[Batch, npt.NDArray[np.bool_]]]
    """Rows and presence of each flow of `batch`."""

    def without(self, gone: Batch) -> _Unverified:
        """Without the flows that are named."""
        if self.batch.template.key != gone.template.key:
            return self
        table = FlowTable()
        table.put(gone)
        stays = ~table.find(self.batch)[0]
        found, is_there = self.look.result()
        look: Future[tuple[Batch, npt.NDArray[np.bool_]]] = Future()
        look.set_result((found.take(stays), is_there[stays]))
        return _Unverified(self.port, self.batch.take(stays), self.made[stays], look)


@dataclass(slots=True)
class _Arriving:
    """One port of the guest that comes, and what was put in for it."""

    scope: Scope
    held: FlowTable = field(default_factory=FlowTable)
    """What the device holds thanks to this session, with the device's own ids."""


class DestinationSession(Session):
    """The destination's part."""

    role = "destination"

    def __init__(self, host: Host, session: str, guest: str, peer: str, ended: Callable[[Session], None]) -> None:
        super().__init__(host, session, guest, peer, ended)
        self._ports: list[_Arriving] = []
        self._waiting: list[bytes] = []
        self._unverified: list[_Unverified] = []
        self._looker = ThreadPoolExecutor(1, thread_name_prefix=f"sami-look-{session[:8]}")
        self._refused: dict[Reason, FlowTable] = {}
        self._degraded: dict[str, FlowTable] = {}
        self._present = FlowTable()
        self._verified = self._discarded = 0
        with host.lock:
            host.arriving_guests.add(guest)

    def _state(self) -> str:
        return self._known.state.value if hasattr(self, "_known") else destination.State.ASKED.value

    def _begin(self) -> None:
        capabilities = self.host.driver.capabilities()
        free = None if capabilities.capacity is None else max(0, capabilities.capacity - capabilities.in_use)
        said = Open(
            guest=self.guest,
            destination=self.host.name,
            versions=(PROTOCOL_VERSION,),
            templates=tuple(sorted(capabilities.templates)),
            compressions=compression.available(),
            free=free,
        )
        self.note("asked")
        self._known, actions = destination.begin(self.host.settings.limits, said, time.monotonic())
        self._enact("guest prepare", actions)

    def _step(self, event: Event, now: float) -> list[Action]:
        self._known, actions = destination.step(self._known, event, now)
        if isinstance(event, PeerSaid):
            self._note_message(event.message)
        return actions

    def _note_message(self, message: Message) -> None:
        match message:
            case Flows():
                self.note("first flows")
            case InSync():
                self.note("in sync")
            case FlowChanges(is_last=True):
                self.note("last changes came")
            case FlowChanges():
                pass
            case Purged():
                self.note("source purged")
            case _:
                self.note(type(message).__name__.lower() + "ed")

    def _say(self, message: Message) -> None:
        super()._say(message)
        if isinstance(message, Complete | Arrived):
            self.note(type(message).__name__.lower())

    def _note_phase(self, event: MigrationEvent) -> None:
        self.note(event.phase.value)
        if event.phase is Phase.RESUMED:
            with self.host.lock:
                self.host.arriving_guests.discard(self.guest)

    def _actions(self) -> Actions:
        return {
            FindScope: self._find_scope,
            Import: self._import,
            Verify: self._verify,
            Renew: self._renew,
            Discard: self._discard,
        }

    def _find_scope(self, action: FindScope) -> Done:
        scopes = self.host.scopes.find(self.guest)
        if not scopes:
            return Done("FindScope", is_all=False)
        self.note("scope known")
        self._ports = [_Arriving(scope) for scope in scopes]
        waiting, self._waiting = self._waiting, []
        for payload in waiting:
            self._put_in_and_take_out(payload)
        if self._known.has_last:
            self.note("last changes applied")
        return Done("FindScope", len(scopes))

    def _import(self, action: Import) -> Done:
        self.keep_payload(action.payload)
        if not self._ports and not self._known.has_scope:
            self._waiting.append(action.payload)
            return Done("Import")
        self._put_in_and_take_out(action.payload)
        if self._known.has_last:
            self.note("last changes applied")
        while self._unverified and self._unverified[0].look.done():
            self._settle(self._unverified.pop(0))
        return Done("Import")

    def _put_in_and_take_out(self, payload: bytes) -> None:
        carried = ipfix.decode(compression.decompress(payload), enterprise=self.host.settings.enterprise)
        for element in carried.skipped:
            remark = f"skipped what is unknown here: {element}"
            if remark not in self.report.remarks:
                self.report.remarks.append(remark)
        for batch in carried.batches:
            if batch.template.is_identity:
                self._take_out(batch)
        for batch in carried.batches:
            if not batch.template.is_identity:
                self._put_in(batch)

    def _take_out(self, gone: Batch) -> None:
        """What the source lost goes here too, if it was this session that put it in."""
        for port in self._ports:
            known, ids = port.held.find(gone)
            named = gone.take(known)
            named.rows["flowId"] = ids[known]
            with self.host.deciding(port.scope):
                named = self.host.arriving.unclaimed_by_others(self.id, port.scope, named)
                self.host.driver.remove(port.scope, named)
            port.held.discard(gone)
        for table in self._tables():
            table.discard(gone)
        self._unverified = [part.without(gone) for part in self._unverified]

    def _put_in(self, batch: Batch) -> None:
        # Nothing tells this host that traffic renews the source's timeout: what is held here must not run out before
        # the guest comes. What the source lets expire arrives as a removal.
        hold = self.host.settings.limits.hold_seconds
        batch.rows["remainingTimeoutSeconds"] = np.maximum(batch.rows["remainingTimeoutSeconds"], hold)
        homeless = np.ones(len(batch), bool)
        for port in self._ports:
            here = has_end_in(batch, port.scope.addresses) & homeless
            homeless &= ~here
            mine = batch.take(here) if not here.all() else batch
            with self.host.deciding(port.scope):
                made = self.host.driver.insert(self._with_neighbours(port.scope), mine)
                self.host.arriving.claim(self.id, port.scope, mine.take(made["outcome"] == Outcome.IMPORTED))
            self._unverified.append(
                _Unverified(port, mine, made, self._looker.submit(self.host.driver.read_back, port.scope, mine))
            )
        if homeless.any():
            foreign = batch.take(homeless)
            look: Future[tuple[Batch, npt.NDArray[np.bool_]]] = Future()
            look.set_result(
                (Batch(foreign.template, foreign.template.empty(len(foreign))), np.zeros(len(foreign), bool))
            )
            made = results(len(foreign), Outcome.REFUSED, Reason.FOREIGN_ADDRESS)
            self._unverified.append(_Unverified(_Arriving(_NOWHERE), foreign, made, look))

    def _with_neighbours(self, scope: Scope) -> Scope:
        """The scope with the ports whose guests run here: flows with them are this host's own business."""
        if not scope.is_shared:
            return scope
        still_coming = {
            address
            for guest in self.host.arriving_guests
            for other in self.host.scopes.find(guest)
            for address in other.addresses
        }
        running = tuple(one for one in self.host.scopes.neighbours(scope) if one not in still_coming)
        return Scope(scope.port, scope.guest, scope.zones, scope.addresses, scope.namespace, True, running)

    def _verify(self, action: Verify) -> Done:
        """Compares what was put in since the last time. What counts is what the device holds, not what it answered."""
        unverified, self._unverified = self._unverified, []
        for part in unverified:
            self._settle(part)
        return Done("Verify", self._held_count(), refused=sum(map(len, self._refused.values())))

    def _corrected(self, part: _Unverified) -> Batch:
        """Corrects the answers by what the device holds; returns what it holds thanks to us."""
        found, is_there = part.look.result()
        made = part.made
        has_vanished = is_in_device(made) & ~is_there
        made["outcome"][has_vanished], made["reason"][has_vanished] = Outcome.REFUSED, Reason.VANISHED
        is_ours = made["outcome"] == Outcome.IMPORTED
        made["lost"][is_ours] = lost_fields(part.batch.take(is_ours), found.rows[is_ours])
        made["outcome"][made["lost"] != 0] = Outcome.DEGRADED
        self._verified += int(np.count_nonzero(is_in_device(made)))
        return found.take(is_ours)

    def _settle(self, part: _Unverified) -> None:
        """Files each flow under what became of it last."""
        batch, made = part.batch, part.made
        found = self._corrected(part)
        for table in (part.port.held, *self._tables()):
            table.discard(batch)
        part.port.held.put(found)
        self._present.put(batch.take(made["outcome"] == Outcome.PRESENT))
        for code in np.unique(made["reason"][made["outcome"] == Outcome.REFUSED]):
            self._refused.setdefault(Reason(int(code)), FlowTable()).put(batch.take(made["reason"] == code))
        for position, state_field in enumerate(batch.template.state):
            is_lost = (made["lost"] >> position) & 1 == 1
            if is_lost.any():
                self._degraded.setdefault(state_field[0], FlowTable()).put(batch.take(is_lost))

    def _tables(self) -> list[FlowTable]:
        return [self._present, *self._refused.values(), *self._degraded.values()]

    def _renew(self, action: Renew) -> Done:
        """Gives time to what would run out while the guest runs elsewhere; puts in again what vanished."""
        hold = self.host.settings.limits.hold_seconds
        for port in self._ports:
            for batch in port.held.batches():
                short = batch.take(batch.rows["remainingTimeoutSeconds"] < 4 * hold)
                short.rows["remainingTimeoutSeconds"] = np.maximum(short.rows["remainingTimeoutSeconds"], hold)
                made = self.host.driver.renew(port.scope, short)
                vanished = short.take(made["outcome"] == Outcome.ABSENT)
                if len(vanished):
                    self.report.remarks.append(f"{len(vanished)} flows vanished before the guest came; put in again")
                    self._put_in(vanished)
        self._verify(Verify())
        return Done("Renew")

    def _discard(self, action: Discard) -> Done:
        """The guest does not come: removes by name what this session put in and no other session claims."""
        self._waiting = []
        self._verify(Verify())
        for port in self._ports:
            with self.host.deciding(port.scope):
                for batch in port.held.batches():
                    victims = self.host.arriving.unclaimed_by_others(self.id, port.scope, batch)
                    removed = self.host.driver.remove(port.scope, victims.identities)
                    self._discarded += int(np.count_nonzero(removed["outcome"] == Outcome.REMOVED))
                self.host.arriving.release(self.id, port.scope)
            port.held = FlowTable()
        self.note("discarded")
        return Done("Discard", self._discarded)

    def _held_count(self) -> int:
        return sum(len(port.held) for port in self._ports)

    def _counts(self) -> dict[str, int]:
        for reason, table in self._refused.items():
            for batch in table.batches():
                self.report.name(f"refused: {WORDS[reason]}", len(batch), names(batch))
        for element, table in self._degraded.items():
            for batch in table.batches():
                self.report.name(f"degraded: {element} was not kept", len(batch), names(batch))
        return {
            "imported": self._held_count(),
            "degraded": _distinct(self._degraded.values()),
            "present": len(self._present),
            "refused": sum(map(len, self._refused.values())),
            "verified": self._verified,
            "discarded": self._discarded,
        }

    def _clean_up(self) -> None:
        self._looker.shutdown(wait=False)
        for port in self._ports:
            with self.host.deciding(port.scope):
                self.host.arriving.release(self.id, port.scope)
        with self.host.lock:
            self.host.arriving_guests.discard(self.guest)


_NOWHERE = Scope(port="", guest="", zones={}, addresses=())


def _distinct(tables: Iterable[FlowTable]) -> int:
    """How many flows are in any of the tables."""
    union = FlowTable()
    for table in tables:
        for batch in table.batches():
            union.put(batch)
    return len(union)
