"""Several drivers as one: each has its kinds, and what fails beside the first costs its own kinds alone."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.memory import Faults, MemoryDevice, MemoryDriver
from sami_plugin.drivers.several import SeveralDrivers, _Watches
from sami_plugin.errors import DeviceFailed
from sami_plugin.model.flows import TEMPLATES, Batch, Omitted
from sami_plugin.model.results import Outcome, Reason
from sami_plugin.testing.conformance import flows
from tests.unit.drivers.test_memory import MemoryConformance

FLOWS = frozenset(name for name, one in TEMPLATES.items() if one.is_flow and not one.is_expectation)
TCP = frozenset(name for name in FLOWS if name.startswith("tcp"))


@pytest.fixture(autouse=True)
def exports_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    monkeypatch.setattr("sami_plugin.drivers.several.SHORT_SECONDS", math.inf)


class TestSeveral(MemoryConformance):
    """All promises of one driver, kept by two of which one cannot watch."""

    def make_driver(self) -> FlowDriver:  # type: ignore[override]
        others = MemoryDriver(MemoryDevice("other"), templates=FLOWS - TCP, can_watch=False)
        return SeveralDrivers((("first", MemoryDriver(MemoryDevice(), templates=TCP)), ("other", others)))


class Failing(MemoryDriver):
    """Fails as a device does that is away."""

    is_away = False
    fails_to_read_back = False
    """Once."""

    def capabilities(self, scope=None):
        self._look()
        return super().capabilities(scope)

    def export(self, scope):
        for piece in super().export(scope):
            yield piece
            self._look()

    def read_back(self, scope, batch):
        self._look()
        if self.fails_to_read_back:
            self.fails_to_read_back = False
            raise DeviceFailed("no buffer space available")
        return super().read_back(scope, batch)

    def renew(self, scope, batch):
        self._look()
        return super().renew(scope, batch)

    def _look(self) -> None:
        if self.is_away:
            raise DeviceFailed("it is away")


@pytest.fixture
def other() -> Failing:
    return Failing(MemoryDevice("other"), templates=FLOWS - TCP, can_watch=False)


@pytest.fixture
def several(other: Failing) -> SeveralDrivers:
    return SeveralDrivers((("first", MemoryDriver(MemoryDevice("first"), templates=TCP)), ("other", other)))


SCOPE = TestSeveral().make_scope()
TCP_FLOWS, UDP_FLOWS = flows(TEMPLATES["tcp-ipv4"], 2), flows(TEMPLATES["udp-ipv4"], 3)


def away(driver: Failing) -> None:
    driver.is_away = True
    driver.device.faults = Faults(fail_after=0)


def counts(driver: FlowDriver) -> dict[str, int]:
    return {one.template.name: len(one) for one in driver.export(SCOPE) if isinstance(one, Batch)}


def test_capabilities_are_the_kinds_of_all_and_the_rest_of_the_first(several: SeveralDrivers) -> None:
    can = several.capabilities(SCOPE)
    assert (can.templates, can.device, can.can_watch, can.notes) == (FLOWS, "first", True, ())


def test_kind_of_two_is_the_firsts_and_the_operator_is_told() -> None:
    drivers = [(name, MemoryDriver(MemoryDevice(name), templates=TCP)) for name in ("first", "second")]
    several = SeveralDrivers(drivers)
    (note, *_) = several.capabilities(SCOPE).notes
    assert note == "tcp-ipv4 is the driver first's; second could carry it too"
    several.insert(SCOPE, TCP_FLOWS)
    assert [driver.device.count for _, driver in drivers] == [2, 0]
    drivers[1][1].insert(SCOPE, TCP_FLOWS)
    assert counts(several) == {"tcp-ipv4": 2}


def test_device_that_is_away_costs_its_own_kinds_alone(several: SeveralDrivers, other: Failing) -> None:
    several.insert(SCOPE, TCP_FLOWS)
    several.insert(SCOPE, UDP_FLOWS)
    with several.watch(SCOPE) as watch:
        away(other)
        told = list(several.export(SCOPE))
        assert sum(len(one) for one in told if isinstance(one, Batch) and one.template.name == "tcp-ipv4") == 2
        (omitted,) = [one for one in told if isinstance(one, Omitted)]
        assert omitted.reason == "the driver other failed, and how much it has is not known: it is away"
        several.remove(SCOPE, TCP_FLOWS.take(TCP_FLOWS.rows["flowId"] == 1).identities)
        changes = watch.collect()
    assert changes.is_complete
    assert [len(one) for one in changes.removals] == [0] or not changes.removals
    for made in (
        several.insert(SCOPE, flows(TEMPLATES["udp-ipv6"], 2)),
        several.renew(SCOPE, UDP_FLOWS),
        several.remove(SCOPE, UDP_FLOWS.identities),
    ):
        assert set(made["outcome"]) == {Outcome.REFUSED}
        assert set(made["reason"]) == {Reason.DEVICE_ERROR}
    found, is_there = several.read_back(SCOPE, UDP_FLOWS)
    assert is_there.all()
    assert found.rows.tobytes() == UDP_FLOWS.rows.tobytes()
    assert several.capabilities(SCOPE).templates == TCP
    assert several.capabilities(SCOPE).notes == ("the driver other fails; the agent's log says how",)


def test_what_failed_in_the_middle_of_an_insert_is_taken_out_by_name(several: SeveralDrivers, other: Failing) -> None:
    there = flows(TEMPLATES["udp-ipv4"], 1, first=1000)
    several.insert(SCOPE, there)
    other.device.faults = Faults(fail_after=2)

    def recover() -> None:
        other.device.faults = Faults()

    remove = other.remove

    def removed(scope, identities):
        recover()
        return remove(scope, identities)

    other.remove = removed  # type: ignore[method-assign]
    assert set(several.insert(SCOPE, UDP_FLOWS)["outcome"]) == {Outcome.REFUSED}
    assert counts(several) == {"udp-ipv4": 1}


def test_arrival_is_told_to_who_has_the_kind(several: SeveralDrivers, other: Failing) -> None:
    told: list[str] = []
    for driver in several._drivers:
        driver.arrived = lambda scope, batch, name=driver.device.name: told.append(name)  # type: ignore[method-assign]
    for batch in (TCP_FLOWS, UDP_FLOWS):
        several.arrived(SCOPE, batch)
    assert told == ["first", "other"]
    other.arrived = lambda scope, batch: other._look()  # type: ignore[method-assign]
    away(other)
    several.arrived(SCOPE, UDP_FLOWS)  # costs nobody anything


def test_last_changes_are_the_firsts_and_then_those_of_the_others(several: SeveralDrivers) -> None:
    with several.watch(SCOPE) as watch:
        for batch in (UDP_FLOWS, TCP_FLOWS):
            several.insert(SCOPE, batch)
        told = [watch.collect_last(), watch.collect_last()]
    assert [[batch.template.name for batch in one.upserts] for one in told] == [["tcp-ipv4"], ["udp-ipv4"]]
    assert [one.is_all for one in told] == [False, True]


def test_first_ones_failure_is_the_hosts(several: SeveralDrivers) -> None:
    first = several._drivers[0]
    assert isinstance(first, MemoryDriver)
    first.device.faults = Faults(fail_after=0)
    with pytest.raises(DeviceFailed):
        several.insert(SCOPE, TCP_FLOWS)


def test_watch_of_one_that_cannot_tells_what_was_given_time(several: SeveralDrivers, other: Failing) -> None:
    several.insert(SCOPE, UDP_FLOWS)
    with several.watch(SCOPE) as watch:
        assert not watch.collect().upserts
        longer = dataclasses.replace(UDP_FLOWS, rows=UDP_FLOWS.rows[:1].copy())
        longer.rows["remainingTimeoutSeconds"] += 100
        several.renew(SCOPE, longer)
        (told,) = watch.collect().upserts
        assert told.rows["sourceTransportPort"].tolist() == longer.rows["sourceTransportPort"].tolist()
        assert not watch.collect().upserts


def test_what_ended_while_its_driver_failed_is_told_afterwards(several: SeveralDrivers, other: Failing) -> None:
    several.capabilities()
    with several.watch(SCOPE) as watch:
        other.insert(SCOPE, UDP_FLOWS)
        assert counts(several) == {"udp-ipv4": 3}
        ended = UDP_FLOWS.identities
        ended.rows["flowId"] = 0
        other.remove(SCOPE, ended)
        assert other.device.count == 0
        other.fails_to_read_back = True
        assert not watch.collect().removals
        assert [len(batch) for batch in watch.collect().removals] == [3]


def test_watch_of_one_that_fails_as_no_driver_should_costs_its_own_kinds_alone(
    several: SeveralDrivers, other: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.capabilities()
    monkeypatch.setattr(other, "export", lambda scope: (_ for _ in ()).throw(OSError("No buffer space available")))
    with several.watch(SCOPE) as watch:
        several.insert(SCOPE, TCP_FLOWS)
        assert sum(map(len, watch.collect().upserts)) == 2


def test_watch_that_cannot_be_closed_costs_nobody_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = SeveralDrivers([(name, MemoryDriver(MemoryDevice(name))) for name in ("first", "second")]).watch(SCOPE)

    def close(self: object) -> None:
        closed.append(self)
        if len(closed) == 1:
            raise DeviceFailed("it is away")

    closed: list[object] = []
    assert isinstance(watch, _Watches)
    for one in watch._watches:
        monkeypatch.setattr(type(one), "close", close)
    watch.close()
    assert closed == watch._watches[::-1]


def test_watch_of_one_whose_exports_are_slow_leaves_it_in_peace_until_the_last(
    several: SeveralDrivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sami_plugin.drivers.several.SHORT_SECONDS", 0)
    monkeypatch.setattr("sami_plugin.drivers.several.PAUSES_PER_EXPORT", 1e9)
    with several.watch(SCOPE) as watch:
        several.insert(SCOPE, UDP_FLOWS)
        assert not watch.collect().upserts
        watch.collect_last()  # the first one's
        assert sum(map(len, watch.collect_last().upserts)) == len(UDP_FLOWS)
