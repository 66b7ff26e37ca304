"""The destination's part of a handover: the guest comes."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin.arriving import FOUND_ANEW, Arriving, Carried, Findings, Unverified
from sami_plugin.codec import compression, ipfix
from sami_plugin.errors import NotAvailable, SamiError
from sami_plugin.former import WAS_HERE, Former, FormerPort
from sami_plugin.migration import destination
from sami_plugin.migration.claims import place_of
from sami_plugin.migration.decision import (
    Action,
    Ask,
    CallAgain,
    Discard,
    Done,
    Event,
    FindScope,
    GuestDid,
    Import,
    LapsePlaces,
    Negotiate,
    Negotiated,
    OperatorSaid,
    PeerSaid,
    Renew,
    TimePassed,
    Verify,
)
from sami_plugin.migration.negotiation import Demand
from sami_plugin.model.address_map import peer_sees_another
from sami_plugin.model.domain import Domain
from sami_plugin.model.flows import (
    Batch,
    FlowStatus,
    answers,
    has_end_in,
    holds_any,
    importance,
    is_expected_behind_another,
    is_expected_elsewhere,
    is_translated_elsewhere,
    names,
)
from sami_plugin.model.keys import FlowTable, KeyIndex
from sami_plugin.model.migration import (
    VERSIONS,
    Arrived,
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
from sami_plugin.model.migration import Outcome as SessionOutcome
from sami_plugin.model.printable import printable
from sami_plugin.model.report import BOTH_HAVE, Report
from sami_plugin.model.results import WORDS, Outcome, Reason, Results, came_out, lacks_bits, lost_fields
from sami_plugin.model.risk import Risk
from sami_plugin.model.scope import Scope
from sami_plugin.model.verdict import Verdict
from sami_plugin.notifications import at_risk, started
from sami_plugin.session import Actions, Host, Session, scope_of

LOG = logging.getLogger(__name__)

UNADMITTED = "begun by a peer when the guest ran here and its port had no zone yet; the source did not have them"
UNADMITTED_REMOVED = f"removed: {UNADMITTED}"
MAY_HAVE_ENDED = "put in again, and may have ended here while no agent was here to be told"
MAY_BE_ANOTHER = "there when an agent was started anew, and not as it was sent; left as it is"
UNTOLD = "put in before an agent was started anew, and not told of since; kept, for the guest runs here"
NOT_DISCARDED = "not discarded: the firewall failed, and they may have been there before"


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
        held_since: float | None = None,
        again: Callable[[DestinationSession], DestinationSession] | None = None,
    ) -> None:
        """`held_since`: since when the migration waits for the policy's word.

        `again` makes a session that goes on with this one.
        """
        super().__init__(host, session, guest, peer, ended)
        self._again, self._held_since = again, held_since
        self._began_at = self._times_noted_at = host.monotonic()
        self._known = destination.new(host.settings.limits, self._began_at, held_since=held_since)
        self._deciding = threading.Lock()
        """Held for each decision: none is between a verdict and the end of the wait for it."""
        self._ports: list[Arriving] = []
        self._unfilled: list[Arriving] = []
        """Of these ports, those for which not all that waits has gone in."""
        self._moved: list[Arriving] = []
        """Of these ports, those that changed, and for which not all that was refused before has been tried again."""
        self._waiting: list[tuple[int, bytes]] = []
        """Payloads, by their numbers, that may hold flows of ports that are not known yet, or do of a router that is
        not."""
        self._applied = 0
        """The payload up to which the journal knows that all is done."""
        self._unverified: list[Unverified] = []
        self._looker = host.looker(session)
        self._findings = Findings()
        self._named_before: dict[str, Any] = {}
        """By a session with which this one goes on. What is told anew is found anew, as far as the guest left it be."""
        self._discarded = 0
        self._has_found = False
        """The finder has told this session of a port of the guest."""
        self._has_renewed = False
        """Once. Before, where another session goes on with one, nobody may have said yet that the guest has come."""
        self._declared: Collection[str] = ()
        self.has_stopped = False
        """The hypervisor has said so; the session may not have come to it yet."""
        self.after: tuple[str, ...] = ()
        """This host's former sessions with the guest, as far as they may still be heard of, newest last."""
        self.went_before: tuple[str, ...] = ()
        """The sessions with which this one goes on, the first one first."""
        self.times_asked = 1
        """How often the source was asked anew for this migration, this time included."""
        self.risk = ""
        """What would be lost, in one line, as far as it is known."""
        host.arriving_guests[session] = guest

    def take_over(self, former: Former) -> None:
        """What the former session put in is here, and is this one's to discard."""
        super().take_over(former)
        self.went_before += (former.session,)
        self.host.take_over(self.guest, former.session, self.id)
        self._has_all = former.state in ("complete", "arrived")
        self._known = destination.continuing(
            self.host.settings.limits,
            self._began_at,
            former.peer,
            has_all=self._has_all,
            is_started=former.has("guest started"),
            runs_here=former.has("guest resumed", WAS_HERE),
            has_come=former.has("guest resumed"),
            has_some=any(len(port.flows) + len(port.unsure) for port in former.ports),
            held_since=self._held_since,
            times_asked=self.times_asked,
        )
        self._named_before = deepcopy(dict(former.named))
        for why in self._named_before.keys() & {MAY_HAVE_ENDED, MAY_BE_ANOTHER}:
            self.report.named[why] = self._named_before.pop(why)
        for known in former.ports:
            port = Arriving(known.scope, unsure=known.unsure)
            for batch in (*known.flows.batches(), *known.unsure.batches()):
                with self.host.deciding(port.scope):
                    self.host.arriving.claim(self.id, port.scope, batch)
            if self._has_all:
                port.held = known.flows
            else:
                for batch in known.flows.batches():
                    may_have_run_out = self._time_of(batch) < self.host.wall() - former.unattended_since
                    port.former.put(batch.take(~may_have_run_out))
                    port.doubt(batch.take(may_have_run_out))
            self._ports.append(port)
        if self._known.runs_here:
            self.host.arriving_guests.pop(self.id, None)
            self.host.arrived_guests.add(self.guest)

    def is_meant(self, session: str, peer: str) -> bool:
        """Whether the source speaks of this session: where its agent ended before it had written this one down, by the
        name of one with which this goes on."""
        is_unknown = session in self.went_before and self._known.state is destination.State.ASKED
        return peer == self.peer and (session == self.id or is_unknown)

    def _flows_by_port(self) -> tuple[FormerPort, ...]:
        self._try_to_look(self._settle)
        self._doubt_unverified()
        return tuple(port.handed_over() for port in self._ports)

    def _made_successor(self) -> Session:
        assert self._again is not None
        return self._again(self)

    def _scopes_known(self) -> tuple[Scope, ...]:
        return tuple(map(scope_of, self._ports))

    @functools.cached_property
    def _actions(self) -> Actions:
        return {
            Ask: self._ask,
            CallAgain: self._call_again,
            Negotiate: self._negotiate,
            LapsePlaces: self._lapse_places,
            FindScope: self._find_scope,
            Import: self._import,
            Verify: self._verify,
            Renew: self._renew,
            Discard: self._discard,
        }

    def _begin(self) -> None:
        with self._deciding:
            self._known, actions = destination.begin(self._known, self.peer, self.host.monotonic())
        self._enact("guest prepare", actions)
        is_held = self._known.verdict is None
        self.host.notifications.tell(started, self.report, self.host.wall(), self._state(), is_held=is_held)

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
            request_id=self.report.request_id,
            after=self.after,
            devices=tuple(sorted(set(capabilities.shared.values()))),
        )
        self.note("asked")
        self._say(said)
        return Done("Ask")

    def _call_again(self, action: CallAgain) -> None:
        self.line.call_again()

    def _negotiate(self, action: Negotiate) -> Negotiated:
        """Sees what can be taken, keeps places for it, and asks the guest's policy."""
        risk = self._risk(action)
        self.risk = risk.words
        policies = self.host.policies
        verdict = policies.judge(risk, self._domain) if action.may_refuse else Verdict.PROCEED
        if verdict is not Verdict.PROCEED and self.held_since is None:
            self.report.remark(f"the policy said {verdict.value} when the migration had gone on")
            verdict = Verdict.PROCEED
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
            self.host.notifications.tell(at_risk, self.report, self.host.wall(), risk, self.host.settings.limits)
        is_awaited = action.offer is not None and action.offer.version > 1
        said = risk.answered(verdict, self.host.settings.limits.reservation_seconds) if is_awaited else None
        return Negotiated(verdict, risk.words, said)

    def _risk(self, action: Negotiate) -> Risk:
        guest, offer = self.guest, action.offer
        if offer is None or offer.version == 1:
            why = action.why_unknown or "the source speaks version 1, which says no counts; upgrade it"
            return Risk(guest, self.peer, self.host.name, None, why_unknown=why)
        return self.host.risk(Demand.of(offer), self.id, guest, self.peer, there=self._inherited_count())

    def _inherited_count(self) -> int:
        count = 0
        for port in self._ports:
            known = FlowTable()  # some are in both tables
            for batch in port.inherited():
                known.put(batch)
            count += sum(int(self.host.driver.read_back(port.scope, batch)[1].sum()) for batch in known.batches())
        return count

    def _is_inherited(self, port: Arriving, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which of the flows another session has put in, and are there still: they need no new place."""
        known = port.inherits(batch)
        if known.any():
            known[known] = self.host.driver.read_back(port.scope, batch.take(known))[1]
        return known

    def _lapse_places(self, action: LapsePlaces) -> None:
        if self.host.lapse_places(self.id) and action.reason:
            self._tell_room(action.reason)

    def _tell_room(self, reason: str) -> None:
        if self._known.version > 1:
            self._say(Room(self.host.places_left(self.id), reason))

    def _import(self, action: Import) -> Done:
        self.keep_payload(action.payload)
        # The ports that are known take theirs at once; the rest waits for those that are not.
        is_awaited = self._apply(action.payload, self._ports, is_last=self._known.has_scope)
        # What comes behind something that waits may take it back.
        if not self._known.has_scope and (is_awaited or self._waiting or not self._has_ports):
            self._waiting.append((self._payloads, action.payload))
        self._note_last()
        self._settle(until_all=False)
        self._note_applied()
        return Done("Import")

    def _find_scope(self, action: FindScope) -> Done:
        """Looks for ports that were not known yet; what came before goes in for each as soon as it is known."""
        here = self.host.scopes.find(self.guest)
        self._has_found |= bool(here)
        changed = [(port, now) for port in self._ports if (now := _now(port.scope, here)) is not None]
        known = {port.scope.port for port in self._ports} | {now.port for _, now in changed}
        found = [scope for scope in here if scope.port not in known]
        if (found or changed or self._moved) and not self.host.may_put_in(self.guest, self.id):
            return Done("FindScope", len(self._ports), is_all=False)
        for port, now in changed:
            self._move(port, now)
        self._put_in_where_they_moved()
        fresh = [Arriving(scope) for scope in found]
        for port in fresh:
            self.host.driver.attend(port.scope.namespace)
        if self._known.runs_here:
            for port in fresh:
                port.unadmitted = list(self._begun_by_peers(port.scope))
        self._ports += fresh
        self._unfilled += fresh
        if fresh:
            self.note_knowledge()  # before anything is put in, or a later start could not find it
        if self._unfilled:
            are_awaited = [self._apply(payload, self._unfilled, is_last=False) for _, payload in self._waiting]
            self._unfilled = []  # only now: a device that fails is tried again, with all that came
            if self._has_ports:
                self._waiting = self._waiting[(*are_awaited, True).index(True) :]
        # What waits when all ports are known is a router's, and whether something does is known when all has come.
        is_all = action.is_last or (self._has_ports and self._known.in_sync and not self._waiting)
        if is_all:
            for _, payload in self._waiting:
                self._apply(payload, [], is_last=True)
            self._waiting = []
            self.note("scope known")
            self._note_last()
        self._note_applied()
        return Done("FindScope", len(self._ports), is_all=is_all)

    def _note_applied(self, *, has_named: bool = False) -> None:
        """For a later start, which would not know what of a payload is done, and what the guest has ended since."""
        applied = self._waiting[0][0] - 1 if self._waiting else self._payloads
        # What a former session was about to do, or what waited there, is settled when the source has told all anew.
        is_settled = self._known.in_sync or self._former is None
        is_news = applied != self._applied or has_named
        if not is_news or not is_settled or self._unverified or not self._journal_works:
            return
        self._applied = applied
        self.write(self.host.journal.note_applied, applied, self._named_so_far())

    def _name_in(self, report: Report) -> None:
        self._findings.name_in(report)
        for why, before in self._named_before.items():
            report.name_once(why, before["count"], before["flows"])

    def _move(self, port: Arriving, now: Scope) -> None:
        """The port has another zone, or is better known: what was put in before, or was refused, is to be put in there.

        Another zone: after a migration of which nobody said that it was given up. Better known: a firewall is
        programmed bit by bit, one family of addresses after the other.
        """
        self._settle()
        if place_of(now) != place_of(port.scope):
            homeless = list(port.held.batches())
            self._empty(port)
            for batch in homeless:
                self._findings.refuse(batch, Reason.DEVICE_ERROR)  # unless it is there in the end
        port.scope = now
        if port not in self._moved:
            self._moved.append(port)
        self.note_knowledge()

    def _put_in_where_they_moved(self) -> None:
        """What has been refused so far of these ports; it stays so until it is in the device."""
        while self._moved:
            self._settle()  # where it failed in the middle, some of it is there
            port = self._moved[0]
            again = [batch.take(port.scope.owns(batch)) for batch in self._findings.refused_flows()]
            for one in _masters_first([Carried(batch, batch) for batch in again]):
                self._put_in(one.batch, [port], one.came)
            del self._moved[0]

    @property
    def _has_ports(self) -> bool:
        """Whether all ports are known that the source has; of routers it may have others."""
        return sum(port.scope.is_port for port in self._ports) >= (self._known.ports or 0)

    def _begun_by_peers(self, scope: Scope) -> Iterator[Batch]:
        for piece in self.host.driver.export(scope):
            if isinstance(piece, Batch) and piece.template.is_flow and not piece.template.is_expectation:
                called = piece.rows[piece.destination_field]
                batch = piece.take(holds_any(called, piece.template.is_ipv6, scope.addresses))
                if len(batch):
                    yield batch

    def _judge_unadmitted(self) -> None:
        """Once all that the source had is here: what is still there of what peers began, and was not the source's."""
        is_removing = self.host.settings.remove_unadmitted
        for port in self._ports:
            for batch in port.unadmitted:
                found, is_there = self.host.driver.read_back(port.scope, batch)
                is_same = is_there & (found.rows["flowId"] == batch.rows["flowId"])
                with self.host.deciding(port.scope):
                    left = batch.take(is_same & ~port.held.find(batch)[0] & ~self._findings.has(batch))
                    left = self.host.arriving.unclaimed_by_others(self.id, port.scope, left)
                    if is_removing:
                        removed = self.host.driver.remove(self._with_neighbours(port.scope), left.identities)
                        left = left.take(came_out(removed, Outcome.REMOVED))
                if len(left):
                    self.report.name(UNADMITTED_REMOVED if is_removing else UNADMITTED, len(left), names(left))
            port.unadmitted = []

    def _apply(self, payload: bytes, ports: list[Arriving], *, is_last: bool) -> bool:
        """Takes out and puts in what the payload says of these ports; at last, refuses what is nobody's.

        :returns: whether some of it is in a zone that is not known here, and will have to be applied again for that.
        """
        if not ports and not is_last:
            return False
        settings = self.host.settings
        octets = compression.decompress(payload, settings.bounds.unpacked_octets)
        carried = ipfix.decode(octets, enterprise=settings.enterprise, max_octets=settings.bounds.unpacked_octets)
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
        is_awaited = False
        for one in _masters_first(arrived):
            if not one.batch.template.is_identity:
                homeless = self._put_in(one.batch, ports, one.came)
                is_awaited |= self._refuse_homeless(one.batch.take(homeless), is_last=is_last)
        return is_awaited

    def _refuse_homeless(self, batch: Batch, *, is_last: bool) -> bool:
        """Of what was not put in now, what is no known port's nor router's, once there will be no more of them.

        :returns: whether there may be a router for some of it.
        """
        for port in self._ports if len(batch) else ():
            batch = batch.take(~port.scope.owns(batch))
        if not len(batch):
            return False
        everywhere = tuple(address for port in self._ports for address in port.scope.addresses)
        is_foreign = ~has_end_in(batch, everywhere)
        if is_last or self._has_ports:
            self._findings.refuse(batch.take(is_foreign), Reason.FOREIGN_ADDRESS)
        if is_last:
            self._findings.refuse(batch.take(~is_foreign), Reason.NO_ZONE)
        return not is_foreign.all()

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
        theirs = tuple(address for port in ports for address in port.scope.addresses)
        self._findings.forget(gone if len(ports) == len(self._ports) else gone.take(has_end_in(gone, theirs)))
        for port in ports:
            here = gone.take(has_end_in(gone, port.scope.addresses))
            known, ids = port.held.find(here)
            ids[~known] = 0  # of what a former session put in the id is not known
            known |= port.inherits(here)
            here = here.take(known)
            # In a shared zone the other end's session may have put the flow in anew, with an id that we do not know.
            here.rows["flowId"] = 0 if port.scope.is_shared else ids[known]
            with self.host.deciding(port.scope):
                self.host.arriving.withdraw(self.id, port.scope, here)
                # A former session's may be what was there before it.
                scope = port.scope if self._former is None else self._with_neighbours(port.scope)
                self.host.driver.remove(scope, self.host.arriving.unclaimed_by_others(self.id, scope, here))
            for table in port.tables():
                table.discard(here)

    def _time_of(self, batch: Batch) -> npt.NDArray[Any]:
        """Seconds that each flow is given here.

        Nothing tells this host that traffic renews the source's timeout: what is held here must not run out before the
        guest comes. What the source lets expire arrives as a removal.
        """
        if not batch.template.is_renewed:
            return np.full(len(batch), math.inf)
        return np.maximum(batch.rows["remainingTimeoutSeconds"], self.host.settings.limits.hold_seconds)

    def _put_in(self, batch: Batch, ports: list[Arriving], came: Batch) -> npt.NDArray[np.bool_]:
        """`came` are the same flows as the source calls them.

        :returns: which of the flows are none of these ports'.
        """
        if batch.template.is_renewed:
            batch.rows["remainingTimeoutSeconds"] = self._time_of(batch)
        sent, batch = batch, batch.under(batch.template.taken_by(self._declared))
        homeless = np.ones(len(batch), bool)
        for port in ports:
            here = port.scope.owns(batch) & homeless
            homeless &= ~here
            mine, theirs = (batch.take(here), came.take(here)) if not here.all() else (batch, came)
            mine = self._with_a_place(port, self._admitted(port, mine, theirs))
            try:
                if self._known.runs_here:
                    mine = self._untouched(port, mine)
                port.told_anew(mine)
                with self.host.deciding(port.scope):
                    scope = self._with_neighbours(port.scope)
                    try:
                        made = self.host.driver.insert(scope, mine)
                    except SamiError:
                        port.doubtful.append((scope, mine))
                        raise
                    if scope.is_shared:
                        self._claim(scope, mine, made)
            finally:
                self.host.used_places(self.id)
            try:
                look = self._looker.submit(self.host.driver.read_back, port.scope, mine)
            except RuntimeError:  # there are as many threads as the system allows
                port.doubtful.append((scope, mine.take(came_out(made, Outcome.IMPORTED))))
                raise
            self._unverified.append(Unverified(port, scope, mine, made, look, _left_out(sent, mine)))
        return homeless

    def _claim(self, scope: Scope, mine: Batch, made: Results) -> None:
        """What another session put in counts as put in here as well: it goes with the last of those that want it."""
        is_present = came_out(made, Outcome.PRESENT)
        is_sessions = is_present & self.host.arriving.claimed_by_others(self.id, scope, mine)
        made["outcome"][is_sessions] = Outcome.IMPORTED
        self.host.arriving.claim(self.id, scope, mine.take(is_present | came_out(made, Outcome.IMPORTED)))

    def _untouched(self, port: Arriving, mine: Batch) -> Batch:
        """Less the flows that the guest has changed or ended since they were put in: what came is older than that."""
        self._settle()
        is_known, is_unsure = np.zeros(len(mine), bool), port.unsure.find(mine)[0]
        for table in port.tables():
            is_known |= table.find(mine)[0]
        if self._former is None and not is_known.any():
            is_further = self._is_further(port, mine, is_known)
            return mine.take(~is_further) if is_further.any() else mine
        found, is_there = self.host.driver.read_back(port.scope, mine)
        is_absent = is_unsure & ~is_there
        is_further = self._is_further(port, mine, is_known & ~is_absent)
        is_as_it_was = np.zeros(len(mine), bool)
        for table in port.tables():
            has_row, rows = table.rows_of(mine)
            before = Batch(mine.template, rows)
            is_as_it_was |= (
                has_row & is_there & ((lost_fields(before, found.rows) == 0) | lacks_bits(before, found.rows))
            )
        is_changed = is_known & is_there & ~is_as_it_was
        for why, which in ((MAY_HAVE_ENDED, is_absent & ~is_further), (MAY_BE_ANOTHER, is_unsure & is_changed)):
            if which.any():
                self.report.name(why, int(np.count_nonzero(which)), names(mine.take(which)))
        # What another session put in, and the guest has changed, is this one's too from now on.
        port.keep(mine, found, is_changed & ~port.held.find(mine)[0])
        return mine.take(((~is_known | is_absent) & ~is_further) | is_as_it_was)

    def _is_further(self, port: Arriving, mine: Batch, is_known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Of what nobody answered where the guest was, what is answered here: the guest has begun it since it came.

        Where it was, packets that came late have made it, and the source does not know that from the guest's. One whose
        agent was started anew may take more of them for the guest's, answers among them.
        """
        is_further = np.zeros(len(mine), bool)
        if not mine.template.is_flow or mine.template.is_expectation:
            return is_further
        bits = np.uint32(FlowStatus.SEEN_REPLY | (0 if self._former is None else FlowStatus.ASSURED))
        is_young = ~is_known & (mine.rows["conntrackStatus"] & bits != bits)
        young = mine.take(is_young)
        for wanted in (young, answers(young).under(young.template)) if len(young) else ():
            found, is_there = self.host.driver.read_back(port.scope, wanted)
            is_there &= found.rows["conntrackStatus"] & ~young.rows["conntrackStatus"] & bits != 0
            self._findings.leave(wanted.take(is_there))
            is_further[is_young] |= is_there
        return is_further

    def _admitted(self, port: Arriving, mine: Batch, theirs: Batch) -> Batch:
        """Those of the port's flows that may come in; the others are refused, and go if they were here before."""
        domain = self._domain
        is_unknown = np.full(len(mine), mine.template.name not in self._declared)
        refused: list[tuple[Reason, npt.NDArray[np.bool_]]] = [(Reason.NOT_DECLARED, is_unknown)]
        if domain is not None:
            refused.append((Reason.NOT_ADMITTED, np.full(len(mine), not domain.takes(mine.template.usual.name))))
            if not domain.peers_follow:
                refused.append((Reason.PEER_CANNOT_FOLLOW, peer_sees_another(theirs, mine, port.scope.addresses)))
        own = (*port.scope.addresses, *port.scope.translations, *self.host.settings.translations)
        if mine.template.is_translated:
            refused.append((Reason.FOREIGN_TRANSLATION, is_translated_elsewhere(mine, own)))
        if mine.template.is_expectation:
            refused.append((Reason.FOREIGN_TRANSLATION, is_expected_behind_another(mine, own)))
            if port.scope.is_shared:
                refused.append((Reason.FOREIGN_ADDRESS, is_expected_elsewhere(mine, own)))
        is_admitted = np.ones(len(mine), bool)
        for reason, which in refused:
            out = mine.take(which & is_admitted)
            if len(out):
                self._take_out(out.identities, [port])
                self._findings.refuse(out, reason)
                is_admitted &= ~which
        return mine if is_admitted.all() else mine.take(is_admitted)

    def _with_a_place(self, port: Arriving, batch: Batch) -> Batch:
        """Those of the flows for which there is room; the others are refused by name. What is no flow takes none."""
        if not batch.template.is_flow:
            return batch
        is_new = ~port.held.find(batch)[0] & ~self._is_inherited(port, batch)
        for part in self._unverified:  # is held only when it was looked at
            if part.port is port:
                is_new &= ~part.has(batch)
        wanted = int(np.count_nonzero(is_new))
        promised = self.host.places_left(self.id)
        granted = self.host.take_places(self.id, port.scope, wanted) if wanted else 0
        if granted == wanted:
            return batch
        if granted < promised:
            self._tell_room(f"traffic on {self.host.name} has taken the others")
        first = np.lexsort((-importance(batch), ~is_new))
        is_left_out = np.zeros(len(batch), bool)
        is_left_out[first[granted:wanted]] = True
        left_out = batch.take(is_left_out)
        port.told_anew(left_out)
        self._findings.refuse(left_out, Reason.NO_PLACE)
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
                # The source has not told of it: it has ended meanwhile.
                for batch in port.inherited():
                    self._take_out(batch.identities, [port])
            for why in [one for one in self._named_before if one.startswith(FOUND_ANEW)]:
                del self._named_before[why]  # or not, where it could be put in this time
        has_named = self._keep_untold()
        if self._known.has_last and not self._waiting:
            self._judge_unadmitted()
        self._note_applied(has_named=has_named)
        return Done("Verify", self._held_count(), refused=self._findings.refused)

    def _settle(self, *, until_all: bool = True) -> None:
        while self._unverified and (until_all or self._unverified[0].look.done()):
            first = self._unverified[0]
            try:
                self._findings.settle(first)
            except Exception:  # who tries again looks again
                look = self._looker.submit(self.host.driver.read_back, first.port.scope, first.batch)
                self._unverified[0] = replace(first, look=look)
                raise
            del self._unverified[0]  # only now: what cannot be looked at may have to be discarded all the same

    def _doubt_unverified(self) -> None:
        """What the device said it took: who cannot look does not know it."""
        for part in self._unverified:
            part.port.doubt(part.batch.take(came_out(part.made, Outcome.IMPORTED)))
        self._unverified = []

    def _renew(self, action: Renew) -> Done:
        """Gives time to what would run out while the guest runs elsewhere; puts in again what vanished."""
        self._settle()  # what was put in a moment ago and vanished is older in what is held
        if self._former is not None and not self._has_renewed:
            self._note_times()
        for port in self._ports:
            # The source may tell of it when it is there again.
            for batch in (known for known in port.inherited() if known.template.is_renewed):
                self.host.driver.renew(port.scope, self._short(batch))
            for batch in (held for held in port.held.batches() if held.template.is_renewed):
                short = self._short(batch)
                made = self.host.driver.renew(port.scope, short)
                for reason in sorted({*made["reason"][came_out(made, Outcome.REFUSED)].tolist()}):
                    self.report.remark(f"more time was refused before the guest came: {WORDS[Reason(reason)]}")
                vanished = short.take(came_out(made, Outcome.ABSENT))
                if len(vanished) and (self._former is None or self._has_renewed):
                    self.report.remark(f"{len(vanished)} flows vanished before the guest came; put in again")
                    self._put_in(vanished, [port], vanished)
        self._settle()
        self._has_renewed = True
        return Done("Renew")

    def _note_times(self) -> None:
        """How much time is left to what another session has put in: it is older than this one, and may have changed."""
        now = self.host.monotonic()
        for port in self._ports:
            for table in port.tables():
                for batch in (known for known in table.batches() if known.template.is_renewed):
                    found, is_there = self.host.driver.read_back(port.scope, batch)
                    noted = batch.take(is_there)
                    noted.rows["remainingTimeoutSeconds"] = found.rows["remainingTimeoutSeconds"][is_there]
                    table.put(noted)
        self._times_noted_at = now

    def _short(self, batch: Batch) -> Batch:
        """What would run out before the time after next, with the time that it is to have."""
        # Rows are as they were when they were looked at, which is no longer ago than this.
        age = self.host.monotonic() - self._times_noted_at
        is_short = batch.rows["remainingTimeoutSeconds"] < age + 2 * self.host.settings.limits.hold_seconds
        # What is no flow is looked after whatever time it has: its device may have begun anew.
        short = batch.take(is_short | (not batch.template.is_flow))
        short.rows["remainingTimeoutSeconds"] = self._time_of(short)
        return short

    def _discard(self, action: Discard) -> Done:
        """The guest does not come: removes by name what this session put in and no other session claims."""
        self.host.release_places(self.id)
        self._waiting = []
        self._doubt_unverified()
        with self.host.discarding(self.guest, self.id) as is_allowed:
            if not is_allowed and any(port.has_put_in for port in self._ports):
                raise NotAvailable("the guest is here, or another migration brings it")
            self._of_each(self._ports, self._empty)
        self.note("discarded")
        return Done("Discard", self._discarded)

    def _empty(self, port: Arriving) -> None:
        """Removes by name what this session put in for the port, and no other session claims."""
        with self._unless_gone(port.scope), self.host.deciding(port.scope):
            # A guest at the other end may have come to stay meanwhile, and its session be over: the flow is its.
            now = self._with_arrived(port.scope)
            for batch in port.held.batches():
                self._discarded += self._removed(now, batch, by_id=not port.scope.is_shared)
            for ours, _ in port.doubtful_parts():
                self._discarded += self._removed(now, ours, by_id=False)
            for batch in port.inherited():
                self._discarded += self._removed(now, batch, by_id=False)
            self.host.arriving.release(self.id, port.scope)
            for _, theirs_too in port.doubtful_parts():  # last: where something fails, all of it is done again
                if len(theirs_too):
                    self.report.name(NOT_DISCARDED, len(theirs_too), names(theirs_too))
        port.held, port.former, port.unsure, port.doubtful = FlowTable(), FlowTable(), FlowTable(), []

    def _removed(self, scope: Scope, batch: Batch, *, by_id: bool) -> int:
        victims = self.host.arriving.unclaimed_by_others(self.id, scope, batch).identities
        if not by_id:  # the source's id, or one that another session's insert has changed
            victims = victims.without_ids()
        removed = self.host.driver.remove(scope, victims)
        return int(np.count_nonzero(came_out(removed, Outcome.REMOVED)))

    def is_about(self, source: str) -> bool:
        """Whether this is the migration from that host that is under way, and not what is left of one before it.

        Either may be unknown yet, and is the same then.
        """
        is_open = destination.is_open(self._known) and not self.has_stopped
        return is_open and (source == self.peer or not source or not self.peer)

    @property
    def is_discarding(self) -> bool:
        """Whether the guest does not come, and what was put in for it could not be removed yet."""
        return self._known.state is destination.State.DISCARDING

    @property
    def is_started(self) -> bool:
        """Whether the guest's process is here, by the hypervisor's word."""
        return self._known.is_started

    @property
    def lacks_ports(self) -> bool:
        """Whether this session goes on with another one, and nothing has told it where the guest's ports are now."""
        return self._former is not None and not self._has_found

    @property
    def held_since(self) -> float | None:
        """Since when the migration has waited for the policy's or an operator's word; None where it does not now."""
        return self._held_since if self._known.verdict in (None, Verdict.ASK) else None

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
        return self._known.state

    def _why_given_up(self) -> str:
        return self._known.reason if self._state_before == destination.State.ORPHANED else ""

    def _step(self, event: Event, now: float) -> list[Action]:
        with self._deciding:
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
        if isinstance(message, Offer):
            for device in message.shared:
                self.report.remark(BOTH_HAVE.format(device=printable(device, 100)))
        if isinstance(message, Purged):  # then it is nowhere but here, whether that was said or not
            self.host.arrived_guests.add(self.guest)
        self.note(_SAID_TO_DESTINATION.get(type(message), type(message).__name__))

    def _note_last(self) -> None:
        if self._known.has_last and not self._waiting:
            self.note("last changes applied")

    def _say(self, message: Message) -> None:
        super()._say(message)
        if isinstance(message, Complete | Arrived):
            self.note(type(message).__name__.lower())

    def _may_not_refuse(self) -> None:
        with self._deciding:
            if self.is_asking:
                self.report.remark("the migration went on before an operator answered")
            self._known = destination.let_go(self._known)

    def _note_phase(self, event: MigrationEvent) -> None:
        self.note(event.phase.value)
        self.has_stopped |= event.phase is Phase.STOPPED
        if event.phase is Phase.RESUMED:
            self.host.arriving_guests.pop(self.id, None)
            self.host.arrived_guests.add(self.guest)
            self.host.has_come(self.guest)

    def _end(self, outcome: SessionOutcome, reason: str) -> None:
        if self._known.runs_here:
            self._try_to_look(self._settle, self._keep_untold)
        super()._end(outcome, reason)
        for port in self._ports if self._known.runs_here else ():
            for batch in (*port.held.batches(), *port.inherited()):
                self.host.driver.arrived(port.scope, batch)

    def _try_to_look(self, *looks: Callable[[], object]) -> None:
        """At the end: what cannot be looked at any more is not counted."""
        try:
            for look in looks:
                look()
        except Exception as error:  # noqa: BLE001 - whatever it is, the session ends
            LOG.warning("%s: not all that was put in could be looked at: %s", self.id, error)

    def _keep_untold(self) -> bool:
        """What another session put in, and has ended at the source, if it did not end here: who can tell.

        :returns: whether there was such.
        """
        has_some = False
        for port in self._ports if self._known.in_sync and self._known.runs_here else ():
            for known in (*port.inherited(),):
                batch = known.take(~port.held.find(known)[0])  # it may be both former and unsure
                found, is_there = self.host.driver.read_back(port.scope, batch)
                if is_there.any():
                    self.report.name(UNTOLD, int(np.count_nonzero(is_there)), names(batch.take(is_there)))
                    port.keep(batch, found, is_there)
                    has_some = True
        return has_some

    def _held_count(self) -> int:
        return sum(len(port.held) for port in self._ports)

    def _counts(self) -> dict[str, int]:
        self._name_in(self.report)
        return {"imported": self._held_count(), **self._findings.counts(), "discarded": self._discarded}

    def _close(self) -> None:
        self._looker.shutdown(wait=False)
        for port in self._ports:
            with self.host.deciding(port.scope):
                self.host.arriving.release(self.id, port.scope)
        self.host.arriving_guests.pop(self.id, None)
        self.host.release_places(self.id)


def _now(before: Scope, here: tuple[Scope, ...]) -> Scope | None:
    """What is known now of this port, whose tap may have another name by now; None where that is nothing new."""
    if before in here:
        return None
    same = [scope for scope in here if scope.port == before.port]
    others = [one for one in here if one.zones.keys() == before.zones.keys() and {*one.addresses} & {*before.addresses}]
    now = next(iter(same or others), None)
    return None if now is None or _essence(now) == _essence(before) else now


def _essence(scope: Scope) -> tuple[object, ...]:
    addresses = frozenset(scope.addresses), frozenset(scope.translations)
    return scope.port, place_of(scope), *addresses, scope.is_shared, scope.barred_marks


def _masters_first(arrived: list[Carried]) -> list[Carried]:
    """What is expected of a flow, and what was, comes behind the flow, whatever its protocol."""
    first: list[Carried] = []
    later: list[Carried] = []
    last: list[Carried] = []
    for one in arrived:
        if one.batch.template.is_expectation:
            last.append(one)
        elif one.batch.template.is_extended:
            has_master = one.batch.rows["masterProtocolIdentifier"] != 0
            for which, where in ((~has_master, first), (has_master, later)):
                if which.any():
                    where.append(Carried(one.batch.take(which), one.came.take(which)))
        else:
            first.append(one)
    return [*first, *later, *last]


def _left_out(sent: Batch, mine: Batch) -> dict[str, npt.NDArray[np.bool_]]:
    """By field of `sent` that `mine`, some of the same flows, has no room for: which of these had something in it."""
    if sent.template == mine.template or not len(mine):
        return {}
    had = sent.take(KeyIndex(sent).find(mine))
    fields = (name for name, *_ in sent.template.state if name not in (mine.rows.dtype.names or ()))
    return {name: np.asarray(had.rows[name].reshape(len(had), -1).any(axis=1)) for name in fields}


_SAID_TO_DESTINATION: Mapping[type[Message], str] = {
    Offer: "offered",
    Flows: "first flows",
    InSync: "in sync",
    Purged: "source purged",
    Stays: "the source said that the guest stays",
    GivesUp: "the source gave up",
}
"""The steps of the report that a message of the peer stands for."""
