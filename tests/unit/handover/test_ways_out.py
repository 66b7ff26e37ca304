"""Each wait has a way out: whatever is late, away or full, the session ends, and the flows are where their guest is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sami_plugin import agent as agent_module
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import OperatorError, Veto
from sami_plugin.handover.destination import DestinationSession
from sami_plugin.migration.decision import Choose, ExportChanges, ExportNext, SayOffer
from sami_plugin.model.flows import Batch, Omitted
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings
from sami_plugin.policies.base import Policy
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator, Refuse
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.hypervisor import Hypervisor
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    ZONES,
    HeldUpExport,
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
    states,
    tcp_flows,
    until,
    until_idle,
    words,
)

VERDICT_SECONDS = 2.5


# --- verdicts


def test_veto_that_comes_when_the_hook_waits_no_longer_costs_the_guest_no_flow_that_has_a_place(
    tmp_path: Path,
) -> None:
    """How much room there is was not known before: somebody else was putting flows in."""
    settings = replace(limited(verdict_seconds=1.0), headroom_percent=0.0)
    with hosts_in(tmp_path, settings, lambda name: MemoryDriver(MemoryDevice(name, capacity=104))) as hosts:
        host, other = hosts.agents["host-b"].host, new_guest()
        host.policies = Policies(Refuse())
        guest = guest_with_flows(hosts)
        hosts.plug("host-b", other, 77, "192.0.2.99")
        its = hosts.scope("host-b", other)
        assert host.take_places("another", its, 50) == 50
        prepare(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        hosts.drivers["host-b"].insert(its, tcp_flows(50, "192.0.2.99"))
        host.release_places("another")
        until(lambda: len(held(hosts, "host-b")) == 54)
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert (told["outcome"], told["flows"]["imported"]) == ("moved", 54)
        assert "the policy said veto when the migration had gone on" in told["remarks"]
        assert (len(held(hosts, "host-b", 77)), held(hosts, "host-a")) == (50, set())


class Silent(MemoryDriver):
    """Whoever exports ends there, as with its agent: the destination never hears what there is."""

    exports = 0

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        self.exports += 1
        raise SystemExit


class SilentAtFirst(Silent):
    """Its next agent exports, when it may."""

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device)
        self.may_export = threading.Event()

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        if not self.exports:
            return super().export(scope)
        assert self.may_export.wait(30)
        return MemoryDriver.export(self, scope)


def begin_anew_while_the_hook_waits(hosts: Hosts, guest: str, began: float) -> None:
    """Later than the margin that the hook has: the next session's time would end after the hook's."""
    driver = hosts.drivers["host-a"]
    assert isinstance(driver, Silent)
    until(lambda: driver.exports == 1)
    until(lambda: time.monotonic() > began + agent_module.VERDICT_MARGIN_SECONDS)
    hosts.kill("host-a")
    hosts.start("host-a")
    until(lambda: hosts.reports("host-b", guest))
    assert report(hosts, "host-b", guest)["outcome"] == "continued"


def silent_source(tmp_path: Path, policy: Policy) -> Hosts:
    settings = brief(verdict_seconds=VERDICT_SECONDS, open_seconds=20.0, ask_seconds=20.0)
    hosts = hosts_in(tmp_path, settings, lambda name: Silent(MemoryDevice(name)))
    hosts.agents["host-b"].host.policies = Policies(policy)
    return hosts


def test_hook_hears_a_veto_in_time_though_the_source_s_agent_was_started_anew_meanwhile(tmp_path: Path) -> None:
    with silent_source(tmp_path, Refuse()) as hosts, ThreadPoolExecutor(1) as pool:
        guest, began = guest_with_flows(hosts), time.monotonic()
        preparing = pool.submit(prepare, hosts, guest)
        begin_anew_while_the_hook_waits(hosts, guest, began)
        with pytest.raises(Veto, match="is not known: the source has not answered yet"):
            preparing.result()
        assert time.monotonic() - began < VERDICT_SECONDS + 1.0


def test_hook_waits_for_the_operator_though_the_source_s_agent_was_started_anew_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with silent_source(tmp_path, AskOperator()) as hosts, ThreadPoolExecutor(1) as pool:
        guest, began = guest_with_flows(hosts), time.monotonic()
        preparing = pool.submit(prepare, hosts, guest)
        begin_anew_while_the_hook_waits(hosts, guest, began)
        until(lambda: preparing.done() or "waits for `sami session approve`" in caplog.text)
        assert not preparing.done()
        (coming,) = hosts.agents["host-b"].sessions()
        assert f"{coming.id}: waits for `sami session approve`" in caplog.text
        hosts.agents["host-b"].decide(guest, may_come=True)
        preparing.result(10)


def test_operator_who_speaks_when_the_hook_waits_no_longer_is_not_heard_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own time began anew with the source's agent, the hook's did not: "refuse" would cost the guest its flows."""
    settings = brief(verdict_seconds=1.0, open_seconds=20.0, ask_seconds=5.0)
    with (
        hosts_in(tmp_path, settings, lambda name: SilentAtFirst(MemoryDevice(name))) as hosts,
        ThreadPoolExecutor(1) as pool,
    ):
        hosts.agents["host-b"].host.policies = Policies(AskOperator())
        guest = guest_with_flows(hosts)
        preparing = pool.submit(prepare, hosts, guest)
        until(lambda: "waits for `sami session approve`" in caplog.text)
        begin_anew_while_the_hook_waits(hosts, guest, time.monotonic() + 2.0)
        until(lambda: len(hosts.agents["host-b"].sessions()) == 1)
        (coming,) = hosts.agents["host-b"].sessions()
        assert isinstance(coming, DestinationSession)
        until(lambda: coming.is_asking)
        preparing.result(10)
        assert not coming.is_asking
        assert coming.refusal is None
        with pytest.raises(OperatorError, match="no session of that name waits for an answer"):
            hosts.agents["host-b"].decide(guest, may_come=False)
        source = hosts.drivers["host-a"]
        assert isinstance(source, SilentAtFirst)
        source.may_export.set()
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: {port for port, _ in held(hosts, "host-b")} == ALL)
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert (told["outcome"], told["flows"]["imported"]) == ("moved", len(ALL))
        assert "the migration went on before an operator answered" in told["remarks"]
        assert held(hosts, "host-a") == set()


# --- senders that have no room


def narrow(**limits: Any) -> Settings:
    """One packet fills the sender's window."""
    return replace(brief(**limits), window=1)


def fill(hosts: Hosts, guest: str) -> None:
    """The source follows, and the other host's agent is away."""
    begin(hosts, guest)
    (leaving,) = hosts.agents["host-a"].sessions()
    hosts.kill("host-b")
    mark(hosts, "host-a", guest, 1000, 7)
    until(lambda: leaving.line._sender._waiting_for_room)


def test_guest_that_leaves_without_a_pause_is_purged_in_time_though_its_sender_has_no_room(tmp_path: Path) -> None:
    with hosts_in(tmp_path, narrow(arrival_seconds=0.5)) as hosts:
        guest = guest_with_flows(hosts)
        fill(hosts, guest)
        hosts.unplug("host-a", guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        until(lambda: hosts.reports("host-a", guest), 5)
        assert report(hosts, "host-a", guest)["outcome"] == "purged without arrival"
        assert held(hosts, "host-a") == set()


def test_session_ends_in_time_though_its_sender_has_no_room(tmp_path: Path) -> None:
    with hosts_in(tmp_path, narrow(session_seconds=2.5)) as hosts:
        guest = guest_with_flows(hosts)
        fill(hosts, guest)
        until(lambda: hosts.reports("host-a", guest), 5)
        told = report(hosts, "host-a", guest)
        assert (told["outcome"], told["reason"]) == ("unclear", "the migration took longer than session_seconds")
        assert ports(hosts, "host-a") == ALL


# --- agents that come late


def test_guest_that_is_back_keeps_its_flows_where_no_hypervisor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source was watching for late packets' entries when its agent died; libvirt is away for longer than that."""
    monkeypatch.setattr(agent_module, "HYPERVISOR_SECONDS", 0.3)
    hypervisors = {name: Hypervisor(name) for name in ZONES}
    driver, settings = lambda name: MemoryDriver(MemoryDevice(name)), brief(watch_seconds=1.0)
    with hosts_in(tmp_path, settings, driver, hypervisors) as hosts:
        guest, hypervisor = guest_with_flows(hosts), hypervisors["host-a"]
        hypervisor.leaving.add(guest)
        begin(hosts, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        hypervisor.leaving.discard(guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        until(lambda: states(hosts, "host-a") == ["watching"])
        hosts.kill("host-a")
        hypervisor.here.add(guest)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(30, first_port=5000))
        hypervisor.is_away = True
        hosts.start("host-a")
        until_idle(hosts)
        assert ports(hosts, "host-a") == set(range(5000, 5030))
        told = report(hosts, "host-a", guest)
        assert (told["outcome"], told["flows"]["late"], told["named"]) == ("moved", 0, {})
        assert any("was not looked for" in remark for remark in told["remarks"])


@pytest.mark.parametrize("watch_seconds", [3.0, 0.05])
def test_who_asks_after_a_purge_without_arrival_gets_the_flows_in_the_watch_as_behind_it(
    tmp_path: Path, watch_seconds: float
) -> None:
    with hosts_in(tmp_path, brief(arrival_seconds=0.5, watch_seconds=watch_seconds)) as hosts:
        guest = guest_with_flows(hosts)
        prepare(hosts, guest)
        until(lambda: hosts.has_step("host-a", guest, "export ended"))
        hosts.kill("host-b")
        leave(hosts, guest)
        until(lambda: states(hosts, "host-a") == (["watching"] if watch_seconds > 1 else []))
        assert held(hosts, "host-a") == set()
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.start("host-b")
        words(hosts, guest, ("host-b", Phase.RESUMED))
        until(lambda: report(hosts, "host-b", guest)["outcome"] != "continued")
        assert (report(hosts, "host-b", guest)["outcome"], ports(hosts, "host-b")) == ("moved", ALL)
        assert held(hosts, "host-a") == set()
        assert hosts.reports("host-a", guest)[-1]["outcome"] == "purged without arrival"


def comes_unannounced(hosts: Hosts, guest: str, *, sessions: int) -> None:
    """Host-b's agent, which knows nothing of the guest, starts and asks. `sessions` are those of host-a by then."""
    hosts.start("host-b")
    coming = hosts.agents["host-b"]
    coming.note(MigrationEvent(guest, Phase.STARTED, source="host-a", is_incoming=True))
    coming.note(MigrationEvent(guest, Phase.RESUMED, role="destination"))
    until(lambda: len(hosts.agents["host-a"].sessions()) == sessions)


def test_two_that_are_to_go_on_with_one_session_go_on_one_after_the_other(tmp_path: Path) -> None:
    """The destination's agent loses its journal, and asks again before the source has come to its first question."""
    with hosts_in(tmp_path, brief(open_seconds=20.0), lambda name: HeldUpExport(MemoryDevice(name))) as hosts:
        guest, driver = guest_with_flows(hosts), hosts.drivers["host-a"]
        assert isinstance(driver, HeldUpExport)
        hosts.kill("host-b")
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        driver.of = guest
        leave(hosts, guest)
        assert driver.has_begun.wait(10)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        comes_unannounced(hosts, guest, sessions=2)
        hosts.kill("host-b")
        for file in tmp_path.glob("host-b-journal*"):
            file.unlink()
        comes_unannounced(hosts, guest, sessions=3)
        driver.may_end.set()
        until(lambda: hosts.reports("host-b", guest))
        until(lambda: not hosts.agents["host-a"].sessions(), 5)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())
        assert report(hosts, "host-b", guest)["outcome"] == "moved"


# --- what is told, and threads


def test_what_was_told_before_the_answer_and_has_no_place_is_told_of_further(tmp_path: Path) -> None:
    """The destination has it, or names it: here it is none that was not exported."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts, 6)
        with leaving_session(hosts, guest) as session:
            session._say_offer(SayOffer(1))
            for port in range(1000, 1006):
                mark(hosts, "host-a", guest, port, 5)
            session._export_changes(ExportChanges(is_last=False))
            session._choose(Choose(2, ("tcp-ipv4",)))
            session._export_next(ExportNext())
            mark(hosts, "host-a", guest, 1005, 9)
            assert session._export_changes(ExportChanges(is_last=True)).count == 1
            (left,) = session._ports
            (told,) = left.exported.batches()
            marks = dict(zip(told.rows["sourceTransportPort"].tolist(), told.rows["flowMark"].tolist(), strict=True))
            assert marks == {**dict.fromkeys(range(1000, 1005), 5), 1005: 9}
            session._counts()
            assert session.report.named == {}


def test_session_that_gets_no_thread_is_over_and_the_next_one_carries_the_flows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        start = threading.Thread.start
        refused: list[str] = []

        def refuse_once(thread: threading.Thread) -> None:
            if thread.name.startswith("sami-destination") and not refused:
                refused.append(thread.name)
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        prepare(hosts, guest)
        assert len(refused) == 1
        assert hosts.agents["host-b"].sessions() == []
        told = report(hosts, "host-b", guest)
        assert told["outcome"] == "failed"
        assert "can't start new thread" in told["reason"]
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        assert len(hosts.agents["host-b"].sessions()) == 1
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())
        hosts.agents["host-b"].stop()
