"""A device, or the system, fails once, at the worst moment: no flow is lost for it, and no session stands for ever."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest

from sami_plugin.drivers.base import Changes, Watch
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import DeviceFailed
from sami_plugin.handover import DestinationSession
from sami_plugin.model.flows import Batch
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.results import Results
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Bounds
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.hypervisor import Hypervisor
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    SECOND_ADDRESS,
    ZONES,
    begin,
    brief,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    limited,
    mark,
    ports,
    prepare,
    report,
    states,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
    words,
)
from tests.unit.threads import no_thread_once

BRIEF = brief(arrival_seconds=3.0)


class Fragile(MemoryDriver):
    """Fails when it is told to, once for each time."""

    inserts_fail = 0
    look_raises: Exception | None = None
    looks: threading.Event | None = None
    """Set where a look is to wait until it may fail."""
    closes_fail = 0

    def insert(self, scope: Scope, batch: Batch) -> Results:
        if self.inserts_fail:
            self.inserts_fail -= 1
            raise DeviceFailed("no buffer space available")
        return super().insert(scope, batch)

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        error = self.look_raises
        if error is not None and threading.current_thread().name.startswith("sami-look"):
            self.look_raises = None
            if self.looks is not None:
                assert self.looks.wait(10)
            raise error
        return super().read_back(scope, batch)

    def watch(self, scope: Scope) -> Watch:
        return _FragileWatch(super().watch(scope), self)


class _FragileWatch(Watch):
    def __init__(self, watch: Watch, driver: Fragile) -> None:
        self._watch, self._driver = watch, driver

    def collect(self) -> Changes:
        return self._watch.collect()

    def collect_last(self) -> Changes:
        return self._watch.collect_last()

    def close(self) -> None:
        self._watch.close()
        if self._driver.closes_fail:
            self._driver.closes_fail -= 1
            raise DeviceFailed("it is not closed")


def fragile_hosts(tmp_path: Path, settings: Any = BRIEF) -> Hosts:
    return hosts_in(tmp_path, settings, lambda name: Fragile(MemoryDevice(name)))


def driver_of(hosts: Hosts, host: str) -> Fragile:
    driver = hosts.drivers[host]
    assert isinstance(driver, Fragile)
    return driver


# --- a host that calls


def test_caller_to_whom_nobody_could_answer_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has said is taken from the line, so it is said by nobody again."""
    with fragile_hosts(tmp_path, brief(open_seconds=30.0)) as hosts:
        guest = guest_with_flows(hosts)
        monkeypatch.setattr(hosts.agents["host-a"], "_open", mock.Mock(side_effect=OSError(24, "Too many open files")))
        prepare(hosts, guest)
        (session,) = hosts.agents["host-b"].sessions()
        until(lambda: session._state() == "orphaned")
        assert "OSError: [Errno 24] Too many open files" in session._known.reason  # type: ignore[attr-defined]


# --- ports that change


def test_flows_of_a_port_that_becomes_better_known_are_tried_again(tmp_path: Path) -> None:
    with fragile_hosts(tmp_path) as hosts:
        guest = new_guest()
        hosts.plug("host-a", guest, ZONES["host-a"], GUEST_ADDRESS, SECOND_ADDRESS)
        scope = hosts.scope("host-a", guest)
        hosts.drivers["host-a"].insert(scope, tcp_flows(50))
        hosts.drivers["host-a"].insert(scope, tcp_flows(50, SECOND_ADDRESS, 3000))
        prepare(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        wait_for_step(hosts, "host-b", guest, "scope known")
        assert len(held(hosts, "host-b")) == 50
        driver = driver_of(hosts, "host-b")
        driver.inserts_fail = 1
        hosts.unplug("host-b", guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS, SECOND_ADDRESS)
        until(lambda: not driver.inserts_fail)
        until(lambda: len(held(hosts, "host-b")) == 100)
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert (told["outcome"], told["flows"]["imported"], told["flows"]["refused"]) == ("moved", 100, 0)


@pytest.mark.parametrize("fails", [1, 1000])
def test_flows_of_a_port_that_has_another_zone_are_there_or_named(tmp_path: Path, fails: int) -> None:
    """And the second port is found all the same."""
    with fragile_hosts(tmp_path, brief(zone_seconds=1.5, arrival_seconds=1.0)) as hosts:
        guest = new_guest()
        hosts.plug("host-a", guest, 4097, GUEST_ADDRESS)
        hosts.plug("host-a", guest, 4098, SECOND_ADDRESS)
        one, two = hosts.agents["host-a"].host.scopes.find(guest)
        hosts.drivers["host-a"].insert(one, tcp_flows(50))
        hosts.drivers["host-a"].insert(two, tcp_flows(50, SECOND_ADDRESS, 3000))
        prepare(hosts, guest)
        wait_for_step(hosts, "host-b", guest, "in sync")
        hosts.plug("host-b", guest, 5201, GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: len(held(hosts, "host-b", 5201)) == 50)
        (session,) = hosts.agents["host-b"].sessions()
        assert isinstance(session, DestinationSession)
        until(lambda: not session._unfilled)
        driver = driver_of(hosts, "host-b")
        driver.inserts_fail = fails
        hosts.unplug("host-b", guest)
        hosts.plug("host-b", guest, 5301, GUEST_ADDRESS)
        until(lambda: held(hosts, "host-b", 5201) == set() and driver.inserts_fail < fails)
        if fails == 1:
            hosts.plug("host-b", guest, 5202, SECOND_ADDRESS)
            until(lambda: len(held(hosts, "host-b", 5301)) == len(held(hosts, "host-b", 5202)) == 50)
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        imported = 100 if fails == 1 else 0
        assert told["outcome"] == ("moved" if fails == 1 else "failed")
        assert (told["flows"]["imported"], told["flows"]["refused"]) == (imported, 100 - imported if fails == 1 else 50)
        assert len(held(hosts, "host-b", 5301)) + len(held(hosts, "host-b", 5202)) == imported


# --- looks


def test_session_ends_though_a_look_raises_what_nobody_thought_of(tmp_path: Path) -> None:
    """While the guest runs here already. A report says less then."""
    with fragile_hosts(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        prepare(hosts, guest)
        wait_for_step(hosts, "host-b", guest, "in sync")
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.unplug("host-a", guest)
        hosts.say("host-b", Phase.STARTED, guest)
        hosts.say("host-b", Phase.RESUMED, guest)
        driver = driver_of(hosts, "host-b")
        driver.look_raises = OSError(24, "too many open files")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        until(lambda: driver.look_raises is None)
        hosts.say("host-a", Phase.STOPPED, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL


@pytest.mark.parametrize("comes", [True, False])
def test_another_session_goes_on_though_a_look_failed_at_that_moment(tmp_path: Path, comes: bool) -> None:
    with fragile_hosts(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        (former,) = hosts.agents["host-b"].sessions()
        assert former.has_caught_up.wait(10)
        driver = driver_of(hosts, "host-b")
        driver.looks = threading.Event()
        driver.look_raises = DeviceFailed("the kernel dropped messages for lack of room in the receive buffer")
        mark(hosts, "host-a", guest, 1000, 7)
        until(lambda: driver.look_raises is None)
        hosts.kill("host-a")
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.OUTGOING))
        until(lambda: former._state() == "ended")
        driver.looks.set()
        until(lambda: former.is_over and hosts.agents["host-b"].sessions())
        if comes:
            finish(hosts, guest)
        else:
            hosts.say("host-a", Phase.ROLLBACK, guest)
            hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert report(hosts, "host-b", guest)["outcome"] == ("moved" if comes else "stayed")
        assert (ports(hosts, "host-a"), ports(hosts, "host-b")) == ((set(), ALL) if comes else (ALL, set()))


# --- the end


def test_guest_whose_watch_cannot_be_closed_moves_on_later(tmp_path: Path) -> None:
    settings = brief(arrival_seconds=1.0, watch_seconds=0.3)
    with fragile_hosts(tmp_path, settings) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        driver_of(hosts, "host-a").closes_fail = 1000
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert report(hosts, "host-a", guest)["outcome"] == "stayed"
        driver_of(hosts, "host-a").closes_fail = 0
        hosts.unplug("host-b", guest)
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert report(hosts, "host-a", guest)["outcome"] == "moved"
        assert ports(hosts, "host-b") == ALL


@pytest.mark.parametrize("host", ["host-a", "host-b"])
def test_session_whose_end_fails_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with fragile_hosts(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        (session,) = hosts.agents[host].sessions()

        def counts() -> dict[str, int]:
            raise OSError(5, "input/output error")

        monkeypatch.setattr(session, "_counts", counts)
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-a"), ports(hosts, "host-b")) == (ALL, set())


def test_session_whose_end_fails_behind_the_end_has_told_how_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fragile_hosts(tmp_path) as hosts:
        guest = guest_with_flows(hosts)

        def arrived(scope: Scope, batch: Batch) -> None:
            raise DeviceFailed("it is away")

        monkeypatch.setattr(hosts.drivers["host-b"], "arrived", arrived)
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert [told["outcome"] for told in hosts.reports("host-b", guest)] == ["moved"]


@pytest.mark.parametrize(("host", "other"), [("host-a", "host-b"), ("host-b", "host-a")])
def test_session_with_which_nobody_can_go_on_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, other: str
) -> None:
    with fragile_hosts(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        (former,) = hosts.agents[host].sessions()
        assert former.has_caught_up.wait(10) or host == "host-a"

        def as_former() -> Any:
            raise OSError(5, "input/output error")

        monkeypatch.setattr(former, "_as_former", as_former)
        hosts.kill(other)
        hosts.start(other)
        if other == "host-a":
            words(hosts, guest, ("host-a", Phase.OUTGOING))
        else:
            words(hosts, guest, ("host-b", Phase.STARTED))
        until(lambda: former.is_over)
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        (told,) = [one for one in hosts.reports(host, guest) if one["session"] == former.id]
        assert (told["outcome"], told["reason"]) == (
            "failed",
            "no other session could go on with it: OSError: [Errno 5] input/output error",
        )
        assert (ports(hosts, "host-a"), ports(hosts, "host-b")) == (ALL, set())


# --- threads


def test_what_was_put_in_is_discarded_though_there_was_no_thread_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fragile_hosts(tmp_path) as hosts, no_thread_once(monkeypatch, "sami-look") as refused:
        guest = guest_with_flows(hosts)
        prepare(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: refused)
        hosts.say("host-a", Phase.ROLLBACK, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert (ports(hosts, "host-a"), ports(hosts, "host-b")) == (ALL, set())


def test_session_that_has_no_thread_to_send_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fragile_hosts(tmp_path) as hosts, no_thread_once(monkeypatch, "sami-send") as refused:
        guest = guest_with_flows(hosts)
        hosts.say("host-b", Phase.PREPARE, guest, "host-a")
        until(lambda: states(hosts, "host-b") == ["orphaned"])
        assert len(refused) == 1
        (session,) = hosts.agents["host-b"].sessions()
        assert session.line._sender.is_idle
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert "raise TasksMax" in report(hosts, "host-b", guest)["reason"]


# --- what has no room, and what is not known


def test_what_comes_behind_changes_that_had_no_room_is_not_said(tmp_path: Path) -> None:
    """Else the last of them would say that all are there."""
    limits = limited(delta_seconds=30.0, resync_seconds=60.0, arrival_seconds=2.0)
    settings = replace(limits, bounds=Bounds(session_octets=1700), call_seconds=0.5)
    with fragile_hosts(tmp_path, settings) as hosts:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        until(lambda: states(hosts, "host-a") == ["following"])
        random = np.random.default_rng(1)  # what cannot be packed
        for port in range(1000, 1088):
            mark(hosts, "host-a", guest, port, int(random.integers(1, 2**32 - 1)))
        finish(hosts, guest)
        until_idle(hosts)
        told = report(hosts, "host-b", guest)
        assert told["outcome"] == "failed"
        assert "has acknowledged nothing of the last" in told["reason"]
        assert ports(hosts, "host-b") == ALL


def test_source_that_becomes_known_after_a_new_start_is_asked(tmp_path: Path) -> None:
    hypervisors = {name: Hypervisor(name) for name in ZONES}
    settings = brief(verdict_seconds=0.3, open_seconds=6.0, arrival_seconds=3.0)
    with hosts_in(tmp_path, settings, hypervisors=hypervisors) as hosts:
        guest = guest_with_flows(hosts)
        hypervisors["host-a"].leaving.add(guest)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.agents["host-b"].tell(MigrationEvent(guest, Phase.PREPARE, role="destination"))
        assert states(hosts, "host-b") == ["looking"]
        hosts.kill("host-b")
        hosts.start("host-b")
        assert states(hosts, "host-b") == ["looking"]
        hosts.agents["host-b"].tell(MigrationEvent(guest, Phase.PREPARE, source="host-a"))
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        wait_for_step(hosts, "host-b", guest, "in sync")
        hypervisors["host-a"].leaving.discard(guest)
        finish(hosts, guest)
        until_idle(hosts)
        assert report(hosts, "host-b", guest)["outcome"] == "moved"
        assert (ports(hosts, "host-a"), ports(hosts, "host-b")) == (set(), ALL)
