"""What a destination can take is known before memory is copied, and what is said to it decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from sami_plugin import agent as agent_module
from sami_plugin.agent import Agent
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import OperatorError, PeerUnreachable, Veto
from sami_plugin.model.flows import ACCOUNTING, TEMPLATES, Batch, FlowStatus, helper_octets, names
from sami_plugin.model.migration import MigrationEvent, Offer, Phase
from sami_plugin.model.results import WORDS, Reason, lost_fields
from sami_plugin.model.risk import FUNCTIONS, LABELS, Risk
from sami_plugin.model.verdict import Verdict
from sami_plugin.policies.base import Policy
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator, Partial, Proceed, Refuse
from sami_plugin.testing.conformance import flows
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    SETTINGS,
    ZONES,
    finish,
    guest_with_flows,
    held,
    mark,
    ports,
    prepare,
    tcp_flows,
    until,
    until_idle,
)
from tests.unit.handover.regions import regions

NO_PLACE = WORDS[Reason.NO_PLACE]
LIMITS = replace(SETTINGS.limits, verdict_seconds=2.0, ask_seconds=5.0)


@contextmanager
def six_against_four(
    folder: Path, policy: object = None, *, silence_means: Verdict = Verdict.PROCEED, **limits: float
) -> Iterator[tuple[Hosts, str]]:
    """A guest with six flows on host-a; host-b has four places. Three of the six were seen one way only."""
    chosen = replace(LIMITS, silence_means=silence_means, **limits)
    settings = replace(SETTINGS, headroom_percent=20.0, limits=chosen)
    devices = {name: MemoryDevice(name, capacity=10) for name in ZONES}
    with Hosts(folder, tuple(ZONES), lambda name: MemoryDriver(devices[name]), settings=settings) as hosts:
        if policy is not None:
            hosts.agents["host-b"].host.policies = Policies(policy)  # type: ignore[arg-type]
        other = new_guest()
        hosts.plug("host-b", other, 77, "192.0.2.99")
        hosts.drivers["host-b"].insert(hosts.scope("host-b", other), tcp_flows(4, "192.0.2.99"))
        guest = guest_with_flows(hosts, 0)
        flows = tcp_flows(6)
        flows.rows["conntrackStatus"][:3] &= ~np.uint32(FlowStatus.ASSURED | FlowStatus.SEEN_REPLY)
        flows.rows["remainingTimeoutSeconds"][:3] = (100, 300, 200)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), flows)
        yield hosts, guest


def move(hosts: Hosts, guest: str) -> None:
    prepare(hosts, guest)
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.say("host-b", Phase.STARTED, guest)
    until(lambda: hosts.has_step("host-b", guest, "in sync"))
    finish(hosts, guest)
    until_idle(hosts)


def reports(hosts: Hosts, guest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return hosts.reports("host-a", guest)[0], hosts.reports("host-b", guest)[0]


@pytest.mark.parametrize("policy", [Proceed(), Partial(60.0), AskOperator()], ids=lambda one: type(one).__name__)
def test_of_six_flows_the_four_fit_that_matter_most_and_both_reports_name_the_rest(
    tmp_path: Path, policy: object
) -> None:
    with six_against_four(tmp_path, policy) as (hosts, guest), ThreadPoolExecutor(1) as pool:
        moving = pool.submit(move, hosts, guest)
        if isinstance(policy, AskOperator):
            approve(hosts.agents["host-b"], may_come=True)
        moving.result()
        assert ports(hosts, "host-b") == {1001, 1003, 1004, 1005}
        assert len(held(hosts, "host-b", 77)) == 4
        assert held(hosts, "host-a") == set()
        source, destination = reports(hosts, guest)
        named = source["named"][
            "not exported: there was no place for it at the destination; " + NO_PLACE.split("; ")[1]
        ]
        assert named["count"] == 2
        assert all(f"{GUEST_ADDRESS}:{port} " in " ".join(named["flows"]) for port in (1000, 1002))
        assert ("an operator approved" in destination["remarks"]) is isinstance(policy, AskOperator)
        for told in (source, destination):
            verdict = told["verdict"]
            assert (verdict["flows"], verdict["places"], verdict["losses"]) == (6, 4, {NO_PLACE: 2})
        assert (source["outcome"], destination["outcome"]) == ("moved", "moved")


@pytest.mark.parametrize("policy", [Refuse(), Partial(70.0)], ids=lambda one: type(one).__name__)
def test_refused_guest_stays_with_all_its_flows(tmp_path: Path, policy: object) -> None:
    with six_against_four(tmp_path, policy) as (hosts, guest):
        with pytest.raises(Veto, match=rf"4 of 6 flows have a place on host-b; 2 lost: {NO_PLACE}"):
            prepare(hosts, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()
        assert len(held(hosts, "host-a")) == 6
        source, destination = reports(hosts, guest)
        assert (source["outcome"], destination["outcome"]) == ("stayed", "stayed")
        assert destination["verdict"]["verdict"] == "veto"


def test_guest_all_of_whose_flows_fit_is_not_refused(tmp_path: Path) -> None:
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), tcp_flows(2).identities)
        move(hosts, guest)
        assert len(held(hosts, "host-b")) == 4


def approve(agent: Agent, *, may_come: bool) -> None:
    until(lambda: any(getattr(one, "is_asking", False) for one in agent.sessions()))
    (session,) = agent.sessions()
    assert "4 of 6 flows" in session.risk  # type: ignore[attr-defined]
    agent.decide(session.id[:8], may_come=may_come)


def test_operator_who_refuses_is_obeyed(tmp_path: Path) -> None:
    with six_against_four(tmp_path, AskOperator()) as (hosts, guest), ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(prepare, hosts, guest)
        approve(hosts.agents["host-b"], may_come=False)
        with pytest.raises(Veto, match="the operator refused: 4 of 6 flows"):
            preparing.result()
        until_idle(hosts)
        assert len(held(hosts, "host-a")) == 6
        assert "an operator refused" in reports(hosts, guest)[1]["remarks"]


def test_migration_that_two_tell_of_waits_for_one_answer_and_both_are_refused(tmp_path: Path) -> None:
    with six_against_four(tmp_path, AskOperator()) as (hosts, guest), ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare, hosts, guest)
        until(lambda: any(getattr(one, "is_asking", False) for one in hosts.agents["host-b"].sessions()))
        second = pool.submit(hosts.say, "host-b", Phase.PREPARE, guest, "host-a")
        time.sleep(0.2)
        assert not first.done()
        approve(hosts.agents["host-b"], may_come=False)
        for preparing in (first, second):
            with pytest.raises(Veto, match="the operator refused"):
                preparing.result()
        until_idle(hosts)
        assert len(held(hosts, "host-a")) == 6


@pytest.mark.parametrize("silence_means", [Verdict.PROCEED, Verdict.VETO])
def test_operator_who_says_nothing_is_waited_for_and_then_the_configuration_speaks(
    tmp_path: Path, silence_means: Verdict
) -> None:
    with six_against_four(tmp_path, AskOperator(), silence_means=silence_means, ask_seconds=0.5) as (hosts, guest):
        began = time.monotonic()
        if silence_means is Verdict.VETO:
            with pytest.raises(Veto, match="no operator answered within ask_seconds"):
                prepare(hosts, guest)
        else:
            prepare(hosts, guest)
        assert 0.5 <= time.monotonic() - began < 2.0
        if silence_means is Verdict.PROCEED:
            hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
            hosts.say("host-b", Phase.STARTED, guest)
            until(lambda: len(held(hosts, "host-b")) == 4)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert "no operator answered within ask_seconds" in reports(hosts, guest)[1]["remarks"]


def test_guest_that_comes_before_the_operator_has_answered_comes_with_what_has_a_place(tmp_path: Path) -> None:
    """As where the hook waits for less than the agent."""
    with six_against_four(tmp_path, AskOperator()) as (hosts, guest), ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(prepare, hosts, guest)
        until(lambda: any(getattr(one, "is_asking", False) for one in hosts.agents["host-b"].sessions()))
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        preparing.result()
        until(lambda: hosts.has_step("host-b", guest, "in sync"))
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == {1001, 1003, 1004, 1005}
        assert "the guest came before an operator answered" in reports(hosts, guest)[1]["remarks"]


def test_journal_says_that_an_operator_is_waited_for_and_what_would_be_lost(tmp_path: Path) -> None:
    """`sami session list` and `show` read it: whoever is to decide has to find it there."""
    with six_against_four(tmp_path, AskOperator()) as (hosts, guest), ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(prepare, hosts, guest)
        until(lambda: any(getattr(one, "is_asking", False) for one in hosts.agents["host-b"].sessions()))
        journal = hosts.agents["host-b"].host.journal
        (row,) = journal.sessions()
        said = f"verdict: ask: 4 of 6 flows have a place on host-b; 2 lost: {NO_PLACE}"
        until(lambda: journal.decisions(row["session"])[-1]["event"] == said)
        assert row["state"] == "negotiating"
        approve(hosts.agents["host-b"], may_come=True)
        preparing.result()
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)


def test_nobody_who_does_not_ask_can_be_answered(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        prepare(hosts, guest)
        for name in ("", guest):
            with pytest.raises(OperatorError, match="no session of that name waits for an answer here"):
                hosts.agents["host-b"].decide(name, may_come=True)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)


@pytest.mark.parametrize("policy", [Refuse(), Partial(1.0), Proceed()], ids=lambda one: type(one).__name__)
def test_source_that_does_not_answer_is_a_risk_that_nobody_knows(tmp_path: Path, policy: object) -> None:
    """Who wants a veto has one; for everybody else the guest moves."""
    with six_against_four(tmp_path, policy, verdict_seconds=0.5) as (hosts, guest):
        hosts.agents["host-a"].host.peers.stop()
        if isinstance(policy, Proceed):
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
            hosts.say("host-b", Phase.STOPPED, guest)
        else:
            with pytest.raises(Veto, match="is not known: the source has not answered yet"):
                hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        until_idle(hosts)


@pytest.mark.parametrize("says", [None, "proceed", ZeroDivisionError("broken")])
def test_policy_that_fails_costs_neither_the_move_nor_a_flow(
    tmp_path: Path, says: object, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Policy):
        def judge(self, risk: Risk) -> Any:
            if isinstance(says, Exception):
                raise says
            return says

    with six_against_four(tmp_path, Broken()) as (hosts, guest):
        assert hosts.agents["host-a"].check(guest, "host-b")["verdict"] == "proceed"
        move(hosts, guest)
        assert ports(hosts, "host-b") == {1001, 1003, 1004, 1005}
        assert "the policy Broken failed, so the guest may come" in caplog.text


def test_source_that_refuses_is_a_risk_too(tmp_path: Path) -> None:
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-c")
        with pytest.raises(Veto, match=f"is not known: .*{guest} moves to host-c, not to host-b"):
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        until(lambda: not hosts.agents["host-b"].sessions())
        hosts.say("host-a", Phase.STOPPED, guest)


def test_without_a_hook_that_waits_nobody_can_be_refused_and_the_flows_that_fit_are_carried(tmp_path: Path) -> None:
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STARTED, source="host-a", is_incoming=True))
        until(lambda: len(held(hosts, "host-b")) == 4)
        finish(hosts, guest)
        until_idle(hosts)
        assert reports(hosts, guest)[1]["outcome"] == "moved"


def test_guest_that_the_operator_excluded_is_left_alone_on_both_hosts(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        for agent in hosts.agents.values():
            agent.host.policies = Policies(excluded=frozenset({guest}))
        prepare(hosts, guest)
        finish(hosts, guest)
        assert [one for agent in hosts.agents.values() for one in agent.sessions()] == []
        assert (held(hosts, "host-b"), len(held(hosts, "host-a"))) == (set(), 6)


def test_source_that_excluded_a_guest_gives_nothing(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        hosts.agents["host-a"].host.policies = Policies(excluded=frozenset({guest}))
        prepare(hosts, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert "wants nothing done for" in hosts.reports("host-b", guest)[0]["reason"]


# --- check


def test_check_of_a_guest_that_the_operator_excluded_says_so(tmp_path: Path) -> None:
    """Nothing of it would be carried, so nothing else may be said."""
    with six_against_four(tmp_path) as (hosts, guest):
        hosts.agents["host-b"].host.policies = Policies(excluded=frozenset({guest}))
        with pytest.raises(PeerUnreachable, match=f"the operator of host-b wants nothing done for {guest}"):
            hosts.agents["host-a"].check(guest, "host-b")
        hosts.agents["host-a"].host.policies = Policies(excluded=frozenset({guest}))
        with pytest.raises(OperatorError, match=f"the operator of host-a wants nothing done for {guest}"):
            hosts.agents["host-a"].check(guest, "host-b")


def test_check_says_what_would_fit_and_moves_and_keeps_nothing(tmp_path: Path) -> None:
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        found = hosts.agents["host-a"].check(guest, "host-b")
        again = hosts.agents["host-a"].check(guest, "host-b")
        assert found == again
        assert (found["verdict"], found["flows"], found["carried"]) == ("veto", 6, 4)
        assert found["kinds"] == {"tcp-ipv4": 6}
        assert found["losses"] == {NO_PLACE: 2}
        assert [name.split(":")[1].split()[0] for name in found["not_carried"]] == ["1002", "1000"]
        assert held(hosts, "host-b") == set()
        assert not hosts.agents["host-b"].sessions()
        assert hosts.agents["host-b"].host.places_left("") == 0


def test_check_of_what_is_not_here_or_goes_nowhere_says_so(tmp_path: Path) -> None:
    with six_against_four(tmp_path, open_seconds=0.5) as (hosts, guest):
        agent = hosts.agents["host-a"]
        with pytest.raises(OperatorError, match="to: the guest is to move from host-a to another host"):
            agent.check(guest, "host-a")
        with pytest.raises(OperatorError, match="knows no port of"):
            agent.check(new_guest(), "host-b")
        with pytest.raises(PeerUnreachable, match=r"host-x has not answered within 0.5 s; is its agent running?"):
            agent.check(guest, "host-x")
        assert not agent._questions


def test_kind_that_the_destination_does_not_know_takes_no_place(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        hosts.drivers["host-b"]._templates = frozenset({"udp-ipv4"})  # type: ignore[attr-defined]
        udp = TEMPLATES["udp-ipv4"].empty(3)
        udp["zoneRole"], udp["protocolIdentifier"], udp["remainingTimeoutSeconds"] = 1, 17, 90
        udp["sourceIPv4Address"], udp["destinationIPv4Address"] = 0xC0000207, 0xC6336401
        udp["sourceTransportPort"] = (1, 2, 3)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), Batch(TEMPLATES["udp-ipv4"], udp))
        found = hosts.agents["host-a"].check(guest, "host-b")
        assert (found["flows"], found["carried"]) == (9, 3)
        assert found["losses"] == {WORDS[Reason.NOT_DECLARED]: 6}
        move(hosts, guest)
        _, destination = reports(hosts, guest)
        assert destination["flows"]["imported"] == 3
        assert destination["named"][f"refused: {WORDS[Reason.NOT_DECLARED]}"]["count"] == 6


def test_marks_that_are_not_kept_there_are_a_risk(tmp_path: Path) -> None:
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        scope = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].remove(scope, tcp_flows(4).identities)
        marked = tcp_flows(2, first_port=1004)
        marked.rows["flowMark"] = 7
        hosts.drivers["host-a"].insert(scope, marked)
        assert hosts.agents["host-a"].check(guest, "host-b")["verdict"] == "proceed"
        hosts.drivers["host-b"].functions = frozenset()  # type: ignore[attr-defined]
        found = hosts.agents["host-a"].check(guest, "host-b")
        assert (found["verdict"], found["carried"]) == ("veto", 2)
        assert list(found["losses"]) == ["the driver of that host does not keep marks, which some of them use"]


def test_what_few_flows_have_is_left_out_by_name_where_the_device_has_no_room_for_it(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        scope = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].remove(scope, tcp_flows(6).identities)
        usual = tcp_flows(2)
        sent = usual.under(TEMPLATES["tcp-extended-ipv4"])
        sent.rows["conntrackHelper"][0] = helper_octets("ftp")
        sent.rows["conntrackLabels"][1, 1] = 1
        hosts.drivers["host-a"].insert(scope, sent)
        hosts.drivers["host-b"]._templates = frozenset({"tcp-ipv4"})  # type: ignore[attr-defined]
        hosts.drivers["host-b"].functions = frozenset({LABELS})  # type: ignore[attr-defined]
        found = hosts.agents["host-a"].check(guest, "host-b")
        assert (found["flows"], found["carried"]) == (2, 2)
        assert found["losses"] == {"the driver of that host does not keep helpers, which some of them use": 2}
        move(hosts, guest)
        there, is_there = hosts.drivers["host-b"].read_back(hosts.scope("host-b", guest), usual)
        assert is_there.all()
        assert not lost_fields(usual, there.rows).any()
        _, destination = reports(hosts, guest)
        assert (destination["flows"]["imported"], destination["flows"]["degraded"]) == (2, 2)
        for field, one in (("conntrackHelper", 0), ("conntrackLabels", 1)):
            told = destination["named"][f"degraded: {field} was not kept"]
            assert (told["count"], tuple(told["flows"])) == (1, names(usual.take(np.array([one]))))


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_was_counted_of_a_flow_goes_to_a_device_that_can_be_given_it(tmp_path: Path, is_kept: bool) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        scope = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].remove(scope, tcp_flows(6).identities)
        sent = tcp_flows(2).under(TEMPLATES["tcp-extended-ipv4"])
        for number, name in enumerate(ACCOUNTING, 1):
            sent.rows[name] = number << 40
        hosts.drivers["host-a"].insert(scope, sent)
        there = hosts.drivers["host-b"]
        if not is_kept:
            there.functions = FUNCTIONS  # type: ignore[attr-defined]
            there.device.faults.drop_fields = frozenset(ACCOUNTING)  # type: ignore[attr-defined]
        losses = {} if is_kept else {"the driver of that host does not keep accounting, which some of them use": 2}
        assert hosts.agents["host-a"].check(guest, "host-b")["losses"] == losses
        move(hosts, guest)
        found, is_there = there.read_back(hosts.scope("host-b", guest), sent)
        assert is_there.all()
        assert [found.rows[name].tolist() for name in ACCOUNTING] == [
            [number << 40 if is_kept else 0] * 2 for number in range(1, 6)
        ]
        named = {} if is_kept else {f"degraded: {name} was not kept": 2 for name in ACCOUNTING}
        assert {what: told["count"] for what, told in reports(hosts, guest)[1]["named"].items()} == named


def test_flow_whose_kind_is_not_taken_at_all_does_not_end_the_session(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        scope = hosts.scope("host-a", guest)
        udp = flows(TEMPLATES["udp-extended-ipv4"], 1, source=scope.addresses)
        hosts.drivers["host-a"].insert(scope, udp)
        hosts.drivers["host-b"]._templates = frozenset({"tcp-ipv4"})  # type: ignore[attr-defined]
        move(hosts, guest)
        _, destination = reports(hosts, guest)
        assert destination["flows"]["imported"] == 4
        assert destination["named"][f"refused: {WORDS[Reason.NOT_DECLARED]}"]["count"] == 1


# --- reservations


def test_places_that_are_promised_are_nobody_else_s(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        other = new_guest()
        hosts.plug("host-a", other, 100, "192.0.2.50")
        hosts.drivers["host-a"].insert(hosts.scope("host-a", other), tcp_flows(3, "192.0.2.50"))
        assert hosts.agents["host-a"].check(other, "host-b")["carried"] == 3
        prepare(hosts, guest)
        assert hosts.agents["host-a"].check(other, "host-b")["carried"] == 0
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert hosts.agents["host-a"].check(other, "host-b")["carried"] == 3


@pytest.mark.parametrize("loss", ["the source is lost", "the guest is refused"])
def test_promise_to_a_guest_whose_flows_will_not_come_is_kept_no_longer(tmp_path: Path, loss: str) -> None:
    with six_against_four(tmp_path, AskOperator()) as (hosts, guest), ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(prepare, hosts, guest)
        agent = hosts.agents["host-b"]
        until(lambda: any(getattr(one, "is_asking", False) for one in agent.sessions()))
        (session,) = agent.sessions()
        assert agent.host.places_left(session.id) == 4
        if loss == "the source is lost":
            session.refuse("gone")
            until(lambda: agent.host.places_left(session.id) == 0)
            assert agent.sessions() == [session]
        agent.decide(session.id, may_come=False)
        with pytest.raises(Veto):
            preparing.result()
        until_idle(hosts)
        assert agent.host.places_left(session.id) == 0


def test_promise_that_lapsed_is_somebody_else_s_and_the_source_is_told(tmp_path: Path) -> None:
    with six_against_four(tmp_path, reservation_seconds=0.3) as (hosts, guest):
        prepare(hosts, guest)
        agent = hosts.agents["host-b"]
        (session,) = agent.sessions()
        assert agent.host.places_left(session.id) == 4
        until(lambda: agent.host.places_left(session.id) == 0)
        remark = "of the promised places at the destination 0 are left: they were kept for reservation_seconds"
        until(lambda: remark in hosts.agents["host-a"].sessions()[0].report.remarks)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)


def test_what_traffic_takes_of_a_promise_is_told_to_the_source(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        prepare(hosts, guest)
        # The table of ten: four of the other guest, four promised, two of headroom.
        hosts.plug("host-b", new_guest(), 99, "192.0.2.60")
        scope = hosts.agents["host-b"].host.scopes.find(hosts._ports["host-b"][-1]["guest"])[0]  # type: ignore[arg-type]
        hosts.drivers["host-b"].insert(scope, tcp_flows(3, "192.0.2.60"))
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: hosts.has_step("host-b", guest, "in sync"))
        finish(hosts, guest)
        until_idle(hosts)
        source, destination = reports(hosts, guest)
        assert ports(hosts, "host-b") == {1003}
        assert destination["named"][f"refused: {NO_PLACE}"]["count"] == 3
        assert any("traffic on host-b has taken the others" in remark for remark in source["remarks"])


def test_change_of_a_flow_that_was_put_in_a_moment_ago_takes_no_place(tmp_path: Path) -> None:
    with six_against_four(tmp_path) as (hosts, guest):
        agent, driver, may_look = hosts.agents["host-b"], hosts.drivers["host-b"], Event()

        def slow_look(*asked: Any) -> Any:
            may_look.wait(10)
            return MemoryDriver.read_back(driver, *asked)  # type: ignore[arg-type]

        driver.read_back = slow_look  # type: ignore[method-assign]
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), tcp_flows(4).identities)
        hosts.plug("host-a", guest, 99, "192.0.2.8")
        hosts.drivers["host-a"].insert(hosts.agents["host-a"].host.scopes.find(guest)[1], tcp_flows(2, "192.0.2.8"))
        prepare(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)  # and the other port comes later
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: ports(hosts, "host-b") == {1004, 1005})
        (session,) = agent.sessions()
        assert agent.host.places_left(session.id) == 2
        mark(hosts, "host-a", guest, 1005, 7)
        until(lambda: (1005, 7) in held(hosts, "host-b"))
        assert agent.host.places_left(session.id) == 2
        may_look.set()
        hosts.plug("host-b", guest, 99, "192.0.2.8")
        finish(hosts, guest)
        until_idle(hosts)
        assert reports(hosts, guest)[1]["flows"]["imported"] == 4


# --- versions


@pytest.mark.parametrize("old", ["host-a", "host-b"])
def test_host_of_version_1_and_one_of_version_2_work_together(
    tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sami_plugin.handover import SourceSession, destination
    from sami_plugin.migration import source

    # One process has one module: what the old host would know it is made to know.
    monkeypatch.setattr(*((source, "VERSIONS", (1,)) if old == "host-a" else (destination, "VERSIONS", (1,))))
    with six_against_four(tmp_path) as (hosts, guest):
        offers: list[Offer] = []
        source_say = SourceSession._say
        monkeypatch.setattr(
            SourceSession,
            "_say",
            lambda self, message: (offers.append(message), source_say(self, message))[1],
        )
        move(hosts, guest)
        assert next(one for one in offers if isinstance(one, Offer)) == Offer(1, 1)
        assert len(ports(hosts, "host-b")) == 4
        assert held(hosts, "host-a") == set()
        source_told, destination_told = reports(hosts, guest)
        assert (source_told["outcome"], destination_told["outcome"]) == ("moved", "moved")


def test_two_guests_that_ask_at_a_time_are_promised_no_place_twice(tmp_path: Path) -> None:
    devices = {name: MemoryDevice(name, capacity=30) for name in ZONES}
    settings = replace(SETTINGS, headroom_percent=0.0)
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(devices[name]), settings=settings) as hosts:
        guests = [new_guest() for _ in range(10)]
        for number, guest in enumerate(guests):
            source = ("host-a", "host-c")[number % 2]
            hosts.plug(source, guest, 100 + number, f"192.0.2.{50 + number}")
            hosts.drivers[source].insert(hosts.scope(source, guest), tcp_flows(2 + number, f"192.0.2.{50 + number}"))
            hosts.say(source, Phase.OUTGOING, guest, destination="host-b")
        ready = threading.Barrier(10)

        def ask(number: int) -> None:
            ready.wait()
            hosts.say("host-b", Phase.PREPARE, guests[number], ("host-a", "host-c")[number % 2])

        with ThreadPoolExecutor(10) as pool:
            asked: list[Future[None]] = [pool.submit(ask, number) for number in range(10)]
            for one in asked:
                one.result()
        promised = [session.report.verdict["places"] for session in hosts.agents["host-b"].sessions()]
        assert len(promised) == 10
        there = hosts.agents["host-b"]
        assert sum(there.host.places_left(session.id) for session in there.sessions()) == 30
        assert 27 <= sum(promised) <= 30, "up to three are set aside for the pause, where those who want few come first"
        for number, guest in enumerate(guests):
            hosts.plug("host-b", guest, 200 + number, f"192.0.2.{50 + number}")
            hosts.say("host-b", Phase.STARTED, guest)
        for number, guest in enumerate(guests):
            until(lambda guest=guest: hosts.has_step("host-b", guest, "in sync"))
            finish(hosts, guest, ("host-a", "host-c")[number % 2])
        until_idle(hosts)
        for number, guest in enumerate(guests):
            (told,) = hosts.reports("host-b", guest)
            zone = 200 + number
            assert told["outcome"] == "moved"
            assert len(held(hosts, "host-b", zone)) == told["flows"]["imported"] >= told["verdict"]["places"]
        assert devices["host-b"].count <= 30
        assert devices["host-a"].count == devices["host-c"].count == 0


@pytest.mark.parametrize("verdict_seconds", [0.1, 2.0])
def test_operator_is_waited_for_although_the_source_s_agent_is_started_anew(
    tmp_path: Path, verdict_seconds: float
) -> None:
    """Sooner or later than the agent begins to say that an operator is waited for."""
    with (
        six_against_four(tmp_path, AskOperator(), verdict_seconds=verdict_seconds, ask_seconds=15.0) as (hosts, guest),
        ThreadPoolExecutor(1) as pool,
    ):
        preparing = pool.submit(prepare, hosts, guest)
        there = hosts.agents["host-b"]
        until(lambda: any(getattr(one, "is_asking", False) for one in there.sessions()))
        (first,) = there.sessions()
        time.sleep(1.0 if verdict_seconds < 1 else 0.0)
        hosts.kill("host-a")
        hosts.start("host-a")
        hosts.agents["host-a"].note(MigrationEvent(guest, Phase.OUTGOING, source="host-a", destination="host-b"))
        until(lambda: any(one is not first and getattr(one, "is_asking", False) for one in there.sessions()))
        time.sleep(verdict_seconds + 1.0)
        assert not preparing.done()
        (asking,) = [one for one in there.sessions() if getattr(one, "is_asking", False)]
        there.decide(asking.id, may_come=False)
        with pytest.raises(Veto, match="the operator refused: 4 of 6 flows"):
            preparing.result()
        until_idle(hosts)
        assert len(held(hosts, "host-a")) == 6


# --- what a veto does not see, or does not stop


def test_guest_that_goes_on_against_a_veto_does_not_lose_what_has_a_place(tmp_path: Path) -> None:
    """The hook's default is veto = no: libvirt goes on, and says STARTED through the same hook."""
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        with pytest.raises(Veto):
            prepare(hosts, guest)
        until_idle(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")  # as who asks libvirt finds out
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: len(held(hosts, "host-b")) == 4)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 4
        assert [told["outcome"] for told in hosts.reports("host-b", guest)] == ["moved", "stayed"]


def test_refused_guest_that_is_started_here_later_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was moved cold. A session that waited for it would have its next migration refused."""
    monkeypatch.setattr(agent_module, "REFUSED_SECONDS", 0.0)
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        with pytest.raises(Veto):
            prepare(hosts, guest)
        until_idle(hosts)
        hosts.unplug("host-a", guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        assert hosts.agents["host-b"].sessions() == []


def test_guest_that_has_left_already_leaves_nothing_behind_when_it_is_refused(tmp_path: Path) -> None:
    """An agent that was away when its hook asked, and is told of the guest when nobody stops it any more."""
    with six_against_four(tmp_path, Refuse(), arrival_seconds=20) as (hosts, guest):
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.unplug("host-a", guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-a", Phase.STOPPED, guest)
        with pytest.raises(Veto):
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        for phase in (Phase.STARTED, Phase.RESUMED):
            hosts.say("host-b", phase, guest)
        until_idle(hosts)
        assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 4)
        assert hosts.reports("host-b", guest)[0]["outcome"] == "moved"


def test_guest_that_has_left_and_is_refused_is_purged_by_name_when_nobody_asks_again(tmp_path: Path) -> None:
    """By then its zone is another guest's, where nothing is looked for that has no name."""
    with six_against_four(tmp_path, Refuse(), arrival_seconds=1.0) as (hosts, guest):
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.unplug("host-a", guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        with pytest.raises(Veto):
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.plug("host-a", new_guest(), ZONES["host-a"], "192.0.2.8")
        until_idle(hosts)
        assert held(hosts, "host-a") == set()
        flows = hosts.reports("host-a", guest)[0]["flows"]
        assert (flows["purged"], flows["late"]) == (6, 0)


def test_kind_that_may_not_go_out_is_a_loss_to_the_policy_veto(tmp_path: Path) -> None:
    with regions(tmp_path, east={"kinds_out": ("udp-*",)}) as (hosts, _):
        hosts.agents["host-b"].host.policies = Policies(Refuse())
        guest = guest_with_flows(hosts)  # a hundred, of TCP
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        with pytest.raises(Veto):
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")


def test_flow_that_the_source_s_driver_cannot_express_is_a_loss_to_the_policy_veto(tmp_path: Path) -> None:
    with six_against_four(tmp_path, Refuse()) as (hosts, guest):
        scope = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].remove(scope, tcp_flows(6).identities)
        hosts.drivers["host-a"].insert(scope, tcp_flows(2))
        udp = TEMPLATES["udp-ipv4"].empty(1)
        udp["zoneRole"], udp["protocolIdentifier"], udp["remainingTimeoutSeconds"] = 1, 17, 90
        udp["sourceIPv4Address"], udp["destinationIPv4Address"] = 0xC0000207, 0xC6336401
        hosts.drivers["host-a"].insert(scope, Batch(TEMPLATES["udp-ipv4"], udp))
        hosts.drivers["host-a"]._templates = frozenset({"tcp-ipv4"})  # type: ignore[attr-defined]
        with pytest.raises(Veto):
            prepare(hosts, guest)
