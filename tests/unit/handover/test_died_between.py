"""An agent dies between writing down and doing: what is done and what is not are told apart when it is there again."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sami_plugin.channel.tls import Channel
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.handover import SourceSession
from sami_plugin.handover.destination import UNTOLD
from sami_plugin.line import Line
from sami_plugin.migration import destination, source
from sami_plugin.model.flows import Batch
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.results import Results
from sami_plugin.model.scope import Scope
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.hypervisor import Hypervisor
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    ZONES,
    begin,
    brief,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    leave,
    leaving_session,
    limited,
    mark,
    ports,
    prepare,
    report,
    sessions_follow,
    tcp_flows,
    until,
    until_idle,
    words,
)

FIRST_TEN = set(range(1000, 1010))


class Dies(MemoryDriver):
    """The session that does what it is not to do ends there, as with its agent."""

    at = ""
    has_died = False

    def insert(self, scope: Scope, batch: Batch) -> Results:
        self._die("insert")
        return super().insert(scope, batch)

    def remove(self, scope: Scope, identities: Batch) -> Results:
        self._die("remove")
        return super().remove(scope, identities)

    def _die(self, at: str) -> None:
        if at == self.at:
            self.at, self.has_died = "", True
            raise SystemExit


def mortal(name: str) -> MemoryDriver:
    return Dies(MemoryDevice(name))


def die(hosts: Hosts, name: str = "host-b") -> None:
    """The host's agent has died where it was to, and its hypervisor is heard by nobody."""
    driver = hosts.drivers[name]
    assert isinstance(driver, Dies)
    until(lambda: driver.has_died)
    hosts.kill(name)


def die_before_anything_is_put_in(hosts: Hosts) -> str:
    """All that the guest has is written down."""
    guest = guest_with_flows(hosts)
    prepare(hosts, guest)
    until(lambda: hosts.has_step("host-b", guest, "in sync"))
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.drivers["host-b"].at = "insert"  # type: ignore[attr-defined]
    words(hosts, guest, ("host-b", Phase.STARTED))
    die(hosts)
    return guest


def test_flows_that_were_written_down_and_not_put_in_are_put_in_by_the_next_agent(tmp_path: Path) -> None:
    """The guest runs there by then, so what is missing might be what it has ended."""
    with hosts_in(tmp_path, driver=mortal) as hosts:
        guest = die_before_anything_is_put_in(hosts)
        leave(hosts, guest)
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.RESUMED))
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())
        assert any("may have ended here" in reason for reason in report(hosts, "host-b", guest)["named"])


def test_source_whose_agent_ended_when_it_had_taken_the_call_is_called_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has written down nothing yet, and its answer ended with it."""
    with hosts_in(tmp_path, brief()) as hosts:
        guest = guest_with_flows(hosts)
        monkeypatch.setattr(destination, "CALL_AGAIN_SECONDS", 0.2)
        real, taken = Line._send, threading.Event()

        def send(line: Line, channel: Channel) -> None:
            if line._is_server and not hosts.agents["host-a"].sessions():
                taken.set()
            else:
                real(line, channel)

        with monkeypatch.context() as patched:
            patched.setattr(Line, "_send", send)
            hosts.agents["host-b"].note(MigrationEvent(guest, Phase.PREPARE, "host-a"))
            assert taken.wait(10)
            hosts.kill("host-a")
        hosts.start("host-a")
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())


def test_source_whose_agent_ended_when_it_was_asked_anew_and_had_not_written_that_down_is_asked_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts_in(tmp_path, brief()) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.kill("host-a")
        with monkeypatch.context() as patched:
            asked = threading.Event()
            patched.setattr(SourceSession, "continue_with", lambda older, successor: asked.set())
            hosts.start("host-a")
            assert asked.wait(10)
            hosts.kill("host-a")
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.OUTGOING))
        until(lambda: sessions_follow(hosts), 3)
        finish(hosts, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())


@pytest.mark.parametrize(
    "told", ["late", "first", pytest.param("meanwhile", id="while the hypervisor is asked whether it stays")]
)
def test_guest_that_leaves_against_the_other_host_s_veto_while_no_agent_is_there_takes_its_flows_along(
    tmp_path: Path, told: str
) -> None:
    """The agent that is started anew hears of the veto, and the guest has left all the same."""
    hypervisors = {name: Hypervisor(name) for name in ZONES}
    with hosts_in(tmp_path, brief(open_seconds=10.0), hypervisors=hypervisors) as hosts:
        guest, here = guest_with_flows(hosts), hypervisors["host-a"]
        hosts.agents["host-b"].host.policies = Policies(AskOperator())
        hosts.drivers["host-b"].device.capacity = 60
        here.mark(guest)
        here.leaving.add(guest)
        comes = MigrationEvent(guest, Phase.PREPARE, domain=here.description(guest))
        hosts.agents["host-b"].note(comes)
        until(lambda: any(getattr(one, "is_asking", False) for one in hosts.agents["host-b"].sessions()))
        hosts.kill("host-a")
        hosts.agents["host-b"].decide(guest, may_come=False)
        until(lambda: not hosts.agents["host-b"].sessions())
        hosts.drivers["host-b"].device.capacity = None
        here.leaving.clear()
        del here.marks[guest]
        hosts.unplug("host-a", guest)
        is_asked, may_say = threading.Event(), threading.Event()
        real = here.is_leaving
        here.is_leaving = lambda guest: (is_asked.set(), may_say.wait(10), real(guest))[-1]  # type: ignore[method-assign]
        hosts.start("host-a")
        assert is_asked.wait(10)
        left = MigrationEvent(guest, Phase.STOPPED, role="source")
        if told == "meanwhile":
            hosts.agents["host-a"].note(left)
        may_say.set()
        until(lambda: told == "meanwhile" or not hosts.agents["host-a"].sessions())
        if told == "first":
            hosts.agents["host-a"].note(left)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.agents["host-b"].note(replace(comes, phase=Phase.STARTED, role="destination", is_incoming=True))
        words(hosts, guest, ("host-b", Phase.RESUMED), ("host-a", Phase.STOPPED))
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())


@pytest.mark.parametrize("comes", [True, False])
def test_removal_that_was_written_down_and_not_done_is_done_by_the_next_agent(tmp_path: Path, comes: bool) -> None:
    with hosts_in(tmp_path, driver=mortal) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.drivers["host-b"].at = "remove"  # type: ignore[attr-defined]
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), tcp_flows(10).identities)
        die(hosts)
        hosts.start("host-b")
        if comes:
            words(hosts, guest, ("host-b", Phase.STARTED))
            until(lambda: ports(hosts, "host-b") == ALL - FIRST_TEN)
            finish(hosts, guest)
        else:
            hosts.say("host-a", Phase.ROLLBACK, guest)
            words(hosts, guest, ("host-b", Phase.STOPPED))
        until_idle(hosts)
        assert ports(hosts, "host-b") == (ALL - FIRST_TEN if comes else set())


def test_what_changed_at_the_source_while_its_agent_was_away_is_taken_where_the_guest_did_not_change_it(
    tmp_path: Path,
) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        here = hosts.scope("host-a", guest)
        hosts.kill("host-a")
        mark(hosts, "host-a", guest, 1003, 7)
        mark(hosts, "host-a", guest, 1004, 7)
        hosts.drivers["host-a"].remove(here, tcp_flows(1, first_port=1005).identities)
        hosts.say("host-b", Phase.RESUMED, guest)
        mark(hosts, "host-b", guest, 1004, 8)
        hosts.drivers["host-b"].remove(hosts.scope("host-b", guest), tcp_flows(1, first_port=1006).identities)
        hosts.start("host-a")
        hosts.unplug("host-a", guest)
        words(hosts, guest, ("host-a", Phase.STOPPED))
        until_idle(hosts)
        marks = {port: value for port, value in held(hosts, "host-b") if value}
        assert (marks, held(hosts, "host-a")) == ({1003: 7, 1004: 8}, set())
        assert ports(hosts, "host-b") == ALL - {1006}
        (gone,) = (told for why, told in report(hosts, "host-a", guest)["named"].items() if "not at the source" in why)
        assert gone["count"] == 1


def test_what_the_guest_has_changed_stays_however_often_it_is_told_anew(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        mark(hosts, "host-b", guest, 1004, 8)
        for _ in range(2):
            hosts.kill("host-a")
            hosts.start("host-a")
            words(hosts, guest, ("host-a", Phase.OUTGOING))
            until(lambda: sessions_follow(hosts))
        leave(hosts, guest)
        until_idle(hosts)
        assert {port: value for port, value in held(hosts, "host-b") if value} == {1004: 8}
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())


def test_what_was_exported_and_not_told_yet_is_the_next_session_s_too(tmp_path: Path) -> None:
    """It may be gone when that exports; and what that writes down comes behind it."""
    with hosts_in(tmp_path) as hosts, leaving_session(hosts, guest_with_flows(hosts)) as session:
        session._line_up(session._pieces)
        former = session._as_former()
        assert sum(len(port.flows) for port in former.ports) == 100
        assert former.payloads == session.host.journal.payload_count(session.id) > 0


@pytest.mark.parametrize(("has_all", "is_told_anew"), [(True, False), (False, False), (False, True)])
def test_what_was_refused_is_named_once_by_the_next_agent_too(
    tmp_path: Path, has_all: bool, is_told_anew: bool
) -> None:
    """Where the guest runs before it is told anew, it is not put in again, and not refused."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.drivers["host-b"].device.faults.refuse = lambda batch: batch.rows["sourceTransportPort"] < 1010
        begin(hosts, guest)
        if has_all:
            hosts.say("host-a", Phase.SUSPENDED, guest)
            until(lambda: all(one._state() == "complete" for one in hosts.agents["host-b"].sessions()))
        hosts.kill("host-b")
        hosts.start("host-b")
        until(lambda: not is_told_anew or sessions_follow(hosts))
        hosts.unplug("host-a", guest)
        words(hosts, guest, ("host-b", Phase.RESUMED), ("host-a", Phase.STOPPED))
        until_idle(hosts)
        assert sum(told["count"] for told in report(hosts, "host-b", guest)["named"].values()) == 10


def test_what_had_no_place_is_named_by_the_next_agent_of_the_source_too(tmp_path: Path) -> None:
    """It purges what its journal has, and sees nothing anew."""
    with hosts_in(tmp_path, driver=mortal) as hosts:
        hosts.drivers["host-b"].device.capacity = 60
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.drivers["host-a"].at = "remove"  # type: ignore[attr-defined]
        finish(hosts, guest)
        die(hosts, "host-a")
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.STOPPED))
        until_idle(hosts)
        assert held(hosts, "host-a") == set()
        missing = 100 - len(ports(hosts, "host-b"))
        (why,) = (one for one in report(hosts, "host-a", guest)["named"] if "no place" in one)
        assert report(hosts, "host-a", guest)["named"][why]["count"] == missing > 0


def test_what_runs_out_while_an_answer_is_awaited_is_had_by_the_next_agent_of_the_source(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=mortal) as hosts:
        guest = guest_with_flows(hosts, 90)
        hosts.agents["host-b"].host.policies = Policies(AskOperator())
        hosts.drivers["host-b"].device.capacity = 60
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        words(hosts, guest, ("host-b", Phase.PREPARE))
        until(lambda: any(getattr(one, "is_asking", False) for one in hosts.agents["host-b"].sessions()))
        hosts.kill("host-b")
        hosts.drivers["host-b"].device.capacity = None
        here = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].insert(here, tcp_flows(10, first_port=1090))
        leave(hosts, guest)
        until(lambda: hosts.agents["host-a"].host.journal.payload_count(hosts.agents["host-a"].sessions()[0].id))
        hosts.kill("host-a")
        hosts.drivers["host-a"].remove(here, tcp_flows(100).identities)
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.STOPPED))
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.RESUMED))
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_there_needs_no_second_place_when_an_agent_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(source, "VERSIONS", (version,))
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.drivers["host-b"].device.capacity = 104
        hosts.kill("host-b")
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.STARTED))
        until(lambda: sessions_follow(hosts))
        finish(hosts, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())
        assert [report(hosts, name, guest)["named"] for name in ("host-a", "host-b")] == [{}, {}]


def test_what_was_written_down_and_has_no_place_when_it_is_told_anew_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "VERSIONS", (1,))  # which says no counts
    with hosts_in(tmp_path, driver=mortal) as hosts:
        guest = die_before_anything_is_put_in(hosts)
        hosts.drivers["host-b"].device.capacity = 60
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.STARTED))
        until(lambda: sessions_follow(hosts))
        finish(hosts, guest)
        until_idle(hosts)
        missing = 100 - len(ports(hosts, "host-b"))
        assert [told["count"] for told in report(hosts, "host-b", guest)["named"].values()] == [missing] != [0]


@pytest.mark.parametrize("killed", [False, True])
def test_next_migration_finds_the_port_in_the_zone_that_it_has_then(tmp_path: Path, killed: bool) -> None:
    """Nobody said that the first one was given up: the session is the same, or that of an agent of before."""
    with hosts_in(tmp_path, limited(arrival_seconds=1.0)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        if killed:
            hosts.kill("host-b")
        hosts.unplug("host-b", guest)
        hosts.plug("host-b", guest, ZONES["host-b"] + 1, GUEST_ADDRESS)
        if killed:
            hosts.start("host-b")
        else:
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        words(hosts, guest, ("host-b", Phase.STARTED))
        until(lambda: ports(hosts, "host-b", ZONES["host-b"] + 1) == ALL)
        finish(hosts, guest)
        until_idle(hosts)
        assert (held(hosts, "host-b"), held(hosts, "host-a")) == (set(), set())
        assert ports(hosts, "host-b", ZONES["host-b"] + 1) == ALL


@pytest.mark.parametrize("dies", [(), ("host-a",), ("host-b",), ("host-a", "host-b")])
def test_what_ended_while_the_source_s_agent_was_away_is_named_however_many_sessions_follow(
    tmp_path: Path, dies: tuple[str, ...]
) -> None:
    """The guest runs at the destination by the word of its hypervisor, and nobody has said that it has left."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        here = hosts.scope("host-a", guest)
        hosts.kill("host-a")
        hosts.drivers["host-a"].remove(here, tcp_flows(10).identities)
        hosts.say("host-b", Phase.RESUMED, guest)
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.OUTGOING))
        until(lambda: sessions_follow(hosts))
        for name in dies:
            hosts.kill(name)
        for name in dies:
            hosts.start(name)
            words(hosts, guest, *[(name, Phase.RESUMED)] * (name == "host-b"))
        hosts.unplug("host-a", guest)
        words(hosts, guest, ("host-a", Phase.STOPPED))
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())
        told = report(hosts, "host-b", guest)
        assert {why: one["count"] for why, one in told["named"].items()} == {UNTOLD: 10}


def test_guest_that_leaves_again_while_its_coming_is_not_over_is_asked_about_as_one_that_leaves(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.kill("host-a")
        assert hosts.agents["host-b"].underway() == [(guest, "destination")]
        hosts.say("host-b", Phase.RESUMED, guest)
        until(lambda: not any(one.is_awaited for one in hosts.agents["host-b"].sessions()))  # type: ignore[attr-defined]
        assert hosts.agents["host-b"].underway() == [(guest, "destination")]
        hosts.say("host-b", Phase.OUTGOING, guest, destination="host-c")
        assert hosts.agents["host-b"].underway() == [(guest, "source")]
