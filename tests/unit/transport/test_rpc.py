"""Which broker may be used, what a peer may call, and when a message is given up."""

from __future__ import annotations

import base64
import threading
from typing import Any

import pytest
from amqp.exceptions import AccessRefused
from oslo_config import cfg

from lab.deadline import wait_until
from sami_plugin.errors import Busy, ConfigurationError, IllegalMessage, PeerUnreachable, StreamBroken
from sami_plugin.model.packet import Packet
from sami_plugin.transport import rpc
from sami_plugin.transport.rpc import LATER, Endpoint, Sender, Transport, refuse_unknown_broker
from tests.unit.threads import no_thread_once


@pytest.mark.parametrize("url", ["fake://", "rabbit://u:p@192.0.2.1:5672,u:p@[2001:db8::1]:5672/sami"])
def test_broker_that_was_tried_is_taken(url: str) -> None:
    refuse_unknown_broker(url)


@pytest.mark.parametrize("url", ["kafka://127.0.0.1/", "amqp://127.0.0.1/", "http://127.0.0.1/", "127.0.0.1", ""])
def test_every_other_kind_of_broker_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^transport_url: .*use rabbit:// or fake://"):
        refuse_unknown_broker(url)


class Heard:
    def __init__(self) -> None:
        self.packets: list[tuple[str, str, Packet]] = []

    def deliver(self, sender: str, session: str, packet: Packet) -> None:
        if packet.number == 13:
            raise IllegalMessage("guest 11111111-2222-3333 is none of yours")
        if packet.number == 14:
            raise StreamBroken("TLS: bad record mac")
        self.packets.append((sender, session, packet))


def test_endpoint_of_an_agent_that_ends_asks_for_the_message_again() -> None:
    has_stopped = threading.Event()
    has_stopped.set()
    heard = Heard()
    assert Endpoint(heard, has_stopped).deliver({}, "host-a", "s", 0, 1, "") == LATER
    assert heard.packets == []


def test_endpoint_of_a_busy_session_asks_for_the_message_again() -> None:
    class Full(Heard):
        def deliver(self, *_: object) -> None:
            raise Busy("the session has more to do than it can keep")

    assert Endpoint(Full(), threading.Event()).deliver({}, "host-a", "s", 0, 1, "") == LATER


def test_endpoint_takes_a_message() -> None:
    heard = Heard()
    assert (
        Endpoint(heard, threading.Event()).deliver({}, "host-a", "s", 2, 1, base64.b64encode(b"\x00\xff").decode())
        == "taken"
    )
    assert heard.packets == [("host-a", "s", Packet(2, 1, b"\x00\xff"))]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("x\n", "s", 0, 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("\ud800", "s", 0, 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("x" * 256, "s", 0, 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("", "s", 0, 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        ((None, "s", 0, 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("host-a", 7, 0, 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("host-a", "s", 0, "1", ""), "sender, session, stream and number have to be two names and two numbers"),
        (("host-a", "s", 0, True, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("host-a", "s", 0, 1, "!"), "the payload is no base64"),
        (("host-a", "s", 0, 1, "größer"), "the payload is no base64"),
        (("host-a", "s", 0, 1, None), "the payload is no base64"),
        (("host-a", "s", 0, 1, ["a"]), "the payload is no base64"),
        (("host-a", "s", "0", 1, ""), "sender, session, stream and number have to be two names and two numbers"),
        (("host-a", "s", 0, 13, ""), "IllegalMessage"),
        (("host-a", "s", 0, 14, ""), "broken"),
    ],
)
def test_endpoint_says_why_a_packet_is_not_taken_in_words_for_anybody(arguments: tuple[Any, ...], answer: str) -> None:
    heard = Heard()
    assert Endpoint(heard, threading.Event()).deliver({}, *arguments) == answer
    assert heard.packets == []


class Broker:
    """Answers each call with the next of `answers`; an exception is raised, and the last answer stands."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, str, Packet]] = []
        self.has_stopped = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def call(self, peer: str, session: str, packet: Packet, timeout_seconds: float) -> str:
        self.calls.append((peer, session, packet))
        assert self.may_answer.wait(10)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def refusals() -> list[str]:
    return []


def sender(broker: Broker, refusals: list[str], **options: Any) -> Sender:
    chosen = {"window": 1, "call_seconds": 1.0, "lifetime_seconds": 10.0, "broken": refusals.append, **options}
    made = Sender(lambda: broker, lambda: "host-b", "s", refused=refusals.append, **chosen)  # type: ignore[arg-type]
    made.RETRY_PAUSE_SECONDS = 0.001
    return made


def finish(made: Sender) -> None:
    made.finish()
    made._pool.shutdown(wait=True)


def test_call_that_is_not_answered_is_made_again_with_the_same_bytes(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("nobody"), PeerUnreachable("nobody"), "taken")
    made = sender(broker, refusals)
    made.send(Packet(0, 4, b"bytes"))
    finish(made)
    assert broker.calls == [("host-b", "s", Packet(0, 4, b"bytes"))] * 3
    assert refusals == []


def test_message_that_is_refused_is_not_sent_again_and_told(refusals: list[str]) -> None:
    broker = Broker("no such session")
    made = sender(broker, refusals)
    made.send(Packet(0, 4, b"bytes"))
    finish(made)
    assert len(broker.calls) == 1
    assert refusals == ["host-b refused what was sent: no such session"]


def test_stream_that_is_broken_at_the_peer_is_told_and_the_packet_is_not_sent_again() -> None:
    broken: list[int] = []
    refusals: list[str] = []
    broker = Broker("broken")
    made = sender(broker, refusals, broken=broken.append)
    made.send(Packet(3, 4, b"bytes"))
    finish(made)
    assert (broken, refusals, len(broker.calls)) == ([3], [], 1)


def test_peer_that_cannot_be_reached_is_tried_until_the_session_ends_and_a_little_longer(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("host-b does not answer"))
    made = sender(broker, refusals, lifetime_seconds=0.05)
    made.send(Packet(0, 4, b"bytes"))
    wait_until(lambda: len(broker.calls) > 100, "a hundred tries")
    finish(made)
    assert refusals == []


def test_error_of_the_messaging_library_is_told_and_costs_no_thread(refusals: list[str]) -> None:
    broker = Broker(RuntimeError("a bug"), "taken")
    made = sender(broker, refusals)
    made.send(Packet(0, 4, b"bytes"))
    made.send(Packet(0, 5, b"bytes"))
    finish(made)
    assert refusals == ["RuntimeError: a bug"]
    assert len(broker.calls) == 2


def test_who_waits_for_room_is_told_when_fewer_messages_are_under_way_than_the_window_takes(
    refusals: list[str],
) -> None:
    broker = Broker("taken")
    broker.may_answer.clear()
    made = sender(broker, refusals, window=2)
    told: list[int] = []
    made.send(Packet(0, 0, b""))
    made.when_there_is_room(lambda: told.append(0))
    assert told == [0]
    for number in (1, 2):
        made.send(Packet(0, number, b""))
    for number in (1, 2):
        made.when_there_is_room(lambda number=number: told.append(number))
    assert told == [0]
    broker.may_answer.set()
    finish(made)
    assert told == [0, 1, 2]
    assert sorted(packet.number for _, _, packet in broker.calls) == [0, 1, 2]


def test_packet_for_which_no_thread_begins_is_sent_by_one_that_there_is(
    refusals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker("taken")
    broker.may_answer.clear()
    made = sender(broker, refusals, window=2)
    made.send(Packet(0, 0, b""))
    with no_thread_once(monkeypatch, "sami-send") as refused:
        made.send(Packet(0, 1, b""))
    assert refused
    broker.may_answer.set()
    wait_until(lambda: made.is_idle, "all to be sent")
    finish(made)
    assert [packet.number for _, _, packet in broker.calls] == [0, 1]
    assert refusals == []


def test_packet_that_no_thread_sends_is_refused_once_and_not_sent_later(
    refusals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker("taken")
    made = sender(broker, refusals, window=2)
    with no_thread_once(monkeypatch, "sami-send"):
        made.send(Packet(0, 0, b""))
    assert made.is_idle
    assert refusals == ["can't start new thread: raise TasksMax or ulimit -u for the agent"]
    made.send(Packet(0, 1, b""))
    finish(made)
    assert made.is_idle
    assert [packet.number for _, _, packet in broker.calls] == [1]


def test_stopped_transport_repeats_nothing(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("nobody"))
    made = sender(broker, refusals)
    made.RETRY_PAUSE_SECONDS = 60
    made.send(Packet(0, 1, b""))
    broker.has_stopped.set()
    finish(made)
    assert len(broker.calls) == 1
    assert refusals == []


def test_closed_sender_still_sends_what_is_under_way_and_nothing_more(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("nobody"), "taken")
    broker.may_answer.clear()
    made = sender(broker, refusals)
    made.send(Packet(0, 1, b""))
    made.close()
    made.close()
    broker.may_answer.set()
    made.send(Packet(0, 2, b""))
    finish(made)
    assert {packet.number for _, _, packet in broker.calls} == {1}


class Refusing:
    """A broker that refuses its first uses, as amqp says it; it stands for oslo.messaging's client and its servers."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.uses = 0

    def prepare(self, **_: object) -> Refusing:
        return self

    def call(self, *_: object, **__: object) -> str:
        self._use()
        return "taken"

    def server(self, *_: object) -> Refusing:
        self.has_failed = False
        return self

    def start(self) -> None:
        if not self.has_failed:  # as oslo.messaging, which does nothing when it is started a second time
            self.has_failed = True
            self._use()

    def stop(self) -> None: ...

    def wait(self) -> None: ...

    def _use(self) -> None:
        self.uses += 1
        if self.uses <= self.refusals:
            raise AccessRefused("Login was refused")


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    monkeypatch.setattr(rpc, "LISTEN_AGAIN_SECONDS", 0.01)
    return Transport(cfg.ConfigOpts(), "host-a", "rabbit://u:p@127.0.0.1:1/")


def test_broker_that_refused_the_login_once_is_tried_again_by_the_next_call(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_client", Refusing(2))
    for _ in range(2):
        with pytest.raises(PeerUnreachable, match="Login was refused"):
            transport.call("host-b", "s", Packet(0, 0, b""), 10)
    assert transport.call("host-b", "s", Packet(0, 0, b""), 10) == "taken"


def test_agent_that_had_no_thread_to_connect_does_it_by_the_next_call(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_client", Refusing(0))
    with no_thread_once(monkeypatch, "sami-connecting"):
        with pytest.raises(PeerUnreachable, match="can't start new thread: raise TasksMax"):
            transport.call("host-b", "s", Packet(0, 0, b""), 10)
        assert transport.call("host-b", "s", Packet(0, 0, b""), 10) == "taken"


def test_login_that_is_refused_later_is_no_error_of_the_messaging_library(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_client", Refusing(0))
    transport.call("host-b", "s", Packet(0, 0, b""), 10)
    monkeypatch.setattr(transport, "_client", Refusing(1))
    with pytest.raises(PeerUnreachable, match="Login was refused"):
        transport.call("host-b", "s", Packet(0, 0, b""), 10)


def test_agent_whose_login_was_refused_listens_when_it_is_not_and_says_why_it_did_not_once(
    transport: Transport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Refusing(3)
    monkeypatch.setattr(transport, "_client", Refusing(0))
    monkeypatch.setattr(rpc.oslo_messaging, "get_rpc_server", lambda *_, **__: broker.server())
    caplog.set_level("INFO")
    transport.start(Heard())
    wait_until(lambda: "the broker answers" in caplog.text, "a start that is not refused")
    assert broker.uses == 4
    assert caplog.text.count("Login was refused") == 1


def test_agent_that_ends_listens_no_more(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Refusing(10**9)
    monkeypatch.setattr(rpc, "CONNECT_SECONDS", 0.01)
    monkeypatch.setattr(rpc.oslo_messaging, "get_rpc_server", lambda *_, **__: broker.server())
    others = set(threading.enumerate())
    transport.start(Heard())
    wait_until(lambda: broker.uses > 2, "some tries")
    transport.stop()
    wait_until(
        lambda: "sami-listening" not in {one.name for one in {*threading.enumerate()} - others}, "the thread's end"
    )
