"""The agent of one host: builds everything, owns the threads, and leads each word to its session."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from oslo_config import cfg
from stevedore import driver as stevedore_driver
from stevedore.exception import NoMatches

from sami_plugin import conf as options
from sami_plugin.codec import messages
from sami_plugin.drivers import loader
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.errors import ConfigurationError, IllegalMessage, NotAuthorised, NotAvailable, OperatorError
from sami_plugin.handover import DestinationSession, SourceSession
from sami_plugin.hooks.local_socket import LocalSocket
from sami_plugin.journal.journal import Journal
from sami_plugin.model.migration import MigrationEvent, Open, Phase
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
    ) -> None:
        """:raises ConfigurationError: the broker is not one that this version may use."""
        transport = Transport(conf, name, self.deliver, transport_url)
        self.host = Host(name, settings, driver, scopes, journal, transport)
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
        """This host's hypervisor said something of a guest. The same may be said twice.

        Returns at once, but for `prepare`: there it waits up to `verdict_seconds` for the source's answer, so that the
        guest does not leave before its flows begin to.

        :raises OperatorError: something is missing in what was said.
        """
        match event.phase:
            case Phase.PREPARE:
                self._expect(event)
            case Phase.OUTGOING:
                with self._lock:
                    self._outgoing[event.guest] = _Outgoing(event.destination)
                    self._lead(event, (SourceSession,))
            case Phase.STARTED:
                self._lead(event, (DestinationSession,))
            case Phase.SUSPENDED:
                with self._lock:
                    if event.guest in self._outgoing:
                        self._outgoing[event.guest] = replace(self._outgoing[event.guest], is_suspended=True)
                    self._lead(event, (SourceSession,))
            case Phase.RESUMED | Phase.STOPPED:
                with self._lock:
                    self._outgoing.pop(event.guest, None)
                    self._lead(event, (SourceSession, DestinationSession))

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

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Whether all sessions ended within the time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._sessions, timeout_seconds)

    def _expect(self, event: MigrationEvent) -> None:
        if event.source is None:
            raise OperatorError("source: has to be told with `prepare`")
        if event.source == self.host.name:
            raise OperatorError(f"source: a guest does not move from {event.source} to itself")
        with self._lock:  # the hook and Nova may say it at the same time
            session = next(iter(self._sessions_of(event.guest, DestinationSession)), None)
            if session is None or not session.is_about(event.source):
                for leaving in self._sessions_of(event.guest, SourceSession):
                    leaving.expect_return()
                session = DestinationSession(self.host, str(uuid.uuid4()), event.guest, event.source, self._forget)
                self._add(session)
        if not session.has_answer.wait(self.host.settings.verdict_seconds):
            LOG.warning("%s: %s has not answered yet; the migration goes on", session.id, event.source)

    def _open(self, sender: str, session_id: str, number: int, octets: bytes) -> Session:
        said = messages.decode(octets)
        if number != 0 or not isinstance(said, Open):
            raise IllegalMessage(f"there is no session {session_id[:40]} here; it begins with message 0, Open")
        if said.destination != sender:
            raise NotAuthorised(f"{sender} may not speak for {said.destination}")
        try:
            uuid.UUID(session_id)
            guest = str(uuid.UUID(said.guest))
        except ValueError as error:
            raise IllegalMessage("session and guest are UUIDs") from error
        with self._lock:
            leaving = self._outgoing.get(guest)
            if leaving is not None and leaving.destination not in (None, sender):
                raise NotAuthorised(f"{guest} moves to {leaving.destination}, not to {sender}")
            return self._add(
                SourceSession(
                    self.host,
                    session_id,
                    guest,
                    sender,
                    self._forget,
                    is_outgoing=leaving is not None,
                    is_suspended=leaving is not None and leaving.is_suspended,
                )
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

    def _lead(self, event: MigrationEvent, kinds: tuple[type[Session], ...]) -> None:
        for session in [one for one in self.sessions() if one.guest == event.guest and isinstance(one, kinds)][-1:]:
            session.tell(event)

    def _sessions_of(self, guest: str, kind: type[SessionT]) -> list[SessionT]:
        """The guest's sessions of this role, newest first."""
        return [one for one in reversed(self.sessions()) if one.guest == guest and isinstance(one, kind)]

    def _forget(self, session: Session) -> None:
        with self._idle:
            self._sessions.pop(session.id, None)
            self._ended[session.id] = None
            while len(self._ended) > ENDED_REMEMBERED:
                self._ended.popitem(last=False)
            self._idle.notify_all()


def load_scopes(name: str, conf: cfg.ConfigOpts) -> ScopeFinder:
    """:raises ConfigurationError: there is no such scope finder."""
    try:
        found: stevedore_driver.DriverManager[Any] = stevedore_driver.DriverManager("sami.scopes", name)
    except NoMatches as error:
        raise ConfigurationError(f"[agent] scopes: there is no scope finder {name!r}") from error
    finder: ScopeFinder = found.driver(conf.agent.scope_file)
    return finder


def run(conf: cfg.ConfigOpts, wait: Callable[[], object]) -> None:
    """Runs the agent that `conf` describes until `wait` returns.

    :raises SamiError: it cannot start; the message says what to change.
    """
    settings = options.settings(conf)
    agent = Agent(
        conf,
        name=conf.agent.host,
        driver=loader.load_driver(conf.agent.driver),
        scopes=load_scopes(conf.agent.scopes, conf),
        journal=Journal(conf.agent.journal),
        settings=settings,
    )
    agent.start()
    try:
        socket = LocalSocket(conf.agent.socket, agent.tell)
        socket.start()
        try:
            wait()
        finally:
            socket.stop()
    finally:
        agent.stop()
