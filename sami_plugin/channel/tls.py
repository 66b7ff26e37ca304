"""Mutual TLS 1.3 inside the messages of a session, without I/O.

A session's messages go through a `Channel`. What is to be said becomes packets, which somebody carries to the other
end; what that end's packets hold comes out as messages, in their order, each once. In between packets may be lost,
repeated, reordered, read and forged:

 * Who reads them learns their number and size. Who forges one breaks a TLS stream, and nothing of it comes out.
 * A stream that broke is followed by another, with a handshake of its own. Messages have a number inside of TLS, and
   each end keeps what the other has not acknowledged there, so the new stream goes on where the old one ended.
 * Only the client begins streams. A server goes on with the old one until the handshake of the new one has shown that
   the same host is at the other end.

Inside of TLS a frame is: length of the message, number of the message, number of the next one that is awaited from the
other end (network byte order; 4, 8 and 8 octets), the message. A frame without a message only acknowledges.
"""

from __future__ import annotations

import ssl
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Protocol

from sami_plugin.channel.identity import host_of
from sami_plugin.channel.ordering import Inbox
from sami_plugin.errors import Busy, IllegalMessage, NotAuthorised, PeerUnreachable, StreamBroken
from sami_plugin.model.packet import Packet
from sami_plugin.model.settings import Bounds

MOST_BEGUN = 4
"""Handshakes of one session that are under way at a server; the oldest gives way."""
MOST_MESSAGE_OCTETS = 16 * 1024 * 1024
ACKNOWLEDGE_EVERY = 8
"""Messages after which an end that has nothing to say acknowledges what it got."""

_FRAME = struct.Struct("!IQQ")
_RECORD = 1 << 14
_REFUSALS = ("CERTIFICATE", "UNKNOWN_CA")
"""In OpenSSL's words for that our certificate, or the lack of one, does not do: another stream would not mend it."""


class Connection(Protocol):
    """What keeps a stream secret: octets of messages in, octets for packets out, and the other way round."""

    is_established: bool
    """Both ends have shown who they are: messages may be written."""

    def advance(self, arrived: bytes = b"") -> bytes:
        """Takes what came, in order; returns what is readable now. A client's begins with an advance by nothing.

        :raises StreamBroken: it is not what the other end wrote, or the other end has ended.
        :raises NotAuthorised: the other end's certificate does not count here, or ours does not there.
        """

    def leaving(self) -> bytes:
        """What is to be sent, and was not given out yet."""

    def write(self, octets: bytes) -> None:
        """Only once it is established."""

    def peer(self) -> str:
        """The host at the other end.

        :raises NotAuthorised: it names no host.
        """


class Connect(Protocol):
    """Makes a connection of what its stream is given."""

    def __call__(self, context: Any, *, is_server: bool) -> Connection: ...


class Tls:
    """A `Connection` by TLS 1.3."""

    def __init__(self, context: ssl.SSLContext, *, is_server: bool) -> None:
        self.is_established = False
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=is_server)

    def advance(self, arrived: bytes = b"") -> bytes:
        self._arrived.write(arrived)
        plain = bytearray()
        try:
            if not self.is_established:
                self._tls.do_handshake()
                self.is_established = True
            while octets := self._tls.read(_RECORD):
                plain += octets
        except ssl.SSLWantReadError:
            return bytes(plain)
        except ssl.SSLCertVerificationError as error:
            raise NotAuthorised(f"the other host's certificate does not count: {error.verify_message}") from error
        except ssl.SSLError as error:
            said = error.reason or str(error)
            # Before the handshake is over anybody may have said it.
            if self.is_established and any(word in said for word in _REFUSALS):
                raise NotAuthorised(f"the other host does not take our certificate: {_spoken(said)}") from error
            raise StreamBroken(f"TLS: {_spoken(said)}") from error
        raise StreamBroken("the other end ended the stream")

    def leaving(self) -> bytes:
        return self._leaving.read()

    def write(self, octets: bytes) -> None:
        self._tls.write(octets)

    def peer(self) -> str:
        names: Any = (self._tls.getpeercert() or {}).get("subjectAltName", ())
        return host_of([value for kind, value in names if kind == "URI"])


class _Stream:
    """One connection, in numbered packets."""

    def __init__(self, number: int, connection: Connection, bounds: Bounds) -> None:
        self.number = number
        self._bounds = bounds
        self.is_broken = False
        self.has_begun = False
        """The other end's first packet has come."""
        self._inbox = Inbox()
        self._sent = 0
        self._connection = connection

    @property
    def is_established(self) -> bool:
        """Both ends have shown who they are."""
        return self._connection.is_established

    def begin(self) -> Packet:
        """The client's first flight."""
        self._connection.advance()
        (packet,) = self.packets()
        return packet

    def packets(self) -> list[Packet]:
        """What the connection wants to be sent."""
        octets = self._connection.leaving()
        return [self._numbered(octets)] if octets else []

    def farewell(self) -> Packet:
        """Says that the stream is broken; the server's last packet."""
        return self._numbered(b"")

    def _numbered(self, octets: bytes) -> Packet:
        packet = Packet(self.number, self._sent, octets)
        self._sent += 1
        return packet

    def take(self, packet: Packet) -> bytes:
        """What is readable now thanks to this packet.

        :raises Busy: too much waits already for a packet that comes before; nothing was taken.
        :raises StreamBroken: it does not belong to the stream; the stream is of no more use.
        :raises NotAuthorised: the other end's certificate does not count here, or ours does not there.
        """
        if self.is_broken:
            raise StreamBroken(f"stream {self.number} broke before")
        most = self._bounds.session_octets if self.is_established else self._bounds.handshake_octets
        waiting = 0 if packet.number == self._inbox.next_number else self._inbox.waiting_octets
        if waiting + len(packet.octets) > most:
            raise Busy(f"packet {packet.number} of stream {self.number} is more than can be kept")
        self.has_begun |= packet.number == 0
        plain = bytearray()
        try:
            for octets in self._inbox.accept(packet.number, packet.octets):
                if not octets:
                    raise StreamBroken("the other end says that the stream is broken")
                plain += self._connection.advance(octets)
        except IllegalMessage as error:
            self.is_broken = True
            raise StreamBroken(str(error)) from error
        except (StreamBroken, NotAuthorised):
            self.is_broken = True
            raise
        return bytes(plain)

    def write(self, octets: bytes) -> None:
        """Only once it is established. Makes packets."""
        self._connection.write(octets)

    def peer(self) -> str:
        """:raises NotAuthorised: as the connection says."""
        return self._connection.peer()


def _spoken(reason: str) -> str:
    return reason.replace("_", " ").lower()


class Channel:
    """One end of a session's channel. Not thread-safe.

    `peer` is the host that has to be at the other end. `context` is asked for with each stream, and `connect` makes
    the stream's connection of it.
    """

    def __init__(
        self,
        peer: str,
        context: Callable[[], Any],
        *,
        is_server: bool,
        bounds: Bounds = Bounds(),  # noqa: B008, a frozen value
        connect: Connect = Tls,
    ) -> None:
        self.peer = peer
        self._bounds = bounds
        self._context = context
        self._connect = connect
        self._is_server = is_server
        self._current: _Stream | None = None
        self._begun: OrderedDict[int, _Stream] = OrderedDict()
        self._streams = 0
        """How many a client has begun; at a server, one more than the highest number of them."""
        self._packets: list[Packet] = []
        self._plain = bytearray()
        self._next_out = self._next_in = 0
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._kept_octets = 0
        self._owed = 0
        """Messages taken since the last frame that left."""

    def packets(self) -> list[Packet]:
        """What is to be carried to the other end, and was not given out yet."""
        packets, self._packets = self._packets, []
        return packets

    def say(self, message: bytes, *, is_last_word: bool = False) -> None:
        """Sends a message, at once or when there is a stream.

        :raises PeerUnreachable: the other end has acknowledged nothing for too long. For a last word there is room.
        """
        if self._kept_octets + len(message) > self._bounds.session_octets and not is_last_word:
            raise PeerUnreachable(f"{self.peer} has acknowledged nothing of the last {self._kept_octets} octets")
        self._unacknowledged.append((self._next_out, message))
        self._kept_octets += len(message)
        self._next_out += 1
        if self._current is None and not self._is_server:
            self._begin()
        self._send(*self._unacknowledged[-1])

    def take(self, packet: Packet) -> list[bytes]:
        """The messages that are in order now thanks to this packet.

        :raises StreamBroken: it broke its stream. A client has begun the next one then.
        :raises PeerUnreachable: it broke its stream, and there will be no other.
        :raises NotAuthorised: who sent it is not `peer`. A server's messages of before, and to come, are `peer`'s.
        :raises IllegalMessage: there can be no such stream.
        :raises Busy: more is kept than may be; nothing was taken.
        """
        stream = self._stream_of(packet)
        if stream is None:
            return []
        was_established, was_broken = stream.is_established, stream.is_broken
        try:
            if self._is_server and packet.number and not stream.has_begun:  # a client waits for the answer to the first
                raise StreamBroken("its beginning was said to somebody else, as to an agent that has ended")
            plain = stream.take(packet)
            if stream.is_established and not was_established:
                self._enter(stream)
            self._plain += plain
            return self._messages() if stream is self._current else []
        except StreamBroken:
            stream.is_broken = True
            self._packets += stream.packets()  # why, in TLS's words, before the last one
            if not self._is_server:
                self._begin()
            elif not was_broken:
                self._packets.append(stream.farewell())
            raise
        finally:
            self._packets += stream.packets()

    @property
    def is_all_said(self) -> bool:
        """Whether all messages have become packets of a stream of which nobody says that it is broken."""
        stream = self._current
        return not self._unacknowledged or (stream is not None and stream.is_established and not stream.is_broken)

    def renew(self, stream: int) -> None:
        """Somebody says that this stream is broken there: if it still counts, the client begins another.

        :raises PeerUnreachable: there were too many.
        """
        if self._current is None or self._current.number != stream:
            return
        if self._is_server:
            self._current.is_broken = True
        else:
            self._begin()

    def call_again(self) -> None:
        """A client begins another stream, in which all is said that was not acknowledged.

        Of half the streams that it may have: the others are left for what is tampered with.
        """
        if not self._is_server and 0 < self._streams < self._bounds.streams // 2:
            self._begin()

    def _stream_of(self, packet: Packet) -> _Stream | None:
        """The stream that a packet belongs to; None where that is of the past."""
        if self._current is not None and packet.stream == self._current.number:
            return self._current
        if not self._is_server or (self._current is not None and packet.stream < self._current.number):
            return None
        if not 0 <= packet.stream < self._bounds.streams:
            most = self._bounds.streams
            raise IllegalMessage(f"stream {packet.stream} is not one of the {most} that a session may have")
        if packet.stream not in self._begun:
            if packet.stream < self._streams:  # it gave way to later ones, or is older than they are
                return None
            self._streams = packet.stream + 1
            if len(self._begun) == MOST_BEGUN:
                self._begun.popitem(last=False)
            self._begun[packet.stream] = self._stream(packet.stream)
        return self._begun[packet.stream]

    def _stream(self, number: int) -> _Stream:
        connection = self._connect(self._context(), is_server=self._is_server)
        return _Stream(number, connection, self._bounds)

    def _begin(self) -> None:
        if self._streams == self._bounds.streams:
            raise PeerUnreachable(f"{self._streams} streams with {self.peer} broke: somebody tampers with them")
        self._current = self._stream(self._streams)
        self._streams += 1
        self._packets.append(self._current.begin())

    def _enter(self, stream: _Stream) -> None:
        """A handshake is over: what the other end has not acknowledged goes through this stream."""
        if (host := stream.peer()) != self.peer:
            stream.is_broken = True
            raise NotAuthorised(f"it is {host} that speaks as {self.peer}")
        self._current = stream
        for number in [number for number in self._begun if number <= stream.number]:
            del self._begun[number]
        self._plain.clear()
        for number, message in self._unacknowledged:
            self._send(number, message)

    def _send(self, number: int, message: bytes) -> None:
        stream = self._current
        if stream is None or stream.is_broken or not stream.is_established:
            return
        stream.write(_FRAME.pack(len(message), number, self._next_in) + message)
        self._packets += stream.packets()
        self._owed = 0

    def _messages(self) -> list[bytes]:
        """The whole messages of what is readable."""
        messages = []
        at = 0
        while len(self._plain) - at >= _FRAME.size:
            length, number, awaited = _FRAME.unpack_from(self._plain, at)
            if length > MOST_MESSAGE_OCTETS:
                raise StreamBroken(f"a message of {length} octets is too long")
            if len(self._plain) - at - _FRAME.size < length:
                break
            at += _FRAME.size
            if length:
                if number > self._next_in:
                    raise StreamBroken(f"message {number} came where {self._next_in} was awaited")
                if self._is_new(number):
                    messages.append(bytes(self._plain[at : at + length]))
                    self._next_in += 1
                    self._owed += 1
                at += length
            self._acknowledged(awaited)
        del self._plain[:at]
        if self._owed >= ACKNOWLEDGE_EVERY:
            self._send(0, b"")
        return messages

    def _is_new(self, number: int) -> bool:
        """Else it came through the stream before, and the word of that got lost."""
        return number == self._next_in

    def _acknowledged(self, awaited: int) -> None:
        if awaited > self._next_out:
            raise StreamBroken(f"message {awaited - 1} is acknowledged, and was never sent")
        while self._unacknowledged and self._unacknowledged[0][0] < awaited:
            self._kept_octets -= len(self._unacknowledged.popleft()[1])
