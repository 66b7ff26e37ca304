"""The network between simulated hosts: it loses, repeats, delays and forges packets, all in virtual time.

What stands for TLS is a `Connection` with the same three flights and the same consequences: who is at the other end is
shown, and what was forged breaks the stream. It costs next to nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack

from sami_plugin.channel.tls import Channel, Connection
from sami_plugin.codec import messages
from sami_plugin.errors import NotAuthorised, StreamBroken
from sami_plugin.line import Line
from sami_plugin.model.migration import Open
from sami_plugin.model.packet import Packet
from sami_plugin.model.settings import Settings
from sami_plugin.peers import Peers, Way
from sami_plugin.transport.rpc import BROKEN, LATER, TAKEN, Endpoint, Receiver, Sender

if TYPE_CHECKING:
    from sami_plugin.testing.simulator.host import SimulatedHost
    from sami_plugin.testing.simulator.world import World

QUICK_SECONDS = 0.0005
BEARABLE_FORGERIES = 4
"""Of one session. Each costs a stream, of which there are not many more."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What an end has to show who it is, and to know others."""

    host: str
    secret: bytes
    secrets: dict[str, bytes]
    """Of all hosts, so that what they show can be checked."""
    nonce: Callable[[], bytes]


class Plain:
    """A `Connection` as TLS would be, without its cryptography.

    Flights: the client's nonce; the server's nonce, name and proof; the client's name and proof, with what it says.
    """

    def __init__(self, identity: Identity, *, is_server: bool) -> None:
        self.is_established = False
        self._identity = identity
        self._is_server = is_server
        self._out = bytearray()
        self._in = bytearray()
        self._nonce = identity.nonce()
        self._seal = b""
        self._peer: str | None = None
        self._has_begun = False

    def advance(self, arrived: bytes = b"") -> bytes:
        if not self._has_begun:
            self._has_begun = True
            if not self._is_server:
                self._out += b"C" + self._nonce
        self._in += arrived
        plain = bytearray()
        while self._in:
            size = self._take(plain)
            if not size:
                break
            del self._in[:size]
        return bytes(plain)

    def _take(self, plain: bytearray) -> int:
        """Takes what stands first; returns how long it was, or nothing where it is not whole yet."""
        kind = bytes(self._in[:1])
        if self.is_established:
            if kind != b"D" or bytes(self._in[1:9]) != self._seal:
                raise StreamBroken("what came was not written by the other end")
            end = 13 + int.from_bytes(self._in[9:13], "big")
            if len(self._in) < end:
                return 0
            plain += self._in[13:end]
            return end
        if self._is_server and not self._seal:
            if kind != b"C" or len(self._in) != 9:
                raise StreamBroken("no client's first words")
            self._seal = bytes(self._in[1:9])
            self._out += b"S" + self._nonce + self._shown()
            return 9
        if kind != (b"F" if self._is_server else b"S"):
            raise StreamBroken("not what comes next in a handshake")
        start = 1
        if not self._is_server:
            self._seal, start = bytes(self._in[1:9]), 9
        size = self._in[start]
        name, proof = (
            bytes(self._in[start + 1 : start + 1 + size]),
            bytes(self._in[start + 1 + size : start + 9 + size]),
        )
        if self._proof(self._identity.secrets.get(name.decode(), b"")) != proof:
            raise NotAuthorised("the other host's certificate does not count")
        self._peer = name.decode()
        if not self._is_server:
            self._out += b"F" + self._shown()
        self._seal = self._proof(b"")
        self.is_established = True
        return start + 9 + size

    def _shown(self) -> bytes:
        name = self._identity.host.encode()
        return bytes((len(name),)) + name + self._proof(self._identity.secret)

    def _proof(self, secret: bytes) -> bytes:
        both = self._seal + self._nonce if self._is_server else self._nonce + self._seal
        return hashlib.blake2b(both, key=secret, digest_size=8).digest()

    def leaving(self) -> bytes:
        octets = bytes(self._out)
        self._out.clear()
        return octets

    def write(self, octets: bytes) -> None:
        self._out += b"D" + self._seal + len(octets).to_bytes(4, "big") + octets

    def peer(self) -> str:
        assert self._peer is not None
        return self._peer


def connect(context: Any, *, is_server: bool) -> Connection:
    """Makes a channel's connection of an `Identity`."""
    return Plain(context, is_server=is_server)


@functools.lru_cache(maxsize=64)
def kind_of(message: bytes) -> str:
    """The kind of a message between agents."""
    return str(msgpack.unpackb(message)["kind"])


def as_first_version(message: bytes) -> bytes:
    """An Open as an old host says it, or as it would understand one."""
    said = messages.decode(message)
    assert isinstance(said, Open)
    return messages.encode(replace(said, versions=(1,)))


@dataclass(slots=True)
class Network:
    """Between all hosts of a world."""

    world: World
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    forged: dict[str, int] = field(default_factory=dict)
    """By session."""
    away_until: dict[str, float] = field(default_factory=dict)
    """Until when the broker does not reach a host."""

    def call(
        self, sender: str, peer: str, session: str, packet: Packet, answered: Callable[[str | None], None]
    ) -> None:
        """One try to hand a packet over; `answered` is told the answer, or None when nobody answered in time."""
        world, mix = self.world, self.world.mix
        dice = world.random.random
        if mix.forgery and dice() < mix.forgery:
            self._forge(sender, peer, session, packet)
        if mix.repetition and dice() < mix.repetition:
            world.after(mix.delay_seconds * dice() * 3, partial(self._deliver, sender, peer, session, packet))
        delay = QUICK_SECONDS + (mix.delay_seconds * dice() if mix.delay_seconds > 0.001 else 0.0)
        world.after(delay, partial(self._arrive, sender, peer, session, packet, answered))

    def _arrive(
        self, sender: str, peer: str, session: str, packet: Packet, answered: Callable[[str | None], None]
    ) -> None:
        world, mix = self.world, self.world.mix
        dice = world.random.random
        is_away = world.now < max(self.away_until.get(peer, 0.0), self.away_until.get(sender, 0.0))
        is_lost = is_away or peer not in self.endpoints or (mix.loss and dice() < mix.loss)
        answer = None if is_lost else self._deliver(sender, peer, session, packet)
        if is_lost or (mix.loss and dice() < mix.loss):
            world.after(world.settings.call_seconds, partial(answered, None))
        else:
            answered(answer)

    def _deliver(self, sender: str, peer: str, session: str, packet: Packet) -> str | None:
        endpoint = self.endpoints.get(peer)
        if endpoint is None:
            return None
        payload = base64.b64encode(packet.octets).decode("ascii")
        if peer == self.world.stranger.name:
            return endpoint.deliver({}, sender, session, packet.stream, packet.number, payload)
        return self.world.guarded(
            peer, partial(endpoint.deliver, {}, sender, session, packet.stream, packet.number, payload)
        )

    def _forge(self, sender: str, peer: str, session: str, packet: Packet) -> None:
        """Somebody who has the broker puts octets of his own in the place of the next packet."""
        forged = Packet(packet.stream, packet.number, b"forged" + packet.octets[6:])
        self.world.tell(peer, f"somebody forges packet {packet.number} of stream {packet.stream} of {sender}")
        self.forged[session] = self.forged.get(session, 0) + 1
        if self.forged[session] > BEARABLE_FORGERIES:
            self.world.hinder("packets were forged")
        self.world.after(0.0, partial(self._deliver, sender, peer, session, forged))


_NEVER = threading.Event()
"""An agent that is down cannot be reached at all."""


class SimulatedPeers(Peers):
    """All hosts are of one domain, and reached through one network."""

    def __init__(self, host: str, network: Network) -> None:
        anything: Any = None
        self._way = Way(anything, anything)
        self._host = host
        self._network = network

    def way_to(self, host: str) -> Way:
        return self._way

    def start(self, receiver: Receiver) -> None:
        self._network.endpoints[self._host] = Endpoint(receiver, _NEVER)

    def stop(self) -> None:
        self._network.endpoints.pop(self._host, None)


class SimulatedSender(Sender):
    """As `Sender`, in virtual time and without threads."""

    def __init__(
        self,
        host: SimulatedHost,
        peer: Callable[[], str],
        session: str,
        settings: Settings,
        refused: Callable[[str], None],
        broken: Callable[[int], None],
        idle: Callable[[], None],
    ) -> None:
        self._host = host
        self._peer = peer
        self._session = session
        self._window = settings.window
        self._lifetime_seconds = settings.message_seconds
        self._refused = refused
        self._broken = broken
        self._idle = idle
        self._waiting: deque[Packet] = deque()
        self._trying = 0
        self._waiting_for_room: list[Callable[[], None]] = []
        self._last_try_at = math.inf
        self._is_closed = False

    def send(self, packet: Packet) -> None:
        if not self._is_closed:
            self._waiting.append(packet)
            self._work()

    @property
    def is_idle(self) -> bool:
        return not self._trying and not self._waiting

    def when_there_is_room(self, then: Callable[[], None]) -> None:
        if self._trying + len(self._waiting) >= self._window:
            self._waiting_for_room.append(then)
        else:
            then()

    def finish(self) -> None:
        self._last_try_at = min(self._last_try_at, self._host.monotonic() + self._lifetime_seconds)

    def close(self) -> None:
        self.finish()
        self._is_closed = True

    def _work(self) -> None:
        while self._waiting and self._trying < self._window:
            self._trying += 1
            self._try(self._waiting.popleft())

    def _try(self, packet: Packet, tries: int = 1) -> None:
        if self._host.is_down:
            return
        self._host.world.network.call(
            self._host.name, self._peer(), self._session, packet, partial(self._answered, packet, tries)
        )

    def _answered(self, packet: Packet, tries: int, answer: str | None) -> None:
        if self._host.is_down:
            return
        world = self._host.world
        if answer in (None, LATER):
            if world.now <= self._last_try_at:
                if tries > 1:
                    world.hinder("a packet had to be sent more than twice")
                world.after(self.RETRY_PAUSE_SECONDS, partial(self._try, packet, tries + 1))
                return
            world.tell(self._host.name, f"packet {packet.number} was never taken")
        if answer == BROKEN:
            self._broken(packet.stream)
        self._trying -= 1
        if self._trying + len(self._waiting) < self._window:
            then, self._waiting_for_room = self._waiting_for_room, []
            for each in then:
                each()
        if answer not in (None, LATER, TAKEN, BROKEN):
            world.tell(self._host.name, f"{self._peer()} refused packet {packet.number}: {answer}")
            self._refused(f"{self._peer()} refused what was sent: {answer}")
        self._work()
        if self.is_idle:
            self._idle()


class SimulatedLine(Line):
    """As `Line`, through a world's network. What is said is told to the world, and so is what is heard."""

    def __init__(self, host: SimulatedHost, session: str, *, caller: str = "") -> None:
        self._host = host
        super().__init__(host.peers, host.settings, session, caller=caller)

    def say(self, message: bytes, *, is_last_word: bool = False) -> None:
        if self._host.name in self._host.world.old and kind_of(message) == "Open":
            message = as_first_version(message)
        self._host.world.says(self._host.name, self.peer, self._session, message)
        super().say(message, is_last_word=is_last_word)

    def take(self, packet: Packet) -> list[bytes]:
        heard = super().take(packet)
        for message in heard:
            self._host.world.hears(self._host.name, self.peer, self._session, message)
        if heard and self._host.name in self._host.world.old:
            heard = [as_first_version(one) if kind_of(one) == "Open" else one for one in heard]
        return heard

    def _new_sender(self, settings: Settings) -> Sender:
        return SimulatedSender(
            self._host,
            lambda: self.peer,
            self._session,
            settings,
            lambda reason: self.lost(reason),
            self._renew,
            self._close_when_done,
        )

    def _new_channel(self) -> Channel:
        return Channel(
            self.peer, lambda: self._host.identity, is_server=self._is_server, bounds=self._bounds, connect=connect
        )
