"""What a listener hears of a real migration over a real RabbitMQ, and what a broker that is not there costs."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

from lab import traffic
from lab.agents import AgentProcess, file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.verdict import has_survived

pytestmark = pytest.mark.usefixtures("world")

WATCHED_SECONDS = 4.0
SAMPLES = Path(__file__).parents[2] / "doc" / "source" / "reference" / "notifications"
START, END = "sami.migration.start", "sami.migration.end"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


class Listener:
    """Somebody else's program. A context manager."""

    def __init__(self, url: str) -> None:
        self.heard: list[dict[str, Any]] = []
        transport = oslo_messaging.get_notification_transport(cfg.ConfigOpts(), url=url)
        self._listener = oslo_messaging.get_notification_listener(
            transport, [oslo_messaging.Target(topic="notifications")], [self], executor="threading"
        )

    def _keep(self, priority: str, publisher: str, event_type: str, payload: dict[str, Any]) -> None:
        self.heard.append(
            {"publisher_id": publisher, "event_type": event_type, "priority": priority, "payload": payload}
        )

    def info(self, context: object, publisher: str, event_type: str, payload: dict[str, Any], _: object) -> None:
        self._keep("INFO", publisher, event_type, payload)

    def warn(self, context: object, publisher: str, event_type: str, payload: dict[str, Any], _: object) -> None:
        self._keep("WARN", publisher, event_type, payload)

    def error(self, context: object, publisher: str, event_type: str, payload: dict[str, Any], _: object) -> None:
        self._keep("ERROR", publisher, event_type, payload)

    def of(self, publisher: str) -> list[dict[str, Any]]:
        return [one for one in self.heard if one["publisher_id"] == publisher]

    def __enter__(self) -> Listener:
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # oslo.messaging joins threads that look up only every ten seconds; they end with the process.
        threading.Thread(target=self._listener.stop, daemon=True).start()


@contextmanager
def cloud(broker: Broker, options: Mapping[str, str]) -> Iterator[tuple[Lab, dict[str, AgentProcess]]]:
    """A lab whose hosts have agents, with these options of their notifications."""
    with Lab() as lab, ExitStack() as stack:
        agents = {
            name: stack.enter_context(
                AgentProcess(
                    lab.folder,
                    name,
                    {**file_and_broker(host.scope_file, broker.url), "oslo_messaging_notifications": options},
                )
            )
            for name, host in lab.hosts.items()
        }
        yield lab, agents


def move(lab: Lab, agents: Mapping[str, AgentProcess]) -> dict[str, dict[str, Any]]:
    """A guest with a download, from a to b; the reports by host."""

    def tell(host: Host, phase: str, guest: Guest) -> None:
        agents[host.name].tell_of(phase, guest)

    guest = lab.add_guest("g", "a")
    flow = traffic.download(lab, guest)
    wait_until(lambda: flow.samples() and flow.samples()[-1].total > 300_000, "the download to be under way", 8)
    record = lab.migrate(guest, "a", "b", tell, copy_seconds=0.5)
    assert record.errors == []
    until = record.cut_over_at + WATCHED_SECONDS
    wait_until(lambda: flow.samples()[-1].time > until, "the time that is watched", WATCHED_SECONDS + 5)
    words = "\n".join(agent.log.read_text()[-3000:] for agent in agents.values())
    assert has_survived(flow.samples(), record.cut_over_at, WATCHED_SECONDS), words
    for agent in agents.values():
        wait_until(lambda agent=agent: agent.ended(guest.uuid), f"agent {agent.name} to end its session", 30)
    return {name: agent.reports(guest.uuid)[0] for name, agent in agents.items()}


def test_listener_hears_the_start_and_the_end_of_a_migration_from_both_hosts(broker: Broker) -> None:
    with Listener(broker.url) as listener, cloud(broker, {"driver": "messagingv2"}) as (lab, agents):
        reports = move(lab, agents)
        wait_until(lambda: len(listener.heard) >= 4, "four notifications to be heard", 20)
    assert len(listener.heard) == 4
    for name, role in (("a", "source"), ("b", "destination")):
        heard = listener.of(f"sami.{name}")
        assert [(one["event_type"], one["priority"]) for one in heard] == [(START, "INFO"), (END, "INFO")]
        begun, over = (one["payload"] for one in heard)
        assert begun["at"] < over["at"]
        report = reports[name]
        for payload in (begun, over):
            assert [payload[field] for field in ("session", "guest", "role", "host")] == [
                report["session"],
                report["guest"],
                role,
                name,
            ]
        assert (over["outcome"], over["counts"]) == ("moved", report["flows"])
        assert over["milliseconds"] == report["milliseconds"]
        for payload, kind in ((begun, "start"), (over, "end")):
            sample = json.loads((SAMPLES / f"{kind}.json").read_text())
            assert list(payload) == list(sample["payload"])


@pytest.mark.parametrize("is_there", [False, True], ids=["away", "hangs"])
def test_broker_of_notifications_that_is_not_there_costs_a_migration_nothing(broker: Broker, is_there: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # connections are made, and nobody answers
        port = nobody.getsockname()[1]
        if not is_there:
            nobody.close()
        options = {"driver": "messagingv2", "transport_url": f"rabbit://guest:guest@127.0.0.1:{port}/"}
        with cloud(broker, options) as (lab, agents):
            reports = move(lab, agents)
            assert [reports[name]["outcome"] for name in "ab"] == ["moved", "moved"]
            for agent in agents.values():
                began = time.monotonic()
                agent.stop()
                # The RPC's broker has a second of its own; the rest is the process.
                assert time.monotonic() - began < 5
                assert "2 notifications could not be sent before the end" in agent.log.read_text()


def test_broker_of_notifications_that_comes_back_is_told_what_it_missed(broker: Broker, tmp_path: Path) -> None:
    theirs = Broker(tmp_path)
    with cloud(broker, {"driver": "messagingv2", "transport_url": theirs.url}) as (lab, agents):
        move(lab, agents)
        with theirs, Listener(theirs.url) as listener:
            wait_until(lambda: len(listener.heard) >= 4, "four notifications to be heard", 40)
    for name in "ab":
        assert [one["event_type"] for one in listener.of(f"sami.{name}")] == [START, END]
