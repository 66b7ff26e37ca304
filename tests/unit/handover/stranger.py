"""A host of the cloud that says what it wants: with a certificate of its own, and without the rest of an agent."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import replace
from types import TracebackType

from oslo_config import cfg

from sami_plugin.channel.identity import Credentials
from sami_plugin.codec import messages
from sami_plugin.line import Line
from sami_plugin.model.migration import Flows, GivesUp, Message, Offer, Open
from sami_plugin.model.packet import Packet
from sami_plugin.peers import Peers, Way
from sami_plugin.testing.certificates import Certificates
from sami_plugin.testing.hosts import Hosts
from sami_plugin.transport.rpc import Transport
from tests.unit.handover.memory import SETTINGS, until


class Stranger:
    """A context manager. `heard` is what it was told, `lost` why a session of it is over."""

    def __init__(
        self, hosts: Hosts, name: str, *, certificates: Certificates | None = None, speaks_with: str = ""
    ) -> None:
        """It believes what the hosts believe. `certificates` are another authority's, `speaks_with` another's name."""
        self.name = name
        self.heard: list[Message] = []
        self.lost: list[str] = []
        self.sessions: dict[type[Message], str] = {}
        """In which session each kind of message was heard first."""
        files = (certificates or hosts.certificates).files(speaks_with or name)
        trusted = replace(files, authorities=hosts.certificates.folder / "ca.pem", revoked=None)
        self.transport = Transport(cfg.ConfigOpts(), name, "fake://")
        self._peers = Peers(Way(self.transport, Credentials(speaks_with or name, trusted)))
        self._lines: dict[str, Line] = {}

    def __enter__(self) -> Stranger:
        self.transport.start(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for line in self._lines.values():
            line.finish()
        self.transport.stop()

    def say(self, peer: str, session: str, message: Message) -> None:
        """In a session of its own making, or in one that it knows of."""
        line = self._lines.get(session)
        if line is None:
            line = self._lines[session] = Line(self._peers, SETTINGS, session)
            line.peer, line.lost = peer, self.lost.append
        line.say(messages.encode(message))

    def ask(self, peer: str, guest: str, token: str = "") -> str:
        """Asks for the guest's flows; returns the session's id."""
        session = str(uuid.uuid4())
        self.say(peer, session, Open(guest, self.name, (1,), (), ("zlib",), None, token))
        return session

    def is_refused(self) -> str:
        """Waits for it; returns the reason."""
        until(lambda: any(isinstance(message, GivesUp) for message in self.heard) or self.lost)
        return next((message.reason for message in self.heard if isinstance(message, GivesUp)), "") or self.lost[0]

    # What the transport asks of a receiver.

    def deliver(self, sender: str, session: str, packet: Packet) -> None:
        if session not in self._lines:
            self._lines[session] = Line(self._peers, SETTINGS, session, caller=sender)
        for octets in self._lines[session].take(packet):
            self.heard.append(messages.decode(octets))
            self.sessions.setdefault(type(self.heard[-1]), session)


def is_given_flows(stranger: Stranger) -> bool:
    """Whether a host that asked for flows has got any; waits for that or for a refusal."""
    with contextlib.suppress(AssertionError):
        until(lambda: stranger.lost or any(isinstance(one, Flows | Offer | GivesUp) for one in stranger.heard))
    return any(isinstance(one, Flows | Offer) for one in stranger.heard)
