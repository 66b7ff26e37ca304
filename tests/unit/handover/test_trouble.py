"""What goes wrong on the way, one thing at a time: no flow is lost, none is left, none is said to be what it is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import netaddr
import numpy as np
import pytest

from sami_plugin import agent as agent_module
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import PeerUnreachable
from sami_plugin.handover import DestinationSession
from sami_plugin.migration import destination as destination_decisions
from sami_plugin.migration import source as source_decisions
from sami_plugin.migration.decision import ExportChanges, ExportNext
from sami_plugin.model.flows import Batch, Omitted, ZoneRole
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.results import Outcome, Results, results
from sami_plugin.model.scope import Scope
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    IMPATIENT,
    SECOND_ADDRESS,
    SETTINGS,
    ZONES,
    FailsOnce,
    HeldUpExport,
    begin,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    is_orphaned,
    leave,
    leaving_session,
    limited,
    ports,
    prepare,
    report,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
    words,
    zone_scope,
)

# --- flows that end on the way


def test_what_packets_make_in_the_pause_in_the_place_of_a_flow_that_was_exported_is_not_told(tmp_path: Path) -> None:
    """Somebody has deleted the flow at the source, where its guest was paused before the copy was over."""
    with hosts_in(tmp_path) as hosts:
        driver = hosts.drivers["host-a"]
        with leaving_session(hosts, guest_with_flows(hosts)) as session:
            session._export_next(ExportNext())
            session._known = replace(session._known, is_paused_early=True)
            (port,) = session._ports
            driver.remove(port.scope, tcp_flows(2).identities)
            driver.insert(port.scope, tcp_flows(1))
            driver.insert(port.scope, tcp_flows(1, first_port=7000))
            done = session._export_changes(ExportChanges(is_last=True, says_removals=False))
            assert done.count == 1
            assert sum(len(batch) for batch in port.exported.batches()) == 101


def test_a_flow_that_ended_before_the_zone_was_known_is_not_at_the_destination(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        wait_for_step(hosts, "host-b", guest, "in sync")
        (leaving,) = hosts.agents["host-a"].sessions()
        hosts.drivers["host-a"].remove(hosts.scope("host-a", guest), tcp_flows(20).identities)
        until(lambda: leaving._exported_count() == 80)  # type: ignore[attr-defined]
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 80


class SlowLook(MemoryDriver):
    def read_back(self, scope: Scope, batch: Batch) -> Any:
        if self.device.name == "host-b":
            time.sleep(0.1)
        return super().read_back(scope, batch)


def test_a_flow_that_ends_before_it_was_looked_at_is_not_left_at_the_destination(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: SlowLook(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        here = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].insert(here, tcp_flows(1, first_port=7000))
        until(lambda: 7000 in ports(hosts, "host-b"))
        hosts.drivers["host-a"].remove(here, tcp_flows(1, first_port=7000).identities)
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == set(range(1000, 1100))


class GoesBetween(MemoryDriver):
    """Events are lost, and a flow that the watch has just told goes before the export that makes up for it."""

    goes: Batch | None = None

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        if self.goes is not None:
            gone, self.goes = self.goes, None
            self.device.faults.lose_events = False
            self.remove(scope, gone)
        yield from super().export(scope)


def test_a_flow_that_goes_between_lost_events_and_the_new_export_is_gone_there_too(tmp_path: Path) -> None:
    settings = limited(delta_seconds=0.3, resync_seconds=100)
    with hosts_in(tmp_path, settings, lambda name: GoesBetween(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        driver, here = hosts.drivers["host-a"], hosts.scope("host-a", guest)
        assert isinstance(driver, GoesBetween)
        with driver.device.lock:
            driver.insert(here, tcp_flows(1, first_port=7000))
            driver.device.faults.lose_events = True
            driver.insert(here, tcp_flows(1, first_port=7001))
            driver.goes = tcp_flows(1, first_port=7000).identities
        until(lambda: 7001 in ports(hosts, "host-b"))
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == {*range(1000, 1100), 7001}


class Counts(MemoryDriver):
    """Each time that somebody looks, each flow has had one packet more; nothing tells changes."""

    exports = inserted = 0

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device, can_watch=False)

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        self.exports += 1
        for piece in super().export(scope):
            if isinstance(piece, Batch):
                piece = piece.under(piece.template.variant(is_extended=True))
                piece.rows["packetTotalCount"] = self.exports
            yield piece

    def insert(self, scope: Scope, batch: Batch) -> Any:
        self.inserted += len(batch)
        return super().insert(scope, batch)


def test_flows_of_which_packets_are_counted_are_sent_once(tmp_path: Path) -> None:
    settings = limited(delta_seconds=0.05, resync_seconds=0.1)
    with hosts_in(tmp_path, settings, lambda name: Counts(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        here, there = (hosts.drivers[name] for name in ("host-a", "host-b"))
        assert isinstance(here, Counts)
        assert isinstance(there, Counts)
        looks = here.exports
        until(lambda: here.exports > looks + 5)
        finish(hosts, guest)
        until_idle(hosts)
        assert there.inserted == 100
        (kept,) = MemoryDriver.export(there, hosts.scope("host-b", guest))
        assert isinstance(kept, Batch)
        assert (kept.rows["packetTotalCount"] > 0).all()


class SlowExport(MemoryDriver):
    pause = 0.0

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        for piece in super().export(scope):
            if not self.pause or isinstance(piece, Omitted):
                yield piece
                continue
            for at in range(0, len(piece), 5):
                yield piece.take(np.arange(at, min(at + 5, len(piece))))
                time.sleep(self.pause)


def test_what_is_deleted_at_the_source_after_the_pause_does_not_travel(tmp_path: Path) -> None:
    with hosts_in(tmp_path, replace(SETTINGS, batch_flows=5), lambda name: SlowExport(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        driver, here = hosts.drivers["host-a"], hosts.scope("host-a", guest)
        assert isinstance(driver, SlowExport)
        driver.pause = 0.03
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        wait_for_step(hosts, "host-b", guest, "first flows")
        (leaving,) = hosts.agents["host-a"].sessions()
        watch = leaving._ports[0].watch  # type: ignore[attr-defined]
        looks: list[object] = []
        real, watch.collect = watch.collect, lambda: looks.append(changes := real()) or changes
        hosts.say("host-a", Phase.SUSPENDED, guest)  # while the first export is under way
        until(lambda: looks)  # at what was deleted until the pause
        driver.remove(here, tcp_flows(100).identities)  # the network's own agent
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def test_a_flow_of_medium_timeout_is_there_when_a_long_copy_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    clocks = {"host-a": lambda: began}  # traffic renews the timeouts there, of which no event tells
    driver = lambda name: MemoryDriver(MemoryDevice(name, clock=clocks.get(name, time.monotonic)))  # noqa: E731
    with hosts_in(tmp_path, limited(hold_seconds=1), driver) as hosts:
        guest = guest_with_flows(hosts, timeout=5)
        begin(hosts, guest)
        until(lambda: time.monotonic() > began + 6)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def test_who_goes_on_knows_that_flows_are_older_than_its_session(tmp_path: Path) -> None:
    passed = [0.0]
    driver = lambda name: MemoryDriver(MemoryDevice(name, clock=lambda: passed[0]))  # noqa: E731
    with hosts_in(tmp_path, limited(hold_seconds=2), driver) as hosts:
        guest = guest_with_flows(hosts, timeout=6)
        begin(hosts, guest)
        words(hosts, guest, ("host-a", Phase.SUSPENDED))
        wait_for_step(hosts, "host-b", guest, "complete")
        hosts.kill("host-a")
        hosts.kill("host-b")
        passed[0] = 5.0
        hosts.start("host-b")
        until_renewed(hosts)
        assert min(times_left(hosts, "host-b", guest)) == 2


@pytest.mark.parametrize("starts", [1, 2])
def test_what_ran_out_while_nobody_renewed_it_is_not_taken_for_what_the_guest_ended(
    tmp_path: Path, starts: int
) -> None:
    clocks = {"host-b": time.monotonic}  # where the guest is it renews its flows
    driver = lambda name: MemoryDriver(MemoryDevice(name, clock=clocks.get(name, lambda: 0.0)))  # noqa: E731
    with hosts_in(tmp_path, limited(hold_seconds=1), driver) as hosts:
        guest = guest_with_flows(hosts, timeout=1)
        begin(hosts, guest)
        hosts.kill("host-b")
        until(lambda: held(hosts, "host-b") == set())
        leave(hosts, guest)
        hosts.kill("host-a")  # which tells nothing anew until the last start
        for _ in range(starts):
            hosts.kill("host-b")
            hosts.start("host-b")
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.STOPPED), ("host-b", Phase.RESUMED))
        until_idle(hosts)
        assert (ports(hosts, "host-b"), held(hosts, "host-a")) == (ALL, set())
        assert any("may have ended here" in reason for reason in report(hosts, "host-b", guest)["named"])


def until_renewed(hosts: Hosts) -> None:
    (session,) = hosts.agents["host-b"].sessions()
    assert isinstance(session, DestinationSession)
    until(lambda: session._has_renewed)


def times_left(hosts: Hosts, host: str, guest: str) -> list[int]:
    found, is_there = hosts.drivers[host].read_back(hosts.scope(host, guest), tcp_flows(100))
    assert is_there.all()
    return found.rows["remainingTimeoutSeconds"].tolist()


def test_who_goes_on_gives_no_time_back_that_the_guest_has_taken(tmp_path: Path) -> None:
    """It has closed its connections since it came; that it did come is told a little later."""
    with hosts_in(tmp_path, limited(hold_seconds=1)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        words(hosts, guest, ("host-a", Phase.SUSPENDED))
        wait_for_step(hosts, "host-b", guest, "complete")
        hosts.kill("host-a")
        hosts.kill("host-b")
        closed = tcp_flows(100)
        closed.rows["remainingTimeoutSeconds"] = 120
        hosts.drivers["host-b"].renew(hosts.scope("host-b", guest), closed)
        hosts.start("host-b")
        until_renewed(hosts)
        assert set(times_left(hosts, "host-b", guest)) == {120}


@pytest.mark.parametrize("has_all", [True, False])
def test_who_goes_on_leaves_flows_the_time_that_they_have(tmp_path: Path, has_all: bool) -> None:
    """A silent guest's connections would run out, and nobody tells of them while the source's agent is away."""
    with hosts_in(tmp_path, limited(hold_seconds=1)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        if has_all:
            words(hosts, guest, ("host-a", Phase.SUSPENDED))
            wait_for_step(hosts, "host-b", guest, "complete")
        hosts.kill("host-a")
        hosts.kill("host-b")
        hosts.start("host-b")
        until_renewed(hosts)
        assert min(times_left(hosts, "host-b", guest)) == 432000


# --- devices that fail


def test_a_device_that_fails_when_a_guest_is_announced_ends_that_session_alone(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: FailsOnce(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        hosts.drivers["host-b"].what = "capabilities"  # type: ignore[attr-defined]
        hosts.say("host-a", Phase.OUTGOING, guest)
        began = time.monotonic()
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        assert time.monotonic() - began < SETTINGS.limits.verdict_seconds, "the migration waits for nobody"
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert "receive buffer" in report(hosts, "host-b", guest)["reason"]
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def announced(hosts: Hosts, guest: str) -> None:
    hosts.say("host-a", Phase.OUTGOING, guest)
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.say("host-b", Phase.STARTED, guest)


def test_what_a_failed_insert_left_in_the_device_is_discarded(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        faults = hosts.drivers["host-b"].device.faults  # type: ignore[attr-defined]
        faults.fail_after = 10
        announced(hosts, guest)
        until(lambda: len(held(hosts, "host-b")) == 10)
        faults.fail_after = None  # it answers again, and what was begun is found there
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()
        assert len(held(hosts, "host-a")) == 100


def test_flows_that_wait_for_the_zone_are_put_in_when_a_firewall_that_failed_works_again(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        wait_for_step(hosts, "host-b", guest, "in sync")
        faults = hosts.drivers["host-b"].device.faults  # type: ignore[attr-defined]
        faults.fail_after = 50
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: len(held(hosts, "host-b")) == 50)
        faults.fail_after = None
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def test_a_look_that_fails_leaves_nothing_behind_at_the_destination(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: FailsOnce(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        hosts.drivers["host-b"].what = "read_back"  # type: ignore[attr-defined]
        announced(hosts, guest)
        until(lambda: is_orphaned(hosts))
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()
        assert len(held(hosts, "host-a")) == 100


def test_a_driver_that_cannot_watch_still_moves_flows(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: MemoryDriver(MemoryDevice(name), can_watch=False)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(1, first_port=7000))
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 101


def test_a_decision_that_fails_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)

        def broken(*_: object) -> None:
            raise AssertionError("our own mistake")

        monkeypatch.setattr(source_decisions, "step", broken)
        assert hosts.agents["host-a"].wait_until_idle(5)
        assert "our own mistake" in report(hosts, "host-a", guest)["reason"]


class Stubborn(MemoryDriver):
    """The first port's zone keeps its flows."""

    def remove(self, scope: Scope, identities: Batch) -> Results:
        if self.device.name == "host-a" and scope.zones[ZoneRole.PORT] == ZONES["host-a"]:
            return results(len(identities), Outcome.REFUSED)
        return super().remove(scope, identities)


def test_flows_that_are_left_of_any_port_are_told(tmp_path: Path) -> None:
    with hosts_in(tmp_path, driver=lambda name: Stubborn(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        hosts.plug("host-a", guest, 4098, SECOND_ADDRESS)
        announced(hosts, guest)
        hosts.plug("host-b", guest, 5202, SECOND_ADDRESS)
        wait_for_step(hosts, "host-b", guest, "in sync")
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-a", guest)
        assert (told["flows"]["left_behind"], told["outcome"]) == (100, "failed")


@pytest.mark.parametrize("what", ["remove", "read_back"])
@pytest.mark.parametrize("is_killed", [False, True], ids=["", "killed meanwhile"])
def test_a_purge_that_fails_once_is_tried_again_and_leaves_nothing(tmp_path: Path, what: str, is_killed: bool) -> None:
    with hosts_in(tmp_path, driver=lambda name: FailsOnce(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        device = hosts.drivers["host-a"]
        assert isinstance(device, FailsOnce)
        device.what = what
        finish(hosts, guest)
        if is_killed:
            until(lambda: not device.what)
            hosts.kill("host-a")
            hosts.start("host-a")
        until_idle(hosts)
        told = report(hosts, "host-a", guest)
        assert (held(hosts, "host-a"), told["outcome"]) == (set(), "moved")
        if is_killed:
            assert told["reason"] == "this host's agent was started anew"
        else:
            assert told["flows"]["purged"] == 100
            assert told["reason"].startswith("the purge was tried again; it failed first: the kernel dropped")


# --- words of the hypervisor that come early, late, twice or not at all


def test_the_source_purges_though_its_port_is_still_there_when_the_guest_arrives(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        until_idle(hosts)
        assert held(hosts, "host-a") == set()
        assert report(hosts, "host-a", guest)["outcome"] == "moved"


def has_moved(hosts: Hosts) -> tuple[str, Scope]:
    """A guest that has left host-a, where its flows have been purged and the watch goes on; and where they were."""
    guest = guest_with_flows(hosts)
    here = hosts.scope("host-a", guest)
    begin(hosts, guest)
    finish(hosts, guest)
    until(lambda: hosts.has_step("host-a", guest, "proved"))
    return guest, here


def test_what_late_packets_made_at_the_source_after_the_purge_is_removed_and_named(tmp_path: Path) -> None:
    with hosts_in(tmp_path, limited(watch_seconds=1.0)) as hosts:
        guest, here = has_moved(hosts)
        hosts.drivers["host-a"].insert(here, tcp_flows(3, first_port=7000))
        assert len(held(hosts, "host-a")) == 3
        until_idle(hosts)
        assert held(hosts, "host-a") == set()
        told = report(hosts, "host-a", guest)
        assert (told["outcome"], told["flows"]["late"], told["flows"]["left_behind"]) == ("moved", 3, 0)
        assert set(told["named"]) == {"removed at the source, made there after the pause"}


def test_watch_says_that_it_looked_for_nothing_where_the_guest_is_back(tmp_path: Path) -> None:
    """It began to come back before it was known to have left, so the watch did not end with it."""
    with hosts_in(tmp_path, limited(watch_seconds=1.0)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        (leaving,) = hosts.agents["host-a"].sessions()
        hosts.say("host-b", Phase.RESUMED, guest)
        hosts.agents["host-a"].note(MigrationEvent(guest, Phase.PREPARE, "host-b"))
        hosts.unplug("host-a", guest)
        hosts.agents["host-a"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
        until(lambda: "proved" in leaving.report.steps)
        hosts.say("host-b", Phase.OUTGOING, guest, destination="host-a")
        hosts.plug("host-a", guest, ZONES["host-a"] + 1, GUEST_ADDRESS)
        hosts.say("host-a", Phase.STARTED, guest)
        wait_for_step(hosts, "host-a", guest, "in sync")
        until(lambda: leaving.is_over)
        assert "watched" not in leaving.report.steps
        assert any("was not looked for" in remark for remark in leaving.report.remarks)


@pytest.mark.parametrize("zone", ["reassigned", "released"])
def test_watch_takes_nothing_where_the_zone_is_another_guest_s(tmp_path: Path, zone: str) -> None:
    """Not even what has an address of the guest that left: the other one may be a router, or speak with it."""
    with hosts_in(tmp_path, limited(watch_seconds=1.0)) as hosts:
        guest, here = has_moved(hosts)
        if zone == "reassigned":
            hosts.plug("host-a", new_guest(), ZONES["host-a"], "192.0.2.99")
        hosts.drivers["host-a"].insert(here, tcp_flows(3, first_port=7000))
        until_idle(hosts)
        is_reassigned = zone == "reassigned"
        assert len(held(hosts, "host-a")) == (3 if is_reassigned else 0)
        told = report(hosts, "host-a", guest)
        assert any("is another guest's" in remark for remark in told["remarks"]) == is_reassigned
        assert told["outcome"] == "moved"


def test_a_guest_that_comes_back_before_anybody_said_that_it_arrived_has_its_flows(tmp_path: Path) -> None:
    with hosts_in(tmp_path, limited(arrival_seconds=60.0)) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        away = hosts.agents["host-b"].host.peers.way_to("host-b").transport
        real, away.call = away.call, unreachable  # type: ignore[method-assign]
        finish(hosts, guest)
        until(lambda: hosts.has_step("host-b", guest, "arrived"))
        hosts.drivers["host-b"].remove(zone_scope("host-b"), tcp_flows(50).identities)
        away.call = real  # type: ignore[method-assign]
        begin(hosts, guest, "host-b", "host-a")
        finish(hosts, guest, "host-b", "host-a")
        until_idle(hosts)
        assert ports(hosts, "host-a") == set(range(1050, 1100))
        assert held(hosts, "host-b") == set()


def unreachable(*_: object) -> str:
    raise PeerUnreachable("the broker is away")


@pytest.mark.parametrize("words", [(Phase.SUSPENDED, Phase.SUSPENDED), (Phase.SUSPENDED, Phase.OUTGOING), ()])
def test_what_a_guest_leaves_goes_though_nobody_asked_and_its_ports_are_gone(
    tmp_path: Path, words: tuple[Phase, ...]
) -> None:
    with hosts_in(tmp_path, IMPATIENT) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", words[0] if words else Phase.OUTGOING, guest)
        hosts.unplug("host-a", guest)
        for again in words[1:]:
            hosts.say("host-a", again, guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        until_idle(hosts)
        assert held(hosts, "host-a") == set()
        assert report(hosts, "host-a", guest)["outcome"] == "purged without arrival"


def test_resumed_alone_is_enough_to_look_for_the_scope(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        wait_for_step(hosts, "host-b", guest, "in sync")
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def guest_of_two_ports(hosts: Hosts) -> str:
    """On host-a, with 100 flows of the first port and 50 of the second."""
    guest = guest_with_flows(hosts)
    hosts.plug("host-a", guest, 4098, SECOND_ADDRESS)
    second = hosts.agents["host-a"].host.scopes.find(guest)[1]
    hosts.drivers["host-a"].insert(second, tcp_flows(50, SECOND_ADDRESS))
    return guest


def test_flows_of_a_port_that_appears_later_than_the_first_are_put_in(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_of_two_ports(hosts)
        announced(hosts, guest)
        until(lambda: len(held(hosts, "host-b")) == 100)  # the first port's do not wait for the second
        hosts.plug("host-b", guest, 5202, SECOND_ADDRESS)
        wait_for_step(hosts, "host-b", guest, "scope known")
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b", 5202)) == 50
        assert report(hosts, "host-b", guest)["flows"]["refused"] == 0


def test_a_port_that_never_appears_costs_its_own_flows_and_names_them(tmp_path: Path) -> None:
    with hosts_in(tmp_path, limited(zone_seconds=0.3)) as hosts:
        guest = guest_of_two_ports(hosts)
        announced(hosts, guest)
        wait_for_step(hosts, "host-b", guest, "scope known")
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert (told["flows"]["imported"], told["flows"]["refused"]) == (100, 50)
        assert told["named"]["refused: neither end is an address of the port"]["count"] == 50


def test_a_second_try_after_a_failed_one_carries_flows(tmp_path: Path) -> None:
    with hosts_in(tmp_path, limited(open_seconds=1.0)) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")  # the source's hypervisor says nothing
        until(lambda: is_orphaned(hosts))
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def test_the_former_destination_lets_go_when_the_guest_moves_elsewhere(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        # Aborted while memory was copied: the source is told nothing, and B's libvirt died with its QEMU.
        begin(hosts, guest, destination="host-c")
        finish(hosts, guest, destination="host-c")
        until_idle(hosts)
        assert len(held(hosts, "host-c")) == 100
        assert held(hosts, "host-b") == set()


def test_a_second_migration_to_here_from_another_source_asks_that_one(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)  # aborted without a word
        hosts.unplug("host-b", guest)
        begin(hosts, guest, destination="host-c")
        finish(hosts, guest, destination="host-c")
        until_idle(hosts)
        begin(hosts, guest, "host-c", "host-b")
        finish(hosts, guest, "host-c", "host-b")
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100
        assert held(hosts, "host-c") == set()


def test_a_pause_that_comes_before_the_destination_asked_still_drains(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)  # a small guest, a slow broker
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        until_idle(hosts)
        assert report(hosts, "host-b", guest)["outcome"] == "moved"
        assert len(held(hosts, "host-b")) == 100
        assert held(hosts, "host-a") == set()


def test_outgoing_that_comes_while_the_question_is_handled_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts_in(tmp_path, limited(open_seconds=1.0)) as hosts:
        guest = guest_with_flows(hosts)
        says: list[threading.Thread] = []

        class Late(agent_module.SourceSession):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                says.append(threading.Thread(target=hosts.say, args=("host-a", Phase.OUTGOING, guest)))
                says[-1].start()
                says[-1].join(0.1)
                super().__init__(*arguments, **options)

        monkeypatch.setattr(agent_module, "SourceSession", Late)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        wait_for_step(hosts, "host-b", guest, "in sync")
        says[0].join()


def test_prepare_by_hook_and_by_nova_at_once_makes_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        made: list[object] = []

        class Slow(agent_module.DestinationSession):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                time.sleep(0.05)
                super().__init__(*arguments, **options)
                made.append(self)

        monkeypatch.setattr(agent_module, "DestinationSession", Slow)
        hosts.say("host-a", Phase.OUTGOING, guest)
        both = [threading.Thread(target=hosts.say, args=("host-b", Phase.PREPARE, guest, "host-a")) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        assert len(made) == 1


def test_words_of_the_hypervisor_are_taken_at_once(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        is_held, may_go = threading.Event(), threading.Event()

        def other() -> None:
            with hosts.agents["host-b"].host.lock:  # another session puts flows into a shared zone
                is_held.set()
                may_go.wait(10)

        busy = threading.Thread(target=other)
        busy.start()
        is_held.wait(10)
        telling = threading.Thread(target=hosts.say, args=("host-b", Phase.RESUMED, guest))
        telling.start()
        telling.join(5)
        was_taken = not telling.is_alive()
        may_go.set()
        busy.join()
        telling.join()
        assert was_taken


def test_look_at_what_came_after_the_purge_holds_up_no_other_guest(tmp_path: Path) -> None:
    limits = limited(watch_seconds=0.05)
    with hosts_in(tmp_path, limits, lambda name: HeldUpExport(MemoryDevice(name))) as hosts:
        guest = new_guest()
        driver, host = hosts.drivers["host-a"], hosts.agents["host-a"].host
        assert isinstance(driver, HeldUpExport)
        hosts.plug("host-a", guest, 7, GUEST_ADDRESS, shared=True)
        driver.insert(hosts.scope("host-a", guest), tcp_flows(10))
        begin(hosts, guest)
        driver.of = guest
        finish(hosts, guest)
        assert driver.has_begun.wait(10)
        is_free = host.lock.acquire(timeout=1)  # who decides about another guest's flows of the same zone takes it
        if is_free:
            host.lock.release()
        driver.may_end.set()
        until_idle(hosts)
        assert is_free
        assert held(hosts, "host-a", 7) == set()


def test_flow_between_two_guests_that_leave_at_once_goes_with_the_last(tmp_path: Path) -> None:
    """Who has purged has no claim to it any more, long before the session's end."""
    with hosts_in(tmp_path, limited(watch_seconds=1.0)) as hosts:
        guests = {new_guest(): address for address in (GUEST_ADDRESS, SECOND_ADDRESS)}
        driver = hosts.drivers["host-a"]
        for guest, address in guests.items():
            hosts.plug("host-a", guest, 7, address, shared=True)
        between = tcp_flows(30)
        between.rows["destinationIPv4Address"] = int(netaddr.IPAddress(SECOND_ADDRESS))
        driver.insert(hosts.scope("host-a", next(iter(guests))), between)
        assert len(held(hosts, "host-a", 7)) == 30
        for number, guest in enumerate(guests):
            hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
            hosts.say("host-b", Phase.PREPARE, guest, "host-a")
            hosts.plug("host-b", guest, 8 + number, guests[guest])
            hosts.say("host-b", Phase.STARTED, guest)
            wait_for_step(hosts, "host-b", guest, "in sync")
        for guest in guests:
            finish(hosts, guest)
        for guest in guests:
            wait_for_step(hosts, "host-a", guest, "proved")
        assert held(hosts, "host-a", 7) == set()
        until_idle(hosts)


def test_session_that_was_to_go_on_with_one_that_ends_first_ends_with_it(tmp_path: Path) -> None:
    """Nobody runs it: the guest's next migrations would meet it for ever."""
    settings = limited(resync_seconds=0.1, watch_seconds=0.1)
    with hosts_in(tmp_path, settings, lambda name: HeldUpExport(MemoryDevice(name))) as hosts:
        guest = guest_with_flows(hosts)
        driver, leaving = hosts.drivers["host-a"], hosts.agents["host-a"]
        assert isinstance(driver, HeldUpExport)
        begin(hosts, guest)
        driver.of = guest
        assert driver.has_begun.wait(10)
        hosts.say("host-a", Phase.ROLLBACK, guest)  # heard when the look at the table is over
        hosts.kill("host-b")
        hosts.start("host-b")
        until(lambda: len(leaving.sessions()) == 2)
        older, late = leaving.sessions()
        driver.may_end.set()
        until(lambda: not leaving.sessions())
        assert late.is_over
        too_late: list[str] = []
        older.continue_with(SimpleNamespace(fail=too_late.append))  # type: ignore[arg-type]
        assert too_late
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert held(hosts, "host-b") == set()
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)


def test_scope_finder_that_is_slow_keeps_nobody_from_being_heard(tmp_path: Path) -> None:
    """It is asked again when it has answered; what it waits for is in the queue."""
    with hosts_in(tmp_path, limited(zone_seconds=60.0, watch_seconds=0.1)) as hosts:
        guest = guest_with_flows(hosts)
        scopes = hosts.agents["host-b"].host.scopes
        find = scopes.find

        def slow(asked: str) -> tuple[Scope, ...]:
            time.sleep(1.5 * destination_decisions.ZONE_POLL_SECONDS)
            return find(asked)

        scopes.find = slow  # type: ignore[method-assign]
        prepare(hosts, guest)
        hosts.say("host-b", Phase.STARTED, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        wait_for_step(hosts, "host-b", guest, "in sync")
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100


def test_guest_that_ends_while_its_session_goes_on_is_forgotten_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of its tap may be another guest's next."""
    with hosts_in(tmp_path, limited(watch_seconds=0.1, arrival_seconds=0.5)) as hosts:
        guest = guest_with_flows(hosts)
        learned: list[tuple[str, object]] = []
        monkeypatch.setattr(hosts.agents["host-b"].host.scopes, "learn", lambda *told: learned.append(told))
        begin(hosts, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        assert hosts.agents["host-b"].sessions()
        assert learned == []
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.unplug("host-a", guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        until_idle(hosts)
        assert learned == [(guest, ())]
