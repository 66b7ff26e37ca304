"""Packets over oslo.messaging RPC.

Each agent is an RPC server named after its host; a packet is one call of the peer's `deliver`. The call returns when
the peer has the packet in its memory, which says nothing about what became of it: acknowledgements that matter are
messages of their own. A call that is not answered is repeated with the same bytes, and the receiver's numbering makes
the repetition harmless. Whoever has the broker can read and forge all of this; what counts is inside of the packets.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, Protocol
from urllib.parse import urlsplit

import oslo_messaging
from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from oslo_config import cfg
from oslo_messaging.rpc import dispatcher

from sami_plugin.errors import Busy, ConfigurationError, PeerUnreachable, SamiError, StreamBroken
from sami_plugin.model.packet import Packet

LOG = logging.getLogger(__name__)

EXCHANGE = TOPIC = "sami"
VERSION = "2.0"
CLOSE_SECONDS = 1.0
FIRST_CALL_SECONDS = 0.1
CONNECT_SECONDS = 3.0
"""For an agent that starts: without its broker it goes on then, since its host's hooks need it."""
LISTEN_AGAIN_SECONDS = 1.0
TAKEN = "taken"
LATER = "later"
"""Answered by an agent that ends, or has more to do than it can keep: the packet is to be sent again."""
BROKEN = "broken"
"""The packet's stream is of no more use; its client begins another."""


# A connection that cannot be made while the broker is away comes as kombu has it; a login or virtual host that the
# broker refuses as amqp has it, which kombu brings.
UNANSWERED = (oslo_messaging.MessagingException, oslo_messaging.MessageUndeliverable, KombuError, OSError)
FAILURES = (*UNANSWERED, AMQPError)


class Receiver(Protocol):
    """Who takes what other hosts say. Called from any thread; may raise `SamiError`."""

    def deliver(self, sender: str, session: str, packet: Packet) -> None:
        """One packet of a session, from who says to be `sender`."""


MORE_THREADS = "raise TasksMax or ulimit -u for the agent"


class Endpoint:
    """What a peer may call. Nothing else is exposed."""

    target = oslo_messaging.Target(version=VERSION)

    def __init__(self, receiver: Receiver, has_stopped: threading.Event) -> None:
        self._receiver = receiver
        self._has_stopped = has_stopped

    @oslo_messaging.expose
    def deliver(self, context: object, sender: str, session: str, stream: int, number: int, payload: str) -> str:
        """Takes one packet. Answers TAKEN, LATER, BROKEN, or what kind of error it is: the broker reads it too."""
        if self._has_stopped.is_set():
            return LATER
        try:
            if not (_is_name(sender) and _is_name(session) and type(number) is int and type(stream) is int):
                return "sender, session, stream and number have to be two names and two numbers"
            packet = Packet(stream, number, base64.b64decode(payload, validate=True))
        except (binascii.Error, TypeError, ValueError):
            return "the payload is no base64"
        try:
            self._receiver.deliver(sender, session, packet)
        except Busy:
            return LATER
        except StreamBroken as error:
            LOG.debug("%s: packet %s of %s: %s", session, number, sender, error)
            return BROKEN
        except SamiError as error:
            LOG.debug("%s: packet %s of %s refused: %s", session, number, sender, error)
            return type(error).__name__
        return TAKEN


def _is_name(word: object) -> bool:
    return isinstance(word, str) and 0 < len(word) <= 255 and word.isprintable()


def refuse_unknown_broker(url: str) -> None:
    """:raises ConfigurationError: RPC over what the URL names was never tried."""
    scheme = urlsplit(url).scheme
    if scheme not in ("rabbit", "fake"):
        raise ConfigurationError(f"transport_url: {scheme or url!r} is not supported; use rabbit:// or fake://")


def _register_what_it_forgets(conf: cfg.ConfigOpts) -> None:
    """oslo.messaging registers these options with the global configuration alone, and reads them from ours.

    Its own ConfFixture reaches for them in the same way.
    """
    for module, group in (("_metrics", "oslo_messaging_metrics"), ("_tracing", "oslo_messaging_tracing")):
        try:
            client = importlib.import_module(f"oslo_messaging.{module}.client")
        except ImportError:  # older ones have no tracing
            continue
        conf.register_opts(getattr(client, group), group=group)  # the list bears the group's name


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


class Transport:
    """One agent's end of a broker."""

    def __init__(self, conf: cfg.ConfigOpts, host: str, url: str | None = None) -> None:
        """Does not connect yet. Without `url`, the option `transport_url` says where the broker is.

        :raises ConfigurationError: the URL is not one that this version may use.
        """
        self.host = host
        self.has_stopped = threading.Event()
        _register_what_it_forgets(conf)
        try:
            self._transport = oslo_messaging.get_rpc_transport(conf, url=url)
            chosen = conf.transport_url if url is None else url
            refuse_unknown_broker(chosen)
            self._is_embedded = urlsplit(chosen).scheme == "fake"
        except (oslo_messaging.InvalidTransportURL, oslo_messaging.DriverLoadFailure) as error:
            raise ConfigurationError(f"transport_url: {error}") from error
        self._server: Any = None
        self._starting = threading.Lock()
        self._connecting: futures.Future[str] | None = None
        """Says in the end why the broker cannot be used; the empty string where it can."""
        # Zed's oslo.messaging has no get_rpc_client.
        make_client = getattr(oslo_messaging, "get_rpc_client", oslo_messaging.RPCClient)
        self._client = make_client(
            self._transport, oslo_messaging.Target(exchange=EXCHANGE, topic=TOPIC, version=VERSION)
        )

    def start(self, receiver: Receiver) -> None:
        """From now on, or from when the broker answers on, this host is heard there.

        Blocks for that, up to `CONNECT_SECONDS`. A broker of hosts that answer elsewhere needs no start.
        """
        if self._is_embedded:
            self._server = self._made_server(receiver)
            self._server.start()
            return
        listening = threading.Thread(target=self._listen, args=(receiver,), name="sami-listening", daemon=True)
        listening.start()
        listening.join(CONNECT_SECONDS)
        if listening.is_alive():
            LOG.warning("%s: the broker cannot be used yet; other hosts hear of this one when it can", self.host)

    def _made_server(self, receiver: Receiver) -> Any:
        return oslo_messaging.get_rpc_server(
            self._transport,
            oslo_messaging.Target(exchange=EXCHANGE, topic=TOPIC, server=self.host),
            [Endpoint(receiver, self.has_stopped)],
            executor="threading",
            access_policy=dispatcher.ExplicitRPCAccessPolicy,
        )

    def _listen(self, receiver: Receiver) -> None:
        """oslo.messaging tries for ever to where the broker is away, and once where it refuses."""
        told: set[str] = set()
        while True:
            with self._starting:
                if self.has_stopped.is_set():
                    return
                self._server = self._made_server(receiver)  # one that could not start does not start again
            try:
                self._server.start()
            except Exception as error:  # a thread's boundary
                reason = _words(error)
                if reason not in told:
                    LOG.error("%s: the broker cannot be used, tried again every second: %s", self.host, reason)
                    LOG.debug("%s: the broker cannot be used", self.host, exc_info=True)
                told.add(reason)
            else:
                LOG.info("%s: the broker answers", self.host)
                break
            self.has_stopped.wait(LISTEN_AGAIN_SECONDS)
        self.connect()

    def connect(self) -> None:
        """Begins to, if that is neither under way nor done. Returns at once."""
        self._begin_to_connect()

    def _begin_to_connect(self) -> futures.Future[str]:
        with self._starting:
            known = self._connecting
            if known is not None and not (known.done() and known.result()):
                return known
            connecting: futures.Future[str] = futures.Future()
            self._connecting = connecting
        if self._is_embedded:
            connecting.set_result("")
        else:
            thread = threading.Thread(target=self._connect, args=(connecting,), name="sami-connecting", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the next call tries again
                connecting.set_result(f"{error}: {MORE_THREADS}")
        return connecting

    def _connect(self, connecting: futures.Future[str]) -> None:
        """By a call that nobody takes: before its first one oslo.messaging tries for ever to hear answers to calls."""
        refusal = ""
        try:
            self._client.prepare(server=self.host, timeout=FIRST_CALL_SECONDS, retry=0).call(
                {}, "deliver", sender="", session="", stream=0, number=0, payload=""
            )
        except UNANSWERED as error:
            LOG.debug("%s: nobody answered the first call: %s", self.host, error)
        except Exception as error:  # a thread's boundary; the next call tries again, and says why
            LOG.debug("%s: the broker cannot be used", self.host, exc_info=True)
            refusal = _words(error)
        connecting.set_result(refusal)

    def stop(self) -> None:
        """Nothing comes in any more, and nothing that goes out is repeated."""
        self.has_stopped.set()
        # With a broker, oslo.messaging joins threads that look up only every ten seconds. Whoever stops an agent need
        # not wait for that: they end with the process. Of `fake://` the next agent of this name in this process would
        # lose messages to the former one.
        closing = threading.Thread(target=self._close, name="sami-closing", daemon=True)
        closing.start()
        closing.join(None if self._is_embedded else CLOSE_SECONDS)

    def _close(self) -> None:
        with self._starting:
            server = self._server
        if server is not None:
            server.stop()
            server.wait()
        self.cleanup()

    def cleanup(self) -> None:
        """Closes the connections of a transport that was not started."""
        self._transport.cleanup()

    def call(self, peer: str, session: str, packet: Packet, timeout_seconds: float) -> str:
        """One try to hand a packet over. Blocks up to `timeout_seconds`.

        :returns: TAKEN, BROKEN, or the peer's words why it did not take it.
        :raises PeerUnreachable: nobody answered, or an agent that takes nothing now.
        """
        connecting = self._begin_to_connect()
        if not futures.wait([connecting], timeout_seconds).done:
            raise PeerUnreachable(f"{peer} does not answer: the broker does not")
        if refusal := connecting.result():
            raise PeerUnreachable(f"{peer} does not answer: the broker cannot be used: {refusal}")
        try:
            answer = self._client.prepare(server=peer, timeout=timeout_seconds, retry=0).call(
                {},
                "deliver",
                sender=self.host,
                session=session,
                stream=packet.stream,
                number=packet.number,
                payload=base64.b64encode(packet.octets).decode("ascii"),
            )
        except FAILURES as error:
            raise PeerUnreachable(f"{peer} does not answer: {_words(error)}") from error
        if answer == LATER:
            raise PeerUnreachable(f"the agent of {peer} is busy or about to end")
        return str(answer)


class Sender:
    """Sends the packets of one session, a window of them at a time, each until it is taken.

    A peer that cannot be reached is tried for as long as the session lasts: whether that is too long is for its
    decisions to say. After `finish` each packet is tried for `lifetime_seconds` more, from then on. No method blocks.
    """

    RETRY_PAUSE_SECONDS = 0.2

    def __init__(
        self,
        transport: Callable[[], Transport],
        peer: Callable[[], str],
        session: str,
        *,
        window: int,
        call_seconds: float,
        lifetime_seconds: float,
        refused: Callable[[str], None],
        broken: Callable[[int], None],
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`peer` tells whom to send to, and `transport` how: they may be known only later, but before the first packet.

        `refused` is told, from another thread, that the peer does not take a packet, and why; `broken`, which stream it
        says is broken; `idle`, that no packet is under way any more.
        """
        self._transport = transport
        self._peer = peer
        self._session = session
        self._window = window
        self._call_seconds = call_seconds
        self._lifetime_seconds = lifetime_seconds
        self._refused = refused
        self._broken = broken
        self._idle = idle
        self._lock = threading.Lock()
        self._under_way = 0
        self._waiting_for_room: list[Callable[[], None]] = []
        self._last_try_at = math.inf
        self._pool = futures.ThreadPoolExecutor(window, thread_name_prefix=f"sami-send-{session[:8]}")
        self._has_thread = self._is_closed = False

    def send(self, packet: Packet) -> None:
        with self._lock:
            self._under_way += 1
        waiting = [packet]
        try:
            self._pool.submit(self._deliver, waiting)
            self._has_thread = True
        except RuntimeError as error:
            if self._is_closed:
                self._one_less()
            elif not self._has_thread:  # else one of those that there are sends it
                waiting.clear()
                self._one_less()
                self._refused(f"{error}: {MORE_THREADS}")

    @property
    def is_idle(self) -> bool:
        """Whether no packet is under way."""
        return not self._under_way

    def when_there_is_room(self, then: Callable[[], None]) -> None:
        """Calls `then`, now or later and from any thread, when fewer packets are under way than the window takes.

        That is what slows an export down to what the other side takes.
        """
        with self._lock:
            if self._under_way >= self._window:
                self._waiting_for_room.append(then)
                return
        then()

    def finish(self) -> None:
        """What is sent from now on is what the last words need to get there. May be repeated."""
        self._last_try_at = min(self._last_try_at, time.monotonic() + self._lifetime_seconds)

    def close(self) -> None:
        """Nothing more will be sent; what is under way goes on. May be repeated."""
        self.finish()
        self._is_closed = True
        self._pool.shutdown(wait=False)

    def _deliver(self, waiting: list[Packet]) -> None:
        if not waiting:
            return
        (packet,) = waiting
        try:
            failure = self._try_until_taken(packet)
        except Exception as error:  # of the messaging library: in a pool's thread nobody else would hear of it
            LOG.exception("%s: packet %s could not be sent", self._session, packet.number)
            failure = f"{type(error).__name__}: {error}"
        finally:
            self._one_less()
        if failure:
            self._refused(failure)

    def _one_less(self) -> None:
        with self._lock:
            self._under_way -= 1
            is_idle = self.is_idle
            if self._under_way >= self._window:
                return
            then, self._waiting_for_room = self._waiting_for_room, []
        for each in then:
            each()
        if is_idle:
            self._idle()

    def _try_until_taken(self, packet: Packet) -> str | None:
        while True:
            try:
                peer, transport = self._peer(), self._transport()
                answer = transport.call(peer, self._session, packet, self._call_seconds)
                if answer == BROKEN:
                    self._broken(packet.stream)
                return None if answer in (TAKEN, BROKEN) else f"{peer} refused what was sent: {answer}"
            except PeerUnreachable as error:
                if time.monotonic() > self._last_try_at:
                    LOG.warning("%s: packet %s was never taken: %s", self._session, packet.number, error)
                    return None
                LOG.info("%s: packet %s is repeated: %s", self._session, packet.number, error)
            if transport.has_stopped.wait(self.RETRY_PAUSE_SECONDS):
                return None
