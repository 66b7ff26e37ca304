"""Notifications are what the reference page says, and nothing waits for them."""

from __future__ import annotations

import json
import logging
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from oslo_config import cfg

from lab.deadline import wait_until
from sami_plugin import notifications
from sami_plugin.errors import ConfigurationError
from sami_plugin.migration.negotiation import NOT_KEPT
from sami_plugin.model.migration import Outcome
from sami_plugin.model.report import Report
from sami_plugin.model.results import MEND_NO_PLACE, WORDS, Reason
from sami_plugin.model.risk import MARKS, Risk
from sami_plugin.model.settings import Limits
from sami_plugin.notifications import Notification, Notifications, Queued, at_risk, ended, from_conf, started

ROOT = pathlib.Path(__file__).parents[2]
REFERENCE = ROOT / "doc" / "source" / "reference"
PAGE = (REFERENCE / "notifications.rst").read_text()
KINDS = ("start", "risk", "end", "error")
AT = 1_790_000_000.0
NO_PLACE = WORDS[Reason.NO_PLACE]
NOT_PLACED = f"not exported: there was no place for it at the destination; {MEND_NO_PLACE}"


def new(role: str = "destination") -> Report:
    hosts = ("compute-1", "compute-2") if role == "source" else ("compute-2", "compute-1")
    made = Report("c0714f5e-33a1-4f0c-9a55-5d1f0c2b7e10", "6ac30000-0000-4000-8000-000000000001", role, *hosts)
    made.request_id = "req-5f2d0c2e-4d0a-4f7b-9d5e-1c5a7f3b9e42"
    return made


def sample(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REFERENCE / "notifications" / f"{kind}.json").read_text())
    return found


def asked() -> Notification:
    report = new()
    losses, degraded = {NO_PLACE: 2}, {NOT_KEPT.format(function=MARKS): 4}
    report.verdict = {"verdict": "ask", "policy": "AskOperator", "flows": 6, "places": 4, "losses": losses}
    risk = Risk(report.guest, report.peer, report.host, 6, ("tcp-ipv4",), 4, losses, degraded)
    return at_risk(report, AT + 0.25, risk, Limits())


def over(outcome: Outcome, reason: str = "") -> Notification:
    report = new("source")
    report.outcome, report.reason = outcome.value, reason
    report.verdict = {"verdict": "ask", "flows": 6, "places": 4, "losses": {NO_PLACE: 2}}
    purged = 3 if outcome is Outcome.MOVED else 0
    report.flows = {"exported": 4, "purged": purged, "kept for other guests": 0, "late": 0, "left_behind": 0}
    report.name(NOT_PLACED, 2, ("tcp 192.0.2.1:1000 > 198.51.100.2:443", "tcp 192.0.2.1:1002 > 198.51.100.2:443"))
    for step, seconds in (("asked", 0.0), ("export began", 0.002), ("offered", 0.031), ("answered", 7.5)):
        report.step(step, AT + seconds, 50 + seconds)
    if outcome is Outcome.MOVED:
        for step, seconds in (("complete", 9.0), ("arrived", 9.125), ("purged", 9.2)):
            report.step(step, AT + seconds, 50 + seconds)
    return ended(report, AT + 10.25)


MADE = {
    "start": started(new(), AT, "asked", is_held=True),
    "risk": asked(),
    "end": over(Outcome.MOVED),
    "error": over(Outcome.UNCLEAR, "nobody said where the guest is"),
}


def conf_with(tmp_path: pathlib.Path, text: str) -> cfg.ConfigOpts:
    file = tmp_path / "agent.conf"
    file.write_text(f"[DEFAULT]\ntransport_url = fake://\n[oslo_messaging_notifications]\n{text}\n")
    conf = cfg.ConfigOpts()
    conf(args=[], default_config_files=[str(file)], default_config_dirs=[])
    return conf


class Broker:
    """Keeps what it is told, and takes nothing while it is away."""

    def __init__(self) -> None:
        self.is_there = threading.Event()
        self.is_there.set()
        self.took: list[Notification] = []

    def take(self, notification: Notification) -> None:
        assert self.is_there.wait(30)
        self.took.append(notification)


@pytest.fixture
def broker() -> Iterator[Broker]:
    made = Broker()
    yield made
    made.is_there.set()


def numbered(number: int) -> Notification:
    return Notification(notifications.START, {"number": number})


# What they say.


@pytest.mark.parametrize("kind", KINDS)
def test_notification_is_as_its_sample_says(
    kind: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oslo.messaging.notification")
    queued = from_conf(conf_with(tmp_path, "driver = log"), MADE[kind].payload["host"])
    queued.tell(lambda: MADE[kind])
    queued.stop()
    (sent,) = (json.loads(one.message) for one in caplog.records if one.name.startswith("oslo.messaging.notification."))
    del sent["message_id"], sent["timestamp"]
    assert sent == sample(kind), json.dumps(sent, indent=4)


@pytest.mark.parametrize("kind", KINDS)
def test_page_shows_the_sample_and_tells_every_field(kind: str) -> None:
    assert f"literalinclude:: notifications/{kind}.json" in PAGE
    assert [field for field in sample(kind)["payload"] if f"``{field}``" not in PAGE] == []


def test_page_tells_the_bounds() -> None:
    assert f"{notifications.MOST_CHARACTERS} characters" in PAGE
    assert f"{notifications.MOST_REASONS} reasons" in PAGE
    assert f"``{notifications.OTHER_REASONS}``" in PAGE
    assert f"{notifications.MOST_WAITING} notifications" in PAGE
    assert f'``version`` is ``"{notifications.VERSION}"``' in PAGE


@pytest.mark.parametrize("outcome", Outcome)
def test_end_is_an_error_where_somebody_has_to_look(outcome: Outcome) -> None:
    is_well = outcome in (Outcome.MOVED, Outcome.STAYED, Outcome.CONTINUED)
    assert over(outcome).event_type == (notifications.END if is_well else notifications.ERROR)
    assert f"``{outcome.value}``" in PAGE


def test_session_that_could_not_be_ended_in_order_is_an_error() -> None:
    told = ended(new(), AT)
    assert (told.event_type, told.payload["outcome"]) == (notifications.ERROR, "failed")


def test_operator_is_told_how_to_answer_only_where_one_is_asked() -> None:
    report = new()
    report.verdict = {"verdict": "veto", "policy": "Refuse"}
    risk = Risk(report.guest, report.peer, report.host, None, why_unknown="the source has not answered yet")
    told = at_risk(report, AT, risk, Limits()).payload
    assert [told[name] for name in ("answer_until", "approve_with", "refuse_with", "silence_means")] == [None] * 4
    assert (told["flows"], told["why_unknown"]) == (None, "the source has not answered yet")


def test_no_name_of_a_flow_is_told() -> None:
    assert "192.0.2.1" not in json.dumps(over(Outcome.MOVED).payload)


def test_words_of_a_peer_are_printable_and_bounded() -> None:
    words = "\x1b[2J\n\U0001f600" * 200
    many = {f"{number} {words}": 2**64 - number for number in range(1000)}
    report = new()
    report.peer = report.reason = words
    report.outcome = "failed"
    report.verdict = {"verdict": words, "policy": "Proceed"}
    report.named = {reason: {"count": count, "flows": []} for reason, count in many.items()}
    risk = Risk(report.guest, report.peer, report.host, 1, losses=many, degraded=many, why_unknown=words)
    for told in (started(report, AT, "asked", is_held=False), at_risk(report, AT, risk, Limits()), ended(report, AT)):
        text = json.dumps(told.payload)
        assert len(text) < 1 << 17
        assert "\\u001b" not in text
        assert "\\n" not in text
    named = ended(report, AT).payload["named"]
    assert list(named.values())[:2] == [2**64, 2**64 - 1]
    assert sum(named.values()) == sum(many.values())


# Where they go.


def test_without_a_driver_nothing_is_sent_and_no_thread_begins(tmp_path: pathlib.Path) -> None:
    before = threading.active_count()
    made = from_conf(conf_with(tmp_path, ""), "host-a")
    assert type(made) is Notifications
    made.tell(numbered, 0)
    made.stop()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("driver = carrier-pigeon", r"\[oslo_messaging_notifications\] driver: there is no 'carrier-pigeon'; .*log"),
        ("driver = log\ntransport_url = none://", r"\[oslo_messaging_notifications\] transport_url: "),
    ],
)
def test_what_does_not_do_is_named(tmp_path: pathlib.Path, line: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        from_conf(conf_with(tmp_path, line), "host-a")


def test_they_are_sent_in_their_order_and_the_rest_before_the_end(broker: Broker) -> None:
    queued = Queued("host-a", broker.take)
    for number in range(500):
        queued.tell(numbered, number)
    queued.stop()
    assert [one.payload["number"] for one in broker.took] == list(range(500))


def test_threads_that_send_at_once_lose_none(broker: Broker) -> None:
    queued = Queued("host-a", broker.take)
    senders = [
        threading.Thread(target=lambda first=first: [queued.tell(numbered, first + one) for one in range(100)])
        for first in range(0, 800, 100)
    ]
    for one in senders:
        one.start()
    for one in senders:
        one.join()
    queued.stop()
    assert sorted(one.payload["number"] for one in broker.took) == list(range(800))


def test_one_that_cannot_be_sent_does_not_keep_the_next_from_it(caplog: pytest.LogCaptureFixture) -> None:
    took: list[object] = []

    def take(notification: Notification) -> None:
        if notification.payload["number"] == 0:
            raise ValueError("the broker does not like it")
        took.append(notification.payload["number"])

    queued = Queued("host-a", take)
    queued.tell(numbered, 0)
    queued.tell(numbered, 1)
    queued.stop()
    assert took == [1]
    assert "sami.migration.start could not be sent" in caplog.text


def test_host_that_has_no_thread_to_spare_sends_later(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    queued = Queued("host-a", broker.take)
    with monkeypatch.context() as poor:
        poor.setattr(threading.Thread, "start", refuse)
        queued.tell(numbered, 0)
    queued.tell(numbered, 1)
    queued.stop()
    assert [one.payload["number"] for one in broker.took] == [0, 1]


def test_those_that_are_too_many_are_dropped_and_counted_in_the_log_once(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.is_there.clear()
    queued = Queued("host-a", broker.take)
    for number in range(notifications.MOST_WAITING + 300):
        queued.tell(numbered, number)
    assert caplog.text.count("those that follow are dropped") == 1
    broker.is_there.set()
    wait_until(lambda: "300 notifications were dropped" in caplog.text, "the count to be told")
    assert [one.payload["number"] for one in broker.took] == list(range(notifications.MOST_WAITING))
    queued.tell(numbered, -1)
    queued.stop()
    assert broker.took[-1].payload["number"] == -1
    assert caplog.text.count("dropped") == 2


def test_broker_that_takes_nothing_delays_nobody_and_the_end_by_a_second(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.is_there.clear()
    closed = threading.Event()
    queued = Queued("host-a", broker.take, closed.set)
    began = time.monotonic()
    for number in range(3):
        queued.tell(numbered, number)
    assert time.monotonic() - began < 0.5
    queued.stop()
    assert time.monotonic() - began < notifications.STOP_SECONDS + 0.5
    assert "3 notifications could not be sent before the end" in caplog.text
    broker.is_there.set()
    assert closed.wait(10)
    queued.tell(numbered, 3)
    assert [one.payload["number"] for one in broker.took] == [0], "what was given up is not sent after all"
