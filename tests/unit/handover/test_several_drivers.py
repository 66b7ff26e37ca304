"""Several drivers in one migration: order, what one of them cannot do, and the one report that tells of all."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab.deadline import wait_until
from sami_plugin.drivers.base import Capabilities, Changes, FlowDriver, Watch
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.drivers.several import SeveralDrivers
from sami_plugin.errors import DeviceFailed
from sami_plugin.model.flows import TEMPLATES, Batch, Omitted
from sami_plugin.model.migration import Phase
from sami_plugin.model.results import WORDS, Reason
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import flows
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import IMPATIENT, SETTINGS, ZONES, begin, finish, guest_with_flows, until_idle

ELEMENT = TEMPLATES["nft-set-element-ipv4"]
CALLS = ("export", "insert", "remove", "read_back")


@dataclass
class Devices:
    """What the hosts' drivers do, in order, as (driver, call); and which calls fail where."""

    done: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    failing: set[tuple[str, str]] = field(default_factory=set)
    """As (host, call), of the second driver."""

    def made(self, host: str) -> FlowDriver:
        flows_ = frozenset(name for name, one in TEMPLATES.items() if one.is_flow and not one.is_expectation)
        first = self._told(host, "firewall", MemoryDriver(MemoryDevice(host), templates=flows_))
        others = MemoryDriver(MemoryDevice(f"{host}'s sets"), templates=frozenset({ELEMENT.name}), can_watch=False)
        return SeveralDrivers((("firewall", first), ("sets", self._told(host, "sets", others))))

    def _told(self, host: str, name: str, driver: MemoryDriver) -> MemoryDriver:
        for call in CALLS:
            setattr(driver, call, self._noting(host, name, call, getattr(driver, call)))
        return driver

    def _noting(self, host: str, name: str, call: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            self.done.setdefault(host, []).append((name, call))
            if name == "sets" and (host, call) in self.failing:
                raise DeviceFailed("it is away")
            return work(*arguments)

        return noted


@pytest.fixture
def devices() -> Devices:
    return Devices()


@pytest.fixture
def hosts(devices: Devices, tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, tuple(ZONES), devices.made, settings=SETTINGS) as made:
        yield made


@pytest.fixture
def guest(hosts: Hosts) -> str:
    """One with 100 flows and 3 elements of a set."""
    made = guest_with_flows(hosts)
    scope = hosts.scope("host-a", made)
    hosts.drivers["host-a"].insert(scope, flows(ELEMENT, 3, source=scope.addresses))
    return made


def move(hosts: Hosts, guest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """From the first host to the second; the reports of both."""
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    return hosts.reports("host-a", guest)[0], hosts.reports("host-b", guest)[0]


def kept(hosts: Hosts, host: str) -> dict[str, int]:
    """By kind, what the devices of the host hold for the guest."""
    found: dict[str, int] = {}
    driver = hosts.drivers[host]
    assert isinstance(driver, SeveralDrivers)
    for one in driver._drivers:
        assert isinstance(one, MemoryDriver)
        for zone in one.device._zones.values():
            for entry in zone.entries.values():
                found[entry.template.name] = found.get(entry.template.name, 0) + 1
    return found


def test_all_of_both_move_and_one_report_counts_them(hosts: Hosts, guest: str, devices: Devices) -> None:
    there, here = move(hosts, guest)
    assert (kept(hosts, "host-a"), kept(hosts, "host-b")) == ({}, {"tcp-ipv4": 100, ELEMENT.name: 3})
    assert (there["flows"]["exported"], there["flows"]["purged"]) == (103, 103)
    assert (here["flows"]["imported"], here["flows"]["verified"], here["outcome"]) == (103, 103, "moved")


def test_firewall_comes_first_going_in_and_going_out(hosts: Hosts, guest: str, devices: Devices) -> None:
    move(hosts, guest)
    for host, call in (("host-b", "insert"), ("host-a", "remove")):
        order = [name for name, done in devices.done[host] if done == call and name in ("firewall", "sets")]
        first = order.index("sets")
        assert "firewall" in order[:first]
        assert "firewall" not in order[first:]


def test_set_that_cannot_be_read_costs_no_flow_and_is_named(hosts: Hosts, guest: str, devices: Devices) -> None:
    devices.failing.add(("host-a", "export"))
    there, here = move(hosts, guest)
    assert kept(hosts, "host-b") == {"tcp-ipv4": 100}
    assert (there["outcome"], here["outcome"]) == ("moved", "moved")
    (reason,) = [one for one in there["named"] if one.startswith("not exported: the driver sets failed")]
    assert "it is away" in reason


def test_element_that_is_not_taken_costs_no_flow_and_is_named(hosts: Hosts, guest: str, devices: Devices) -> None:
    devices.failing.add(("host-b", "insert"))
    _, here = move(hosts, guest)
    assert kept(hosts, "host-b") == {"tcp-ipv4": 100}
    assert (here["flows"]["imported"], here["flows"]["refused"], here["outcome"]) == (100, 3, "moved")
    (named,) = [one for reason, one in here["named"].items() if WORDS[Reason.DEVICE_ERROR] in reason]
    assert (named["count"], len(named["flows"])) == (3, 3)


def test_element_that_cannot_be_looked_at_is_told_as_changed(hosts: Hosts, guest: str, devices: Devices) -> None:
    devices.failing.add(("host-b", "read_back"))
    _, here = move(hosts, guest)
    assert kept(hosts, "host-b") == {"tcp-ipv4": 100, ELEMENT.name: 3}
    assert here["outcome"] == "moved"
    assert here["flows"]["imported"] == 103


def test_element_that_cannot_be_purged_is_counted_as_left(hosts: Hosts, guest: str, devices: Devices) -> None:
    devices.failing |= {("host-a", "remove"), ("host-a", "read_back")}
    there, here = move(hosts, guest)
    assert kept(hosts, "host-a") == {ELEMENT.name: 3}
    assert [there["flows"][what] for what in ("purged", "late", "left_behind")] == [100, 0, 3]
    assert (there["outcome"], there["reason"]) == ("failed", "")
    assert (here["outcome"], here["reason"]) == ("failed", "3 flows are left at the source")


def test_guest_that_stays_leaves_nothing_of_either_at_the_destination(
    hosts: Hosts, guest: str, devices: Devices
) -> None:
    begin(hosts, guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    hosts.say("host-a", Phase.RESUMED, guest)
    until_idle(hosts)
    assert (kept(hosts, "host-a"), kept(hosts, "host-b")) == ({"tcp-ipv4": 100, ELEMENT.name: 3}, {})


def test_what_a_set_gets_while_memory_is_copied_comes_along(hosts: Hosts, guest: str, devices: Devices) -> None:
    begin(hosts, guest)
    scope = hosts.scope("host-a", guest)
    driver = hosts.drivers["host-a"]
    driver.insert(scope, flows(ELEMENT, 2, source=scope.addresses, first=1000))
    (old,) = [one for one in driver.export(scope) if not isinstance(one, Omitted) and one.template == ELEMENT]
    gone = Batch(ELEMENT, old.rows[:1])
    driver.remove(scope, gone.identities)
    finish(hosts, guest)
    until_idle(hosts)
    assert kept(hosts, "host-b") == {"tcp-ipv4": 100, ELEMENT.name: 4}
    _, is_there = hosts.drivers["host-b"].read_back(hosts.scope("host-b", guest), gone)
    assert not is_there.any()


class SlowAtLast(Watch):
    """Of a device that takes its time when it is asked for the last time."""

    def __init__(self, may_answer: threading.Event) -> None:
        self._may_answer = may_answer

    def collect(self) -> Changes:
        return Changes()

    def collect_last(self) -> Changes:
        self._may_answer.wait(20)
        return Changes()

    def close(self) -> None:
        pass


def test_last_changes_of_the_firewall_do_not_wait_for_a_slow_device(hosts: Hosts, guest: str, devices: Devices) -> None:
    driver, scope, may_answer = hosts.drivers["host-a"], hosts.scope("host-a", guest), threading.Event()
    assert isinstance(driver, SeveralDrivers)
    driver._drivers[1].watch = lambda scope: SlowAtLast(may_answer)  # type: ignore[method-assign]
    begin(hosts, guest)
    driver.insert(scope, flows(TEMPLATES["tcp-ipv4"], 5, source=scope.addresses, first=1000))
    hosts.say("host-a", Phase.SUSPENDED, guest)
    wait_until(lambda: kept(hosts, "host-b")["tcp-ipv4"] == 105, "what the firewall told last")
    assert not hosts.has_step("host-b", guest, "last changes came")
    may_answer.set()
    finish(hosts, guest)
    until_idle(hosts)
    assert (kept(hosts, "host-a"), kept(hosts, "host-b")) == ({}, {"tcp-ipv4": 105, ELEMENT.name: 3})


# ------------------------------------------------------------------------------------------ a device that both have


class Appliance(MemoryDriver):
    """Keeps elements, for whichever host asks."""

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        return dataclasses.replace(super().capabilities(scope), shared={ELEMENT.name: self.device.name})


@pytest.fixture
def appliances() -> dict[str, MemoryDevice]:
    """The device of each host: one and the same."""
    one = MemoryDevice("appliance 7")
    return dict.fromkeys(ZONES, one)


@pytest.fixture
def sharing(appliances: dict[str, MemoryDevice], tmp_path: Path) -> Iterator[Hosts]:
    flows_ = frozenset(name for name, one in TEMPLATES.items() if one.is_flow and not one.is_expectation)

    def driver_of(host: str) -> FlowDriver:
        appliance = Appliance(appliances[host], templates=frozenset({ELEMENT.name}), can_watch=False)
        return SeveralDrivers(
            (("firewall", MemoryDriver(MemoryDevice(host), templates=flows_)), ("appliance", appliance))
        )

    with Hosts(tmp_path, tuple(ZONES), driver_of, settings=IMPATIENT) as made:
        yield made


def with_elements(hosts: Hosts) -> str:
    guest = guest_with_flows(hosts)
    scope = hosts.scope("host-a", guest)
    hosts.drivers["host-a"].insert(scope, flows(ELEMENT, 3, source=scope.addresses))
    return guest


def test_what_a_shared_device_keeps_stays_in_it_and_both_reports_say_so(
    sharing: Hosts, appliances: dict[str, MemoryDevice]
) -> None:
    guest = with_elements(sharing)
    begin(sharing, guest)
    scope = sharing.scope("host-a", guest)
    sharing.drivers["host-a"].insert(scope, flows(ELEMENT, 2, source=scope.addresses, first=1000))
    finish(sharing, guest)
    until_idle(sharing)
    there, here = (sharing.reports(host, guest)[0] for host in ("host-a", "host-b"))
    assert appliances["host-a"].count == 5
    assert (there["flows"]["exported"], there["flows"]["purged"], there["flows"]["late"]) == (100, 100, 0)
    assert (here["flows"]["imported"], here["flows"]["refused"]) == (100, 0)
    for report in (there, here):
        assert "both hosts have the device appliance 7: what it keeps stays in it" in report["remarks"]


def test_device_that_only_one_has_is_emptied_as_any_other(sharing: Hosts, appliances: dict[str, MemoryDevice]) -> None:
    driver = sharing.drivers["host-b"]
    assert isinstance(driver, SeveralDrivers)
    driver._drivers[1].device = MemoryDevice("appliance 8")  # type: ignore[attr-defined]
    guest = with_elements(sharing)
    there, here = move(sharing, guest)
    assert appliances["host-a"].count == 0
    assert (there["flows"]["purged"], here["flows"]["imported"]) == (103, 103)
    assert not there["remarks"]


def test_what_it_keeps_is_not_removed_where_nobody_says_what_the_other_host_has(
    sharing: Hosts, appliances: dict[str, MemoryDevice]
) -> None:
    guest = with_elements(sharing)
    sharing.say("host-a", Phase.OUTGOING, guest)
    sharing.say("host-a", Phase.SUSPENDED, guest)
    sharing.unplug("host-a", guest)
    sharing.say("host-a", Phase.STOPPED, guest)
    until_idle(sharing)
    report = sharing.reports("host-a", guest)[0]
    assert (report["outcome"], report["flows"]["purged"]) == ("purged without arrival", 100)
    assert appliances["host-a"].count == 3
    assert "the other host may have the device appliance 7 too: what it keeps stays in it" in report["remarks"]
