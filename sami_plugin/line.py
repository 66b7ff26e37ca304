"""The line between the two ends of a session: its secure channel, and the sender that carries the channel's packets."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from sami_plugin.channel.tls import Channel
from sami_plugin.errors import IllegalMessage, NotAuthorised, PeerUnreachable, StreamBroken
from sami_plugin.model.packet import Packet
from sami_plugin.model.settings import Settings
from sami_plugin.peers import Peers
from sami_plugin.transport.rpc import Sender

LOG = logging.getLogger(__name__)

ENDED_REMEMBERED = 1024
"""Sessions of which a late or repeated message is still taken, and dropped, after their end."""


class Line:
    """One end of it. The destination calls, the source answers. Thread-safe; nothing blocks."""

    def __init__(
        self,
        peers: Peers,
        settings: Settings,
        session: str,
        *,
        caller: str = "",
    ) -> None:
        """`caller` is who has called; without one this end is to call somebody."""
        self.peer = caller
        """Who is, or has to be, at the other end."""
        self.lost: Callable[[str], None] = lambda reason: None
        """Told, from any thread, that nothing will come of this line, and why."""
        self._session = session
        self._peers = peers
        self._bounds = settings.bounds
        self._is_server = bool(caller)
        self._is_finished = self.is_closed = self._lacks_something = False
        self._lock = threading.RLock()
        self._channel: Channel | None = self._new_channel() if caller else None
        self._sender = self._new_sender(settings)

    def say(self, message: bytes, *, is_last_word: bool = False) -> None:
        """Sends a message to `peer`, which has to be known by now.

        Once there was no room for one, those behind it would say what is not so; but a last word is always said.
        """
        with self._lock:
            if self._channel is None:
                self._channel = self._new_channel()
            if self._lacks_something and not is_last_word:
                return
            said = self._attempt(lambda channel: channel.say(message, is_last_word=is_last_word))
            self._lacks_something |= not said

    def call_again(self) -> None:
        """Where the other end has taken all, and not answered, it may have ended in between: it is called anew."""
        with self._lock:
            if self._channel is not None and self._sender.is_idle:
                self._attempt(lambda channel: channel.call_again())

    def take(self, packet: Packet) -> list[bytes]:
        """The messages that are in order now thanks to this packet.

        :raises StreamBroken, NotAuthorised, IllegalMessage: as the channel says.
        """
        with self._lock:
            channel = self._channel
            if channel is None:
                raise IllegalMessage("nobody here has called")
            try:
                return channel.take(packet)
            except StreamBroken as error:
                if self._is_server:
                    raise
                LOG.warning("%s: %s; another stream was begun", self._session, error)
                return []
            except (NotAuthorised, PeerUnreachable) as error:
                if not self._is_server:
                    self.lost(str(error))
                raise
            finally:
                self._send(channel)
                self._close_when_done()

    def when_there_is_room(self, then: Callable[[], None]) -> None:
        """See Sender."""
        self._sender.when_there_is_room(then)

    def finish(self) -> None:
        """Nothing more will be said. What was said is brought to the other end, for a while. May be repeated.

        That may need words from there: `take` is still to be called.
        """
        with self._lock:
            self._is_finished = True
            self._sender.finish()
            self._close_when_done()

    def close(self) -> None:
        """Gives up what has not got there by now. May be repeated."""
        with self._lock:
            self.is_closed = True
            self._sender.close()

    def _close_when_done(self) -> None:
        with self._lock:
            if self._is_finished and self._sender.is_idle and (self._channel is None or self._channel.is_all_said):
                self.close()

    # What a simulated line has otherwise.

    def _new_sender(self, settings: Settings) -> Sender:
        return Sender(
            lambda: self._peers.way_to(self.peer).transport,
            lambda: self.peer,
            self._session,
            window=settings.window,
            call_seconds=settings.call_seconds,
            lifetime_seconds=settings.message_seconds,
            refused=lambda reason: self.lost(reason),
            broken=self._renew,
            idle=self._close_when_done,
        )

    def _new_channel(self) -> Channel:
        credentials, is_server = self._peers.way_to(self.peer).credentials, self._is_server
        return Channel(
            self.peer, lambda: credentials.context(is_server=is_server), is_server=is_server, bounds=self._bounds
        )

    def _renew(self, stream: int) -> None:
        with self._lock:
            self._attempt(lambda channel: channel.renew(stream))

    def _attempt(self, act: Callable[[Channel], None]) -> bool:
        assert self._channel is not None
        try:
            act(self._channel)
        except PeerUnreachable as error:
            self.lost(str(error))
            return False
        else:
            return True
        finally:
            self._send(self._channel)

    def _send(self, channel: Channel) -> None:
        for packet in channel.packets():
            self._sender.send(packet)


class Ended:
    """Sessions that have ended, with the line of each that has not brought its last words to the other end yet.

    Not thread-safe.
    """

    def __init__(self, seconds: float) -> None:
        """For so long each may try to."""
        self._seconds = seconds
        self._lines: OrderedDict[str, Line | None] = OrderedDict()
        self._until: deque[tuple[float, str]] = deque()

    def __contains__(self, session: str) -> bool:
        return session in self._lines

    def line(self, session: str) -> Line | None:
        return self._lines.get(session)

    def add(self, session: str, line: Line, now: float) -> None:
        """Closes what has had its time, and forgets the oldest of too many."""
        self._lines[session] = None if line.is_closed else line
        self._until.append((now + self._seconds, session))
        while self._until[0][0] <= now:
            self._shut(self._until.popleft()[1])
        while len(self._lines) > ENDED_REMEMBERED:
            oldest = next(iter(self._lines))
            self._shut(oldest)
            del self._lines[oldest]

    def close(self) -> None:
        """Gives up what has not got there by now."""
        for session in self._lines:
            self._shut(session)

    def _shut(self, session: str) -> None:
        line = self._lines.get(session)
        if line is not None:
            line.close()
            self._lines[session] = None
