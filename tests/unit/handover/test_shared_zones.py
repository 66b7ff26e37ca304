"""Guests whose ports share a zone: what is both guests' goes with the last of them."""

from __future__ import annotations

from pathlib import Path

import netaddr
import pytest

from sami_plugin.drivers.memory import MemoryDevice
from sami_plugin.model.flows import Batch, ZoneRole
from sami_plugin.model.migration import Phase
from sami_plugin.model.scope import Scope
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    SECOND_ADDRESS,
    ZONES,
    FailsOnce,
    begin,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    is_orphaned,
    limited,
    mark,
    ports,
    report,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
    zone_scope,
)


def test_a_guest_that_comes_into_the_zone_during_the_copy_keeps_its_flows(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest, newcomer = guest_with_flows(hosts), new_guest()
        begin(hosts, guest)
        hosts.plug("host-a", newcomer, ZONES["host-a"], SECOND_ADDRESS)
        own = Scope("any", newcomer, {ZoneRole.PORT: ZONES["host-a"]}, (netaddr.IPAddress(SECOND_ADDRESS),))
        hosts.drivers["host-a"].insert(own, tcp_flows(10, SECOND_ADDRESS, first_port=7000))
        until(lambda: any(port == 7000 for port, _ in held(hosts, "host-a")))
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-a") == set(range(7000, 7010))
        assert ports(hosts, "host-b") == set(range(1000, 1100))


def two_that_share(hosts: Hosts) -> tuple[str, str, Batch]:
    """Two guests of one zone that both move, and the one flow between them."""
    one, two = new_guest(), new_guest()
    hosts.plug("host-a", one, ZONES["host-a"], GUEST_ADDRESS, shared=True)
    hosts.plug("host-a", two, ZONES["host-a"], SECOND_ADDRESS, shared=True)
    between = tcp_flows(1)
    between.rows["destinationIPv4Address"] = int(netaddr.IPAddress(SECOND_ADDRESS))
    own = Scope("any", one, {ZoneRole.PORT: ZONES["host-a"]}, hosts.scope("host-a", one).addresses)
    hosts.drivers["host-a"].insert(own, between)
    for guest in (one, two):
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", one, ZONES["host-b"], GUEST_ADDRESS, shared=True)
    hosts.plug("host-b", two, ZONES["host-b"], SECOND_ADDRESS, shared=True)
    for guest in (one, two):
        hosts.say("host-b", Phase.STARTED, guest)
        wait_for_step(hosts, "host-b", guest, "in sync")
    arriving = hosts.agents["host-b"].sessions()
    until(lambda: all(session._held_count() == 1 for session in arriving))  # type: ignore[attr-defined]
    return one, two, between


def test_a_shared_flow_that_ends_during_the_copy_ends_at_the_destination_too(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        one, two, between = two_that_share(hosts)
        hosts.drivers["host-a"].remove(zone_scope("host-a"), between.identities)
        for guest in (one, two):
            finish(hosts, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()


def test_a_shared_flow_is_purged_with_the_last_of_both_though_the_ports_are_still_there(tmp_path: Path) -> None:
    with hosts_in(tmp_path, limited(watch_seconds=2.0)) as hosts:
        guests = two_that_share(hosts)[:2]
        for guest in guests:
            hosts.say("host-a", Phase.SUSPENDED, guest)
        for guest in guests:
            hosts.say("host-b", Phase.RESUMED, guest)
            until(lambda guest=guest: hosts.has_step("host-a", guest, "proved"))
        assert held(hosts, "host-a") == set()
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 1


@pytest.mark.parametrize("first", [0, 1])
def test_a_shared_flow_is_discarded_with_the_last_of_both_roll_backs(tmp_path: Path, first: int) -> None:
    with hosts_in(tmp_path) as hosts:
        guests = two_that_share(hosts)[:2]
        for guest in (guests[first], guests[1 - first]):
            hosts.say("host-b", Phase.STOPPED, guest)
            until(lambda guest=guest: hosts.reports("host-b", guest))
        until_idle(hosts)
        assert held(hosts, "host-b") == set()
        assert len(held(hosts, "host-a")) == 1


def test_a_roll_back_after_a_failed_insert_takes_nothing_from_a_guest_that_runs_here(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: FailsOnce(MemoryDevice(name))) as hosts:
        guest, resident = new_guest(), new_guest()
        between = tcp_flows(1)
        between.rows["destinationIPv4Address"] = int(netaddr.IPAddress(SECOND_ADDRESS))
        hosts.plug("host-a", guest, ZONES["host-a"], GUEST_ADDRESS, shared=True)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), between)
        hosts.plug("host-b", resident, ZONES["host-b"], SECOND_ADDRESS, shared=True)
        hosts.drivers["host-b"].insert(hosts.scope("host-b", resident), between)
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS, shared=True)
        hosts.drivers["host-b"].what = "insert"  # type: ignore[attr-defined]
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: is_orphaned(hosts))
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 1
        assert [name for name in report(hosts, "host-b", guest)["named"] if name.startswith("not discarded")]


def test_a_roll_back_after_a_new_start_takes_nothing_from_a_guest_that_has_come(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        one, two, _ = two_that_share(hosts)
        finish(hosts, one)
        until(lambda: hosts.reports("host-b", one))
        hosts.kill("host-b")
        hosts.start("host-b")
        hosts.say("host-b", Phase.STOPPED, two)
        until(lambda: len(hosts.reports("host-b", two)) > 1)
        assert len(held(hosts, "host-b")) == 1


def test_what_the_guest_changed_or_ended_since_it_runs_is_not_put_back_by_the_last_changes(tmp_path: Path) -> None:
    """The source's last changes come when the guest runs at the destination already: what is there is younger."""
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        mark(hosts, "host-b", guest, 1000, 3)
        hosts.drivers["host-b"].remove(hosts.scope("host-b", guest), tcp_flows(1, first_port=1001).identities)
        for port in (1000, 1001, 1002):
            mark(hosts, "host-a", guest, port, 2)
        finish(hosts, guest)
        until_idle(hosts)
        assert {(1000, 3), (1002, 2)} < held(hosts, "host-b")
        assert len(held(hosts, "host-b")) == 99
        assert held(hosts, "host-a") == set()
