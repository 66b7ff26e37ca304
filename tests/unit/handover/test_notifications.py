"""What is told of a migration while it goes on, and that it never waits for who is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sami_plugin import notifications
from sami_plugin.agent import Agent
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import Veto
from sami_plugin.model.migration import Phase
from sami_plugin.notifications import STOP_SECONDS, Notification, Notifications, Queued
from sami_plugin.policies.base import Policy
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator, Refuse
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import SETTINGS, ZONES, begin, finish, guest_with_flows, held, until, until_idle

SAMPLES = Path(__file__).parents[3] / "doc" / "source" / "reference" / "notifications"
START, RISK, END, ERROR = (f"sami.migration.{kind}" for kind in ("start", "risk", "end", "error"))


class Kept(Notifications):
    """Keeps them."""

    def __init__(self) -> None:
        self.all: list[Notification] = []

    def tell(self, made: Callable[..., Notification], *of: Any, **named: Any) -> None:
        self.all.append(made(*of, **named))

    @property
    def kinds(self) -> list[str]:
        return [one.event_type for one in self.all]


@contextmanager
def two_hosts(
    folder: Path, *, places: int = 1000, policy: Policy | None = None, **more: float
) -> Iterator[tuple[Hosts, Kept, Kept]]:
    devices = {"host-a": MemoryDevice("a"), "host-b": MemoryDevice("b", capacity=places)}
    limits = replace(SETTINGS.limits, verdict_seconds=2.0, ask_seconds=5.0, **more)
    settings = replace(SETTINGS, headroom_percent=0.0, limits=limits)
    with Hosts(folder, tuple(devices), lambda name: MemoryDriver(devices[name]), settings=settings) as hosts:
        kept = [Kept(), Kept()]
        for agent, each in zip(hosts.agents.values(), kept, strict=True):
            agent.host.notifications = each
        if policy is not None:
            hosts.agents["host-b"].host.policies = Policies(policy)
        yield hosts, kept[0], kept[1]


def payload(kept: Kept, kind: str) -> dict[str, Any]:
    (found,) = (one.payload for one in kept.all if one.event_type == kind)
    return found


def assert_fields_are_those_of_the_samples(*kept: Kept) -> None:
    for one in (one for each in kept for one in each.all):
        sample = json.loads((SAMPLES / f"{one.event_type.rpartition('.')[2]}.json").read_text())
        assert list(one.payload) == list(sample["payload"])
        json.dumps(one.payload)


def test_migration_of_which_all_is_well_is_told_by_its_start_and_its_end(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (hosts, source, destination):
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
    assert source.kinds == destination.kinds == [START, END]
    assert (payload(source, START)["state"], payload(destination, START)["state"]) == ("copying", "asked")
    assert (payload(source, START)["is_held"], payload(destination, START)["is_held"]) == (False, True)
    assert payload(source, END)["counts"]["purged"] == payload(destination, END)["counts"]["imported"] == 100
    assert {one.payload["guest"] for one in (*source.all, *destination.all)} == {guest}
    assert len({one.payload["session"] for one in (*source.all, *destination.all)}) == 1
    assert_fields_are_those_of_the_samples(source, destination)


def test_operator_answers_with_the_command_that_the_notification_tells(tmp_path: Path) -> None:
    with two_hosts(tmp_path, places=4, policy=AskOperator()) as (hosts, source, destination):
        guest = guest_with_flows(hosts, 6)
        with ThreadPoolExecutor(1) as pool:
            beginning = pool.submit(begin, hosts, guest)
            until(lambda: RISK in destination.kinds)
            risk = payload(destination, RISK)
            *command, session = risk["approve_with"].split()
            assert command == ["sami", "session", "approve"]
            until(lambda: getattr(hosts.agents["host-b"].sessions()[0], "is_asking", False))
            hosts.agents["host-b"].decide(session, may_come=True)
            beginning.result()
        finish(hosts, guest)
        until_idle(hosts)
    assert (risk["flows"], risk["carried"], sum(risk["losses"].values())) == (6, 4, 2)
    assert (risk["verdict"], risk["policy"], risk["silence_means"]) == ("ask", "AskOperator", "proceed")
    assert risk["answer_until"] == risk["at"] + 5.0
    assert (source.kinds, destination.kinds) == ([START, END], [START, RISK, END])
    assert list(payload(source, END)["named"].values()) == [2]
    assert_fields_are_those_of_the_samples(source, destination)


def test_migration_that_the_policy_refuses_is_a_risk_and_no_error(tmp_path: Path) -> None:
    with two_hosts(tmp_path, places=4, policy=Refuse()) as (hosts, source, destination):
        guest = guest_with_flows(hosts, 6)
        with pytest.raises(Veto):
            begin(hosts, guest)
        until_idle(hosts)
    assert (source.kinds, destination.kinds) == ([START, END], [START, RISK, END])
    assert payload(destination, RISK)["verdict"] == "veto"
    assert payload(destination, END)["outcome"] == payload(source, END)["outcome"] == "stayed"


def test_guest_that_left_and_nobody_asked_is_an_error_at_the_source(tmp_path: Path) -> None:
    with two_hosts(tmp_path, arrival_seconds=0.5) as (hosts, source, _):
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        until_idle(hosts)
    assert source.kinds == [START, ERROR]
    assert (payload(source, START)["state"], payload(source, START)["peer"]) == ("abandoned", "not known")
    assert payload(source, ERROR)["outcome"] == "purged without arrival"
    assert_fields_are_those_of_the_samples(source)


def test_session_that_fails_by_our_own_mistake_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_hosts(tmp_path) as (hosts, source, _):
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")

        def fail(*_: object) -> None:
            raise RuntimeError("ours")

        monkeypatch.setattr("sami_plugin.handover.SourceSession._counts", fail)
        monkeypatch.setattr("sami_plugin.handover.SourceSession._step", fail)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        until(lambda: ERROR in source.kinds)
    assert payload(source, ERROR)["outcome"] == "failed"


def test_broker_that_takes_nothing_delays_neither_a_migration_nor_the_agents_end(tmp_path: Path) -> None:
    is_back = threading.Event()
    try:
        with two_hosts(tmp_path) as (hosts, _, _):
            for name, agent in hosts.agents.items():
                agent.host.notifications = Queued(name, lambda _: is_back.wait(60))
            guest = guest_with_flows(hosts)
            began = time.monotonic()
            begin(hosts, guest)
            finish(hosts, guest)
            until_idle(hosts)
            assert time.monotonic() - began < 10
            assert len(held(hosts, "host-b", ZONES["host-b"])) == 100
            assert held(hosts, "host-a") == set()
            began = time.monotonic()
            with ThreadPoolExecutor() as pool:
                list(pool.map(Agent.stop, hosts.agents.values()))
            assert time.monotonic() - began < STOP_SECONDS + 3
    finally:
        is_back.set()


def test_session_of_an_agent_that_is_started_anew_ends_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"host-a": Kept(), "host-b": Kept()}
    monkeypatch.setattr(notifications, "from_conf", lambda _, host: kept[host])
    with Hosts(tmp_path, tuple(kept), lambda name: MemoryDriver(MemoryDevice(name)), settings=SETTINGS) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.kill("host-b")
        assert kept["host-b"].kinds == [START]
        hosts.start("host-b")
        hosts.say("host-b", Phase.STARTED, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100
    for each in kept.values():
        first, second = dict.fromkeys(one.payload["session"] for one in each.all)
        told = {
            one: [(t.event_type, t.payload) for t in each.all if t.payload["session"] == one] for one in (first, second)
        }
        assert [kind for kind, _ in told[first]] == [kind for kind, _ in told[second]] == [START, END]
        assert [told[one][1][1]["outcome"] for one in (first, second)] == ["continued", "moved"]
        assert second in told[first][1][1]["reason"]


def test_host_with_the_default_options_sends_nothing(tmp_path: Path) -> None:
    with Hosts(tmp_path, ("host-a",), lambda name: MemoryDriver(MemoryDevice(name))) as hosts:
        assert type(hosts.agents["host-a"].host.notifications) is Notifications
