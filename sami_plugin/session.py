"""One guest, one move, one thread: decide, record, act.

Whatever happens to a session (a word of the hypervisor, a message, the end of an action, the clock) goes into its queue
and is handled in order. The decision is asked of `migration`, written into the journal, and only then is anything done.
What there is to do is in `handover`.
"""

from __future__ import annotations

import abc
import functools
import logging
import operator
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from sami_plugin.codec import messages
from sami_plugin.drivers.base import Capabilities, FlowDriver
from sami_plugin.errors import Busy, HasGone, IllegalMessage, JournalError, NotAvailable, RepresentationError, SamiError
from sami_plugin.former import Former, FormerPort
from sami_plugin.journal.journal import Journal
from sami_plugin.line import Line
from sami_plugin.migration.claims import Claims
from sami_plugin.migration.decision import (
    Action,
    ActionFailed,
    CallAgain,
    Continued,
    Done,
    End,
    Event,
    ExportChanges,
    ExportNext,
    FindScope,
    Found,
    GuestDid,
    HandOver,
    Import,
    LetGo,
    Negotiated,
    OperatorSaid,
    PeerLost,
    PeerSaid,
    Purge,
    PurgeLate,
    Renew,
    Resync,
    Returns,
    Say,
    Superseded,
    TimePassed,
    Verify,
    WakeAt,
)
from sami_plugin.migration.negotiation import Demand, weigh
from sami_plugin.migration.places import Look, Places
from sami_plugin.model.domain import Domain
from sami_plugin.model.flows import Addresses
from sami_plugin.model.migration import FlowChanges, Flows, GivesUp, Message, MigrationEvent, Outcome, Stays
from sami_plugin.model.packet import Packet
from sami_plugin.model.report import Report
from sami_plugin.model.risk import Risk
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings
from sami_plugin.notifications import Notifications, ended
from sami_plugin.peers import Peers
from sami_plugin.policies.chosen import Policies
from sami_plugin.refusals import Refusals
from sami_plugin.scopes.base import ScopeFinder
from sami_plugin.transport.rpc import MORE_THREADS

LOG = logging.getLogger(__name__)


class Port(Protocol):
    """What a session keeps of one port of its guest."""

    @property
    def scope(self) -> Scope:
        """Where the port has its state here."""


PortT = TypeVar("PortT", bound=Port)
scope_of: Callable[[Port], Scope] = operator.attrgetter("scope")

BULK = (ExportNext, ExportChanges, Resync)
"""Actions that send much: the next of them waits until the sender has room."""

PUT_IN_SECONDS = 10.0
"""For so long a session waits at most until others have put in what they are putting in, to know what room is left."""

ROUTINE = frozenset((*BULK, CallAgain, WakeAt, FindScope, Import, Verify, Renew))
"""Actions that may be decided upon many times a second."""

USUAL = frozenset((TimePassed, Done, Flows, FlowChanges))
"""What happens and is said that often."""


Actions = Mapping[type[Action], Callable[[Any], Done | Negotiated | None]]
"""How each action is done."""


@dataclass(slots=True)
class Host:
    """What all sessions of this host share."""

    name: str
    settings: Settings
    driver: FlowDriver
    scopes: ScopeFinder
    journal: Journal
    peers: Peers
    refusals: Refusals
    policies: Policies = field(default_factory=Policies)
    notifications: Notifications = field(default_factory=Notifications)
    leaving: Claims = field(default_factory=Claims)
    arriving: Claims = field(default_factory=Claims)
    arriving_guests: dict[str, str] = field(default_factory=dict)
    """By session, guests that are being received and do not run here yet."""
    is_here: Callable[[str], bool | None] = lambda guest: False
    """Whether a guest that had left is here again, of which no agent here was told; None: nobody knows."""
    arrived_guests: set[str] = field(default_factory=set)
    """Guests that were received and have run here since."""
    gone: dict[str, Addresses] = field(default_factory=dict)
    """By session, of guests that have left and whose flows were purged, where their flows ended."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    _turns: threading.Lock = field(default_factory=threading.Lock)
    _promising: threading.Condition = field(default_factory=threading.Condition)
    _removing: list[str] = field(default_factory=list)
    """Guests of which something is being removed: nothing of them is put in."""
    _received: dict[str, str] = field(default_factory=dict)
    """By guest that is received, the session that puts in its flows; empty when it has come."""
    _places: Places = field(init=False)

    def __post_init__(self) -> None:
        # One for all namespaces: where a guest's ports will be may be known only when its places are promised already.
        self._places = Places(self.settings.headroom_percent)

    # What a simulated host has otherwise: time, chance, threads and the network.

    def monotonic(self) -> float:
        """Seconds, of which only the difference counts."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def new_id(self) -> str:
        """A UUID for a session."""
        return str(uuid.uuid4())

    def run(self, session: Session) -> None:
        """Lets the session live; returns at once."""
        name = f"sami-{session.role}-{session.id[:8]}"
        thread = threading.Thread(target=session.live, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there are as many as the system allows
            session.fail(f"{error}: {MORE_THREADS}")
        else:
            session.thread = thread

    def looker(self, session: str) -> Executor:
        """Where the session looks at the device while it does something else."""
        return ThreadPoolExecutor(1, thread_name_prefix=f"sami-look-{session[:8]}")

    def line(self, session: str, *, caller: str = "") -> Line:
        """A new one for this session; see Line."""
        return Line(self.peers, self.settings, session, caller=caller)

    # What sessions share.

    def risk(
        self, demand: Demand, session: str, guest: str, source: str, *, there: int = 0, is_kept: bool = True
    ) -> Risk:
        """What would be lost if these flows came from that host. The places that they need are kept for the session.

        `there` is how many of them it finds in the device already, from another session with which it goes on.

        :raises SamiError: this host's firewall does not say.
        """
        scope = Scope("", guest, {}, (), namespace=self._namespace)
        can, domain = self.driver.capabilities(scope), self.peers.way_to(source).domain

        def promise(wanted: int) -> int:
            new = max(0, wanted - there)
            with self._counted(session, new, scope) as look:
                granted = self._places.promise(session, new, look)
                if not is_kept:
                    self._places.lapse(session)
                return wanted - new + granted

        found = weigh(
            demand,
            declared=can.templates,
            admitted=(lambda kind: True) if domain is None else domain.takes,
            functions=can.functions,
            promise=promise,
        )
        return Risk(guest, source, self.name, demand.flows, found.kinds, found.places, found.losses, found.degraded)

    def places_left(self, session: str) -> int:
        """What the session was promised and has not put in yet."""
        with self._promising:
            return self._places.left(session)

    def take_places(self, session: str, scope: Scope, wanted: int) -> int:
        """How many new entries of `wanted` the session may put into the scope's device now; see Places."""
        with self._counted(session, wanted, scope) as look:
            return self._places.take(session, wanted, look)

    @contextmanager
    def _counted(self, session: str, wanted: int, scope: Scope) -> Iterator[Look]:
        """What the device tells while nobody else takes or is promised any place; it is asked only if need be.

        Where it makes a difference, that is once nothing is counted twice that others are putting in.
        """
        told: list[Capabilities] = []

        def look() -> tuple[int | None, int]:
            if not told:
                told.append(self.driver.capabilities(scope))
            return told[0].capacity, told[0].in_use

        def is_known() -> bool:
            told.clear()
            return not self._places.needs_to_wait(session, wanted, look)

        with self._promising:
            self._promising.wait_for(is_known, PUT_IN_SECONDS)
            yield look

    def lapse_places(self, session: str) -> int:
        """No more places are kept for the session; how many it had that it has put nothing in."""
        with self._promising:
            left = self._places.left(session)
            self._places.lapse(session)
            return left

    @property
    def _namespace(self) -> str | None:
        """Where a guest's ports will be, as far as one can know: the only one where this host's ports are, or ours."""
        namespaces = self.scopes.namespaces()
        return namespaces[0] if len(namespaces) == 1 else None

    def used_places(self, session: str) -> None:
        """What it took is in the device, or will never be."""
        with self._promising:
            self._places.used(session)
            self._promising.notify_all()

    def release_places(self, session: str) -> None:
        """It will put in nothing more."""
        with self._promising:
            self._places.release(session)
            self._promising.notify_all()

    def deciding(self, scope: Scope) -> AbstractContextManager[object]:
        """Held from deciding whose an entry of the scope is to removing it. In a zone of its own nobody else asks."""
        return self.lock if scope.is_shared else nullcontext()

    # A guest may come, or come back, while what it left here is being purged, or what was put in for it when it did not
    # come is being discarded. A kernel gives ids again, so that even by id the removal could hit what comes with it:
    # either it is over before anything is put in, or it does not begin.

    @contextmanager
    def purging(self, guest: str, *, has_names: bool) -> Iterator[bool]:
        """Whether the guest's old flows may be removed: nothing of it is put in here until the block ends.

        `has_names`: only those that were exported. For others it has to be known that the guest is not here.
        """
        with self._removing_unless(guest, lambda: guest in self._received) as is_allowed:
            yield is_allowed and self.is_here(guest) in ((False, None) if has_names else (False,))

    @contextmanager
    def discarding(self, guest: str, session: str) -> Iterator[bool]:
        """Whether what this session put in may be removed: the guest is not here, and no other session puts it in.

        When it is removed, nothing of the guest is here but what it left, which may be purged.
        """
        with self._removing_unless(guest, lambda: self._received.get(guest, session) != session) as is_allowed:
            yield is_allowed
        with self._turns:
            if self._received.get(guest) == session:
                del self._received[guest]

    @contextmanager
    def _removing_unless(self, guest: str, is_forbidden: Callable[[], bool]) -> Iterator[bool]:
        with self._turns:
            if is_allowed := not is_forbidden():
                self._removing.append(guest)
        try:
            yield is_allowed
        finally:
            if is_allowed:
                with self._turns:
                    self._removing.remove(guest)

    def may_put_in(self, guest: str, session: str) -> bool:
        """Whether no old flows of the guest are being removed. Then no purge begins until the guest leaves again."""
        with self._turns:
            if guest in self._removing:
                return False
            self._received[guest] = session
            return True

    def take_over(self, guest: str, former: str, session: str) -> None:
        """What one session may put in, and discard, another one may from now on."""
        with self._turns:
            if self._received.get(guest) == former:
                self._received[guest] = session

    def has_come(self, guest: str) -> None:
        """What the guest has here now is its own, and no more what it left here before, or what was put in for it."""
        with self._turns:
            self._received[guest] = ""

    def leaves(self, guest: str) -> None:
        """What the guest has here now is what it leaves, and is purged when it has left."""
        with self._turns:
            self._received.pop(guest, None)


class Session(abc.ABC):
    """Runs one session in a thread of its own. Subclasses know how to decide and how to act."""

    role: ClassVar[str]

    def __init__(
        self,
        host: Host,
        session: str,
        guest: str,
        peer: str,
        ended: Callable[[Session], None],
        line: Line | None = None,
    ) -> None:
        """`line` is the one on which the peer has called; without it this end is to call."""
        self.host = host
        self.id = session
        self.known_as = session
        """The id by which the other host knows this session: that of the first one, where another goes on with it."""
        self.guest = guest
        self.peer = peer
        self.destination = ""
        """Where the guest goes to, as far as this host's hypervisor has said."""
        self.token = ""
        """What the guest's description says: see Origin."""
        self.report = Report(session, guest, self.role, host.name, peer or "not known")
        self._ended = ended
        self._former: Former | None = None
        self._next: Session | None = None
        """Who goes on with this session one day."""
        self._successor: Session | None = None
        """Who does so now."""
        self._handing_over = threading.Lock()
        self._state_before = ""
        """The state in which the last event came."""
        self._heard_of: set[str] = set()
        """What has happened so far, in the journal's words."""
        self._noted: object = None
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._finished: deque[Done | Negotiated | ActionFailed] = deque()
        self.wake_at: float | None = None
        self._had_its_time = False
        """The last event was that time had passed."""
        self.line = line or host.line(session)
        self.line.lost = lambda reason: self._events.put(PeerLost(reason))
        self._hearing = threading.Lock()
        self._kept: deque[int] = deque()
        """The sizes of the peer's messages that are in the queue."""
        self._decisions = 0
        self._payloads = 0
        self.is_over = False
        self._journal_works = True
        self.has_verdict = threading.Event()
        """Set when the policy has spoken, and at the session's end."""
        self.has_caught_up = threading.Event()
        """Set when all that the peer had at first is in the device here, or will not be, and at the session's end."""
        self.thread: threading.Thread | None = None

    # From any thread.

    def tell(self, event: MigrationEvent) -> None:
        """This host's hypervisor said something of the guest."""
        with self._handing_over:
            if self._successor is None:
                LOG.debug("%s: %s on %s", self.id, event.phase.value, self.host.name)
                self._note_phase(event)
                self._events.put(GuestDid(event))
                return
        self._successor.tell(event)

    def deliver(self, packet: Packet) -> None:
        """A packet of the peer, in any order.

        :raises Busy: this session has not yet handled what came before; nothing was taken.
        :raises RepresentationError: it held no message; the session is over for the peer.
        :raises PeerError: as `Line.take`.
        """
        with self._hearing:
            if sum(self._kept) > self.host.settings.bounds.session_octets:
                raise Busy(f"session {self.id} has more to do than it can keep")
            for message in self.line.take(packet):
                self._hear(message)

    def hear(self, said: Iterable[bytes]) -> None:
        """Messages that came before the session was there."""
        with self._hearing:
            for message in said:
                self._hear(message)

    def _hear(self, octets: bytes) -> None:
        try:
            said = PeerSaid(messages.decode(octets))
        except RepresentationError as error:
            self._events.put(PeerLost(f"{self.peer} said what is no message: {error}"))
            raise
        self._kept.append(len(octets))
        self._events.put(said)

    def supersede(self) -> None:
        """Another migration of the guest has begun here."""
        self._events.put(Superseded())

    def continue_with(self, successor: Session) -> None:
        """The other host goes on with another session, which has not begun. It begins when it has all of this one."""
        with self._handing_over:
            is_over, before = self.is_over, self._next
            if not is_over and before is None:
                self._next = successor
                self._events.put(Continued())
        if is_over:
            successor.fail(f"session {self.id} has ended before another one could go on with it")
        elif before is not None:  # nor has that one begun
            before.continue_with(successor)

    def find(self, source: str) -> None:
        """It is known now which host the guest leaves."""
        self._events.put(Found(source))

    def refuse(self, reason: str) -> None:
        """The peer has no business here."""
        self._events.put(PeerLost(reason))

    def approve(self, *, may_come: bool) -> None:
        """The operator was asked, and has spoken."""
        with self._handing_over:
            if self._successor is None:
                self._events.put(OperatorSaid(may_come))
                return
        self._successor.approve(may_come=may_come)

    def let_go(self) -> None:
        """The migration waits for this session's verdict no longer: unless it was refused before, the guest comes."""
        with self._handing_over:
            if self._successor is None:
                self._may_not_refuse()
                self._events.put(LetGo())
                return
        self._successor.let_go()

    def expect_return(self) -> None:
        """The guest is about to come to this host."""
        self.host.gone.pop(self.id, None)
        self._events.put(Returns())

    def stop(self) -> None:
        """Ends the thread; what the session was about is left as it is. Waits for the action under way."""
        self._events.put(None)
        if self.thread is not None:
            self.thread.join()
        self.line.close()
        self._close()

    def enter(self) -> None:
        """Into the journal, where a later start finds it: before it lives, and before the peer hears that it does."""
        if self._former is not None:  # it is there as the one that goes on
            return
        self._noted = self._knowledge()
        self.write(
            self.host.journal.begin,
            self.guest,
            self.role,
            self.peer,
            self._state(),
            ports=[scope.as_dict() for scope in self._scopes_known()],
            destination=self.destination,
            token=self.token,
        )

    # In the session's own thread.

    def live(self) -> None:
        """All that happens to the session, until it is over."""
        try:
            self.begin()
            while not self.is_over:
                event = self.next_event()
                if event is None:
                    return
                self.handle(event)
        except Exception as error:  # the session boundary: our own mistake, or a device at the very beginning
            LOG.exception("%s: the session failed", self.id)
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, reason: str) -> None:
        """Ends the session whatever works and what not: nobody may wait for it, and nobody find it.

        By another thread only where it has none of its own and never will.
        """
        try:
            self._say(GivesUp(reason))
            self._end(Outcome.FAILED, reason)
        except Exception:
            LOG.exception("%s: the session could not be ended in order", self.id)
        finally:
            if not self.is_over:
                self._leave()

    def begin(self) -> None:
        """First of all."""
        self._begin()
        self.note_knowledge()

    def take_over(self, former: Former) -> None:
        """This session goes on with another one. Called before it begins; the journal has it by then."""
        self._former = former
        self.report.remark(f"it goes on with session {former.session}")
        self._heard_of |= former.heard
        self._payloads = former.payloads
        self.destination, self.token = former.destination, former.token

    def next_event(self, *, waits: bool = True) -> Event | None:
        """What happens next; None where it has been stopped, or where nothing has happened and nobody waits for it."""
        if self._finished:
            return self._finished.popleft()
        wait = None if self.wake_at is None else self.wake_at - self.host.monotonic()
        is_due = wait is not None and wait <= 0
        # In turns: a peer that never stops speaking does not put off what has its time, and what takes longer than the
        # time until it is due again, as a slow scope finder does, keeps nobody from being heard.
        if not is_due or self._had_its_time:
            self._had_its_time = False
            try:
                return self._events.get(waits and not is_due, wait)
            except queue.Empty:
                if not waits and not is_due:
                    return None
        self._had_its_time = True
        self.wake_at = None
        return TimePassed()

    def handle(self, event: Event) -> None:
        """Decides, records and does what there is to do about it."""
        try:
            self._decide(event)
        except IllegalMessage as error:
            LOG.warning("%s: %s said: %s", self.id, self.peer, error)
            self.report.remark(f"refused: {error}")
        if isinstance(event, PeerSaid):
            with self._hearing:
                self._kept.popleft()

    def _decide(self, event: Event) -> None:
        before = self._state_before = self._state()
        label, kind = _label(event), type(event)
        is_news = kind is GuestDid and label not in self._heard_of  # who is started anew has to know it
        if kind in (GuestDid, PeerSaid):
            self._heard_of.add(label)
        actions = self._step(event, self.host.monotonic())
        has_moved = (after := self._state()) != before
        if has_moved:
            LOG.info("%s: guest %s: %s -> %s (%s)", self.id, self.guest, before, after, label)
        if is_news or has_moved or (actions and not _is_routine(event, actions)):
            self._enact(label, actions)
        else:
            self._do(actions)
        if actions:
            self.note_knowledge()

    def note_knowledge(self) -> None:
        """What a later start needs to know besides decisions and flows goes into the journal when it has changed."""
        known = self._knowledge()
        if known == self._noted or not self._journal_works:
            return
        self._noted = known
        ports = [scope.as_dict() for scope in known[-1]]
        self.write(self.host.journal.know, peer=self.peer, ports=ports, destination=self.destination, token=self.token)

    def _knowledge(self) -> tuple[str, str, str, tuple[Scope, ...]]:
        return self.peer, self.destination, self.token, self._scopes_known()

    def _enact(self, label: str, actions: list[Action]) -> None:
        """Records a decision, then does it."""
        self._record(label, actions)
        self._do(actions)

    def _do(self, actions: list[Action]) -> None:
        """All of it, in order, up to what fails."""
        for action in actions:
            if not self._act_safely(action):
                break

    def _record(self, label: str, actions: list[Action]) -> None:
        if not self._journal_works:
            return
        is_durable = any(
            isinstance(action, Purge) or (isinstance(action, Say) and action.is_durable) for action in actions
        )
        self._decisions += 1
        labels = [_label(one) for one in actions]
        self.write(self.host.journal.record, self._decisions, label, self._state(), labels, is_durable=is_durable)

    def write(self, row: Callable[..., None], *what: Any, **named: Any) -> None:
        """Into the journal, of this session. Where that does not work it is lost."""
        try:
            row(self.id, *what, **named)
        except JournalError as error:
            self.lose_journal(error)

    def lose_journal(self, error: JournalError) -> None:
        """The migration goes on, but nothing is purged: after a restart nobody could finish it."""
        LOG.error("%s: %s; flows are carried, nothing is purged", self.id, error)
        self.report.remark(str(error))
        self._journal_works = False

    def _act_safely(self, action: Action) -> bool:
        """Whether the actions behind this one may follow. The one broad catch: a failure ends this session alone."""
        try:
            if not self._journal_works and isinstance(action, Purge | PurgeLate):
                raise JournalError(
                    "the journal does not work, so nothing is purged; mend it and remove the flows by hand"
                )
            done = self._act(action)
        except SamiError as error:
            LOG.error("%s: %s: %s", self.id, type(action).__name__, error)
            self._could_not(action, str(error))
            return False
        except Exception as error:
            LOG.exception("%s: %s failed", self.id, type(action).__name__)
            self._could_not(action, f"{type(error).__name__}: {error}")
            return False
        if done is not None:
            # Most is decided upon at once. What is only a part of a whole, and what sends much, goes behind what
            # happened meanwhile: neither the guest's pause nor an abort waits for it.
            if isinstance(done, Negotiated):
                self._finished.append(done)
            elif isinstance(action, BULK):
                self.line.when_there_is_room(lambda: self._events.put(done))
            elif done.is_all:
                self._finished.append(done)
            else:
                self._events.put(done)
        return True

    def _could_not(self, action: Action, reason: str) -> None:
        if isinstance(action, HandOver) and self._successor is not None:
            self._leave()  # the other session has all
        elif not isinstance(action, End):
            self._finished.append(ActionFailed(type(action).__name__, reason))
        elif not self.is_over:
            self.fail(reason)

    def _act(self, action: Action) -> Done | Negotiated | None:
        match action:
            case Say(message=message):
                self._say(message)
            case WakeAt(when=when):
                self.wake_at = when
            case End(outcome=outcome, reason=reason):
                self._end(outcome, reason)
            case HandOver():
                self._hand_over()
            case _:
                return self._actions[type(action)](action)
        return None

    @property
    def newest(self) -> Session:
        """This session, or the last one of those that have gone on with it."""
        with self._handing_over:
            successor = self._successor
        return self if successor is None else successor.newest

    @property
    def _domain(self) -> Domain | None:
        """The peer's, where it is not this host's own."""
        return self.host.peers.way_to(self.peer).domain

    def _say(self, message: Message) -> None:
        if not self.peer:  # nobody was found yet, or nobody asked
            return
        self.line.peer = self.peer
        self.line.say(messages.encode(message), is_last_word=isinstance(message, GivesUp | Stays))

    def _end(self, outcome: Outcome, reason: str) -> None:
        self._close()
        self.note("ended")
        self.report.outcome, self.report.reason = outcome.value, reason
        self.report.flows = self._counts()
        log = LOG.info if outcome in (Outcome.MOVED, Outcome.STAYED) else LOG.warning
        log("%s: guest %s: %s %s %s", self.id, self.guest, outcome.value, reason, self.report.flows)
        is_late = outcome is Outcome.LEFT_WITHOUT_ARRIVAL  # who comes late may still want them
        self.write(  # also where it has failed before: what is over is not to be gone on with
            self.host.journal.end,
            self._state(),
            outcome.value,
            self.report.as_dict(),
            keep_payloads_seconds=self.host.settings.late_import_seconds if is_late else 0.0,
        )
        self._leave()

    def _hand_over(self) -> None:
        """Another session goes on from here, with the flows, the journal's rows, and the words that are to come."""
        successor = self._next = self._next or self._made_successor()
        self.note("ended")
        self.report.outcome, self.report.reason = self._continued_as().value, f"session {successor.id} goes on with it"
        if why := self._why_given_up():
            self.report.reason += f", which was given up: {why}"
        former = self._as_former()
        LOG.info("%s: guest %s: %s", self.id, self.guest, self.report.reason)
        go_on(successor, former, self.report.as_dict())
        if not self._journal_works:  # it has nothing to go on with, or not all of it
            successor.lose_journal(JournalError(f"the journal did not work in session {self.id}"))
        with self._handing_over:
            self._successor = successor
            while True:
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    break
                match event:
                    case GuestDid(event=told):
                        successor.tell(told)
                    case LetGo():
                        successor.let_go()
                    case OperatorSaid(may_come=may_come):
                        successor.approve(may_come=may_come)
                    case Superseded():
                        successor.supersede()
                    case Returns():
                        successor.expect_return()
        self.host.run(successor)
        self._close()
        self._leave()

    def _as_former(self) -> Former:
        """What another session needs to go on with this one."""
        ports = self._flows_by_port()  # first: what it notes for that is a payload too, and may be a finding
        self.report.flows = self._counts()
        return Former(
            self.id,
            self.known_as,
            self.guest,
            self.role,
            self.peer,
            self._state_before,
            self.destination,
            self.token,
            self._payloads,
            frozenset(self._heard_of),
            ports,
            self.report.named,
        )

    def _leave(self) -> None:
        """Nobody waits for the session any more, and nobody finds it."""
        with self._handing_over:
            self.is_over = True
            abandoned = self._next if self._successor is None else None
        self.host.notifications.tell(ended, self.report, self.host.wall())
        self.line.finish()
        self.has_verdict.set()
        self.has_caught_up.set()
        self._ended(self)
        if abandoned is not None:
            abandoned.fail(f"session {self.id} has ended before another one could go on with it")

    def _of_each(self, ports: Iterable[PortT], act: Callable[[PortT], object]) -> None:
        """For each of them that is still here, also where it fails for one.

        :raises SamiError: the first failure.
        """
        failures = []
        for port in ports:
            try:
                with self._unless_gone(port.scope):
                    act(port)
            except SamiError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    @contextmanager
    def _unless_gone(self, scope: Scope) -> Iterator[None]:
        """What a router tracked has gone with it, or is emptied by who has it: there is nothing of the guest's left."""
        try:
            yield
        except NotAvailable as error:  # or nobody can be asked for a moment
            has_left = scope.namespace is not None and not Path(scope.namespace).exists()
            if not isinstance(error, HasGone) and not has_left:
                raise
            self.report.remark(f"{scope.port} is not here any more: {error}")

    def note(self, step: str) -> None:
        """Puts a step on the report's time line."""
        self.report.step(step, self.host.wall(), self.host.monotonic())

    def keep_payload(self, payload: bytes) -> None:
        """Journals flows before they are sent or imported."""
        self._payloads += 1
        if self._journal_works:
            self.write(self.host.journal.keep_payload, self._payloads, payload)

    def _named_so_far(self) -> dict[str, Any]:
        """What the report would say of flows that were not carried as they were sent, if the session ended now."""
        named = {reason: {**entry, "flows": [*entry["flows"]]} for reason, entry in self.report.named.items()}
        told = Report(self.id, self.guest, self.role, self.host.name, self.peer, named=named)
        self._name_in(told)
        return told.named

    # What a role adds.

    @abc.abstractmethod
    def _state(self) -> str:
        """The state's name, for the journal and the log."""

    @abc.abstractmethod
    def _why_given_up(self) -> str:
        """Why nothing is carried, or not any more; empty where something is."""

    @abc.abstractmethod
    def _begin(self) -> None:
        """What the session does before anything happens to it."""

    @abc.abstractmethod
    def _step(self, event: Event, now: float) -> list[Action]:
        """Asks the role's decision and keeps what is known now."""

    @functools.cached_property
    @abc.abstractmethod
    def _actions(self) -> Actions:
        """How each of the role's actions is done."""

    @abc.abstractmethod
    def _note_phase(self, event: MigrationEvent) -> None:
        """Puts the hypervisor's word on the time line, at once."""

    @abc.abstractmethod
    def _may_not_refuse(self) -> None:
        """From now on. In any thread."""

    @abc.abstractmethod
    def _name_in(self, report: Report) -> None:
        """Names flows that the session keeps apart until it ends."""

    @abc.abstractmethod
    def _counts(self) -> dict[str, int]:
        """The report's figures. What is to be named is."""

    @abc.abstractmethod
    def _flows_by_port(self) -> tuple[FormerPort, ...]:
        """What another session needs to know of flows to go on with this one."""

    @abc.abstractmethod
    def _made_successor(self) -> Session:
        """The one that goes on where the other host has made none."""

    def _continued_as(self) -> Outcome:
        """What the report says of a session with which another goes on."""
        return Outcome.CONTINUED

    @abc.abstractmethod
    def _scopes_known(self) -> tuple[Scope, ...]:
        """Where the guest's ports have their state here, as far as it is known."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Closes what the session holds open. May be repeated."""


def go_on(successor: Session, former: Former, report: dict[str, Any]) -> None:
    """Lets a session that has not begun take over a former one, whose report this is."""
    successor.take_over(former)
    row = functools.partial(successor.host.journal.go_on, former.session)
    successor.write(row, successor.known_as, former.state, former.heard, report)


def _is_routine(event: Event, actions: list[Action]) -> bool:
    """Whether this happens again and again and needs no row in the journal; flows are kept there by themselves."""
    said = type(event.message) if isinstance(event, PeerSaid) else type(event)
    return said in USUAL and ROUTINE.issuperset(map(type, actions))


def _label(item: Event | Action) -> str:
    """A short name for the journal; what flows there are is in the payloads."""
    label = _LABELS.get(type(item))
    return type(item).__name__ if label is None else label(item)


_LABELS: Mapping[type, Callable[[Any], str]] = {
    GuestDid: lambda did: f"guest {did.event.phase.value}",
    PeerSaid: lambda said: f"peer said {type(said.message).__name__}",
    Say: lambda say: f"say {type(say.message).__name__}",
    Done: lambda done: f"{done.what} done ({done.count})",
    ActionFailed: lambda failed: f"{failed.what} failed: {failed.reason}",
    PeerLost: lambda lost: f"peer lost: {lost.reason}",
    Found: lambda found: f"found: {found.source}",
    Negotiated: lambda one: f"verdict: {one.verdict.value}: {one.reason}",
    OperatorSaid: lambda said: f"operator said: {'approve' if said.may_come else 'refuse'}",
    End: lambda end: f"end: {end.outcome.value}",
}
