"""From one administrative domain to another: other authorities, other addresses, and not everything may pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import netaddr
import pytest

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.handover import SourceSession
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, Omitted, ZoneRole
from sami_plugin.model.migration import Phase
from sami_plugin.model.results import WORDS, Reason
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    SETTINGS,
    ZONES,
    begin,
    finish,
    guest_with_flows,
    held,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
    zone_scope,
)
from tests.unit.handover.regions import EAST_ADDRESS, WEST_ADDRESS, goes_east, regions

PUBLIC, PEER = "198.51.100.9", "198.51.100.1"


def ends(hosts: Hosts, host: str) -> set[tuple[str, ...]]:
    """All addresses of each flow in the host's zone, in the order of their fields."""
    found = set()
    for batch in MemoryDriver.export(hosts.drivers[host], zone_scope(host)):
        assert not isinstance(batch, Omitted)
        for row in batch.rows:
            found.add(tuple(str(netaddr.IPAddress(int(row[field]))) for field in batch.address_fields))
    return found


def moves_east(hosts: Hosts, guest: str, *addresses: str) -> dict[str, Any]:
    """The report of the east."""
    goes_east(hosts, guest, *addresses)
    finish(hosts, guest)
    until_idle(hosts)
    return hosts.reports("host-b", guest)[0]


def named(report: dict[str, Any], what: str) -> int:
    return int(report["named"].get(what, {"count": 0})["count"])


def translated(*addresses: str) -> Batch:
    """A flow with a NAT of its own: source, destination, and those of the replies turned round."""
    template = TEMPLATES["tcp-nat-ipv4"]
    batch = Batch(template, template.empty(1))
    for field, address in zip(batch.address_fields, addresses, strict=True):
        batch.rows[field] = int(netaddr.IPAddress(address))
    for field, value in {
        "zoneRole": ZoneRole.PORT,
        "protocolIdentifier": 6,
        "sourceTransportPort": 4000,
        "destinationTransportPort": 443,
        "postNAPTSourceTransportPort": 4000,
        "postNAPTDestinationTransportPort": 443,
        "conntrackStatus": FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.ASSURED,
        "remainingTimeoutSeconds": 432000,
        "tcpConnectionState": 5,
    }.items():
        batch.rows[field] = value
    return batch


def test_guest_has_its_flows_under_its_new_address_and_the_source_has_none(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts)
        report = moves_east(hosts, guest)
        assert ends(hosts, "host-b") == {(EAST_ADDRESS, PEER)}
        assert len(held(hosts, "host-b")) == report["flows"]["imported"] == 100
        assert held(hosts, "host-a") == set()
        assert report["outcome"] == "moved"


def test_what_ends_during_the_copy_ends_under_its_new_address(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts)
        goes_east(hosts, guest)
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), tcp_flows(30).identities)
        until(lambda: len(held(hosts, "host-b")) == 70)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 70


def test_guest_that_goes_back_has_its_old_address_again(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts)
        before = held(hosts, "host-a")
        moves_east(hosts, guest)
        hosts.say("host-b", Phase.OUTGOING, guest, destination="host-a")
        hosts.say("host-a", Phase.PREPARE, guest, "host-b")
        hosts.plug("host-a", guest, ZONES["host-a"], WEST_ADDRESS)
        hosts.say("host-a", Phase.STARTED, guest)
        wait_for_step(hosts, "host-a", guest, "in sync")
        finish(hosts, guest, "host-b", "host-a")
        until_idle(hosts)
        assert held(hosts, "host-a") == before
        assert ends(hosts, "host-a") == {(WEST_ADDRESS, PEER)}
        assert held(hosts, "host-b") == set()


def test_roll_back_removes_what_came_under_the_new_address(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts)
        before = held(hosts, "host-a")
        goes_east(hosts, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        hosts.say("host-a", Phase.ROLLBACK, guest)
        until_idle(hosts)
        assert (held(hosts, "host-a"), held(hosts, "host-b")) == (before, set())


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ((WEST_ADDRESS, PEER, PUBLIC, PEER), (EAST_ADDRESS, PEER, PUBLIC, PEER)),
        ((PEER, PUBLIC, PEER, WEST_ADDRESS), (PEER, PUBLIC, PEER, EAST_ADDRESS)),
        ((WEST_ADDRESS, PEER, "192.0.2.200", PEER), None),
    ],
)
def test_without_peers_that_follow_only_what_a_nat_hides_from_them_is_carried(
    tmp_path: Path, there: tuple[str, ...], here: tuple[str, ...] | None
) -> None:
    with regions(tmp_path, west={"peers_follow": False}) as (hosts, _):
        guest = guest_with_flows(hosts)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), translated(*there))
        report = moves_east(hosts, guest, EAST_ADDRESS, PUBLIC)
        assert ends(hosts, "host-b") == ({here} if here else set())
        assert named(report, f"refused: {WORDS[Reason.PEER_CANNOT_FOLLOW]}") == (100 if here else 101)


def test_guest_whose_addresses_stay_needs_no_peers_that_follow(tmp_path: Path) -> None:
    with regions(tmp_path, west={"peers_follow": False}) as (hosts, _):
        guest, address = new_guest(), "198.18.0.7"
        hosts.plug("host-a", guest, ZONES["host-a"], address)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(3, address))
        moves_east(hosts, guest, address)
        assert ends(hosts, "host-b") == {(address, PEER)}


def test_kind_that_may_not_come_in_is_refused_by_name(tmp_path: Path) -> None:
    with regions(tmp_path, west={"kinds_in": ("udp-*", "icmp-*")}) as (hosts, _):
        report = moves_east(hosts, guest_with_flows(hosts))
        assert held(hosts, "host-b") == set()
        assert named(report, f"refused: {WORDS[Reason.NOT_ADMITTED]}") == report["flows"]["refused"] == 100


def test_kind_that_may_not_go_out_is_told_nobody_and_purged(tmp_path: Path) -> None:
    with regions(tmp_path, east={"kinds_out": ("tcp-ipv4",)}) as (hosts, _):
        guest = guest_with_flows(hosts)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), translated(WEST_ADDRESS, PEER, PUBLIC, PEER))
        moves_east(hosts, guest)
        (report,) = hosts.reports("host-a", guest)
        assert len(held(hosts, "host-b")) == report["flows"]["exported"] == 100
        assert named(report, "not exported: this kind may not go to that domain (kinds_out)") == 1
        assert report["flows"]["purged"] == 101
        assert (report["flows"]["late"], held(hosts, "host-a")) == (0, set())


def test_address_of_ours_that_means_another_there_takes_nobody_s_place(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts)
        foreign = tcp_flows(5)
        foreign.rows["destinationIPv4Address"] = int(netaddr.IPAddress("203.0.113.50"))
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), foreign)
        report = moves_east(hosts, guest)
        assert ends(hosts, "host-b") == {(EAST_ADDRESS, PEER)}
        assert named(report, f"refused: {WORDS[Reason.AMBIGUOUS_ADDRESS]}") == 5


# --- a tuple that is used again, for something that may not pass: the destination must not keep what it had


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers that cannot watch: another export finds what changed, and a key that stays is not told as gone."""
    real = MemoryDriver.capabilities
    monkeypatch.setattr(
        MemoryDriver, "capabilities", lambda self, scope=None: replace(real(self, scope), can_watch=False)
    )


def is_used_again(hosts: Hosts, guest: str, *addresses: str) -> None:
    """The guest's first flow ends, and its tuple has a translation from now on."""
    driver, scope = hosts.drivers["host-a"], hosts.scope("host-a", guest)
    driver.remove(scope, tcp_flows(1).identities)
    again = translated(*addresses)
    again.rows["sourceTransportPort"] = again.rows["postNAPTSourceTransportPort"] = 1000
    driver.insert(scope, again)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(
    ("west", "east", "public"),
    [
        ({}, {"kinds_out": ("tcp-ipv4",)}, PUBLIC),
        ({"kinds_in": ("tcp-ipv4",)}, {}, PUBLIC),
        ({}, {}, "203.0.113.50"),  # ambiguous
        ({}, {}, "198.18.0.1"),  # a foreign translation
    ],
)
def test_flow_that_may_not_pass_any_more_is_gone_at_the_destination(
    tmp_path: Path, west: dict[str, Any], east: dict[str, Any], public: str
) -> None:
    with regions(tmp_path, west=west, east=east) as (hosts, _):
        guest = guest_with_flows(hosts, 1)
        goes_east(hosts, guest, EAST_ADDRESS, PUBLIC)
        until(lambda: len(held(hosts, "host-b")) == 1)
        is_used_again(hosts, guest, WEST_ADDRESS, PEER, public, PEER)
        until(lambda: not held(hosts, "host-b"))
        finish(hosts, guest)
        until_idle(hosts)
        (there,), (here,) = hosts.reports("host-b", guest), hosts.reports("host-a", guest)
        assert there["flows"]["imported"] == 0
        assert there["flows"]["refused"] == (0 if east else 1)
        assert (here["flows"]["purged"], ends(hosts, "host-a")) == (1, set())


@pytest.mark.usefixtures("unwatched")
def test_without_a_domain_a_foreign_translation_takes_away_what_was_there(tmp_path: Path) -> None:
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(MemoryDevice(name)), settings=SETTINGS) as hosts:
        guest = guest_with_flows(hosts, 1)
        begin(hosts, guest)
        is_used_again(hosts, guest, WEST_ADDRESS, PEER, PUBLIC, PEER)
        until(lambda: not held(hosts, "host-b"))
        finish(hosts, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()


def test_flow_whose_name_here_is_another_s_is_named_and_the_other_is_there(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts, 5)
        hosts.unplug("host-a", guest)
        hosts.plug("host-a", guest, ZONES["host-a"], WEST_ADDRESS, EAST_ADDRESS)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(5, EAST_ADDRESS))
        report = moves_east(hosts, guest)
        assert named(report, f"refused: {WORDS[Reason.AMBIGUOUS_ADDRESS]}") == report["flows"]["refused"] == 5
        assert (report["flows"]["imported"], len(held(hosts, "host-b"))) == (5, 5)


def test_ambiguous_translation_that_ended_is_not_reported(tmp_path: Path) -> None:
    with regions(tmp_path) as (hosts, _):
        guest = guest_with_flows(hosts, 3)
        scope, odd = hosts.scope("host-a", guest), translated(WEST_ADDRESS, PEER, "203.0.113.50", PEER)
        hosts.drivers["host-a"].insert(scope, odd)
        goes_east(hosts, guest)
        hosts.drivers["host-a"].remove(scope, odd.identities)
        finish(hosts, guest)
        until_idle(hosts)
        assert hosts.reports("host-b", guest)[0]["flows"]["refused"] == 0


def test_what_ended_is_not_refused_again_when_another_port_becomes_known(tmp_path: Path) -> None:
    with regions(tmp_path, west={"kinds_in": ("udp-*",)}) as (hosts, _):
        guest = new_guest()
        hosts.plug("host-a", guest, ZONES["host-a"], WEST_ADDRESS)
        hosts.plug("host-a", guest, 4999, "192.0.2.8")
        scope = hosts.agents["host-a"].host.scopes.find(guest)[0]
        hosts.drivers["host-a"].insert(scope, tcp_flows(10))
        goes_east(hosts, guest)
        hosts.drivers["host-a"].remove(scope, tcp_flows(3).identities)
        until(lambda: hosts.agents["host-b"].sessions()[0]._findings.refused == 7)  # type: ignore[attr-defined]
        hosts.plug("host-b", guest, 5999, "203.0.113.8")
        wait_for_step(hosts, "host-b", guest, "scope known")
        finish(hosts, guest)
        until_idle(hosts)
        assert named(hosts.reports("host-b", guest)[0], f"refused: {WORDS[Reason.NOT_ADMITTED]}") == 7


def test_what_is_withheld_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    real = SourceSession._tell

    def tell(self: SourceSession, port: Any, batch: Batch, *more: Any) -> None:
        told.append(len(batch))
        real(self, port, batch, *more)

    monkeypatch.setattr(SourceSession, "_tell", tell)
    with regions(tmp_path, east={"kinds_out": ("udp-*",)}) as (hosts, _):
        guest = guest_with_flows(hosts)
        resyncs: list[object] = []
        real_resync = SourceSession._resync
        monkeypatch.setattr(
            SourceSession, "_resync", lambda self, action: resyncs.append(1) or real_resync(self, action)
        )
        goes_east(hosts, guest)
        until(lambda: len(resyncs) > 8)
        finish(hosts, guest)
        until_idle(hosts)
    assert sum(told) == 100
