"""The agent of one host: builds everything, owns the threads, and leads each word to its session."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from oslo_config import cfg
from stevedore import driver as stevedore_driver
from stevedore.exception import NoMatches

from sami_plugin import conf as options
from sami_plugin.codec import messages
from sami_plugin.drivers import loader
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.errors import (
    ConfigurationError,
    IllegalMessage,
    NotAuthorised,
    NotAvailable,
    OperatorError,
    RepresentationError,
)
from sami_plugin.handover import DestinationSession, SourceSession
from sami_plugin.hooks import domain_xml
from sami_plugin.hooks.libvirt_events import LibvirtHost
from sami_plugin.hooks.local_socket import LocalSocket
from sami_plugin.journal.journal import Journal
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.migration import MigrationEvent, Open, Outcome, Phase
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings
from sami_plugin.scopes.base import ScopeFinder
from sami_plugin.session import Host, Session
from sami_plugin.transport.rpc import Transport

LOG = logging.getLogger(__name__)

ENDED_REMEMBERED = 1024
"""Sessions of which a late or repeated message is still taken, and dropped, after their end."""


SessionT = TypeVar("SessionT", bound=Session)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A guest that a job of this host moves away, whether the other host has asked for its flows or not."""

    destination: str | None
    """Where to, if the hypervisor said so."""
    is_suspended: bool = False
    scopes: tuple[Scope, ...] = ()
    """Its ports, where no session knows them."""


class Hypervisor(Protocol):
    """What an agent asks of its host's hypervisor. Both may be called from any thread and block for a moment only."""

    def is_leaving(self, guest: str) -> bool:
        """Whether the guest is in a job that moves it away."""

    def ports(self, guest: str) -> tuple[GuestPort, ...]:
        """The guest's ports, none where it is not there."""


class Agent:
    """Sessions by id and by guest. Its methods may be called from any thread."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        *,
        name: str,
        driver: FlowDriver,
        scopes: ScopeFinder,
        journal: Journal,
        settings: Settings,
        transport_url: str | None = None,
        hypervisor: Hypervisor | None = None,
    ) -> None:
        """:raises ConfigurationError: the broker is not one that this version may use."""
        transport = Transport(conf, name, self, transport_url)
        self.host = Host(name, settings, driver, scopes, journal, transport)
        self._hypervisor = hypervisor
        self._sessions: dict[str, Session] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._outgoing: dict[str, _Outgoing] = {}
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)

    def start(self) -> None:
        """:raises SamiError: the firewall or the broker cannot be used; better now than at the first migration."""
        self.host.driver.capabilities()
        for namespace in self.host.scopes.namespaces():
            try:
                self.host.driver.attend(namespace)
            except NotAvailable as error:  # of one that comes later, the first guest to leave is told by exports
                LOG.warning("%s: %s", self.host.name, error)
        self.host.transport.start()
        LOG.info("%s: agent is running, driver %s", self.host.name, type(self.host.driver).__name__)

    def stop(self) -> None:
        """Ends all threads. Sessions under way are left as they are; the journal has them."""
        self.host.transport.stop()
        for session in self.sessions():
            session.stop()

    def tell(self, event: MigrationEvent) -> None:
        """As `note`, and waits where the teller can hold the migration up for a while.

        `prepare` waits up to `verdict_seconds` for the source's answer, so that the guest does not leave before its
        flows begin to; `started` up to `started_seconds` until all that the source had at first is in the firewall, or
        until what the guest left here before is gone.

        :raises OperatorError: something is missing in what was said.
        """
        self.note(event)
        settings = self.host.settings
        session: Session | None = next(iter(self._sessions_of(event.guest, DestinationSession)), None)
        if session is None and event.phase is Phase.STARTED:
            session = next((one for one in self._sessions_of(event.guest, SourceSession) if one.has_left), None)
        if session is None:
            return
        if event.phase is Phase.PREPARE and not session.has_answer.wait(settings.verdict_seconds):
            LOG.warning("%s: the source has not answered yet; the migration goes on", session.id)
        if event.phase is Phase.STARTED and not session.has_caught_up.wait(settings.started_seconds):
            LOG.warning("%s: not all is done yet; the guest goes on", session.id)

    def note(self, event: MigrationEvent) -> None:
        """This host's hypervisor said something of a guest. The same may be said twice. Returns at once.

        :raises OperatorError: something is missing in what was said.
        """
        if event.domain is not None:
            self._learn(event.guest, event.domain)
        match event.phase:
            case Phase.PREPARE:
                self._expect(event)
            case Phase.STARTED:
                # Without a hook this is the first word. It may also be a late one, of a session that is well under way.
                if not self._sessions_of(event.guest, DestinationSession):
                    if event.is_incoming:
                        self._learn_ports(event.guest)
                        self._expect(event)
                    else:  # it starts here: what it left before has to be gone before it speaks
                        for leaving in self._sessions_of(event.guest, SourceSession):
                            leaving.expect_return()
                self._lead(event, DestinationSession)
            case Phase.OUTGOING:
                self._note_outgoing(event.guest, event.destination)
                self._lead(event, SourceSession)
            case Phase.SUSPENDED:
                self._pauses(event)
            case Phase.RESUMED:
                with self._lock:
                    if event.guest in self._outgoing and self._outgoing[event.guest].is_suspended:
                        del self._outgoing[event.guest]
                self._lead(event, SourceSession, DestinationSession)
            case Phase.ROLLBACK:
                with self._lock:
                    self._outgoing.pop(event.guest, None)
                self._lead(event, SourceSession)
            case Phase.STOPPED:
                self._stops(event)

    def _learn(self, guest: str, domain: str) -> None:
        try:
            self.host.scopes.learn(guest, domain_xml.ports_of(domain))
        except RepresentationError as error:  # the migration is known all the same
            LOG.warning("guest %s: its ports are not known: %s", guest, error)

    def _note_outgoing(self, guest: str, destination: str | None = None) -> None:
        with self._lock:
            if destination is not None or guest not in self._outgoing:
                self._outgoing[guest] = _Outgoing(destination)
        self._learn_ports(guest)

    def _learn_ports(self, guest: str) -> None:
        """Asks the hypervisor, where there is one; a guest that it cannot say anything of is not forgotten."""
        ports = () if self._hypervisor is None else self._hypervisor.ports(guest)
        if ports:
            self.host.scopes.learn(guest, ports)

    def _pauses(self, event: MigrationEvent) -> None:
        """Where no session knows of the guest, its ports are noted now: when it is gone, so are they."""
        if event.guest not in self._outgoing:
            self._note_outgoing(event.guest)
            self._lead(replace(event, phase=Phase.OUTGOING), SourceSession)
        with self._lock:  # a session that begins from here on knows of the pause
            if event.guest in self._outgoing:
                self._outgoing[event.guest] = replace(self._outgoing[event.guest], is_suspended=True)
            self._lead(event, SourceSession)
        if self._sessions_of(event.guest, SourceSession):
            return
        scopes = self.host.scopes.find(event.guest)
        with self._lock:
            if event.guest in self._outgoing:
                self._outgoing[event.guest] = replace(self._outgoing[event.guest], scopes=scopes)

    def _stops(self, event: MigrationEvent) -> None:
        with self._lock:
            outgoing = self._outgoing.pop(event.guest, None)
            if outgoing is not None and outgoing.scopes and not self._sessions_of(event.guest, SourceSession):
                LOG.warning("guest %s left, and no agent at its destination asked for its flows", event.guest)
                self._add(self._leaving(str(uuid.uuid4()), event.guest, "", outgoing))
        self._lead(event, SourceSession, DestinationSession)
        if not any(session.guest == event.guest for session in self.sessions()):
            self.host.scopes.learn(event.guest, ())  # it ended here, and its tap's name may be another guest's next

    def deliver(self, sender: str, session_id: str, number: int, octets: bytes) -> None:
        """A peer's message.

        :raises NotAuthorised: the session is another host's.
        :raises IllegalMessage, RepresentationError: it is not one that may come now.
        """
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None and session_id in self._ended:
                return
        if session is None:
            session = self._open(sender, session_id, number, octets)
        if session.peer != sender:
            raise NotAuthorised(f"session {session_id} is not with {sender}")
        session.deliver(number, octets)

    def sessions(self) -> list[Session]:
        """Those under way, oldest first."""
        with self._lock:
            return list(self._sessions.values())

    def underway(self) -> list[tuple[str, str]]:
        """The guests that are on their way, and this host's role in it; of one that comes back, only that it comes."""
        roles = {session.guest: session.role for session in self.sessions() if session.role == "source"}
        return list({**roles, **{one.guest: one.role for one in self.sessions() if one.role == "destination"}}.items())

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Whether all sessions ended within the time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._sessions, timeout_seconds)

    def asked(self, sender: str, session: str, guest: str) -> None:
        """Another host awaits a guest and asks which one it leaves. Only who is about to lose it answers.

        :raises PeerUnreachable: the answer cannot be sent.
        """
        if sender != self.host.name and _is_uuid(guest) and self._is_leaving(str(uuid.UUID(guest)), sender):
            LOG.info("guest %s leaves this host, as %s asked", guest, sender)
            self.host.transport.tell_found(sender, session)

    def found(self, sender: str, session: str) -> None:
        """The answer to such a question of ours."""
        with self._lock:
            asking = self._sessions.get(session)
        if isinstance(asking, DestinationSession):
            asking.find(sender)

    def _is_leaving(self, guest: str, destination: str) -> bool:
        """Whether this host's hypervisor has the guest in a job that moves it there, as far as it says where to."""
        # Of a guest that comes here a hypervisor is not asked: it may answer only when its hooks have returned.
        is_coming = any(one.is_awaited for one in self._sessions_of(guest, DestinationSession))
        if self._hypervisor is not None and not is_coming:
            if not self._hypervisor.is_leaving(guest):
                return False
            self._note_outgoing(guest)
        with self._lock:
            outgoing = self._outgoing.get(guest)
        return outgoing is not None and outgoing.destination in (None, destination)

    def _expect(self, event: MigrationEvent) -> None:
        if event.source is None and self._hypervisor is None:
            raise OperatorError("source: has to be told with `prepare`, since no hypervisor is there to be asked")
        if event.source == self.host.name:
            raise OperatorError(f"source: a guest does not move from {event.source} to itself")
        source = event.source or ""
        with self._lock:  # the hook and Nova may say it at the same time
            session = next(iter(self._sessions_of(event.guest, DestinationSession)), None)
            if session is None or not session.is_about(source):
                for leaving in self._sessions_of(event.guest, SourceSession):
                    leaving.expect_return()
                self._add(DestinationSession(self.host, str(uuid.uuid4()), event.guest, source, self._forget))
            elif source:
                session.find(source)

    def _open(self, sender: str, session_id: str, number: int, octets: bytes) -> Session:
        said = messages.decode(octets)
        if number != 0 or not isinstance(said, Open):
            raise IllegalMessage(f"there is no session {session_id[:40]} here; it begins with message 0, Open")
        if said.destination != sender:
            raise NotAuthorised(f"{sender} may not speak for {said.destination}")
        if not (_is_uuid(session_id) and _is_uuid(said.guest)):
            raise IllegalMessage("session and guest are UUIDs")
        guest = str(uuid.UUID(said.guest))
        is_leaving = self._is_leaving(guest, sender)
        with self._lock:
            outgoing = self._outgoing.get(guest)
            if outgoing is not None and outgoing.destination not in (None, sender):
                raise NotAuthorised(f"{guest} moves to {outgoing.destination}, not to {sender}")
            if any(one.has_left for one in self._sessions_of(guest, SourceSession)):
                raise NotAuthorised(f"{guest} has left this host already")
            if self._hypervisor is not None and not is_leaving and outgoing is not None and not outgoing.is_suspended:
                del self._outgoing[guest]  # its job ended without a word
                outgoing = None
            return self._add(self._leaving(session_id, guest, sender, outgoing))

    def _leaving(self, session: str, guest: str, peer: str, outgoing: _Outgoing | None) -> SourceSession:
        return SourceSession(
            self.host,
            session,
            guest,
            peer,
            self._forget,
            is_outgoing=outgoing is not None,
            is_suspended=outgoing is not None and outgoing.is_suspended,
            scopes=outgoing.scopes if outgoing is not None and not peer else None,
        )

    def _add(self, session: Session) -> Session:
        with self._lock:
            known = self._sessions.get(session.id)
            if known is not None:  # the same Open came twice at the same time
                return known
            for older in self._sessions_of(session.guest, type(session)):
                older.supersede()
            self._sessions[session.id] = session
            session.start()
            return session

    def _lead(self, event: MigrationEvent, *kinds: type[Session]) -> None:
        """Tells the guest's newest session, of the role that the event is about where that is known."""
        for session in reversed(self.sessions()):
            if session.guest == event.guest and isinstance(session, kinds) and event.role in (None, session.role):
                session.tell(event)
                return

    def _sessions_of(self, guest: str, kind: type[SessionT]) -> list[SessionT]:
        """The guest's sessions of this role, newest first."""
        return [one for one in reversed(self.sessions()) if one.guest == guest and isinstance(one, kind)]

    def _forget(self, session: Session) -> None:
        has_stayed = session.report.outcome == Outcome.STAYED.value
        with self._idle:
            self._sessions.pop(session.id, None)
            is_last = all(one.guest != session.guest for one in self._sessions.values())
            if is_last and has_stayed:
                self._outgoing.pop(session.guest, None)
            if is_last and has_stayed == (session.role == "destination"):
                self.host.scopes.learn(session.guest, ())  # it is not here any more
            self._ended[session.id] = None
            while len(self._ended) > ENDED_REMEMBERED:
                self._ended.popitem(last=False)
            self._idle.notify_all()


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def load_scopes(name: str, conf: cfg.ConfigOpts) -> ScopeFinder:
    """:raises ConfigurationError: there is no such scope finder, or its options are wrong."""
    try:
        found: stevedore_driver.DriverManager[Any] = stevedore_driver.DriverManager("sami.scopes", name)
    except NoMatches as error:
        raise ConfigurationError(f"[agent] scopes: there is no scope finder {name!r}") from error
    finder: Any = found.driver
    if not (isinstance(finder, type) and issubclass(finder, ScopeFinder)):
        raise ConfigurationError(f"[agent] scopes: {name!r} is no scope finder but {finder!r}")
    return finder.from_conf(conf)


def run(conf: cfg.ConfigOpts, wait: Callable[[], object]) -> None:
    """Runs the agent that `conf` describes until `wait` returns.

    :raises SamiError: it cannot start; the message says what to change.
    """
    settings = options.settings(conf)
    libvirt = LibvirtHost(conf.libvirt.uri) if conf.libvirt.uri else None
    agent = Agent(
        conf,
        name=conf.agent.host,
        driver=loader.load_driver(conf.agent.driver),
        scopes=load_scopes(conf.agent.scopes, conf),
        journal=Journal(conf.agent.journal),
        settings=settings,
        hypervisor=libvirt,
    )
    with ExitStack() as stack:
        agent.start()
        stack.callback(agent.stop)
        socket = LocalSocket(
            conf.agent.socket, agent.tell, mode=int(conf.agent.socket_mode, 8), group=conf.agent.socket_group
        )
        socket.start()
        stack.callback(socket.stop)
        if libvirt is not None:
            libvirt.start(agent.note, agent.underway)
            stack.callback(libvirt.stop)
        wait()
