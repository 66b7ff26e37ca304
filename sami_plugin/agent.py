"""The agent of one host: leads each word to its session."""

from __future__ import annotations

import hmac
import json
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from sami_plugin import former as formers
from sami_plugin import notifications
from sami_plugin.callers import OVER_OF_A_GUEST, Caller, Callers, as_uuid
from sami_plugin.codec import messages
from sami_plugin.errors import (
    Crowded,
    DeviceFailed,
    IllegalMessage,
    JournalError,
    NotAuthorised,
    NotAvailable,
    OperatorError,
    RepresentationError,
    SamiError,
    Veto,
)
from sami_plugin.former import Former
from sami_plugin.handover import DestinationSession, SourceSession
from sami_plugin.hooks import domain_xml
from sami_plugin.leaving import Inventory, Leaving, Piece, foremost
from sami_plugin.line import Ended, Line
from sami_plugin.migration import destination
from sami_plugin.migration.negotiation import Demand
from sami_plugin.model.flows import Omitted, names
from sami_plugin.model.migration import (
    Answer,
    Arrived,
    AskAgain,
    Check,
    Complete,
    GivesUp,
    Message,
    MigrationEvent,
    Open,
    Origin,
    Outcome,
    Phase,
    Purged,
    Room,
    Stays,
)
from sami_plugin.model.newest import Newest
from sami_plugin.model.packet import Packet
from sami_plugin.model.report import NAMES_PER_REASON, Report
from sami_plugin.model.scope import Scope
from sami_plugin.outgoing import Outgoing, OutgoingGuests
from sami_plugin.question import Question
from sami_plugin.refusals import STRANGER
from sami_plugin.session import Host, Session, go_on

LOG = logging.getLogger(__name__)

VERDICT_MARGIN_SECONDS = 0.5
"""What a session gets beyond its own limits to say what comes of them."""
HYPERVISOR_SECONDS = 5.0
"""It is connected to a second or two after the agent's start."""
ASK_AGAIN_SECONDS = 0.1
MOST_ANNOUNCED = MOST_REFUSED = MOST_REFUSING = MOST_BEGUN = 1024
REFUSED_SECONDS = 300.0
"""Who goes on against a veto starts the guest's shell by then, however much memory it takes first."""
MOST_EXCLUDED = 16384

SessionT = TypeVar("SessionT", bound=Session)
Older = SourceSession | tuple[Former, dict[str, Any]]
"""A session with which another one goes on: under way, or what the journal has of it, and its report."""


@dataclass(frozen=True, slots=True)
class _Announced:
    """A guest that the manager is about to have moved here."""

    source: str
    request_id: str
    until: float
    """When this is of interest no more."""


class Hypervisor(Protocol):
    """What an agent asks of its host's hypervisor. May be called from any thread, and blocks for a moment only."""

    def is_leaving(self, guest: str) -> bool | None:
        """Whether the guest is in a job that moves it away; None while it cannot be asked."""

    def is_here(self, guest: str) -> bool | None:
        """Whether the guest is there, and not paused to be moved away; None while it cannot be asked."""

    def description(self, guest: str) -> str | None:
        """The guest's XML, as it was last while it cannot be asked; None where it is not there."""

    def mark(self, guest: str) -> None:
        """Gives the guest a new token (`Origin`), some time."""


class Agent:
    """Sessions by id and by guest. Its methods may be called from any thread."""

    def __init__(self, host: Host, hypervisor: Hypervisor | None = None) -> None:
        """Without `hypervisor` there is nobody to ask, and all has to be told."""
        self.host = host
        self._hypervisor = hypervisor
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._sessions: dict[str, Session] = {}
        self._ended = Ended(host.settings.message_seconds)
        self._callers = Callers(host, self._ended, self._lock)
        self._questions: dict[str, Question] = {}
        self._announced = Newest[_Announced](MOST_ANNOUNCED)
        self._excluded = Newest[None](MOST_EXCLUDED)
        """Guests of flavors for which nothing is to be done."""
        self._refused = Newest[tuple[str, float]](MOST_REFUSED)
        """Guests that were refused, where from, and until when they may come all the same, where nobody stops them."""
        self._outgoing = OutgoingGuests(host.journal)
        self._refusing = Newest[str](MOST_REFUSING)
        """By guest, the destination that said that it stays. If its agent died before its hypervisor heard that, the
        guest comes all the same, and the agent asks for what it left."""
        self._missed: set[str] = set()
        """Guests that were leaving, or had left, when the agent of before ended: they may be here again."""
        self._gone: set[str] = set()
        """Guests that have ended here while a session with them goes on."""
        self._begun = Newest[tuple[str, ...]](MOST_BEGUN)
        """By guest that was to come here, the newest of its sessions, newest last."""
        host.is_here = self._is_here

    def start(self) -> None:
        """:raises SamiError: the firewall cannot be used; better now than at the first migration."""
        self.host.driver.capabilities()
        for namespace in self.host.scopes.namespaces():
            try:
                self.host.driver.attend(namespace)
            except (NotAvailable, DeviceFailed) as error:
                # Of one that comes later, the first guest to leave is told by exports.
                LOG.warning("%s: %s", self.host.name, error)
        self._recover()
        self.host.peers.start(self)
        LOG.info("%s: agent is running, driver %s", self.host.name, type(self.host.driver).__name__)

    def _recover(self) -> None:
        """Goes on with what was under way when the agent of before was ended. Where each guest is, is told anyway."""
        host = self.host
        try:
            self._outgoing.read()
            self._missed.update(self._outgoing.unconfirmed())
            self._remember_who_came()
            unfinished = host.journal.unfinished()
        except JournalError as error:
            LOG.error("%s: what was under way is not gone on with: %s", host.name, error)
            return
        recovered: list[Session] = []  # none of them does anything before all are known
        for row in unfinished:
            domain = host.peers.way_to(row["peer"]).domain
            guest, peer, name = row["guest"], row["peer"], row["session"]
            session: Session
            try:
                former = formers.read(host.journal, row, host.settings, domain)
                if former.role == "source":
                    self._missed.add(guest)
                    session = SourceSession(
                        host, host.new_id(), guest, peer, self._forget, is_outgoing=True, is_recovered=True
                    )
                else:
                    session = self._arriving(guest, peer)
                report = Report(name, guest, former.role, host.name, peer, Outcome.CONTINUED.value)
                report.reason = f"the agent was started anew; session {session.id} goes on with it"
                go_on(session, former, report.as_dict())
                host.notifications.tell(notifications.ended, report, host.wall())
            except SamiError as error:
                LOG.error("%s: guest %s: what was under way cannot be gone on with: %s", name, guest, error)
                continue
            LOG.warning("%s: guest %s: %s", name, guest, report.reason)
            recovered.append(session)
            if isinstance(session, SourceSession):
                self.host.leaves(guest)
                continue
            if former.has("guest resumed", formers.WAS_HERE):
                self.host.has_come(guest)
            elif any(len(port.flows) + len(port.unsure) for port in former.ports):
                self.host.may_put_in(guest, session.id)
            if not former.has(formers.WAS_HERE):
                for leaving in recovered:  # it has left, and comes back
                    if leaving.guest == guest and leaving.role == "source":
                        leaving.expect_return()
        for session in recovered:
            self._add(session)

    def _remember_who_came(self) -> None:
        """Guests that sessions brought here before: a roll-back of another guest's takes nothing from them."""
        newest: set[str] = set()
        for row in self.host.journal.sessions():
            if row["guest"] not in newest and row["role"] == "destination" and row["report"] is not None:
                steps = json.loads(row["report"])["steps"]
                if any(one["step"] == Phase.RESUMED.value for one in steps):
                    self.host.arrived_guests.add(row["guest"])
            newest.add(row["guest"])

    def _arriving(self, guest: str, peer: str, *, held_since: float | None = None) -> DestinationSession:
        """A session of a guest that comes here: all those before it are over, or will be."""
        session = DestinationSession(
            self.host, self.host.new_id(), guest, peer, self._forget, held_since=held_since, again=self._again
        )
        with self._lock:
            session.after = self._begun.get(guest, ())
            self._begun.put(guest, (*session.after, session.id)[-OVER_OF_A_GUEST:])
        return session

    def _again(self, former: DestinationSession) -> DestinationSession:
        """The source cannot go on with this session. Whoever waits for it waits for the next one."""
        session = self._arriving(former.guest, former.peer, held_since=former.held_since)
        session.token, session.times_asked = former.token, former.times_asked + 1
        session.went_before = former.went_before
        session.report.request_id = former.report.request_id
        session.has_verdict, former.has_verdict = former.has_verdict, threading.Event()
        session.has_caught_up, former.has_caught_up = former.has_caught_up, threading.Event()
        self._put_in_place_of(former, session)
        return session

    def stop(self) -> None:
        """Ends all threads. Sessions under way are left as they are; the journal has them."""
        self.host.peers.stop()
        for session in self.sessions():
            session.stop()
        with self._lock:
            self._ended.close()
        self.host.refusals.write()
        self.host.notifications.stop()

    def tell(self, event: MigrationEvent) -> None:
        """As `note`, and waits where the teller can hold the migration up for a while.

        `prepare` waits until the guest's policy has spoken, up to `verdict_seconds` and, where it asks an operator,
        `ask_seconds` more: after that it does without what it waits for. `started` waits up to `started_seconds` until
        all that the source had at first is in the firewall, or until what the guest left here before is gone.

        :raises OperatorError: something is missing in what was said.
        :raises Veto: the guest may not come here.
        """
        coming = self.note(event)
        settings = self.host.settings
        if event.phase is Phase.PREPARE and coming is not None:
            self._await_verdict(coming)
        if event.phase is Phase.STARTED:
            session: Session | None = coming
            if session is None:
                session = next((one for one in self._sessions_of(event.guest, SourceSession) if one.has_left), None)
            if session is not None and not session.has_caught_up.wait(settings.started_seconds):
                LOG.warning("%s: not all is done yet; the guest goes on", session.id)

    def _await_verdict(self, session: DestinationSession) -> None:
        """:raises Veto: the guest may not come here."""
        limits = self.host.settings.limits
        verdict = session.has_verdict  # the next session's, if one goes on with this one
        has_spoken = verdict.wait(limits.verdict_seconds + VERDICT_MARGIN_SECONDS)
        if not has_spoken and (asking := _newest(session)).is_asking:
            LOG.warning("%s: waits for `sami session approve` or `refuse`: %s", asking.id, asking.risk)
            has_spoken = verdict.wait(limits.ask_seconds + VERDICT_MARGIN_SECONDS)
        newest = _newest(session)
        if not has_spoken:
            newest.let_go()
        if newest.refusal is not None:
            with self._lock:
                until = self.host.monotonic() + REFUSED_SECONDS
                self._refused.put(newest.guest, (newest.peer, until))
            raise Veto(f"{newest.refusal} (session {newest.id})")
        if not has_spoken:
            LOG.warning("%s: nothing is decided yet; the migration goes on", session.id)

    def announce(self, guest: str, source: str, destination: str, request_id: str) -> None:
        """The manager will have the guest moved here. Nothing is asked of the source before its job has begun.

        :raises OperatorError: it means another host than this agent's.
        """
        if destination != self.host.name:
            raise OperatorError(
                f"destination: {destination} is not {self.host.name}; [agent] host has to be what the manager calls it"
            )
        now = self.host.monotonic()
        with self._lock:
            for old in [one for one, known in self._announced.items() if known.until <= now]:
                del self._announced[old]
            until = now + self.host.settings.limits.session_seconds
            self._announced.put(guest, _Announced(source, request_id, until))

    def decide(self, session_id: str, *, may_come: bool) -> None:
        """An operator's answer, for a session whose policy asks for one. Its first characters are enough.

        :raises OperatorError: there is none that asks, or more than one.
        """
        asking = [one for one in self.sessions() if isinstance(one, DestinationSession) and one.is_asking]
        found = [one for one in asking if one.id.startswith(session_id) or one.guest == session_id]
        if len(found) != 1:
            known = ", ".join(one.id for one in asking) or "none"
            what = "no session" if not found else f"{len(found)} sessions"
            raise OperatorError(f"{what} of that name waits for an answer here; those that wait: {known}")
        found[0].approve(may_come=may_come)

    def check(self, guest: str, host: str) -> dict[str, Any]:
        """What would become of a guest's flows if it moved from here to that host. Moves and keeps nothing.

        Blocks up to `open_seconds`.

        :raises OperatorError: the guest is not here, or the host is this one.
        :raises SamiError: the firewall or the other host does not answer.
        """
        if host == self.host.name:
            raise OperatorError(f"to: the guest is to move from {host} to another host")
        self._look(guest)
        if self._is_excluded(guest):
            raise OperatorError(self._words_of_exclusion(guest))
        scopes = self.host.scopes.find(guest)
        if not scopes:
            raise OperatorError(f"guest: {self.host.name} knows no port of {guest}; is the guest here?")
        there, found = self.host.peers.way_to(host).domain, Inventory()
        pieces: list[Piece] = []
        for scope in scopes:
            for piece in self.host.driver.export(scope):
                found.add(piece, there)
                if not isinstance(piece, Omitted):
                    pieces.append((Leaving(scope, None), piece))
        answer = self._ask(host, Check(guest, *found.told()))
        _, rest = foremost((piece for piece in pieces if piece[1].template.name in answer.kinds), answer.places)
        refused = [batch for _, batch in pieces if batch.template.name not in answer.kinds]
        without = [*refused, *(batch for _, batch in rest)]
        return {
            "guest": guest,
            "source": self.host.name,
            "destination": host,
            "verdict": answer.verdict,
            "flows": found.counts.total() + found.left_out.total(),
            "carried": answer.places,
            "kinds": dict(found.counts),
            "losses": dict(zip(answer.reasons, answer.counts, strict=False)),
            "not_carried": [name for batch in without for name in names(batch)][:NAMES_PER_REASON],
        }

    def _ask(self, host: str, check: Check) -> Answer:
        session = self.host.new_id()
        question = Question(self.host.line(session), host)
        with self._lock:
            self._questions[session] = question
        try:
            return question.ask(check, self.host.settings.limits.open_seconds)
        finally:
            with self._lock:
                del self._questions[session]
                self._ended.add(session, question.line, self.host.monotonic())

    def note(self, event: MigrationEvent) -> DestinationSession | None:
        """This host's hypervisor said something of a guest. The same may be said twice.

        Returns at once, where the guest comes here with the session that is about it, even if it is over by then.

        :raises OperatorError: something is missing in what was said.
        """
        if event.guest in self.host.policies.excluded:
            return None
        if event.phase is Phase.RESUMED:
            self._missed.discard(event.guest)
        if event.phase in (Phase.PREPARE, Phase.STARTED, Phase.RESUMED):
            self._gone.discard(event.guest)
        origin = self._learn(event.guest, event.domain)
        # In the pause nothing is asked that was asked before it.
        leaves = event.phase is Phase.OUTGOING or (event.phase is Phase.SUSPENDED and event.guest not in self._outgoing)
        if self.host.policies.excluded_flavors and event.domain is None and (leaves or event.is_incoming):
            self._look(event.guest)
        if event.guest in self._excluded and all(one.guest != event.guest for one in self.sessions()):
            with self._lock:  # of before it was excluded
                self._outgoing.pop(event.guest)
            return None
        if event.domain is None and event.phase in (Phase.STARTED, Phase.RESUMED):
            self._look_for_ports(event.guest)
        match event.phase:
            case Phase.PREPARE:
                return self._expect(event, origin)
            case Phase.STARTED:
                # Without a hook this is the first word. It may also be a late one, of a session that is well under way.
                coming = self._sessions_of(event.guest, DestinationSession)
                if all(one.refusal is not None or one.has_stopped or one.is_discarding for one in coming):
                    refused_from, until = self._refused.pop(event.guest, ("", 0.0))
                    if until < self.host.monotonic() or (origin is not None and origin.host == self.host.name):
                        refused_from = ""  # it starts here
                    if event.is_incoming or refused_from:  # who was to stop the migration has not done it
                        known = event if event.source else replace(event, source=refused_from or None)
                        # Who brought a description has said all, and libvirt may wait for its hook to return.
                        self._expect(known, origin or (None if event.domain else self._look(event.guest)))
                    else:  # it starts here: what it left before has to be gone before it speaks
                        for leaving in self._sessions_of(event.guest, SourceSession):
                            leaving.expect_return()
                self._lead(event, DestinationSession)
            case Phase.OUTGOING:
                self._refusing.pop(event.guest, None)
                self._note_outgoing(event.guest, event.destination)
                self._refuse_others(event)
                self._lead(event, SourceSession)
            case Phase.SUSPENDED:
                self._pauses(event)
            case Phase.RESUMED:
                with self._lock:
                    outgoing = self._outgoing.get(event.guest)
                    if outgoing is not None and outgoing.is_suspended:
                        self._outgoing.pop(event.guest)
                for leaving in self._sessions_of(event.guest, SourceSession):
                    if leaving.has_purged:  # what comes from here on is no late packet of a guest that has left
                        leaving.expect_return()
                    elif leaving.has_left:  # nobody had said that it comes back
                        leaving.tell(event)
                self._lead(event, SourceSession, DestinationSession)
                if self._is_coming(event.guest):  # too, where a session that goes on with its leaving is newer
                    self._lead(event, DestinationSession)
            case Phase.ROLLBACK:
                if not self._is_leaving(event.guest):  # else again: the word is about the job before this one
                    with self._lock:
                        self._outgoing.pop(event.guest)
                        self._refusing.pop(event.guest, None)
                    has_left = any(one.has_left for one in self._sessions_of(event.guest, SourceSession))
                    # Else what was to come here is destroyed, or the guest was, which its hook has said before.
                    if not (has_left and (self._is_coming(event.guest) or self._is_gone(event.guest))):
                        self._lead(event, SourceSession)
            case Phase.STOPPED:
                self._stops(event)
        return next(iter(self._sessions_of(event.guest, DestinationSession)), None)

    def _learn(self, guest: str, domain: str | None) -> Origin | None:
        """Keeps what the description says of the guest's ports; returns what it says of where it comes from."""
        if domain is None:
            return None
        try:
            if excluded := self.host.policies.excluded_flavors:
                self._exclude(guest, is_excluded=domain_xml.flavor_of(domain) in excluded)
            if guest not in self._excluded and (ports := domain_xml.ports_of(domain)):
                self.host.scopes.learn(guest, ports)
        except RepresentationError as error:  # the migration is known all the same
            LOG.warning("guest %s: its ports are not known: %s", guest, error)
        try:
            return domain_xml.origin_of(domain)
        except RepresentationError as error:
            LOG.warning("guest %s: its description does not say where it comes from: %s", guest, error)
            return None

    def _note_outgoing(self, guest: str, destination: str | None = None) -> None:
        """In one record: who is started anew right after finds the ports of a guest that has left nowhere else."""
        origin, scopes = self._look(guest), self._ports_nobody_knows(guest)
        with self._lock:
            known = self._outgoing.get(guest) or Outgoing()
            if destination is not None or guest not in self._outgoing:
                # Its pause may have been told before; that it is paused still shows when it is gone.
                known = replace(known, destination=destination, is_suspended=False)
            elif guest in self._outgoing.unconfirmed():  # the pause of then may be over; one of now is told as well
                known = replace(known, is_suspended=False)
            token = origin.token if origin is not None and origin.host == self.host.name else known.token
            self._outgoing.put(guest, replace(known, token=token, scopes=scopes or known.scopes))

    def _ports_of(self, guest: str) -> tuple[Scope, ...]:
        """As far as they are known."""
        try:
            return self.host.scopes.find(guest)
        except SamiError as error:  # the migration is known all the same
            LOG.warning("guest %s: its ports are not known: %s", guest, error)
            return ()

    def _ports_nobody_knows(self, guest: str) -> tuple[Scope, ...]:
        """Of a guest that leaves, as `_ports_of`; none where its session knows them, or is told them now."""
        leaving = self._sessions_of(guest, SourceSession)
        if leaving and not leaving[0].lacks_ports:
            return ()
        scopes = self._ports_of(guest)
        if leaving:
            leaving[0].note_ports(scopes)
        return scopes

    def _look_for_ports(self, guest: str) -> None:
        """Of a guest that comes, where an agent before this one was told of them, and this one was not."""
        coming = self._sessions_of(guest, DestinationSession)
        if coming and coming[0].lacks_ports:
            self._look(guest)

    def _look(self, guest: str) -> Origin | None:
        """Asks the hypervisor, where there is one, to describe the guest; as `_learn`."""
        return self._learn(guest, None if self._hypervisor is None else self._hypervisor.description(guest))

    def _refuse_others(self, event: MigrationEvent) -> None:
        """Sessions of hosts that asked before it was known where the guest moves to."""
        for session in self._sessions_of(event.guest, SourceSession):
            if event.destination is not None and session.peer and session.peer != event.destination:
                reason = f"{event.guest} moves to {event.destination}, not to {session.peer}"
                self.host.refusals.note(session.peer, NotAuthorised(reason))
                session.refuse(reason)

    def _pauses(self, event: MigrationEvent) -> None:
        is_first_word = event.guest not in self._outgoing
        if is_first_word:
            self._note_outgoing(event.guest, self._refusing.pop(event.guest, None))
            self._lead(replace(event, phase=Phase.OUTGOING), SourceSession)
        with self._lock:  # a session that begins from here on knows of the pause
            self._lead(event, SourceSession)  # first: the guest stands still, and the journal may be busy
            if (outgoing := self._outgoing.get(event.guest)) is not None:
                self._outgoing.put(event.guest, replace(outgoing, is_suspended=True))
        for coming in self._sessions_of(event.guest, DestinationSession):
            if not coming.is_awaited:
                coming.tell(event)
        if not is_first_word:
            self._note_ports(event.guest)

    def _note_ports(self, guest: str) -> None:
        """Where no session knows the guest's ports, they are noted now: when it is gone, so are they."""
        scopes = self._ports_nobody_knows(guest)
        with self._lock:  # where a word is said again, they may be gone: what was known of them stays known
            if scopes and (outgoing := self._outgoing.get(guest)) is not None:
                self._outgoing.put(guest, replace(outgoing, scopes=scopes))

    def _stops(self, event: MigrationEvent) -> None:
        self._refused.pop(event.guest, None)
        if event.role != "destination":
            self._has_gone(event)
        self._lead(event, SourceSession, DestinationSession)
        if event.role == "source":
            for coming in self._sessions_of(event.guest, DestinationSession):
                if not coming.is_awaited:  # it ran here, and has left before its flows had come
                    coming.tell(event)
        with self._lock:
            if any(session.guest == event.guest for session in self._sessions.values()):
                comes_back = event.role == "source" and self._sessions_of(event.guest, DestinationSession)
                if not comes_back:
                    self._gone.add(event.guest)
                return
        self.host.scopes.learn(event.guest, ())  # it ended here, and its tap's name may be another guest's next

    def _has_gone(self, event: MigrationEvent) -> None:
        """What a guest leaves that nobody asked for is removed by a session too."""
        with self._lock:
            outgoing = self._outgoing.get(event.guest)
            is_nobodys = all(one.is_over for one in self._sessions_of(event.guest, SourceSession))
            if outgoing is not None and outgoing.scopes and is_nobodys:
                LOG.warning("guest %s left, and no agent at its destination asked for its flows", event.guest)
                session = self._leaving(self.host.new_id(), event.guest, "", outgoing)
                self._add(session)
                session.tell(event)
            self._outgoing.pop(event.guest)  # not before the session is in the journal

    def deliver(self, sender: str, session_id: str, packet: Packet) -> None:
        """A packet from who says to be `sender`. Of an unknown session it is a host that calls.

        :raises PeerError: it is not one that may come now, or more than is taken at a time.
        """
        try:
            self._deliver(sender, session_id, packet)
        except RepresentationError as error:  # it came through TLS
            self.host.refusals.note(sender, error)
            raise
        except (NotAuthorised, IllegalMessage, Crowded) as error:
            self.host.refusals.note(STRANGER, error)
            raise

    def _deliver(self, sender: str, session_id: str, packet: Packet) -> None:
        with self._lock:  # a session is there before its caller is forgotten, so one of both is found
            known: Session | Question | Caller | None
            known = self._sessions.get(session_id) or self._questions.get(session_id)
            if known is None and not (session_id in self._ended or self._callers.is_overtaken(session_id, sender)):
                known = self._callers.get(sender, session_id)
            line = self._ended.line(session_id) if known is None else None
        if known is None:  # of interest only where the other end needs an answer to hear what was said last
            if line is not None and line.peer == sender:
                line.take(packet)
            return
        if known.peer != sender:
            raise NotAuthorised("a session is with one host, and no other may speak in it")
        if isinstance(known, Caller):
            self._greet(known, packet)
        else:
            known.deliver(packet)

    def _greet(self, caller: Caller, packet: Packet) -> None:
        with caller.lock:
            if caller.session is not None:  # another thread had the packet before this one
                caller.session.deliver(packet)
                return
            heard = caller.line.take(packet)
            if not heard:
                return
            try:
                said = messages.decode(heard[0])
                answer = self._answer(caller, said)
                if isinstance(said, Open) and answer is None:
                    caller.session = self._open(caller, said, heard)
                    self._callers.forget(caller)
                    return
            except SamiError as error:  # the caller is told, and not the broker
                self.host.refusals.note(caller.peer, error)
                answer = GivesUp(str(error))
            except Exception as error:  # what was taken from the line is said again by nobody
                LOG.exception("%s calls, and nobody could answer", caller.peer)
                answer = GivesUp(f"{type(error).__name__}: {error}")
            if answer is not None:
                caller.line.say(messages.encode(answer))
            self._callers.hang_up(caller.id)

    def sessions(self) -> list[Session]:
        """Those under way, oldest first."""
        with self._lock:
            return list(self._sessions.values())

    def underway(self) -> list[tuple[str, str]]:
        """Guests that are on their way as far as is known here, whether anybody has asked for them or not, and this
        host's role in it. Of one that comes back, only that it comes; of one that came and leaves again, only that.
        """
        with self._lock:
            outgoing = dict.fromkeys(self._outgoing, "source")
        roles = outgoing | {one.guest: one.role for one in self.sessions() if isinstance(one, SourceSession)}
        for one in self.sessions():
            if isinstance(one, DestinationSession) and (one.is_awaited or one.guest not in outgoing):
                roles[one.guest] = one.role
        return list(roles.items())

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Whether all sessions ended within the time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._sessions, timeout_seconds)

    def _has_job(self, guest: str, *, has_token: bool) -> bool:
        """Whether this host's hypervisor, as far as it can be asked, has the guest in a job that moves it away.

        While it cannot, who was given the guest's description has it from that job.
        """
        if self._hypervisor is None or self._is_coming(guest):
            return True
        is_leaving = self._hypervisor.is_leaving(guest)
        if is_leaving or (is_leaving is None and has_token):
            self._note_outgoing(guest)
        return is_leaving is not False

    def _is_leaving(self, guest: str) -> bool:
        """Whether the hypervisor says now that it moves the guest away from here."""
        return self._hypervisor is not None and not self._is_coming(guest) and bool(self._hypervisor.is_leaving(guest))

    def _is_gone(self, guest: str) -> bool:
        """Whether the hypervisor says that the guest is not here."""
        return self._hypervisor is not None and self._hypervisor.is_here(guest) is False

    def _leaves_all_the_same(self, guest: str) -> bool:
        """Whether a guest that was said to stay is moved away, or is gone, or nobody can say: it will be said yet."""
        hypervisor = self._hypervisor
        if hypervisor is None or self._is_coming(guest):  # of one that comes it is not asked
            return False
        return hypervisor.is_leaving(guest) is not False or hypervisor.is_here(guest) is not True

    def _is_here(self, guest: str) -> bool | None:
        """Whether the hypervisor says that a guest is here of which this agent may have missed that it came.

        Blocks while the hypervisor cannot be asked, for a while; None where it says nothing. It is asked of one that
        comes, too, by a thread for which its hooks do not wait for long: that the guest comes may have been said while
        no agent was here to hear it, and it may run by now.
        """
        if self._hypervisor is None or guest not in self._missed:
            return False
        end = self.host.monotonic() + HYPERVISOR_SECONDS
        while (is_here := self._hypervisor.is_here(guest)) is None and self.host.monotonic() < end:
            time.sleep(ASK_AGAIN_SECONDS)
        return is_here

    def _is_coming(self, guest: str) -> bool:
        """Then the hypervisor is not asked about it: it may answer only when its hooks have returned."""
        return any(one.is_awaited for one in self._sessions_of(guest, DestinationSession))

    def _expect(self, event: MigrationEvent, origin: Origin | None) -> DestinationSession:
        if event.source == self.host.name:
            raise OperatorError(f"source: a guest does not move from {event.source} to itself")
        with self._lock:
            announced = self._announced.pop(event.guest, None)
        source = event.source or ("" if origin is None or origin.host == self.host.name else origin.host)
        if not source and announced is not None:
            source = announced.source
        if not source and self._hypervisor is None and event.phase is Phase.PREPARE:
            raise OperatorError("source: has to be told with `prepare`: the guest's description does not name it")
        with self._lock:  # the hook and Nova may say it at the same time
            session = next(iter(self._sessions_of(event.guest, DestinationSession)), None)
            token = origin.token if origin is not None else ""
            is_another = session is not None and event.phase is Phase.PREPARE and session.is_started
            if session is None or is_another or not session.is_about(source):
                self._make_room(event.guest)
                # Whether that was said or not.
                self._has_gone(MigrationEvent(event.guest, Phase.STOPPED, role="source"))
                for leaving in self._sessions_of(event.guest, SourceSession):
                    leaving.expect_return()
                held_since = self.host.monotonic() if event.phase is Phase.PREPARE else None
                session = self._arriving(event.guest, source, held_since=held_since)
                session.token = token
                session.report.request_id = announced.request_id if announced is not None else ""
                self._add(session)
            else:
                session.token = token or session.token
                if source:
                    session.find(source)
            return session

    def _answer(self, caller: Caller, said: Message) -> Message | None:
        """What is said to a host that gets no session of its own; None where nothing is, or where it does get one."""
        if isinstance(said, Check):
            return self._judge(said, caller.peer)
        if isinstance(said, Open):
            if self._was_opened(caller):
                return AskAgain(caller.id)
            # How many there were was said, or noted, before.
            return Purged(0, 0) if self._has_purged(said, caller.peer) else None
        if isinstance(said, AskAgain):
            for session in self.sessions():
                if isinstance(session, DestinationSession) and session.is_meant(said.session, caller.peer):
                    session.known_as = said.session
                    session.hear([messages.encode(said)])
                    return None
            return self._tell_again(said.session, caller.peer)
        if isinstance(said, Answer | Room | Complete | Arrived):  # from the middle of a session of an agent before this
            return AskAgain(caller.id)
        return GivesUp("there is no such session here")

    def _was_opened(self, caller: Caller) -> bool:
        """Whether an agent before this one had this session already: what it was asked is not asked anew."""
        try:
            row = self.host.journal.known_as(caller.id, "source")
        except JournalError:
            return False
        return row is not None and row["peer"] == caller.peer

    def _has_purged(self, said: Open, peer: str) -> bool:
        """Whether the caller has all, and all is purged here: its former session needs nothing but to hear it."""
        if not said.has_all:
            return False
        row = self.host.journal.known_as(said.continues, "source")
        if row is None or row["peer"] != peer:
            return False
        under_way = self._sessions.get(row["session"])
        if isinstance(under_way, SourceSession):
            return under_way.has_purged
        return row["outcome"] in (Outcome.MOVED.value, Outcome.LEFT_WITHOUT_ARRIVAL.value)

    def _tell_again(self, session_id: str, peer: str) -> Message | None:
        """How a session ended while the source was away: in a message, or by a session that tells the arrival."""
        row = self.host.journal.known_as(session_id, "destination")
        if row is None or row["peer"] != peer:
            return GivesUp("there is no such session here")
        if row["outcome"] == Outcome.STAYED.value:
            return Stays(json.loads(row["report"])["reason"])
        if row["outcome"] != Outcome.MOVED.value or self.host.journal.newest(row["guest"]) != row["session"]:
            return GivesUp("there is no such session here any more")
        former = formers.read(self.host.journal, row, self.host.settings, self.host.peers.way_to(peer).domain)
        session = self._arriving(row["guest"], peer)
        go_on(session, replace(former, state=destination.State.ARRIVED.value), json.loads(row["report"]))
        self._add(session)
        return None

    def _judge(self, check: Check, sender: str) -> Answer:
        """What would be said to these flows; nothing is kept for them.

        :raises NotAuthorised: the guest's flows are nobody's business here.
        """
        if self._is_excluded(check.guest):
            raise NotAuthorised(self._words_of_exclusion(check.guest))
        demand = Demand.of(check)
        risk = self.host.risk(demand, "", check.guest, sender, is_kept=False)
        return risk.answered(self.host.policies.judge(risk, self.host.peers.way_to(sender).domain), 0)

    def _exclude(self, guest: str, *, is_excluded: bool) -> None:
        """By its flavor, as its newest description has it: what is excluded stays so when it has left."""
        with self._lock:
            if is_excluded:
                self._excluded.put(guest, None)
            else:
                self._excluded.pop(guest, None)

    def _is_excluded(self, guest: str) -> bool:
        return guest in self.host.policies.excluded or guest in self._excluded

    def _words_of_exclusion(self, guest: str) -> str:
        why = "guests" if guest in self.host.policies.excluded else "excluded_flavors"
        return f"the operator of {self.host.name} wants nothing done for {guest} ([policy] {why})"

    def _open(self, caller: Caller, said: Open, heard: list[bytes]) -> Session:
        """The session that the caller asks for in the first message that was heard of it."""
        sender = caller.peer
        guest = as_uuid(said.guest)
        if guest is None:
            raise IllegalMessage("a guest is a UUID")
        if said.continues and (continuing := self._continue(caller, said, guest, heard)) is not None:
            return continuing
        if said.has_all:
            raise NotAuthorised(f"there is no session {said.continues} of {guest} here")
        has_token = not self._is_coming(guest) and self._has_token(guest, said.token)
        if self._is_excluded(guest):
            raise NotAuthorised(self._words_of_exclusion(guest))
        has_job = self._has_job(guest, has_token=has_token)
        has_left = not has_job and self._is_gone(guest)
        scopes = self._ports_of(guest)
        with self._lock:
            self._callers.refuse_who_was_overtaken(caller, guest)
            outgoing = self._outgoing.get(guest)
            left = next((one for one in self._sessions_of(guest, SourceSession) if one.has_left), None)
            if left is not None and not left.may_be_fetched_by(sender, said.token):
                raise NotAuthorised(f"{guest} has left this host already")
            if left is not None:
                return self._take_over(caller, guest, said, left, heard)
            # It may have left, which will be told, or while no agent was here.
            may_have_left = has_left or guest in self._outgoing.unconfirmed()
            if may_have_left and self._outgoing.is_of(guest, said.token):
                has_token = True
            elif not has_job and not has_left and outgoing is not None and not outgoing.is_suspended:
                self._outgoing.pop(guest)  # its job ended without a word
                outgoing = None
            self._refuse_who_is_not_the_destination(guest, sender, outgoing, has_token=has_token)
            self._callers.overtake(said.after, sender)
            self._make_room(guest)
            if outgoing is not None and scopes:
                outgoing = replace(outgoing, scopes=scopes)
                self._outgoing.put(guest, outgoing)
            session = self._leaving(caller.id, guest, sender, outgoing, caller.line)
            if session.lacks_ports:  # whoever starts anew when the guest has left finds them nowhere but in the journal
                session.note_ports(scopes)
            session.hear(heard)  # before another thread finds the session and has it hear what was said later
            self._add(session)
            return session

    def _continue(self, caller: Caller, said: Open, guest: str, heard: list[bytes]) -> Session | None:
        """The session that goes on with another one, if that is the caller's and the flows are still to be had."""
        with self._lock:
            self._callers.refuse_who_was_overtaken(caller, guest)
            older = [
                one
                for one in self._sessions_of(guest, SourceSession)
                if one.may_be_continued_by(caller.peer, said.continues)
            ]
            left = None if older else self._left_before(caller.peer, said.continues, guest)
            if not older and left is None:
                return None
            return self._take_over(caller, guest, said, older[0] if older else left, heard)

    def _take_over(self, caller: Caller, guest: str, said: Open, older: Older | None, heard: list[bytes]) -> Session:
        """The session that goes on with that one, for the caller."""
        self._callers.overtake(said.after, caller.peer)
        session = SourceSession(
            self.host,
            caller.id,
            guest,
            caller.peer,
            self._forget,
            is_outgoing=True,
            line=caller.line,
            has_all=said.has_all,
        )
        session.hear(heard)
        if self._is_coming(guest):
            session.expect_return()
        if isinstance(older, SourceSession):
            self._put_in_place_of(older, session)
            older.continue_with(session)
        elif older is not None:
            self._sessions[session.id] = session
            go_on(session, *older)
            self.host.run(session)
        return session

    def _put_in_place_of(self, former: Session, successor: Session) -> None:
        """Who goes on with a session is no newer than it: words are about a migration that has begun since."""
        with self._lock:
            known = list(self._sessions.items())
            known.insert([one for _, one in known].index(former) + 1, (successor.id, successor))
            self._sessions = dict(known)

    def _left_before(self, peer: str, session: str, guest: str) -> Older | None:
        """A session that purged without arrival, and its report, for as long as its flows may still be imported.

        :raises NotAuthorised: they may not be any more.
        """
        row = self.host.journal.known_as(session, "source")
        if row is None or (row["peer"], row["guest"], row["outcome"]) != (
            peer,
            guest,
            Outcome.LEFT_WITHOUT_ARRIVAL.value,
        ):
            return None
        if self.host.journal.newest(guest) != row["session"]:
            raise NotAuthorised(f"{guest} has come back since")
        ago = self.host.wall() - row["ended_at"]
        if ago > self.host.settings.late_import_seconds:
            raise NotAuthorised(
                f"the flows of {guest} were purged {ago:.0f} s ago, too long to be imported (late_import_seconds)"
            )
        former = formers.read(self.host.journal, row, self.host.settings, self.host.peers.way_to(peer).domain)
        return former, json.loads(row["report"])

    def _has_token(self, guest: str, token: str) -> bool:
        """Whether the caller was given the guest's description, as its destination is and no other host."""
        origin = self._look(guest) if token else None
        return origin is not None and hmac.compare_digest(origin.token.encode(), token.encode())

    def _refuse_who_is_not_the_destination(
        self, guest: str, sender: str, outgoing: Outgoing | None, *, has_token: bool
    ) -> None:
        """:raises NotAuthorised: it is not shown that the guest moves to the sender."""
        destination = outgoing.destination if outgoing is not None else None
        if destination == sender or (destination is None and has_token):
            return
        if destination is not None:
            raise NotAuthorised(f"{guest} moves to {destination}, not to {sender}")
        # Where there is no hypervisor to ask, its word may come after the destination's, and names the destination.
        if self._hypervisor is not None or outgoing is not None or self._sessions_of(guest, SourceSession):
            raise NotAuthorised(f"nothing shows that {guest} moves to {sender}")

    def _leaving(
        self, session: str, guest: str, peer: str, outgoing: Outgoing | None, line: Line | None = None
    ) -> SourceSession:
        self.host.leaves(guest)
        return SourceSession(
            self.host,
            session,
            guest,
            peer,
            self._forget,
            is_outgoing=outgoing is not None,
            is_suspended=outgoing is not None and outgoing.is_suspended,
            scopes=outgoing.scopes if outgoing is not None else (),
            line=line,
            destination=outgoing.destination if outgoing is not None else None,
            token=outgoing.token if outgoing is not None else "",
        )

    def _make_room(self, guest: str) -> None:
        """:raises OperatorError: there are as many sessions as may be. Where the guest has one already, one more is."""
        most = self.host.settings.bounds.sessions
        if len(self._sessions) >= most and all(one.guest != guest for one in self._sessions.values()):
            raise OperatorError(f"there are {most} sessions (sessions): the flows of {guest} are not carried")

    def _add(self, session: Session) -> None:
        with self._lock:
            for older in self._sessions_of(session.guest, type(session)):
                older.supersede()
            session.enter()
            self._sessions[session.id] = session
            self.host.run(session)

    def _lead(self, event: MigrationEvent, *kinds: type[Session]) -> None:
        """Tells the guest's newest session, of the role that the event is about where that is known."""
        for session in reversed(self.sessions()):
            if session.guest == event.guest and isinstance(session, kinds) and event.role in (None, session.role):
                session.tell(event)
                return

    def _sessions_of(self, guest: str, kind: type[SessionT]) -> list[SessionT]:
        """The guest's sessions of this role, newest first."""
        with self._lock:
            return [one for one in reversed(self._sessions.values()) if one.guest == guest and isinstance(one, kind)]

    def _forget(self, session: Session) -> None:
        has_stayed = session.report.outcome == Outcome.STAYED.value
        # Else that word came late, or the other host's veto was not heeded.
        does_stay = has_stayed and not (session.role == "source" and self._leaves_all_the_same(session.guest))
        with self._idle:
            self._sessions.pop(session.id, None)
            others = [one for one in self._sessions.values() if one.guest == session.guest]
            is_last = not others
            # What brought it here, and waits for its source yet, keeps nothing of a later move back.
            is_last_to_leave = session.role == "source" and all(
                isinstance(one, DestinationSession) and not one.is_awaited for one in others
            )
            if has_stayed and (is_last or is_last_to_leave):
                outgoing = self._outgoing.pop(session.guest) if does_stay else None
                if outgoing is not None and outgoing.destination is not None:
                    self._refusing.put(session.guest, outgoing.destination)
                if session.role == "source" and self._hypervisor is not None:
                    self._hypervisor.mark(session.guest)
            has_moved = session.role == "source" and session.report.outcome == Outcome.MOVED.value
            left = self._outgoing.get(session.guest) if has_moved and is_last_to_leave else None
            if left is not None and left.is_suspended:
                self._outgoing.pop(session.guest)  # with post-copy its process ends later, and leaves nothing more
            if is_last:
                if session.guest in self._gone or has_stayed == (session.role == "destination"):
                    self.host.scopes.learn(session.guest, ())  # it is not here any more
                self._gone.discard(session.guest)
            self._ended.add(session.id, session.line, self.host.monotonic())
            self._idle.notify_all()


def _newest(session: DestinationSession) -> DestinationSession:
    newest = session.newest
    assert isinstance(newest, DestinationSession)  # nothing else goes on with one
    return newest
