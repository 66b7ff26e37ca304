"""What happens to a guest's flows when it moves, from the first word of the migration to the purge.

 1. The destination's hypervisor says that a guest is about to come, and from which host. `DestinationSession` asks that
    one for the guest's flows (`_ask`).
 2. The source has the guest in an outgoing job: `SourceSession` begins to watch the guest's ports, exports them, and
    says what there is (`_start_export`, `_say_offer`). The destination sees what it can take, keeps places for it and
    asks the guest's policy, which may refuse the migration (`_negotiate`). The source sends what has a place, batch by
    batch while the guest runs (`_choose`, `_export_next`).
 3. The destination puts each batch into its firewall as soon as the port's place is known there, looks at what the
    firewall kept, and keeps it from running out of time (`_import`, `_find_scope`, `_verify`, `_renew`).
 4. The source sends what changes, again and again (`_export_changes`, `_resync`).
 5. The guest is paused: the source sends its last changes (`_export_changes`). The destination puts them in, looks
    (`_import`, `_verify`), and says COMPLETE.
 6. The guest runs at the destination, which says ARRIVED.
 7. The source removes by name what it exported and looks whether all is gone (`_purge`); a moment later it removes by
    name what packets of peers have made of the guest's since the pause (`_purge_late`).

When the guest stays, the destination removes by name what it put in (`_discard`), and the source keeps everything.
When a guest left and no destination ever asked, the source notes what it left (`_keep`) and purges that after a while.

When to do which is decided in `migration.source` and `migration.destination`; `session` writes each decision into the
journal, waits for the disk where the decision says so, and calls what stands here: how it is done, in the order above.
What each role keeps of a port is in `leaving` and in `arriving`.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin.arriving import Arriving, Carried, Findings, Unverified
from sami_plugin.codec import compression, ipfix
from sami_plugin.errors import SamiError
from sami_plugin.former import FlowsByPort, Former
from sami_plugin.leaving import (
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
from sami_plugin.migration import destination, source
from sami_plugin.migration.decision import (
    Action,
    Ask,
    Choose,
    Discard,
    Done,
    Event,
    ExportChanges,
    ExportNext,
    FindScope,
    GuestDid,
    Import,
    Keep,
    LapsePlaces,
    Negotiate,
    Negotiated,
    OperatorSaid,
    PeerSaid,
    Purge,
    PurgeLate,
    Renew,
    Resync,
    SayAgain,
    SayOffer,
    StartExport,
    TimePassed,
    Verify,
)
from sami_plugin.migration.negotiation import Demand
from sami_plugin.model.address_map import peer_sees_another
from sami_plugin.model.domain import Domain
from sami_plugin.model.flows import (
    Addresses,
    Batch,
    FirewallEvent,
    Omitted,
    has_end_in,
    importance,
    is_translated_elsewhere,
    names,
)
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.migration import (
    VERSIONS,
    Answer,
    Arrived,
    AskAgain,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    InSync,
    Message,
    MigrationEvent,
    Offer,
    Open,
    Phase,
    Purged,
    Room,
    Stays,
)
from sami_plugin.model.results import MEND_NO_PLACE, Outcome, Reason, lost_fields
from sami_plugin.model.risk import Risk
from sami_plugin.model.scope import Scope
from sami_plugin.model.verdict import Verdict
from sami_plugin.notifications import at_risk, started
from sami_plugin.session import Host, Session

Actions = Mapping[type[Action], Callable[[Any], Done | Negotiated | None]]


# ------------------------------------------------------------------------------------------------ the guest leaves


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
        self._pieces: Iterator[Piece] = iter(())
        self._sweep: Sweep | None = None
        self._offered = Inventory()
        self._is_answered = True
        self._unsaid: list[Batch] = []
        """What changed before the destination has answered."""
        self._is_sent = False
        """All that was exported at first is sent."""
        self._removed = self._late = self._left = self._kept_for_others = 0
        host.leaves(guest)

    def take_over(self, former: Former) -> None:
        """The guest's flows are still here, or in the journal."""
        super().take_over(former)
        limits, now = self.host.settings.limits, self.host.monotonic()
        is_gone, is_suspended = former.has("guest stopped"), former.has("guest suspended")
        self.has_left |= is_gone
        if self._is_recovered:
            self.known_as = former.known_as
            self._known, self._begins_with = source.recovered(
                limits,
                now,
                former.state,
                is_suspended=is_suspended,
                is_gone=is_gone,
                has_arrived=former.has("peer said Arrived"),
            )
        else:
            self._known = source.continuing(
                limits, now, has_all=self._has_all, is_suspended=is_suspended, is_gone=is_gone
            )
        for scope, table in former.ports:
            port = Leaving(scope, None)
            if self._is_recovered or self._has_all:
                port.exported = table
            else:
                port.former = table
            for batch in table.batches():
                with self.host.deciding(scope):
                    self.host.leaving.claim(self.id, scope, batch)
            self._ports.append(port)

    def _flows_by_port(self) -> FlowsByPort:
        return tuple((port.scope, port.told()) for port in self._ports)

    def _made_successor(self) -> Session:
        raise AssertionError("only a destination opens sessions")

    def _scopes_known(self) -> tuple[Scope, ...]:
        return tuple(port.scope for port in self._ports)

    def may_be_fetched_by(self, host: str, token: str) -> bool:
        """Whether the guest left to that host, as far as one knows here, and nobody has asked for its flows by now."""
        is_its = host == self.destination or bool(
            not self.destination and self.token and hmac.compare_digest(self.token.encode(), token.encode())
        )
        return not self.peer and is_its and source.may_be_continued(self._known)

    @property
    def has_purged(self) -> bool:
        """Whether what was exported is gone here."""
        return self._known.state is source.State.WATCHING

    def may_be_continued_by(self, peer: str, session: str) -> bool:
        """Whether this is the session, by the id that the peer knows, and all of the guest's flows are still here."""
        return (self.peer, self.known_as) == (peer, session) and source.may_be_continued(self._known)

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
        self.host.notifications.send(started(self.report, self.host.wall(), self._state(), is_held=False))
        if not self._ports:
            scopes = (self.host.scopes.find(self.guest) if self.peer else ()) or self._scopes
            self._ports = [Leaving(scope, None) for scope in scopes]
        for port in self._ports:
            if self.host.driver.capabilities(port.scope).can_watch:
                port.watch = self.host.driver.watch(port.scope)
        if not self._ports:
            self.report.remark("this host knows no port of the guest, so nothing was carried")
        self._pieces = self._export()
        return Done("StartExport", len(self._ports))

    def _say_offer(self, action: SayOffer) -> None:
        """All is exported before, to know how much it is."""
        pieces = list(self._pieces)
        self._pieces = iter(pieces)
        for _, batch in pieces:
            self._offered.add(batch, self._domain)
        self._is_answered = False
        self._say(Offer(self._known.version, action.ports, *self._offered.told()))
        self.note("offered")

    def _say_again(self, action: SayAgain) -> None:
        self._say(AskAgain(self.known_as))

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
        self._pieces = iter([*chosen, *others])
        for port, batch in rest:
            with self.host.deciding(port.scope):
                self.host.leaving.claim(self.id, port.scope, batch)
            port.unplaced.put(batch)

    def _keep(self, action: Keep) -> Done:
        """Nobody asked for the guest's flows. What it leaves is noted, to be removed by name like all else."""
        self._start_export(StartExport())
        for some in self._told(self._pieces):
            self._packed(some)
        for port in self._ports:
            port.close()
        self.note("export ended")
        return Done("Keep", self._exported_count())

    def _export(self) -> Iterator[Piece]:
        for port in self._ports:
            for piece in self.host.driver.export(port.scope):
                if isinstance(piece, Omitted):
                    self._offered.add(piece, self._domain)
                    self.report.name(f"not exported: {piece.reason}", piece.count, piece.examples)
                else:
                    port.former.discard(piece)
                    yield port, piece
            if self._known.is_suspended:  # what was deleted since the pause says nothing, and travels all the same
                yield from ((port, batch) for batch in port.former.batches())

    def _export_next(self, action: ExportNext) -> Done:
        pieces, is_all = taken(self._pieces, self.host.settings.batch_flows)
        count = 0
        for some in self._told(pieces):
            count += sum(map(len, some))
            self._say(Flows(self._packed(some)))
        if is_all:
            self.note("export ended")
            self._is_sent = True
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
        gone: list[Batch] = []
        told: list[Batch] = []
        for port in self._ports:
            changes = port.changes()
            if changes.is_complete:
                differences: Iterable[tuple[Leaving, Iterable[Batch], Iterable[Batch]]]
                differences = [(port, changes.removals, changes.upserts)]
            else:
                sweep = Sweep([port], self.host.driver)
                while not sweep.advance(self.host.settings.batch_flows):
                    pass
                differences = sweep.difference()
            self._tell_differences(differences, gone, told, says_removals=action.says_removals)
        self._sweep = None
        if not self._is_answered:
            self._unsaid += [*gone, *told]
        elif gone or told or action.is_last:
            self._say_changes([*gone, *told], is_last=action.is_last)
        if action.is_last:
            # What is deleted here from now on says nothing, and the purge's own events would only cost time.
            for port in self._ports:
                port.close()
            self.note("last changes sent")
        return Done("ExportChanges", sum(map(len, told)))

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
        """Whether the other host's domain may have this kind."""
        return self._domain is None or self._domain.gives(batch.template.name)

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
        with self.host.purging(self.guest) as is_allowed:
            if not is_allowed:
                self.report.remark("the guest is back and its flows with it; what it left here before was not removed")
                return Done("Purge", refused=self._exported_count())
            for port in self._ports:
                with self.host.lock:
                    stay = self._neighbours(port.scope)
                    batches = [*chain(*(table.batches() for table in (port.exported, *port.untold())))]
                    victims = [self._ours_alone(port, batch, stay) for batch in batches]
                    self._kept_for_others += sum(map(len, batches)) - sum(map(len, victims))
                    for batch in victims:
                        removed = self.host.driver.remove(port.scope, batch.identities)
                        self._removed += int(np.count_nonzero(removed["outcome"] == Outcome.REMOVED))
                    self.note("purged")
                    self._left += sum(self._is_left(port.scope, batch) for batch in victims)
                    self.host.leaving.release(self.id, port.scope)
        self.note("proved")
        return Done("Purge", self._removed, refused=self._left)

    def _is_left(self, scope: Scope, batch: Batch) -> int:
        """How many are there still. What has the same name and another id was made since: that is `_purge_late`'s."""
        found, is_there = self.host.driver.read_back(scope, batch)
        return int(np.count_nonzero(is_there & (found.rows["flowId"] == batch.rows["flowId"])))

    def _purge_late(self, action: PurgeLate) -> Done:
        """Removes by name what packets of peers made here after the pause, until they knew where the guest is now.

        Later than the purge, for they may still be coming then, and since a look at a whole firewall has no hurry.
        """
        with self.host.purging(self.guest) as is_allowed:
            for port in self._ports if is_allowed else ():
                with self.host.lock:
                    for batch in self._remaining(port, self._neighbours(port.scope)):
                        self._late += len(batch)
                        self.report.name("removed at the source, made there after the pause", len(batch), names(batch))
                        self.host.driver.remove(port.scope, batch.identities)
        self.note("watched")
        return Done("PurgeLate", self._late)

    def _neighbours(self, scope: Scope) -> Addresses:
        """Whose flows stay. A zone that was the port's own when the guest began to leave may be shared by now."""
        try:
            return self.host.scopes.neighbours(scope)
        except SamiError as error:
            if scope.is_shared:
                raise
            self.report.remark(f"it is not known who else is in the zone by now: {error}")
            return ()

    def _ours_alone(self, port: Leaving, batch: Batch, stay: Addresses) -> Batch:
        batch = self.host.leaving.unclaimed_by_others(self.id, port.scope, batch)
        return batch.take(~has_end_in(batch, stay)) if stay else batch

    def _remaining(self, port: Leaving, stay: Addresses) -> list[Batch]:
        pieces = (piece for piece in self.host.driver.export(port.scope) if not isinstance(piece, Omitted))
        own = (piece.take(has_end_in(piece, port.scope.addresses)) for piece in pieces)
        return [left for piece in own if len(left := self._ours_alone(port, piece, stay))]

    # What the session asks of its role.

    def _state(self) -> str:
        return self._known.state.value

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

    def _note_phase(self, event: MigrationEvent) -> None:
        if event.phase is Phase.STOPPED:
            self.has_left = True
            self.host.arrived_guests.discard(self.guest)
        self.note(event.phase.value)

    def _exported_count(self) -> int:
        return sum(len(port.exported) for port in self._ports)

    def _counts(self) -> dict[str, int]:
        for port in self._ports:
            for table, why in (
                (port.withheld, NOT_FOR_THAT_DOMAIN),
                (port.unplaced, f"there was no place for it at the destination; {MEND_NO_PLACE}"),
            ):
                for batch in table.batches():
                    self.report.name(f"not exported: {why}", len(batch), names(batch))
        return {
            "exported": self._exported_count(),
            "purged": self._removed,
            "kept for other guests": self._kept_for_others,
            "late": self._late,
            "left_behind": self._left,
        }

    def _let_go(self) -> None:
        for port in self._ports:
            port.close()
            with self.host.deciding(port.scope):
                self.host.leaving.release(self.id, port.scope)


# -------------------------------------------------------------------------------------------------- the guest comes


class DestinationSession(Session):
    """The destination's part."""

    role = "destination"

    def __init__(
        self,
        host: Host,
        session: str,
        guest: str,
        peer: str,
        ended: Callable[[Session], None],
        *,
        is_held: bool = False,
        again: Callable[[DestinationSession], DestinationSession] | None = None,
    ) -> None:
        """`is_held`: the migration waits for the policy's word. `again` makes a session that goes on with this one."""
        super().__init__(host, session, guest, peer, ended)
        self._again, self._is_held = again, is_held
        self._began_at = host.monotonic()
        self._known = destination.new(host.settings.limits, self._began_at, is_held=is_held)
        self._ports: list[Arriving] = []
        self._unfilled: list[Arriving] = []
        """Of these ports, those for which not all that waits has gone in."""
        self._waiting: list[bytes] = []
        """Payloads that may hold flows of ports that are not known yet."""
        self._unverified: list[Unverified] = []
        self._looker = host.looker(session)
        self._findings = Findings()
        self._discarded = 0
        self._declared: Collection[str] = ()
        self.risk = ""
        """What would be lost, in one line, as far as it is known."""
        host.arriving_guests[session] = guest

    def take_over(self, former: Former) -> None:
        """What the former session put in is here, and is this one's to discard."""
        super().take_over(former)
        self._has_all = former.state in ("complete", "arrived")
        self._known = destination.continuing(
            self.host.settings.limits,
            self._began_at,
            former.peer,
            has_all=self._has_all,
            is_started=former.has("guest started"),
            runs_here=former.has("guest resumed"),
            is_held=self._is_held,
        )
        for scope, table in former.ports:
            port = Arriving(scope)
            for batch in table.batches():
                with self.host.deciding(scope):
                    self.host.arriving.claim(self.id, scope, batch)
            if self._has_all:
                port.held = table
            else:
                port.former = table
            self._ports.append(port)
        if self._known.runs_here:
            self.host.arriving_guests.pop(self.id, None)
            self.host.arrived_guests.add(self.guest)

    def _flows_by_port(self) -> FlowsByPort:
        self._settle()
        return tuple((port.scope, port.put_in()) for port in self._ports)

    def _made_successor(self) -> Session:
        assert self._again is not None
        return self._again(self)

    def _scopes_known(self) -> tuple[Scope, ...]:
        return tuple(port.scope for port in self._ports)

    def _actions(self) -> Actions:
        return {
            Ask: self._ask,
            Negotiate: self._negotiate,
            LapsePlaces: self._lapse_places,
            FindScope: self._find_scope,
            Import: self._import,
            Verify: self._verify,
            Renew: self._renew,
            Discard: self._discard,
        }

    def _begin(self) -> None:
        self._known, actions = destination.begin(self._known, self.peer, self.host.monotonic())
        self._enact("guest prepare", actions)
        is_held = self._known.verdict is None
        self.host.notifications.send(started(self.report, self.host.wall(), self._state(), is_held=is_held))

    def _ask(self, action: Ask) -> Done:
        self.peer = self.report.peer = action.source
        capabilities = self.host.driver.capabilities()
        self._declared = capabilities.templates
        free = None if capabilities.capacity is None else max(0, capabilities.capacity - capabilities.in_use)
        said = Open(
            guest=self.guest,
            destination=self.host.name,
            versions=VERSIONS,
            templates=tuple(sorted(capabilities.templates)),
            compressions=compression.available(),
            free=free,
            token=self.token,
            continues="" if self._former is None else self._former.known_as,
            has_all=action.has_all,
        )
        self.note("asked")
        self._say(said)
        return Done("Ask")

    def _negotiate(self, action: Negotiate) -> Negotiated:
        """Sees what can be taken, keeps places for it, and asks the guest's policy."""
        risk = self._risk(action)
        self.risk = risk.words
        policies = self.host.policies
        verdict = policies.judge(risk, self._domain) if action.may_refuse else Verdict.PROCEED
        self.report.verdict = {
            "verdict": verdict.value,
            "policy": type(policies.of(self.guest, self._domain)).__name__,
            "flows": risk.flows,
            "places": risk.carried,
            "losses": {**risk.losses, **risk.degraded},
        }
        if not risk.is_none:
            self.report.remark(risk.words)
        if not risk.is_none or verdict is not Verdict.PROCEED:
            self.host.notifications.send(at_risk(self.report, self.host.wall(), risk, self.host.settings.limits))
        is_awaited = action.offer is not None and action.offer.version > 1
        said = risk.answered(verdict, self.host.settings.limits.reservation_seconds) if is_awaited else None
        return Negotiated(verdict, risk.words, said)

    def _risk(self, action: Negotiate) -> Risk:
        guest, offer = self.guest, action.offer
        if offer is None or offer.version == 1:
            why = action.why_unknown or "the source speaks version 1, which says no counts; upgrade it"
            return Risk(guest, self.peer, self.host.name, None, why_unknown=why)
        return self.host.risk(Demand.of(offer), self.id, guest, self.peer)

    def _lapse_places(self, action: LapsePlaces) -> None:
        if self.host.lapse_places(self.id):
            self._tell_room("they were kept for reservation_seconds")

    def _tell_room(self, reason: str) -> None:
        if self._known.version > 1:
            self._say(Room(self.host.places_left(self.id), reason))

    def _import(self, action: Import) -> Done:
        self.keep_payload(action.payload)
        # The ports that are known take theirs at once; the rest waits for those that are not.
        if not self._known.has_scope:
            self._waiting.append(action.payload)
        if self._ports or self._known.has_scope:
            self._apply(action.payload, self._ports, is_final=self._known.has_scope)
        self._note_last()
        self._settle(until_all=False)
        return Done("Import")

    def _find_scope(self, action: FindScope) -> Done:
        """Looks for ports that were not known yet; what came before goes in for each as soon as it is known."""
        known = {port.scope.port for port in self._ports}
        found = [scope for scope in self.host.scopes.find(self.guest) if scope.port not in known]
        if found and not self.host.may_put_in(self.guest):
            return Done("FindScope", len(self._ports), is_all=False)
        fresh = [Arriving(scope) for scope in found]
        self._ports += fresh
        self._unfilled += fresh
        if fresh:
            self.note_knowledge()  # before anything is put in, or a later start could not find it
        is_all = action.is_last or len(self._ports) >= (self._known.ports or 0)
        if self._unfilled or is_all:
            for payload in self._waiting:
                self._apply(payload, self._unfilled, is_final=is_all)
            self._unfilled = []  # only now: a device that fails is tried again, with all that came
        if is_all:
            self._waiting = []
            self.note("scope known")
            self._note_last()
        return Done("FindScope", len(self._ports), is_all=is_all)

    def _apply(self, payload: bytes, ports: list[Arriving], *, is_final: bool) -> None:
        """Takes out and puts in what the payload says of these ports. When final, refuses what is no port's at all."""
        settings = self.host.settings
        octets = compression.decompress(payload, settings.bounds.unpacked_octets)
        carried = ipfix.decode(octets, enterprise=settings.enterprise)
        for element in carried.skipped:
            self.report.remark(f"skipped what is unknown here: {element}")
        domain = self._domain
        arrived = [
            Carried(batch, batch) if domain is None else self._named_here(batch, ports, domain)
            for batch in carried.batches
        ]
        for one in arrived:
            if one.batch.template.is_identity:
                self._take_out(one.batch, ports)
        for one in arrived:
            if not one.batch.template.is_identity:
                self._put_in(one.batch, ports, one.came)
                if is_final:
                    everywhere = tuple(address for port in self._ports for address in port.scope.addresses)
                    foreign = one.batch.take(~has_end_in(one.batch, everywhere))
                    self._findings.refuse(foreign, Reason.FOREIGN_ADDRESS)

    def _named_here(self, came: Batch, ports: list[Arriving], domain: Domain) -> Carried:
        """What came from another domain as it is called here, but what is not to be told from something else."""
        here, is_ambiguous = domain.address_map.applied(came)
        self._findings.forget_ambiguous(came)
        if is_ambiguous.any() and not came.template.is_identity:
            self._findings.refuse_ambiguous(came.take(is_ambiguous))
            # Where only a translation in it is ambiguous, it may have been put in before it had that.
            is_nameless = domain.address_map.applied(came.identities)[1]
            self._take_out(here.take(is_ambiguous & ~is_nameless).identities, ports)
        return Carried(here.take(~is_ambiguous), came.take(~is_ambiguous))

    def _take_out(self, gone: Batch, ports: list[Arriving]) -> None:
        """What the source lost goes here too, if it was this session that put it in."""
        self._settle()  # what was put in a moment ago is among what is held only then
        for port in ports:
            here = gone.take(has_end_in(gone, port.scope.addresses))
            self._findings.forget(here)
            known, ids = port.held.find(here)
            ids[~known] = 0  # of what a former session put in the id is not known
            known |= port.former.find(here)[0]
            here = here.take(known)
            # In a shared zone the other end's session may have put the flow in anew, with an id that we do not know.
            here.rows["flowId"] = 0 if port.scope.is_shared else ids[known]
            with self.host.deciding(port.scope):
                self.host.arriving.withdraw(self.id, port.scope, here)
                self.host.driver.remove(port.scope, self.host.arriving.unclaimed_by_others(self.id, port.scope, here))
            for table in (port.held, port.former):
                table.discard(here)

    def _put_in(self, batch: Batch, ports: list[Arriving], came: Batch) -> None:
        """`came` are the same flows as the source calls them."""
        # Nothing tells this host that traffic renews the source's timeout: what is held here must not run out before
        # the guest comes. What the source lets expire arrives as a removal.
        hold = self.host.settings.limits.hold_seconds
        batch.rows["remainingTimeoutSeconds"] = np.maximum(batch.rows["remainingTimeoutSeconds"], hold)
        homeless = np.ones(len(batch), bool)
        for port in ports:
            here = has_end_in(batch, port.scope.addresses) & homeless
            homeless &= ~here
            mine, theirs = (batch.take(here), came.take(here)) if not here.all() else (batch, came)
            mine = self._with_a_place(port, self._admitted(port, mine, theirs))
            is_former = port.former.find(mine)[0]
            if self._known.runs_here:  # what the guest has not ended since is there, and is younger than what came
                mine = self._untouched(port, mine.take(~is_former))
            elif is_former.any():
                port.former.discard(mine)
            with self.host.deciding(port.scope):
                scope = self._with_neighbours(port.scope)
                try:
                    made = self.host.driver.insert(scope, mine)
                except SamiError:
                    port.doubtful.append((scope, mine))
                    raise
                finally:
                    self.host.used_places(self.id)
                self.host.arriving.claim(self.id, port.scope, mine.take(made["outcome"] == Outcome.IMPORTED))
            look = self._looker.submit(self.host.driver.read_back, port.scope, mine)
            self._unverified.append(Unverified(port, scope, mine, made, look))

    def _untouched(self, port: Arriving, mine: Batch) -> Batch:
        """Less the flows that the guest has changed or ended since they were put in: what came is older than that."""
        self._settle()
        is_held, rows = port.held.rows_of(mine)
        if not is_held.any():
            return mine
        found, is_there = self.host.driver.read_back(port.scope, mine)
        is_touched = ~is_there | (lost_fields(Batch(mine.template, rows), found.rows) != 0)
        return mine.take(~(is_held & is_touched))

    def _admitted(self, port: Arriving, mine: Batch, theirs: Batch) -> Batch:
        """Those of the port's flows that may come in; the others are refused, and go if they were here before."""
        domain = self._domain
        is_unknown = np.full(len(mine), mine.template.name not in self._declared)
        refused: list[tuple[Reason, npt.NDArray[np.bool_]]] = [(Reason.NOT_DECLARED, is_unknown)]
        if domain is not None:
            refused.append((Reason.NOT_ADMITTED, np.full(len(mine), not domain.takes(mine.template.name))))
            if not domain.peers_follow:
                refused.append((Reason.PEER_CANNOT_FOLLOW, peer_sees_another(theirs, mine, port.scope.addresses)))
        if mine.template.is_translated:
            refused.append((Reason.FOREIGN_TRANSLATION, is_translated_elsewhere(mine, port.scope.addresses)))
        is_admitted = np.ones(len(mine), bool)
        for reason, which in refused:
            out = mine.take(which & is_admitted)
            if len(out):
                self._take_out(out.identities, [port])
                self._findings.refuse(out, reason)
                is_admitted &= ~which
        return mine if is_admitted.all() else mine.take(is_admitted)

    def _with_a_place(self, port: Arriving, batch: Batch) -> Batch:
        """Those of the flows for which there is room; the others are refused by name."""
        is_new = ~port.held.find(batch)[0]
        wanted = int(np.count_nonzero(is_new))
        promised = self.host.places_left(self.id)
        granted = self.host.take_places(self.id, port.scope, wanted) if wanted else 0
        if granted == wanted:
            return batch
        if self._unverified:  # what was put in a moment ago is known to be held only when it was looked at
            self._settle()
            return self._with_a_place(port, batch)
        if granted < promised:
            self._tell_room(f"traffic on {self.host.name} has taken the others")
        first = np.lexsort((-importance(batch), ~is_new))
        is_left_out = np.zeros(len(batch), bool)
        is_left_out[first[granted:wanted]] = True
        self._findings.refuse(batch.take(is_left_out), Reason.NO_PLACE)
        return batch.take(~is_left_out)

    def _with_neighbours(self, scope: Scope) -> Scope:
        """The scope with the ports whose guests run here: flows with them are this host's own business."""
        if not scope.is_shared:
            return scope
        still_coming: set[object] = set()
        for guest in set(self.host.arriving_guests.values()):
            with contextlib.suppress(SamiError):  # of another guest: it counts as running here, which harms nobody
                still_coming.update(one for other in self.host.scopes.find(guest) for one in other.addresses)
        running = tuple(one for one in self.host.scopes.neighbours(scope) if one not in still_coming)
        return replace(scope, neighbours=running)

    def _with_arrived(self, scope: Scope) -> Scope:
        """The scope with the ports of guests that sessions have brought here: what is held for both is theirs now."""
        if self._former is not None:  # who came while this host's agent was away came without a session
            return self._with_neighbours(scope)
        arrived: list[object] = []
        for guest in self.host.arrived_guests - {self.guest} if scope.is_shared else ():
            with contextlib.suppress(SamiError):  # as above
                arrived += [address for other in self.host.scopes.find(guest) for address in other.addresses]
        return replace(scope, neighbours=tuple(arrived))

    def _verify(self, action: Verify) -> Done:
        """Compares what was put in since the last time with what the device kept of it."""
        self._settle()
        if self._known.in_sync and not self._known.runs_here:
            for port in self._ports:
                for batch in list(port.former.batches()):  # the source has not told of it: it has ended meanwhile
                    self._take_out(batch.identities, [port])
        return Done("Verify", self._held_count(), refused=self._findings.refused)

    def _settle(self, *, until_all: bool = True) -> None:
        while self._unverified and (until_all or self._unverified[0].look.done()):
            self._findings.settle(self._unverified[0])
            del self._unverified[0]  # only now: what cannot be looked at may have to be discarded all the same

    def _renew(self, action: Renew) -> Done:
        """Gives time to what would run out while the guest runs elsewhere; puts in again what vanished."""
        self._settle()  # what was put in a moment ago and vanished is older in what is held
        hold = self.host.settings.limits.hold_seconds
        age = self.host.monotonic() - self._began_at
        for port in self._ports:
            for batch in port.held.batches():
                # The rows are as they were when they were looked at, which is no longer ago than the session is old.
                short = batch.take(batch.rows["remainingTimeoutSeconds"] < age + 2 * hold)
                short.rows["remainingTimeoutSeconds"] = np.maximum(short.rows["remainingTimeoutSeconds"], hold)
                made = self.host.driver.renew(port.scope, short)
                vanished = short.take(made["outcome"] == Outcome.ABSENT)
                if len(vanished):
                    self.report.remark(f"{len(vanished)} flows vanished before the guest came; put in again")
                    self._put_in(vanished, [port], vanished)
        self._settle()
        return Done("Renew")

    def _discard(self, action: Discard) -> Done:
        """The guest does not come: removes by name what this session put in and no other session claims."""
        self.host.release_places(self.id)
        self._waiting = []
        for part in self._unverified:
            part.port.doubtful.append((part.scope, part.batch.take(part.made["outcome"] == Outcome.IMPORTED)))
        self._unverified = []
        for port in self._ports:
            with self.host.deciding(port.scope):
                # A guest at the other end may have come to stay meanwhile, and its session be over: the flow is its.
                now = self._with_arrived(port.scope)
                for batch in port.held.batches():
                    self._discarded += self._removed(now, batch, by_id=not port.scope.is_shared)
                for batch in (*(batch for _, batch in port.doubtful), *port.former.batches()):
                    self._discarded += self._removed(now, batch, by_id=False)
                self.host.arriving.release(self.id, port.scope)
            port.held, port.former, port.doubtful = FlowTable(), FlowTable(), []
        self.note("discarded")
        return Done("Discard", self._discarded)

    def _removed(self, scope: Scope, batch: Batch, *, by_id: bool) -> int:
        victims = self.host.arriving.unclaimed_by_others(self.id, scope, batch).identities
        if not by_id:  # the source's id, or one that another session's insert has changed
            victims = Batch(victims.template, victims.rows.copy())
            victims.rows["flowId"] = 0
        removed = self.host.driver.remove(scope, victims)
        return int(np.count_nonzero(removed["outcome"] == Outcome.REMOVED))

    def is_about(self, source: str) -> bool:
        """Whether this is the migration from that host that is under way, and not what is left of one before it.

        Either may be unknown yet, and is the same then.
        """
        return destination.is_open(self._known) and (source == self.peer or not source or not self.peer)

    @property
    def lacks_ports(self) -> bool:
        """Whether this session goes on with another one, and none of the guest's ports is known."""
        return self._former is not None and not self._ports

    @property
    def is_held_up(self) -> bool:
        """Whether the migration waits for the policy's or an operator's word."""
        return self._known.verdict in (None, Verdict.ASK)

    @property
    def is_asking(self) -> bool:
        """Whether an operator is to say if the guest may come."""
        return self._known.verdict is Verdict.ASK

    @property
    def refusal(self) -> str | None:
        """Why the guest may not come; None where it may, or where nobody has said yet."""
        return self._known.reason if self._known.verdict is Verdict.VETO else None

    @property
    def is_awaited(self) -> bool:
        """Whether the guest does not run here yet."""
        return not self._known.runs_here

    # What the session asks of its role.

    def _state(self) -> str:
        return self._known.state.value

    def _step(self, event: Event, now: float) -> list[Action]:
        was_asking = self.is_asking
        self._known, actions = destination.step(self._known, event, now)
        if isinstance(event, PeerSaid):
            self._note_message(event.message)
        if was_asking and not self.is_asking:
            self._note_answer(event)
        if not self.has_verdict.is_set() and self._known.verdict in (Verdict.PROCEED, Verdict.VETO):
            self.has_verdict.set()
        if not self.has_caught_up.is_set() and destination.has_caught_up(self._known):
            self.has_caught_up.set()
        return actions

    def _note_answer(self, event: Event) -> None:
        """What has become of the question to the operator."""
        match event:
            case OperatorSaid(may_come=may_come):
                self.report.remark(f"an operator {'approved' if may_come else 'refused'}")
            case TimePassed():
                self.report.remark("no operator answered within ask_seconds")
            case GuestDid(event=told) if told.phase in (Phase.STARTED, Phase.RESUMED):
                self.report.remark("the guest came before an operator answered")

    def _note_message(self, message: Message) -> None:
        if isinstance(message, FlowChanges):
            if message.is_last:
                self.note("last changes came")
            return
        self.note(_SAID_TO_DESTINATION.get(type(message), type(message).__name__))

    def _note_last(self) -> None:
        if self._known.has_last and not self._waiting:
            self.note("last changes applied")

    def _say(self, message: Message) -> None:
        super()._say(message)
        if isinstance(message, Complete | Arrived):
            self.note(type(message).__name__.lower())

    def _note_phase(self, event: MigrationEvent) -> None:
        self.note(event.phase.value)
        if event.phase is Phase.RESUMED:
            self.host.arriving_guests.pop(self.id, None)
            self.host.arrived_guests.add(self.guest)

    def _held_count(self) -> int:
        return sum(len(port.held) for port in self._ports)

    def _counts(self) -> dict[str, int]:
        self._findings.name_in(self.report)
        return {"imported": self._held_count(), **self._findings.counts(), "discarded": self._discarded}

    def _let_go(self) -> None:
        self._looker.shutdown(wait=False)
        for port in self._ports:
            with self.host.deciding(port.scope):
                self.host.arriving.release(self.id, port.scope)
        self.host.arriving_guests.pop(self.id, None)
        self.host.release_places(self.id)


_SAID_TO_SOURCE: Mapping[type[Message], str] = {
    Open: "asked",
    Answer: "answered",
    Complete: "complete",
    Arrived: "arrived",
    Stays: "the destination said that the guest stays",
    GivesUp: "the destination gave up",
}
_SAID_TO_DESTINATION: Mapping[type[Message], str] = {
    Offer: "offered",
    Flows: "first flows",
    InSync: "in sync",
    Purged: "source purged",
    Stays: "the source said that the guest stays",
    GivesUp: "the source gave up",
}
"""The steps of the report that a message of the peer stands for."""
