"""The whole path between two agents of this process, with firewalls in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import netaddr
import pytest

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import HasGone, NotAvailable
from sami_plugin.handover import DestinationSession
from sami_plugin.migration.destination import DISCARD_TRIES
from sami_plugin.model.flows import TEMPLATES, Batch, ZoneRole
from sami_plugin.model.migration import Phase
from sami_plugin.model.results import WORDS, Outcome, Reason, Results
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings
from sami_plugin.testing.conformance import flows
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    IMPATIENT,
    SETTINGS,
    ZONES,
    begin,
    begin_before_its_router,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    limited,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
    zone_scope,
)


@pytest.fixture
def settings() -> Settings:
    return SETTINGS


@pytest.fixture
def hosts(tmp_path: Path, settings: Settings) -> Iterator[Hosts]:
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(MemoryDevice(name)), settings=settings) as made:
        yield made


@pytest.fixture
def guest(hosts: Hosts) -> str:
    return guest_with_flows(hosts)


def test_every_flow_is_where_the_guest_is_and_nowhere_else(hosts: Hosts, guest: str) -> None:
    before = held(hosts, "host-a")
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == before
    assert held(hosts, "host-a") == set()
    (source,) = hosts.reports("host-a", guest)
    (destination,) = hosts.reports("host-b", guest)
    assert (source["outcome"], destination["outcome"]) == ("moved", "moved")
    assert source["flows"]["exported"] == source["flows"]["purged"] == destination["flows"]["imported"] == 100
    assert source["flows"]["left_behind"] == 0


def test_what_changes_during_the_copy_arrives_as_it_was_at_the_pause(hosts: Hosts, guest: str) -> None:
    here = hosts.scope("host-a", guest)
    driver = hosts.drivers["host-a"]
    begin(hosts, guest)
    new = tcp_flows(10, first_port=5000)
    driver.insert(here, new)
    marked = tcp_flows(5)
    marked.rows["flowMark"] = 7
    driver.remove(here, tcp_flows(20).identities)
    driver.insert(here, marked)
    at_pause = held(hosts, "host-a")
    finish(hosts, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == at_pause
    assert held(hosts, "host-a") == set()


def test_source_keeps_everything_and_destination_nothing_when_the_guest_comes_back(hosts: Hosts, guest: str) -> None:
    before = held(hosts, "host-a")
    begin(hosts, guest)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    wait_for_step(hosts, "host-a", guest, "complete")
    assert held(hosts, "host-b") == before
    hosts.say("host-a", Phase.RESUMED, guest)
    until_idle(hosts)
    assert held(hosts, "host-a") == before
    assert held(hosts, "host-b") == set()
    assert hosts.reports("host-a", guest)[0]["outcome"] == "stayed"


ROUTERS = {"host-a": 70, "host-b": 80}


def routed_guest(hosts: Hosts) -> tuple[str, set[tuple[int, int]]]:
    """A guest with flows in its port's zone and others in that of a router, which only host-a has; the latter."""
    guest = guest_with_flows(hosts)
    hosts.plug("host-a", guest, ROUTERS["host-a"], GUEST_ADDRESS, shared=True, role="dnat")
    _, routed = hosts.agents["host-a"].host.scopes.find(guest)
    flows = tcp_flows(7, first_port=7000)
    flows.rows["zoneRole"] = ZoneRole.DNAT
    assert (hosts.drivers["host-a"].insert(routed, flows)["outcome"] == Outcome.IMPORTED).all()
    return guest, held(hosts, "host-a", ROUTERS["host-a"])


def test_what_a_router_tracks_goes_to_the_router_of_the_other_host(hosts: Hosts) -> None:
    guest, routed = routed_guest(hosts)
    hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")
    before = held(hosts, "host-a")
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == before
    assert held(hosts, "host-b", ROUTERS["host-b"]) == routed
    assert held(hosts, "host-a") == held(hosts, "host-a", ROUTERS["host-a"]) == set()


@pytest.mark.parametrize("settings", [limited(zone_seconds=0.5)], ids=["zone_seconds"])
def test_what_a_router_tracks_is_refused_by_name_where_there_is_no_router(hosts: Hosts) -> None:
    guest, routed = routed_guest(hosts)
    before = held(hosts, "host-a")
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == before
    (report,) = hosts.reports("host-b", guest)
    assert {reason: told["count"] for reason, told in report["named"].items()} == {
        f"refused: {WORDS[Reason.NO_ZONE]}": len(routed)
    }


def test_port_that_comes_after_a_router_has_its_flows(hosts: Hosts) -> None:
    """Which the source does not know: there another host translates, or its agent is an older one."""
    guest = guest_with_flows(hosts)
    second, zones = "192.0.2.8", {"host-a": 4100, "host-b": 5300}
    hosts.plug("host-a", guest, zones["host-a"], second)
    scope = hosts.agents["host-a"].host.scopes.find(guest)[1]
    hosts.drivers["host-a"].insert(scope, tcp_flows(10, second, first_port=5000))
    before = held(hosts, "host-a", zones["host-a"])
    hosts.say("host-a", Phase.OUTGOING, guest)
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")
    hosts.say("host-b", Phase.STARTED, guest)
    until(lambda: len(held(hosts, "host-b")) == 100)
    hosts.plug("host-b", guest, zones["host-b"], second)
    finish(hosts, guest)
    until_idle(hosts)
    assert held(hosts, "host-b", zones["host-b"]) == before
    assert hosts.reports("host-b", guest)[0]["named"] == {}


def test_flows_that_end_while_their_router_is_waited_for_are_not_refused(hosts: Hosts) -> None:
    guest, _ = routed_guest(hosts)
    begin_before_its_router(hosts, guest)
    driver = hosts.drivers["host-a"]
    _, routed = hosts.agents["host-a"].host.scopes.find(guest)
    ended = tcp_flows(7, first_port=7000)
    ended.rows["zoneRole"] = ZoneRole.DNAT
    driver.remove(routed, ended.identities)
    finish(hosts, guest)
    wait_for_step(hosts, "host-b", guest, "last changes came")
    hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")
    until_idle(hosts)
    assert hosts.reports("host-b", guest)[0]["named"] == {}
    assert held(hosts, "host-b", ROUTERS["host-b"]) == set()


class GoneDriver(MemoryDriver):
    """Of a host whose router ends with its last guest."""

    def remove(self, scope: Scope, identities: Batch) -> Results:
        if not scope.is_port:
            raise HasGone("there is no network namespace at /run/netns/qrouter-1")
        return super().remove(scope, identities)


def test_router_that_ends_when_the_guest_has_left_takes_its_flows_along(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: GoneDriver(MemoryDevice(name))) as hosts:
        guest, routed = routed_guest(hosts)
        hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert held(hosts, "host-b", ROUTERS["host-b"]) == routed
        for host in ("host-a", "host-b"):
            (report,) = hosts.reports(host, guest)
            assert (report["outcome"], report["reason"]) == ("moved", "")
        (report,) = hosts.reports("host-a", guest)
        assert any("is not here any more: there is no network namespace" in one for one in report["remarks"])


class UnaskedDriver(MemoryDriver):
    """Of a host on which nobody can be asked about routers for a moment."""

    fails = 0

    def remove(self, scope: Scope, identities: Batch) -> Results:
        if self.fails and not scope.is_port:
            self.fails -= 1
            raise NotAvailable("Open_vSwitch has no connection; is its server running?")
        return super().remove(scope, identities)


@pytest.mark.parametrize(("moves", "fails"), [(True, 2), (False, 2), (False, DISCARD_TRIES)])
def test_router_of_which_nobody_can_be_asked_has_not_gone(tmp_path: Path, moves: bool, fails: int) -> None:
    with hosts_in(tmp_path, driver=lambda name: UnaskedDriver(MemoryDevice(name))) as hosts:
        guest, routed = routed_guest(hosts)
        hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")
        begin(hosts, guest)
        until(lambda: held(hosts, "host-b", ROUTERS["host-b"]) == routed)
        emptied = "host-a" if moves else "host-b"
        driver = hosts.drivers[emptied]
        assert isinstance(driver, UnaskedDriver)
        driver.fails = fails
        if moves:
            finish(hosts, guest)
        else:
            hosts.say("host-a", Phase.ROLLBACK, guest)
            hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        (report,) = hosts.reports(emptied, guest)
        if fails == DISCARD_TRIES:
            assert report["outcome"] == "failed"
            assert "could not be discarded: Open_vSwitch has no connection" in report["reason"]
        else:
            assert held(hosts, emptied, ROUTERS[emptied]) == set()
            assert report["outcome"] == ("moved" if moves else "stayed")
            assert "it failed first: Open_vSwitch has no connection" in report["reason"]


@pytest.mark.parametrize("is_router_first", [False, True])
def test_port_is_emptied_where_its_router_cannot_be(tmp_path: Path, is_router_first: bool) -> None:
    with hosts_in(tmp_path, driver=lambda name: UnaskedDriver(MemoryDevice(name))) as hosts:
        guest, routed = routed_guest(hosts)
        begin_before_its_router(hosts, guest)
        hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")
        until(lambda: held(hosts, "host-b", ROUTERS["host-b"]) == routed)
        (session,) = hosts.agents["host-b"].sessions()
        assert isinstance(session, DestinationSession)
        if is_router_first:
            session._ports.reverse()
        driver = hosts.drivers["host-b"]
        assert isinstance(driver, UnaskedDriver)
        driver.fails = 10
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()


@pytest.mark.parametrize("is_router_first", [False, True])
def test_new_start_of_the_destination_s_agent_knows_the_port_s_flows_from_the_router_s(
    hosts: Hosts, is_router_first: bool
) -> None:
    guest, _ = routed_guest(hosts)

    def plug_router() -> None:
        hosts.plug("host-b", guest, ROUTERS["host-b"], GUEST_ADDRESS, shared=True, role="dnat")

    if is_router_first:
        plug_router()
    begin_before_its_router(hosts, guest)
    if not is_router_first:
        plug_router()
    wait_for_step(hosts, "host-b", guest, "in sync")
    until(lambda: len(held(hosts, "host-b", ROUTERS["host-b"])) == 7)
    hosts.kill("host-b")
    hosts.start("host-b")
    hosts.say("host-b", Phase.STARTED, guest)
    hosts.say("host-a", Phase.ROLLBACK, guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == held(hosts, "host-b", ROUTERS["host-b"]) == set()
    assert hosts.reports("host-b", guest)[0]["flows"]["discarded"] == 107


def test_abort_while_copying_leaves_nothing_at_the_destination(hosts: Hosts, guest: str) -> None:
    before = held(hosts, "host-a")
    begin(hosts, guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert held(hosts, "host-a") == before
    assert held(hosts, "host-b") == set()


def test_what_the_destination_had_before_survives_a_roll_back(hosts: Hosts, guest: str) -> None:
    other = zone_scope("host-b")
    hosts.drivers["host-b"].insert(
        Scope("p", "g", other.zones, tuple(hosts.scope("host-a", guest).addresses)), tcp_flows(3, first_port=9000)
    )
    before = held(hosts, "host-b")
    begin(hosts, guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == before


@pytest.mark.parametrize("settings", [IMPATIENT], ids=["impatient"])
def test_source_purges_without_arrival_only_after_its_own_hypervisor_says_that_the_guest_left(
    hosts: Hosts, guest: str
) -> None:
    begin(hosts, guest)
    hosts.agents["host-b"].host.peers.way_to("host-b").transport.stop()  # ARRIVED will never be heard
    hosts.say("host-a", Phase.SUSPENDED, guest)
    wait_for_step(hosts, "host-a", guest, "last changes sent")
    assert len(held(hosts, "host-a")) == 100
    hosts.unplug("host-a", guest)
    hosts.say("host-a", Phase.STOPPED, guest)
    assert hosts.agents["host-a"].wait_until_idle(20)
    assert held(hosts, "host-a") == set()
    assert hosts.reports("host-a", guest)[0]["outcome"] == "purged without arrival"


def test_a_guest_that_comes_back_has_all_its_flows_again(hosts: Hosts, guest: str) -> None:
    before = held(hosts, "host-a")
    for source, destination in (("host-a", "host-b"), ("host-b", "host-a")):
        begin(hosts, guest, source, destination)
        finish(hosts, guest, source, destination)
    until_idle(hosts)
    assert held(hosts, "host-a") == before
    assert held(hosts, "host-b") == set()


def test_two_guests_in_opposite_directions_do_not_see_each_other(hosts: Hosts, guest: str) -> None:
    other = new_guest()
    zone_b, zone_a = 5999, 4999
    hosts.plug("host-b", other, zone_b, "192.0.2.8")
    hosts.drivers["host-b"].insert(hosts.scope("host-b", other), tcp_flows(50, "192.0.2.8"))
    begin(hosts, guest)
    hosts.say("host-b", Phase.OUTGOING, other, destination="host-a")
    hosts.say("host-a", Phase.PREPARE, other, "host-b")
    hosts.plug("host-a", other, zone_a, "192.0.2.8")
    hosts.say("host-a", Phase.STARTED, other)
    wait_for_step(hosts, "host-a", other, "in sync")
    finish(hosts, guest)
    finish(hosts, other, "host-b", "host-a")
    until_idle(hosts)
    assert len(held(hosts, "host-b")) == 100
    there = list(hosts.drivers["host-a"].export(Scope("p", other, {ZoneRole.PORT: zone_a}, ())))
    assert sum(len(batch) for batch in there if isinstance(batch, Batch)) == 50
    assert held(hosts, "host-a") == set()


def test_flows_of_foreign_addresses_are_refused_by_name(hosts: Hosts, guest: str) -> None:
    foreign = tcp_flows(2, "203.0.113.9")
    source_scope = hosts.scope("host-a", guest)
    wider = Scope("p", guest, source_scope.zones, (*source_scope.addresses, *_address("203.0.113.9")))
    hosts.drivers["host-a"].insert(wider, foreign)
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    (report,) = hosts.reports("host-b", guest)
    assert report["flows"]["refused"] == 2
    named = report["named"]["refused: neither end is an address of the port"]
    assert named["flows"][0] == "tcp 203.0.113.9:1000 > 198.51.100.1:443"


def _address(text: str) -> tuple[object, ...]:
    import netaddr

    return (netaddr.IPAddress(text),)


def test_a_guest_without_ports_moves(hosts: Hosts) -> None:
    guest = new_guest()
    hosts.say("host-a", Phase.OUTGOING, guest)
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    assert hosts.agents["host-a"].wait_until_idle(20)
    (told,) = hosts.reports("host-a", guest)
    assert told["remarks"] == ["this host knows no port of the guest, so nothing was carried"]


def test_two_guests_at_a_time_do_not_get_the_same_place_twice(tmp_path: Path) -> None:
    devices = {name: MemoryDevice(name, capacity=200) for name in ZONES}
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(devices[name]), settings=SETTINGS) as hosts:
        guests = [new_guest(), new_guest()]
        for number, guest in enumerate(guests):
            hosts.plug("host-a", guest, 100 + number, f"192.0.2.{50 + number}")
            hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(100, f"192.0.2.{50 + number}"))
            hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
            hosts.plug("host-b", guest, 200 + number, f"192.0.2.{50 + number}")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda guest: hosts.say("host-b", Phase.STARTED, guest), guests))
        for guest in guests:
            wait_for_step(hosts, "host-b", guest, "in sync")
            finish(hosts, guest)
        until_idle(hosts)
        imported = [hosts.reports("host-b", guest)[0]["flows"]["imported"] for guest in guests]
        assert sum(imported) == devices["host-b"].count
        assert 180 <= sum(imported) <= 190


def test_guest_that_leaves_long_after_it_runs_elsewhere_has_one_report(hosts: Hosts) -> None:
    """As with post-copy: its process here ends when all memory has followed, long after its flows were purged."""
    guest = guest_with_flows(hosts)
    begin(hosts, guest)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    hosts.say("host-b", Phase.RESUMED, guest)
    until_idle(hosts)
    hosts.say("host-a", Phase.STOPPED, guest)
    until_idle(hosts)
    assert [report["outcome"] for report in hosts.reports("host-a", guest)] == ["moved"]
    assert hosts.agents["host-a"].underway() == []


@pytest.mark.parametrize("is_known", [True, False])
def test_flow_is_translated_only_to_what_the_destination_knows_to_be_translated_to(
    tmp_path: Path, is_known: bool
) -> None:
    public = netaddr.IPAddress("203.0.113.7")
    with hosts_in(tmp_path, replace(SETTINGS, translations=(public,) if is_known else ())) as hosts:
        guest = guest_with_flows(hosts, 0)
        own = (netaddr.IPAddress(GUEST_ADDRESS),)
        sent = flows(TEMPLATES["tcp-nat-ipv4"], 3, source=own)
        sent.rows["postNATSourceIPv4Address"] = int(public)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), sent)
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == (3 if is_known else 0)
        assert held(hosts, "host-a") == set()
        named = hosts.reports("host-b", guest)[0]["named"]
        assert (f"refused: {WORDS[Reason.FOREIGN_TRANSLATION]}" in named) is not is_known
