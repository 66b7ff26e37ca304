"""The source's part of a handover: the guest leaves."""

from __future__ import annotations

import functools
import hmac
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin.codec import compression, ipfix
from sami_plugin.drivers.base import Capabilities
from sami_plugin.errors import SamiError
from sami_plugin.former import Former, FormerPort
from sami_plugin.leaving import (
    KEPT,
    NOT_FOR_THAT_DOMAIN,
    Inventory,
    Leaving,
    Piece,
    Sweep,
    foremost,
    merged,
    split,
    taken,
)
from sami_plugin.line import Line
from sami_plugin.migration import source
from sami_plugin.migration.decision import (
    Action,
    Choose,
    Done,
    Event,
    ExportChanges,
    ExportNext,
    Keep,
    PeerSaid,
    Purge,
    PurgeLate,
    Resync,
    SayAgain,
    SayOffer,
    StartExport,
)
from sami_plugin.model.flows import (
    Addresses,
    Batch,
    FirewallEvent,
    Omitted,
    Template,
    has_end_in,
    names,
)
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.migration import (
    Answer,
    Arrived,
    AskAgain,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    Message,
    MigrationEvent,
    Offer,
    Open,
    Phase,
    Room,
    Stays,
)
from sami_plugin.model.migration import Outcome as SessionOutcome
from sami_plugin.model.report import BOTH_HAVE, Report
from sami_plugin.model.results import MEND_NO_PLACE, WORDS, Outcome, Reason, came_out
from sami_plugin.model.scope import Scope
from sami_plugin.notifications import started
from sami_plugin.session import Actions, Host, Session, scope_of

LOG = logging.getLogger(__name__)

TOLD_ALL = frozenset((source.State.DRAINED, source.State.PURGING, source.State.WATCHING, source.State.ENDED))
"""States of a session that has told the last changes: what is gone since was deleted in the pause, or by it."""

GONE = "told of before, and not at the source any more; sent all the same, for it may have gone since the pause"

REMOVED_AT_A_TIME = 2048
"""Flows that are removed between two moments in which another guest of a shared zone gets its turn."""


class SourceSession(Session):
    """The source's part."""

    role = "source"

    def __init__(
        self,
        host: Host,
        session: str,
        guest: str,
        peer: str,
        ended: Callable[[Session], None],
        *,
        is_outgoing: bool,
        is_suspended: bool = False,
        scopes: tuple[Scope, ...] = (),
        line: Line | None = None,
        is_recovered: bool = False,
        has_all: bool = False,
        destination: str | None = None,
        token: str = "",
    ) -> None:
        """`scopes` are the guest's ports as they were noted before: it may be gone already, and they with it.

        Of a session that goes on with another one, `is_recovered` says that it is because this host's agent was started
        anew, and `has_all` that the destination needs nothing more. `destination` and `token` are where the guest goes
        to and what its description says, for a host that asks when it has left.
        """
        super().__init__(host, session, guest, peer, ended, line)
        self._is_recovered, self._has_all = is_recovered, has_all
        self.destination, self.token = destination or "", token
        limits = host.settings.limits
        self._known = source.Source(
            limits, host.monotonic() + limits.session_seconds, is_outgoing=is_outgoing, is_suspended=is_suspended
        )
        self.has_left = False
        """Whether the guest is gone from this host, by its hypervisor's word."""
        self._scopes = scopes
        self._begins_with: list[Action] = []
        self._ports: list[Leaving] = []
        self._compression = "zlib"
        self._templates: tuple[str, ...] = ()
        """Those of the destination's driver."""
        self._devices: tuple[str, ...] | None = None
        """The destination's that serve several hosts; None where it has not said."""
        self._shared: tuple[str, ...] = ()
        """Of these, this host's."""
        self._pieces: Iterator[Piece] = iter(())
        self._unsent: deque[Piece] = deque()
        """Of an export that is whole, what is still to be told."""
        self._sweep: Sweep | None = None
        self._offered = Inventory()
        self._is_answered = True
        self._unsaid: list[Batch] = []
        """What changed before the destination has answered."""
        self._is_sent = False
        """All that was exported at first is sent."""
        self._named: Mapping[str, Any] | None = {}
        """What the journal has of the flows that the report will name; None where that is a former session's."""
        self._removed = self._late = self._left = self._kept_for_others = 0

    def take_over(self, former: Former) -> None:
        """The guest's flows are still here, or in the journal."""
        super().take_over(former)
        limits, now = self.host.settings.limits, self.host.monotonic()
        is_gone, is_suspended = former.has("guest stopped"), former.has("guest suspended")
        self.has_left |= is_gone
        self._named = None
        if self._is_recovered:
            self.known_as = former.known_as
            self.report.named |= deepcopy(dict(former.named))
            self._known, self._begins_with = source.recovered(
                limits,
                now,
                former.state,
                is_suspended=is_suspended,
                is_gone=is_gone,
                has_arrived=former.has("peer said Arrived"),
                has_purged=any(one.startswith("Purge done") for one in former.heard),
            )
        else:
            self._known = source.continuing(
                limits, now, has_all=self._has_all, is_suspended=is_suspended, is_gone=is_gone
            )
        for known in former.ports:
            port = Leaving(known.scope, None)
            if self._is_recovered or self._has_all:
                port.exported = known.flows
            else:
                port.former = known.flows
            for batch in known.flows.batches():
                with self.host.deciding(known.scope):
                    self.host.leaving.claim(self.id, known.scope, batch)
            self._ports.append(port)

    def _flows_by_port(self) -> tuple[FormerPort, ...]:
        self._note_unsent(self._unsent)  # it may be gone when it is exported again
        known = tuple(FormerPort(port.scope, port.told()) for port in self._ports)
        return known or tuple(FormerPort(scope) for scope in self._scopes)

    def _made_successor(self) -> Session:
        raise AssertionError("only a destination opens sessions")

    def _continued_as(self) -> SessionOutcome:
        return self._known.outcome if self._state_before == source.State.WATCHING else super()._continued_as()

    def _scopes_known(self) -> tuple[Scope, ...]:
        return tuple(map(scope_of, self._ports)) or self._scopes

    def may_be_fetched_by(self, host: str, token: str) -> bool:
        """Whether the guest left to that host, as far as one knows here, and no other has asked for its flows."""
        is_its = host == self.destination or bool(
            not self.destination and self.token and hmac.compare_digest(self.token.encode(), token.encode())
        )
        return self.peer in ("", host) and is_its and source.may_be_continued(self._known)

    @property
    def lacks_ports(self) -> bool:
        """Whether it does not know where the guest's ports are, or were."""
        return not self._scopes_known()

    def note_ports(self, scopes: tuple[Scope, ...]) -> None:
        """Where they are while the guest is here. From any thread."""
        self._scopes = scopes

    @property
    def has_purged(self) -> bool:
        """Whether what was exported is gone here."""
        return self._known.state is source.State.WATCHING

    def may_be_continued_by(self, peer: str, session: str) -> bool:
        """Whether this is the session, by the id that the peer knows, and all of the guest's flows are still here."""
        return (self.peer, self.known_as) == (peer, session) and source.may_be_continued(self._known)

    @functools.cached_property
    def _actions(self) -> Actions:
        return {
            Keep: self._keep,
            StartExport: self._start_export,
            SayOffer: self._say_offer,
            SayAgain: self._say_again,
            Choose: self._choose,
            ExportNext: self._export_next,
            ExportChanges: self._export_changes,
            Resync: self._resync,
            Purge: self._purge,
            PurgeLate: self._purge_late,
        }

    def _start_export(self, action: StartExport) -> Done:
        """Watches before it exports, so that no change falls between the two."""
        self.note("export began")
        self.host.notifications.tell(started, self.report, self.host.wall(), self._state(), is_held=False)
        if not self._ports:
            scopes = (self.host.scopes.find(self.guest) if self.peer else ()) or self._scopes
            self._ports = [Leaving(scope, None) for scope in scopes]
        for port in self._ports:
            self.host.driver.attend(port.scope.namespace)
            can = self.host.driver.capabilities(port.scope)
            self._leave_in_place(port, can)
            if can.can_watch:
                port.watch = self.host.driver.watch(port.scope)
        if not self._ports:
            self.report.remark("this host knows no port of the guest, so nothing was carried")
        self._pieces = self._export()
        return Done("StartExport", sum(port.scope.is_port for port in self._ports))

    def _leave_in_place(self, port: Leaving, can: Capabilities) -> None:
        """What a device keeps that the other host has as well, or may have, does not leave and is not removed."""
        port.stays = frozenset(
            kind for kind, device in can.shared.items() if self._devices is None or device in self._devices
        )
        for device in sorted({can.shared[kind] for kind in port.stays}):
            if self._devices is None:
                self.report.remark(f"the other host may have the device {device} too: what it keeps stays in it")
            else:
                self._shared = (*dict.fromkeys((*self._shared, device)),)
                self.report.remark(BOTH_HAVE.format(device=device))

    def _say_offer(self, action: SayOffer) -> None:
        """All is exported before, to know how much it is."""
        self._line_up(self._pieces)
        for _, batch in self._unsent:
            self._offered.add(batch, self._domain)
        self._is_answered = False
        self._say(Offer(self._known.version, action.ports, *self._offered.told(), self._shared))
        self.note("offered")

    def _say_again(self, action: SayAgain) -> None:
        self._say(AskAgain(self.known_as))

    def _line_up(self, pieces: Iterable[Piece]) -> None:
        unsent = self._unsent = deque(pieces)
        self._pieces = (unsent.popleft() for _ in range(len(unsent)))

    def _choose(self, action: Choose) -> None:
        """Keeps back what has no place there: the least important."""
        self._is_answered = True
        if self._unsaid:
            self._say_changes(self._unsaid, is_last=False)
        if action.places >= sum(self._offered.counts[kind] for kind in action.kinds):
            return
        pieces = list(self._pieces)
        others = [piece for piece in pieces if piece[1].template.name not in action.kinds]
        chosen, rest = foremost((piece for piece in pieces if piece[1].template.name in action.kinds), action.places)
        self._line_up([*chosen, *others])
        for port, batch in rest:
            with self.host.deciding(port.scope):
                self.host.leaving.claim(self.id, port.scope, batch)
            port.unplaced.put(batch.take(~port.exported.find(batch)[0]))  # of what changed it has been told
        self._note_named()

    def _keep(self, action: Keep) -> Done:
        """Nobody asked for the guest's flows, or answered. What it leaves is noted, and removed by name like all else.

        After a new start it is still to be had, though it may have run out by then.
        """
        if not self._is_answered:
            waiting = [*(batch for _, batch in self._unsent), *self._unsaid]
            for some in split(waiting, self.host.settings.batch_flows) if waiting else ():
                self._packed(some)
            return Done("Keep", sum(map(len, waiting)))
        self._start_export(StartExport())
        self._note_unsent(self._pieces)
        for port in self._ports:
            port.close()
        self.note("export ended")
        return Done("Keep", self._exported_count())

    def _note_unsent(self, pieces: Iterable[Piece]) -> None:
        """What nobody was told of is removed by name too, and kept for who may still come for it."""
        for some in self._told(pieces):
            self._packed(some)

    def _export(self) -> Iterator[Piece]:
        for port in self._ports:
            for piece in self.host.driver.export(port.scope):
                if isinstance(piece, Omitted):
                    self._offered.add(piece, self._domain)
                    self.report.name(f"not exported: {piece.reason}", piece.count, piece.examples)
                elif port.leaves(piece):
                    if self._former is not None and self._former.has("guest suspended"):
                        piece = _made_before_the_pause(port.former, piece)
                    port.former.discard(piece)
                    yield port, piece
            if self._known.is_suspended:  # what was deleted since the pause says nothing, and travels all the same
                for batch in port.former.batches():
                    if self._former is not None and self._former.state not in TOLD_ALL:
                        self.report.name(GONE, len(batch), names(batch))
                    yield port, batch
            else:  # nor does it say anything later, when the guest is paused
                self._note_gone(port.former)
                port.former = FlowTable()

    def _note_gone(self, former: FlowTable) -> None:
        """For a session that goes on with this one by its journal, in which flows are as they were told."""
        gone = [batch.identities for batch in former.batches()]
        for batch in gone:
            batch.rows["firewallEvent"] = FirewallEvent.DELETED
        for some in split(gone, self.host.settings.batch_flows) if gone else ():
            self._packed(some)

    def _export_next(self, action: ExportNext) -> Done:
        pieces, is_all = taken(self._pieces, self.host.settings.batch_flows)
        count = 0
        for some in self._told(pieces):
            count += sum(map(len, some))
            self._say(Flows(self._packed(some)))
        if is_all:
            self.note("export ended")
            self._is_sent = True
            self._note_named()
        return Done("ExportNext", count, is_all=is_all)

    def _told(self, pieces: Iterable[Piece]) -> list[list[Batch]]:
        """These flows as what the other host is told of, in lists that make one message each."""
        told: list[Batch] = []
        for port, batch in merged(pieces):
            newest = batch.take(~port.overtaken.find(batch)[0])
            self._tell(port, newest, told, [])  # the first time that anything is said of them
        return split(told, self.host.settings.batch_flows) if told else []

    def _export_changes(self, action: ExportChanges) -> Done:
        """Tells what changed since the last time; where changes were lost, by the difference of a whole export."""
        count, ports = 0, self._ports
        is_all = False
        while not is_all:
            gone, told, ports = self._changes_of(ports, action)
            is_all = not ports
            if not self._is_answered:
                self._unsaid += [*gone, *told]
            elif gone or told or (action.is_last and is_all):
                self._say_changes([*gone, *told], is_last=action.is_last and is_all)
            count += sum(map(len, told))
        self._sweep = None
        if action.is_last:
            # What is deleted here from now on says nothing, and the purge's own events would only cost time.
            for port in self._ports:
                port.close()
            self.note("last changes sent")
            self._note_named()
        return Done("ExportChanges", count)

    def _changes_of(
        self, ports: list[Leaving], action: ExportChanges
    ) -> tuple[list[Batch], list[Batch], list[Leaving]]:
        """What is gone and what is to be told of these ports, and which of them have more that takes longer."""
        gone: list[Batch] = []
        told: list[Batch] = []
        slower: list[Leaving] = []
        for port in ports:
            changes = port.changes(is_last=action.is_last)
            if not changes.is_all:
                slower.append(port)
            if changes.is_complete:
                differences: Iterable[tuple[Leaving, Iterable[Batch], Iterable[Batch]]]
                differences = [(port, changes.removals, changes.upserts)]
            else:
                sweep = Sweep([port], self.host.driver)
                while not sweep.advance(self.host.settings.batch_flows):
                    pass
                differences = sweep.difference()
            if action.is_last and self._known.is_paused_early:  # of all that changed since, the guest has made nothing
                differences = (
                    (port, removals, [_made_before_the_pause(port.exported, batch) for batch in upserts])
                    for port, removals, upserts in differences
                )
            self._tell_differences(differences, gone, told, says_removals=action.says_removals)
        return gone, told, slower

    def _resync(self, action: Resync) -> Done:
        """Exports again, a slice at a time, and tells the difference.

        A kernel does not tell the changes of entries that are older than the first listener; this finds them. That
        traffic renews a timeout is found by nobody, so the destination renews what it holds.
        """
        if self._sweep is None:
            self._sweep = Sweep(self._ports, self.host.driver)
        if not self._sweep.advance(self.host.settings.batch_flows):
            return Done("Resync", is_all=False)
        gone: list[Batch] = []
        told: list[Batch] = []
        self._tell_differences(self._sweep.difference(), gone, told)
        self._sweep = None
        if gone or told:
            self._say_changes([*gone, *told], is_last=False)
        return Done("Resync")

    def _tell_differences(
        self,
        differences: Iterable[tuple[Leaving, Iterable[Batch], Iterable[Batch]]],
        gone: list[Batch],
        told: list[Batch],
        *,
        says_removals: bool = True,
    ) -> None:
        for port, removals, upserts in differences:
            for batch in removals:
                if says_removals:
                    self._overtake(port, batch)
                    self._tell_gone(port, batch, gone)
                else:
                    self._name_unheard(port, batch)
            for batch in upserts:
                self._overtake(port, batch)
                self._tell(port, batch, told, gone)

    def _overtake(self, port: Leaving, batch: Batch) -> None:
        """What was exported of these flows, and waits to be sent, says nothing any more."""
        if not self._is_sent:
            port.overtaken.put(batch.identities)

    def _tell(self, port: Leaving, batch: Batch, told: list[Batch], gone: list[Batch]) -> None:
        """Puts flows among what is told, or keeps them from a domain that is not to have them."""
        if not len(batch):
            return
        with self.host.deciding(port.scope):
            self.host.leaving.claim(self.id, port.scope, batch)
        is_unplaced = port.unplaced.find(batch)[0]
        if is_unplaced.any():
            port.unplaced.put(batch.take(is_unplaced))
            batch = batch.take(~is_unplaced)
        if self._gives(batch):
            port.withheld.discard(batch)
            port.exported.put(batch)
            told.append(batch)
        else:
            before = batch.identities  # told as of another kind, with or without a translation
            before.rows["flowId"] = 0
            self._tell_gone(port, before, gone)
            port.withheld.put(batch)

    def _gives(self, batch: Batch) -> bool:
        """Whether the other host's domain may have this kind, and the host reads it: not each one what is expected."""
        return self._knows(batch.template) and (self._domain is None or self._domain.gives(batch.template.usual.name))

    def _knows(self, template: Template) -> bool:
        return template.is_read_by_all or template.name in self._templates

    def _tell_gone(self, port: Leaving, batch: Batch, gone: list[Batch]) -> None:
        """A flow that was never told needs no removal; one that took the same tuple since is not meant."""
        for table in port.untold():
            table.discard(batch)
        known, ids = port.exported.find(batch)
        named = batch.rows["flowId"]
        batch = batch.take(known & ((named == 0) | (ids == named)))
        if len(batch):
            batch.rows["firewallEvent"] = FirewallEvent.DELETED
            port.exported.discard(batch)
            gone.append(batch)

    def _name_unheard(self, port: Leaving, batch: Batch) -> None:
        """Flows that somebody deleted in the pause, before the export came to them: what they were is not known."""
        known = [table.find(batch)[0] for table in (port.exported, *port.untold())]
        lost = batch.take(~np.logical_or.reduce(known))
        if len(lost):
            self.report.name("deleted at the source in the pause, before they were exported", len(lost), names(lost))

    def _say_changes(self, batches: list[Batch], *, is_last: bool) -> None:
        lists = split(batches, self.host.settings.batch_flows)
        for number, some in enumerate(lists, 1):
            self._say(FlowChanges(self._packed(some), is_last and number == len(lists)))

    def _packed(self, batches: Iterable[Batch]) -> bytes:
        octets = ipfix.encode(batches, export_time=int(self.host.wall()), enterprise=self.host.settings.enterprise)
        payload = compression.compress(octets, self._compression)
        self.keep_payload(payload)
        return payload

    def _purge(self, action: Purge) -> Done:
        """Removes what was exported, except what a guest that stays still needs, and looks whether it is gone."""
        with self.host.purging(self.guest, has_names=True) as is_allowed:
            if not is_allowed:
                self.report.remark("the guest is back and its flows with it; what it left here before was not removed")
                return Done("Purge", refused=self._exported_count())
            self._left = self._kept_for_others = 0  # of a purge that failed half-way
            self.report.named.pop(KEPT, None)
            self._note_unsent(self._unsent)
            self._of_each(self._ports, self._purge_port)
            self.host.gone[self.id] = tuple(address for port in self._ports for address in port.scope.addresses)
        self.note("proved")
        return Done("Purge", self._removed, refused=self._left)

    def _purge_port(self, port: Leaving) -> None:
        told = chain(*(table.batches() for table in (port.exported, *port.untold())))
        if port.scope.is_shared:
            told = chain(*split(told, REMOVED_AT_A_TIME))
        victims: list[Piece] = []
        for batch in told:
            with self.host.deciding(port.scope):
                stay = self._neighbours(port.scope)  # with who has come since
                is_others = self._is_others_too(port, batch, stay)
                self.host.leaving.withdraw(self.id, port.scope, batch)  # what others claim is theirs alone now
                if is_others.any():
                    kept, batch = batch.take(is_others), batch.take(~is_others)
                    self._kept_for_others += len(kept)
                    self.report.name(KEPT, len(kept), names(kept))
                removed = self.host.driver.remove(port.scope, batch.identities)
            self._removed += int(np.count_nonzero(came_out(removed, Outcome.REMOVED)))
            victims.append((port, batch))
        self.note("purged")
        self._left += sum(self._is_left(port.scope, batch) for _, batch in merged(victims))

    def _is_left(self, scope: Scope, batch: Batch) -> int:
        """How many are there still. What has the same name and another id was made since: that is `_purge_late`'s."""
        found, is_there = self.host.driver.read_back(scope, batch)
        return int(np.count_nonzero(is_there & (found.rows["flowId"] == batch.rows["flowId"])))

    def _purge_late(self, action: PurgeLate) -> Done:
        """Removes by name what packets of peers made here after the pause, until they knew where the guest is now.

        Later than the purge, for they may still be coming then, and since a look at a whole firewall has no hurry.
        """
        with self.host.purging(self.guest, has_names=False) as is_allowed:
            if not is_allowed:
                self.report.remark("the guest is back, or may be; what late packets made here was not looked for")
                return Done("PurgeLate")
            self._of_each(self._ports, self._purge_late_of)
        self.note("watched")
        return Done("PurgeLate", self._late)

    def _purge_late_of(self, port: Leaving) -> None:
        remaining = self._remaining(port)  # a whole firewall, while nobody waits for it
        with self.host.deciding(port.scope):
            self._purge_remaining(port, remaining)

    def _purge_remaining(self, port: Leaving, remaining: list[Batch]) -> None:
        stay = self._neighbours(port.scope)
        if stay and not port.scope.is_shared:  # of what passes there now the guest is no measure
            self.report.remark(f"the zone of {port.scope.port} is another guest's, and was not watched")
            return
        for batch in remaining:
            left = batch.take(~self._is_others_too(port, batch, stay))
            made = self.host.driver.remove(port.scope, left.identities)
            gone = left.take(came_out(made, Outcome.REMOVED))
            self._late += len(gone)
            if len(gone):
                why = "removed at the source, made there after the pause"
                self.report.name(why, len(gone), names(gone))

    def _neighbours(self, scope: Scope) -> Addresses:
        """Whose flows stay. A zone that was the port's own when the guest began to leave may be shared by now.

        The port of a guest that has left may be here still, and needs nothing.
        """
        gone = {address for session, some in tuple(self.host.gone.items()) if session != self.id for address in some}
        try:
            return tuple(address for address in self.host.scopes.neighbours(scope) if address not in gone)
        except SamiError as error:
            if scope.is_shared:
                raise
            self.report.remark(f"it is not known who else is in the zone by now: {error}")
            return ()

    def _is_others_too(self, port: Leaving, batch: Batch, stay: Addresses) -> npt.NDArray[np.bool_]:
        return self.host.leaving.claimed_by_others(self.id, port.scope, batch) | has_end_in(batch, stay)

    def _remaining(self, port: Leaving) -> list[Batch]:
        self._leave_in_place(port, self.host.driver.capabilities(port.scope))
        pieces = (piece for piece in self.host.driver.export(port.scope) if not isinstance(piece, Omitted))
        return [piece.take(has_end_in(piece, port.scope.addresses)) for piece in pieces if port.leaves(piece)]

    # What the session asks of its role.

    def _state(self) -> str:
        return self._known.state

    def _why_given_up(self) -> str:
        is_given_up = self._state_before == source.State.ABANDONED and self._known.reason != source.STARTED_ANEW
        return self._known.reason if is_given_up else ""

    def _begin(self) -> None:
        """All but what goes on begins with the destination's Open, which is in the queue."""
        if self._begins_with:
            self._enact("goes on", self._begins_with)

    def _step(self, event: Event, now: float) -> list[Action]:
        self._known, actions = source.step(self._known, event, now)
        if isinstance(event, PeerSaid):
            self._note_message(event.message)
        return actions

    def _note_message(self, message: Message) -> None:
        match message:
            case Open():
                self._compression = compression.choose(message.compressions)
                self._templates = message.templates
                self._devices = message.devices
                self.report.request_id = message.request_id
            case Answer():
                losses = dict(zip(message.reasons, message.counts, strict=False))
                self.report.verdict = {
                    "verdict": message.verdict,
                    "flows": self._offered.counts.total() + self._offered.left_out.total(),
                    "places": message.places,
                    "losses": losses,
                }
            case Room():
                left = f"of the promised places at the destination {message.places} are left"
                self.report.remark(f"{left}: {message.reason}")
                return
        self.note(_SAID_TO_SOURCE.get(type(message), type(message).__name__))

    def _may_not_refuse(self) -> None:
        """Only the destination does."""

    def _note_phase(self, event: MigrationEvent) -> None:
        if event.phase is Phase.STOPPED:
            self.has_left = True
            self.host.arrived_guests.discard(self.guest)
        self.note(event.phase.value)

    def _exported_count(self) -> int:
        return sum(len(port.exported) for port in self._ports)

    def _note_named(self) -> None:
        """For a later start, to which all that was exported is alike."""
        named = self._named_so_far()
        if named == self._named or not self._journal_works:
            return
        self._named = named
        self.write(self.host.journal.note_named, named)

    def _name_in(self, report: Report) -> None:
        for port in self._ports:
            for batch in port.withheld.batches():
                why = NOT_FOR_THAT_DOMAIN if self._knows(batch.template) else WORDS[Reason.NOT_DECLARED]
                report.name(f"not exported: {why}", len(batch), names(batch))
            for batch in port.unplaced.batches():
                why = f"there was no place for it at the destination; {MEND_NO_PLACE}"
                report.name(f"not exported: {why}", len(batch), names(batch))

    def _counts(self) -> dict[str, int]:
        self._name_in(self.report)
        return {
            "exported": self._exported_count(),
            "purged": self._removed,
            "kept for other guests": self._kept_for_others,
            "late": self._late,
            "left_behind": self._left,
        }

    def _close(self) -> None:
        self.host.gone.pop(self.id, None)
        self._sweep = None
        for port in self._ports:
            try:
                port.close()
            except Exception:  # whatever it is, the session ends, and claims nothing any more
                LOG.exception("%s: %s could not be let go of", self.id, port.scope.port)
            with self.host.deciding(port.scope):
                self.host.leaving.release(self.id, port.scope)


def _made_before_the_pause(told: FlowTable, now: Batch) -> Batch:
    """Less what packets of peers have made since, in the place of flows that were told of and are gone."""
    known, ids = told.find(now)
    return now.take(~(known & (ids != 0) & (ids != now.rows["flowId"])))


_SAID_TO_SOURCE: Mapping[type[Message], str] = {
    Open: "asked",
    Answer: "answered",
    Complete: "complete",
    Arrived: "arrived",
    Stays: "the destination said that the guest stays",
    GivesUp: "the destination gave up",
}
"""The steps of the report that a message of the peer stands for."""
