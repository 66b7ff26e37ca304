"""Hosts that call late or in vain, and brokers that go away: no flow is lost, and no stranger has any."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sami_plugin.errors import NotAuthorised, PeerUnreachable
from sami_plugin.model.migration import MigrationEvent, Open, Phase
from sami_plugin.model.packet import Packet
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import (
    SETTINGS,
    begin,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    prepare,
    report,
    tcp_flows,
    until,
    until_idle,
)
from tests.unit.handover.stranger import Stranger, is_given_flows

HASTY = replace(SETTINGS, call_seconds=0.2, bounds=replace(SETTINGS.bounds, handshake_seconds=0.3))
"""For a handshake that takes longer than it may."""


def all_moves(hosts: Hosts, guest: str) -> None:
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    assert len(held(hosts, "host-b")) == 100


def test_handshake_that_was_held_up_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker fails over between its two flights: who called late is called under the same name again."""
    with hosts_in(tmp_path, HASTY) as hosts:
        guest = guest_with_flows(hosts)
        transport, is_back = hosts.agents["host-b"].host.peers.way_to("host-a").transport, threading.Event()
        call = transport.call

        def held_up(peer: str, session: str, packet: Packet, seconds: float) -> str:
            if packet.number and not is_back.is_set():
                is_back.wait(0.1)
                raise PeerUnreachable("the broker fails over")
            return call(peer, session, packet, seconds)

        monkeypatch.setattr(transport, "call", held_up)
        threading.Timer(3 * HASTY.bounds.handshake_seconds, is_back.set).start()
        all_moves(hosts, guest)


def test_answer_that_takes_longer_than_a_handshake_may_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt is busy; meanwhile the question is asked again, and others call."""
    with hosts_in(tmp_path, HASTY) as hosts:
        guest = guest_with_flows(hosts)
        leaving = hosts.agents["host-a"]
        has_job = leaving._has_job

        def slow(*arguments: Any, **options: Any) -> bool:
            time.sleep(3 * HASTY.bounds.handshake_seconds)
            return has_job(*arguments, **options)

        monkeypatch.setattr(leaving, "_has_job", slow)
        all_moves(hosts, guest)


def test_stays_is_heard_when_the_broker_comes_back_after_longer_than_a_message_lives(tmp_path: Path) -> None:
    with hosts_in(tmp_path, replace(SETTINGS, message_seconds=0.2)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        transport = hosts.agents["host-a"].host.peers.way_to("host-b").transport
        tries: list[Packet] = []

        def away(peer: str, session: str, packet: Packet, *_: object) -> str:
            tries.append(packet)
            raise PeerUnreachable("the broker is away")

        real, transport.call = transport.call, away  # type: ignore[method-assign]
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(1, first_port=8000))
        until(lambda: len(tries) > 3)
        transport.call = real  # type: ignore[method-assign]
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-a", Phase.RESUMED, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()


def test_a_call_of_a_migration_that_is_over_comes_too_late_to_end_the_next_one(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts, Stranger(hosts, "stranger") as stranger:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="stranger")
        agent = hosts.agents["host-a"]
        late, later, session = (str(uuid.uuid4()) for _ in range(3))
        caller = agent._callers.get("stranger", late)
        said = Open(guest, "stranger", (1,), (), ("zlib",), None)
        stranger.say("host-a", session, replace(said, after=(late, later)))
        until(lambda: is_given_flows(stranger))
        with pytest.raises(NotAuthorised, match=r"a newer session of .* has come before this one"):
            agent._open(caller, said, [])
        agent.deliver("stranger", later, Packet(0, 0, b"a call"))
        assert not {late, later} & agent._callers._known.keys()
        assert [one.id for one in agent.sessions()] == [session]


def test_host_that_says_what_is_over_silences_no_other_host(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts, Stranger(hosts, "stranger") as stranger:
        guest, others = guest_with_flows(hosts), str(uuid.uuid4())
        said = Open(guest, "stranger", (1,), (), ("zlib",), None, after=(others, "no session"))
        agent = hosts.agents["host-a"]
        hosts.say("host-a", Phase.OUTGOING, guest, destination="stranger")
        stranger.say("host-a", str(uuid.uuid4()), said)
        until(lambda: is_given_flows(stranger))
        assert agent._callers._overtaken == {others: "stranger"}
        assert agent._callers.get("host-b", others).id == others


def test_a_host_that_the_guest_does_not_move_to_is_refused(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        asked = hosts.agents["host-a"]
        asked.tell(MigrationEvent(guest, Phase.OUTGOING, "host-a", "host-b"))
        with Stranger(hosts, "host-x") as stranger:
            stranger.ask("host-a", guest)
            assert "moves to host-b, not to host-x" in stranger.is_refused()
        assert asked.sessions() == []


def test_last_word_is_heard_though_it_was_said_before_the_other_host_answered_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        agent, may_hear = hosts.agents["host-a"], threading.Event()
        deliver = agent.deliver

        def late(sender: str, session: str, packet: Packet) -> None:
            assert may_hear.wait(20)
            deliver(sender, session, packet)

        monkeypatch.setattr(agent, "deliver", late)
        prepare(hosts, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        assert hosts.agents["host-b"].wait_until_idle(20)
        may_hear.set()
        until(lambda: hosts.reports("host-a", guest))
        assert report(hosts, "host-a", guest)["reason"] == "the guest did not come"


def test_a_quiet_copy_fills_no_journal(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        (leaving,) = hosts.agents["host-a"].sessions()
        journal = hosts.agents["host-a"].host.journal
        before = len(journal.decisions(leaving.id))
        looks: list[object] = []
        port = leaving._ports[0]  # type: ignore[attr-defined]
        real = port.watch.collect
        port.watch.collect = lambda: looks.append(None) or real()
        until(lambda: len(looks) > 20)
        assert len(journal.decisions(leaving.id)) == before
