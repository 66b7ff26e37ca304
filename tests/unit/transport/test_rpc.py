"""Which broker may be used, what a peer may call, and when a message is given up."""

from __future__ import annotations

import base64
import threading
from typing import Any

import pytest

from lab.deadline import wait_until
from sami_plugin.errors import Busy, ConfigurationError, IllegalMessage, PeerUnreachable
from sami_plugin.transport.rpc import LATER, Endpoint, Sender, refuse_foreign_broker


@pytest.mark.parametrize(
    "url",
    [
        "fake://",
        "fake:///",
        "rabbit://127.0.0.1/",
        "rabbit://127.0.0.1:5672/sami",
        "rabbit://127.9.9.9:5672/",
        "rabbit://localhost/",
        "rabbit://localhost:5672/",
        "rabbit://user:secret@127.0.0.1:5672/",
        "rabbit://user:p%40ss@localhost/",
        "rabbit://[::1]/",
        "rabbit://user:secret@[::1]:5672/",
        "rabbit://user:secret@127.0.0.1:5672,user:secret@[::1]:5673/",
    ],
)
def test_broker_of_this_machine_is_taken(url: str) -> None:
    refuse_foreign_broker(url)


@pytest.mark.parametrize(
    "url",
    [
        "rabbit://192.0.2.1/",
        "rabbit://broker.example:5672/",
        "rabbit://user:secret@broker.example/",
        "rabbit://localhost.example/",
        "rabbit://127.0.0.1.example/",
        "rabbit://localhost@broker.example/",
        "rabbit://user:127.0.0.1@broker.example/",
        "rabbit://user:secret@127.0.0.1,user:secret@broker.example/",
        "rabbit://broker.example,127.0.0.1/",
        "rabbit://127.0.0.1,,/",
        "rabbit://[2001:db8::1]:5672/",
        "rabbit://[::]/",
        "rabbit://0.0.0.0/",
        "rabbit:///",
        "rabbit://",
        "kafka://127.0.0.1/",
        "amqp://127.0.0.1/",
        "http://127.0.0.1/",
        "127.0.0.1",
        "",
    ],
)
def test_every_other_broker_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^transport_url: ") as caught:
        refuse_foreign_broker(url)
    assert "secret" not in str(caught.value)


class Heard:
    def __init__(self) -> None:
        self.messages: list[tuple[str, str, int, bytes]] = []
        self.questions: list[tuple[str, ...]] = []

    def deliver(self, sender: str, session: str, number: int, octets: bytes) -> None:
        if number == 13:
            raise IllegalMessage("message 13 is out of the window")
        self.messages.append((sender, session, number, octets))

    def asked(self, sender: str, session: str, guest: str) -> None:
        self.questions.append((sender, session, guest))
        raise PeerUnreachable("the broker does not take the answer")

    def found(self, sender: str, session: str) -> None:
        self.questions.append((sender, session))


def test_endpoint_of_an_agent_that_ends_asks_for_the_message_again() -> None:
    has_stopped = threading.Event()
    has_stopped.set()
    heard = Heard()
    assert Endpoint(heard, has_stopped).deliver({}, "host-a", "s", 1, "") == LATER
    assert heard.messages == []


def test_endpoint_of_a_busy_session_asks_for_the_message_again() -> None:
    class Full(Heard):
        def deliver(self, *_: object) -> None:
            raise Busy("the session has more to do than it can keep")

    assert Endpoint(Full(), threading.Event()).deliver({}, "host-a", "s", 1, "") == LATER


def test_endpoint_takes_a_message() -> None:
    heard = Heard()
    assert (
        Endpoint(heard, threading.Event()).deliver({}, "host-a", "s", 1, base64.b64encode(b"\x00\xff").decode())
        == "taken"
    )
    assert heard.messages == [("host-a", "s", 1, b"\x00\xff")]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ((None, "s", 1, ""), "sender, session and number have to be a text, a text and a number"),
        (("host-a", 7, 1, ""), "sender, session and number have to be a text, a text and a number"),
        (("host-a", "s", "1", ""), "sender, session and number have to be a text, a text and a number"),
        (("host-a", "s", True, ""), "sender, session and number have to be a text, a text and a number"),
        (("host-a", "s", 1, "!"), "the payload is no base64"),
        (("host-a", "s", 1, "größer"), "the payload is no base64"),
        (("host-a", "s", 1, None), "the payload is no base64"),
        (("host-a", "s", 1, ["a"]), "the payload is no base64"),
        (("host-a", "s", 13, ""), "message 13 is out of the window"),
    ],
)
def test_endpoint_says_in_words_why_a_message_is_not_taken(arguments: tuple[Any, ...], answer: str) -> None:
    heard = Heard()
    assert Endpoint(heard, threading.Event()).deliver({}, *arguments) == answer
    assert heard.messages == []


def test_endpoint_passes_questions_and_answers_on_and_raises_nothing() -> None:
    heard = Heard()
    endpoint = Endpoint(heard, threading.Event())
    endpoint.who_is_left({}, "host-b", "s", "guest")
    endpoint.is_left({}, "host-a", "s")
    endpoint.who_is_left({}, "host-b", None, 7)  # type: ignore[arg-type]
    endpoint.is_left({}, ["host-a"], "s")  # type: ignore[arg-type]
    assert heard.questions == [("host-b", "s", "guest"), ("host-a", "s")]


class Broker:
    """Answers each call with the next of `answers`; an exception is raised, and the last answer stands."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, str, int, bytes]] = []
        self.has_stopped = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def call(self, peer: str, session: str, number: int, octets: bytes, timeout_seconds: float) -> str:
        self.calls.append((peer, session, number, octets))
        assert self.may_answer.wait(10)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def refusals() -> list[str]:
    return []


def sender(broker: Broker, refusals: list[str], **options: Any) -> Sender:
    chosen = {"window": 1, "call_seconds": 1.0, "lifetime_seconds": 10.0, **options}
    made = Sender(broker, lambda: "host-b", "s", refused=refusals.append, **chosen)  # type: ignore[arg-type]
    made.RETRY_PAUSE_SECONDS = 0.001
    return made


def finish(made: Sender) -> None:
    made.finish()
    made._pool.shutdown(wait=True)


def test_call_that_is_not_answered_is_made_again_with_the_same_bytes(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("nobody"), PeerUnreachable("nobody"), "taken")
    made = sender(broker, refusals)
    made.send(4, b"bytes")
    finish(made)
    assert broker.calls == [("host-b", "s", 4, b"bytes")] * 3
    assert refusals == []


def test_message_that_is_refused_is_not_sent_again_and_told(refusals: list[str]) -> None:
    broker = Broker("no such session")
    made = sender(broker, refusals)
    made.send(4, b"bytes")
    finish(made)
    assert len(broker.calls) == 1
    assert refusals == ["host-b refused message 4: no such session"]


def test_peer_that_cannot_be_reached_is_tried_until_the_session_ends_and_a_little_longer(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("host-b does not answer"))
    made = sender(broker, refusals, lifetime_seconds=0.05)
    made.send(4, b"bytes")
    wait_until(lambda: len(broker.calls) > 100, "a hundred tries")
    finish(made)
    assert refusals == []


def test_error_of_the_messaging_library_is_told_and_costs_no_thread(refusals: list[str]) -> None:
    broker = Broker(RuntimeError("a bug"), "taken")
    made = sender(broker, refusals)
    made.send(4, b"bytes")
    made.send(5, b"bytes")
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
    made.send(0, b"")
    made.when_there_is_room(lambda: told.append(0))
    assert told == [0]
    for number in (1, 2):
        made.send(number, b"")
    for number in (1, 2):
        made.when_there_is_room(lambda number=number: told.append(number))
    assert told == [0]
    broker.may_answer.set()
    finish(made)
    assert told == [0, 1, 2]
    assert sorted(number for _, _, number, _ in broker.calls) == [0, 1, 2]


def test_stopped_transport_repeats_nothing(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("nobody"))
    made = sender(broker, refusals)
    made.RETRY_PAUSE_SECONDS = 60
    made.send(1, b"")
    broker.has_stopped.set()
    finish(made)
    assert len(broker.calls) == 1
    assert refusals == []


def test_finished_sender_still_sends_what_is_under_way_and_nothing_more(refusals: list[str]) -> None:
    broker = Broker(PeerUnreachable("nobody"), "taken")
    broker.may_answer.clear()
    made = sender(broker, refusals)
    made.send(1, b"")
    made.finish()
    made.finish()
    broker.may_answer.set()
    made.send(2, b"")
    finish(made)
    assert {number for _, _, number, _ in broker.calls} == {1}
