"""What the destination comes to know bit by bit, or is told in the midst of something else."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import netaddr
import numpy as np
import pytest

from sami_plugin.arriving import Findings
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import DeviceFailed, NotAvailable
from sami_plugin.handover.destination import UNTOLD
from sami_plugin.migration.decision import FindScope, Import, Renew, Verify
from sami_plugin.model.flows import Batch, FlowStatus, turned_round
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.results import Reason, Results
from sami_plugin.model.scope import Scope
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    SECOND_ADDRESS,
    SETTINGS,
    ZONES,
    FailsOnce,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    limited,
    payload,
    ports,
    report,
    session_in,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
)


def coming(guest: str, phase: Phase) -> MigrationEvent:
    """What libvirt's events say where no hook does."""
    return MigrationEvent(guest, phase, "host-a", role="destination", is_incoming=phase is Phase.STARTED)


def test_finder_that_fails_once_when_the_source_answers_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts_in(tmp_path, limited(arrival_seconds=1.0)) as hosts:
        guest = guest_with_flows(hosts)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        finder = hosts.agents["host-b"].host.scopes
        real, fails = finder.find, iter([True])

        def find(wanted: str) -> tuple[Scope, ...]:
            if next(fails, False):
                raise NotAvailable("iptables-save: another app is holding the xtables lock")
            return real(wanted)

        monkeypatch.setattr(finder, "find", find)
        hosts.agents["host-b"].note(coming(guest, Phase.STARTED))
        wait_for_step(hosts, "host-b", guest, "in sync")
        assert next(fails, None) is None
        finish(hosts, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())


def test_address_that_is_known_a_moment_later_has_its_flows(tmp_path: Path) -> None:
    """As of a firewall that is programmed for one family of addresses after the other."""
    with hosts_in(tmp_path) as hosts:
        guest = new_guest()
        hosts.plug("host-a", guest, ZONES["host-a"], GUEST_ADDRESS, SECOND_ADDRESS)
        for address, first in ((GUEST_ADDRESS, 1000), (SECOND_ADDRESS, 2000)):
            hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(10, address, first))
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: ports(hosts, "host-b") == set(range(1000, 1010)))
        hosts.unplug("host-b", guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS, SECOND_ADDRESS)
        until(lambda: len(ports(hosts, "host-b")) == 20)
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert (told["flows"]["imported"], told["flows"]["refused"], told["named"]) == (20, 0, {})


class Slow(MemoryDriver):
    """Removes nothing until it is let."""

    let = threading.Event()

    def remove(self, scope: Scope, identities: Batch) -> Results:
        assert self.let.wait(10)
        return super().remove(scope, identities)


def test_next_migration_that_starts_while_the_session_of_one_before_is_ending_has_its_own(tmp_path: Path) -> None:
    Slow.let.set()
    with hosts_in(tmp_path, limited(arrival_seconds=1.0), lambda name: Slow(MemoryDevice(name))) as hosts:
        guest, agent = guest_with_flows(hosts), hosts.agents["host-b"]
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        agent.note(coming(guest, Phase.STARTED))
        until(lambda: ports(hosts, "host-b") == ALL)
        (first,) = agent.sessions()
        Slow.let.clear()
        agent.note(coming(guest, Phase.STOPPED))
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.agents["host-a"].wait_until_idle(10)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        agent.note(coming(guest, Phase.STARTED))
        Slow.let.set()
        until(lambda: first.is_over)
        wait_for_step(hosts, "host-b", guest, "in sync")
        finish(hosts, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())


# --- a session without its thread


def test_what_could_not_be_looked_at_once_is_looked_at_again(tmp_path: Path) -> None:
    """Else nothing would be kept from running out any more."""
    with hosts_in(tmp_path, driver=lambda name: FailsOnce(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts, 1)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        with session_in(hosts, guest, 1) as session:
            session._find_scope(FindScope())
            driver = hosts.drivers["host-b"]
            assert isinstance(driver, FailsOnce)
            driver.what = "read_back"

            def bring() -> None:
                session._import(Import(payload(tcp_flows(2))))
                session._settle()

            with pytest.raises(DeviceFailed):
                bring()
            session._renew(Renew())
            assert session._findings.counts()["verified"] == 2


def test_refusal_of_one_port_s_flow_stays_when_what_came_before_is_read_again_for_another(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest, flows = new_guest(), tcp_flows(2)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        faults = hosts.drivers["host-b"].device.faults
        with session_in(hosts, guest, 2) as session:
            session._find_scope(FindScope())
            session._import(Import(payload(flows)))
            session._import(Import(payload(flows.identities)))
            faults.refuse = lambda batch: np.ones(len(batch), bool)
            session._import(Import(payload(flows)))
            session._settle()
            hosts.plug("host-b", guest, ZONES["host-b"] + 1, SECOND_ADDRESS)
            session._find_scope(FindScope())
            session._settle()
            assert session._findings.refused == 2


def test_flow_that_is_refused_twice_is_counted_once() -> None:
    findings = Findings()
    for reason in (Reason.TABLE_FULL, Reason.NO_PLACE):
        findings.refuse(tcp_flows(3), reason)
    assert findings.refused == 3


def test_what_is_named_when_all_is_looked_at_is_written_down(tmp_path: Path) -> None:
    """For an agent that begins with all of it, and is told nothing anew."""
    with hosts_in(tmp_path) as hosts:
        guest, flows = new_guest(), tcp_flows(10)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        with session_in(hosts, guest, 1) as session:
            session.host.journal.begin(session.id, guest, "destination", "host-a", "receiving")
            session._find_scope(FindScope(is_last=True))
            (port,) = session._ports
            hosts.drivers["host-b"].insert(port.scope, flows)
            port.former.put(flows)
            session._known = replace(session._known, in_sync=True, runs_here=True)
            session._verify(Verify())
            (row,) = session.host.journal.unfinished()
            assert json.loads(row["named"])[UNTOLD]["count"] == 10
            assert port.held.find(flows)[0].all()


def test_what_packets_made_where_the_guest_was_takes_nothing_from_what_it_has_begun_since(tmp_path: Path) -> None:
    """Of four: two it has begun itself, one its peer has, and one is as new here as there."""
    with hosts_in(tmp_path) as hosts:
        guest, late = new_guest(), tcp_flows(4)
        late.rows["conntrackStatus"] = int(FlowStatus.CONFIRMED)
        begun = Batch(late.template, late.rows.copy())
        begun.rows["conntrackStatus"] |= int(FlowStatus.SEEN_REPLY)
        begun.rows["flowMark"] = 7
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        with session_in(hosts, guest, 1) as session:
            session._known = replace(session._known, runs_here=True)
            session._find_scope(FindScope(is_last=True))
            (port,) = session._ports
            for batch in (begun.take(np.arange(4) < 2), turned_round(begun.take(np.arange(4) == 2))):
                hosts.drivers["host-b"].insert(port.scope, batch)
            session._import(Import(payload(late)))
            session._settle()
            assert sorted(value for _, value in held(hosts, "host-b")) == [0, 7, 7, 7]
            assert session._findings.counts()["present"] == 3
            assert len(port.held) == 1


class Forgets(MemoryDriver):
    """It has none of the flows that it said it took."""

    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = super().insert(scope, batch)
        super().remove(scope, batch.identities)
        return made


def test_what_vanished_before_the_source_began_anew_is_known_to_who_goes_on(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: Forgets(MemoryDevice(name))) as hosts:
        guest = new_guest()
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        with session_in(hosts, guest, 1) as session:
            session._find_scope(FindScope(is_last=True))
            session._put_in(tcp_flows(10), session._ports, tcp_flows(10))
            (told,) = session._as_former().named.values()
            assert told["count"] == 10


# --- a neighbour's flow with the guest


def to_the_guest() -> Batch:
    """A connection that a guest on host-b has with the one that comes."""
    flow = tcp_flows(1, SECOND_ADDRESS, 4000)
    flow.rows["destinationIPv4Address"] = int(netaddr.IPAddress(GUEST_ADDRESS))
    return flow


def neighbours(hosts: Hosts) -> str:
    """A guest on host-a whose connection with one on host-b both hosts have; where it comes to is shared."""
    guest, other = new_guest(), new_guest()
    hosts.plug("host-a", guest, ZONES["host-a"], GUEST_ADDRESS, shared=True)
    hosts.plug("host-b", other, ZONES["host-b"], SECOND_ADDRESS, shared=True)
    for host, whose in (("host-a", guest), ("host-b", other)):
        hosts.drivers[host].insert(hosts.scope(host, whose), to_the_guest())
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    return guest


@pytest.mark.parametrize("is_removing", [False, True])
def test_what_a_neighbour_began_and_the_source_has_told_of_is_not_called_unadmitted(
    tmp_path: Path, is_removing: bool
) -> None:
    with hosts_in(tmp_path, replace(SETTINGS, remove_unadmitted=is_removing)) as hosts:
        guest = neighbours(hosts)
        wait_for_step(hosts, "host-b", guest, "in sync")
        finish(hosts, guest)
        wait_for_step(hosts, "host-b", guest, "resumed")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS, shared=True)
        until_idle(hosts)
        named: dict[str, Any] = report(hosts, "host-b", guest)["named"]
        assert not [reason for reason in named if "begun by a peer" in reason]
        assert ports(hosts, "host-b") == {4000}


def test_neighbour_s_own_entry_stays_when_the_source_loses_the_flow_while_no_agent_is_here(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = neighbours(hosts)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS, shared=True)
        hosts.say("host-b", Phase.STARTED, guest)
        wait_for_step(hosts, "host-b", guest, "in sync")
        hosts.kill("host-b")
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), to_the_guest().identities)
        hosts.start("host-b")
        until(lambda: all(one._known.has_caught_up for one in hosts.agents["host-b"].sessions()))
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == {4000}
