"""The memory driver keeps the contract; drivers that do not are found out by the suite."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sami_plugin.drivers.base import Changes, Watch
from sami_plugin.drivers.memory import Faults, MemoryDevice, MemoryDriver
from sami_plugin.errors import DeviceFailed, UndeclaredAbility
from sami_plugin.model.flows import TEMPLATES, Batch, FirewallEvent, Omitted, Template, ZoneRole, turned_round
from sami_plugin.model.results import Outcome, Reason, Results, lost_fields, results
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import (
    NEIGHBOUR_ADDRESSES,
    PORT_ADDRESSES,
    FlowDriverConformance,
    flows,
)

TCP = TEMPLATES["tcp-ipv4"]


class MemoryConformance(FlowDriverConformance):
    driver_class: type[MemoryDriver] = MemoryDriver
    options: dict[str, Any] = {}  # noqa: RUF012

    def make_driver(self) -> MemoryDriver:
        return self.driver_class(MemoryDevice(), **self.options)

    def make_scope(self) -> Scope:
        return Scope("port", "guest", {ZoneRole.PORT: 7}, PORT_ADDRESSES)

    def make_other_scope(self) -> Scope:
        return Scope("other", "another", {ZoneRole.PORT: 8}, PORT_ADDRESSES)

    def make_shared_scope(self) -> Scope:
        zones = {ZoneRole.PORT: 9}
        return Scope("port", "guest", zones, PORT_ADDRESSES, is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)


class TestMemoryDriver(MemoryConformance):
    pass


class TestMemoryDriverThatDeclaresLittle(MemoryConformance):
    options = {"templates": frozenset({"udp-ipv4", "tcp-nat-ipv6"}), "can_watch": False}  # noqa: RUF012


# Wrong drivers: each breaks the promise that stands beside it.


class _DropsMark(MemoryDriver):
    def insert(self, scope: Scope, batch: Batch) -> Results:
        kept = Batch(batch.template, batch.rows.copy())
        kept.rows["flowMark"] = 0
        return super().insert(scope, kept)


class _RemovesByKeyAlone(MemoryDriver):
    def remove(self, scope: Scope, identities: Batch) -> Results:
        named = Batch(identities.template, identities.rows.copy())
        named.rows["flowId"] = 0
        return super().remove(scope, named)


class _FlushesOnEmptyRemoval(MemoryDriver):
    def remove(self, scope: Scope, identities: Batch) -> Results:
        if not len(identities):
            for batch in list(self.export(scope)):
                assert isinstance(batch, Batch)
                super().remove(scope, batch.identities)
        return super().remove(scope, identities)


class _RemovesTheReverseToo(MemoryDriver):
    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = super().remove(scope, identities)
        if "sourceTransportPort" in (identities.rows.dtype.names or ()):
            also = super().remove(scope, turned_round(identities))
            made["outcome"] = np.minimum(made["outcome"], also["outcome"])
        return made


class _LooksInEveryZone(MemoryDriver):
    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = super().remove(scope, identities)
        for zone in (7, 8):
            super().remove(dataclasses.replace(scope, zones={ZoneRole.PORT: zone}), identities)
        return made


class _RenewInserts(MemoryDriver):
    def renew(self, scope: Scope, batch: Batch) -> Results:
        return self.insert(scope, batch)


class _ArrivalInserts(MemoryDriver):
    def arrived(self, scope: Scope, batch: Batch) -> None:
        self.insert(scope, batch)


class _ArrivalRemoves(MemoryDriver):
    def arrived(self, scope: Scope, batch: Batch) -> None:
        victims = batch.identities
        victims.rows["flowId"] = 0
        self.remove(scope, victims)


class _ForgetsToRenew(MemoryDriver):
    def renew(self, scope: Scope, batch: Batch) -> Results:
        return results(len(batch))


class _KnowsNoBarring(MemoryDriver):
    def _all(self, scope: Scope) -> Scope:
        return dataclasses.replace(scope, barred_marks=0)

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        return super().export(self._all(scope))

    def insert(self, scope: Scope, batch: Batch) -> Results:
        return super().insert(self._all(scope), batch)

    def watch(self, scope: Scope) -> Watch:
        return super().watch(self._all(scope))


class _SharedZonesAreAllMine(MemoryDriver):
    def _mine(self, scope: Scope) -> Scope:
        return dataclasses.replace(scope, is_shared=False, neighbours=())

    def insert(self, scope: Scope, batch: Batch) -> Results:
        return super().insert(self._mine(scope), batch)

    def remove(self, scope: Scope, identities: Batch) -> Results:
        return super().remove(self._mine(scope), identities)

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        return super().export(self._mine(scope))


class _TakesWhatItDoesNotDeclare(MemoryDriver):
    def insert(self, scope: Scope, batch: Batch) -> Results:
        if batch.template.name not in TEMPLATES:
            return results(len(batch))
        return super().insert(scope, batch)


class _AnswersBackwards(MemoryDriver):
    def remove(self, scope: Scope, identities: Batch) -> Results:
        order = np.argsort(super().read_back(scope, _as_flows(identities))[1])
        return super().remove(scope, identities)[order]


def _as_flows(identities: Batch) -> Batch:
    template = TEMPLATES[identities.template.name.removesuffix("-identity")]
    rows = template.empty(len(identities))
    for field in template.key:
        rows[field[0]] = identities.rows[field[0]]
    return Batch(template, rows)


class _DropsTheLastResult(MemoryDriver):
    def remove(self, scope: Scope, identities: Batch) -> Results:
        return super().remove(scope, identities)[:-1]


class _GuessesAZone(MemoryDriver):
    def insert(self, scope: Scope, batch: Batch) -> Results:
        known = Batch(batch.template, batch.rows.copy())
        known.rows["zoneRole"] = ZoneRole.PORT
        return super().insert(scope, known)


class _WritesIntoItsArgument(MemoryDriver):
    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = super().insert(scope, batch)
        if batch.rows.flags.writeable:
            batch.rows["flowId"] = 0
        return made


class _KeepsIds(MemoryDriver):
    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, np.ndarray]:
        kept, found = super().read_back(scope, batch)
        kept.rows["flowId"][found] = kept.rows["remainingTimeoutSeconds"][found]
        return kept, found


class _OldWatch(Watch):
    """Wraps a watch and spoils what it tells."""

    def __init__(self, watch: Watch, spoil: Callable[[Changes], Changes]) -> None:
        self._watch, self._spoil = watch, spoil

    def collect(self) -> Changes:
        return self._spoil(self._watch.collect())

    def close(self) -> None:
        self._watch.close()


class _WatchWithoutRemovals(MemoryDriver):
    def watch(self, scope: Scope) -> Watch:
        return _OldWatch(super().watch(scope), lambda told: dataclasses.replace(told, removals=()))


class _WatchTellsEverythingTwice(MemoryDriver):
    def watch(self, scope: Scope) -> Watch:
        return _OldWatch(super().watch(scope), lambda told: dataclasses.replace(told, upserts=told.upserts * 2))


class _WatchBeginsLate(MemoryDriver):
    """Begins to note changes with the first `collect`."""

    def watch(self, scope: Scope) -> Watch:
        begin, began = super().watch, [False]

        class Late(Watch):
            def collect(self) -> Changes:
                if not began[0]:
                    began[0] = True
                    self.watch = begin(scope)
                return self.watch.collect()

            def close(self) -> None:
                pass

        return Late()


class _WatchClosesOnce(MemoryDriver):
    def watch(self, scope: Scope) -> Watch:
        inner, closed = super().watch(scope), [False]

        class Once(Watch):
            def collect(self) -> Changes:
                return inner.collect()

            def close(self) -> None:
                if closed[0]:
                    raise OSError("closed already")
                closed[0] = True
                inner.close()

        return Once()


class _WatchesWithoutSayingSo(MemoryDriver):
    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device, can_watch=False)

    def watch(self, scope: Scope) -> Watch:
        return MemoryDriver(self.device).watch(scope)


class _TakesTheNatsOfOthers(MemoryDriver):
    def insert(self, scope: Scope, batch: Batch) -> Results:
        return super().insert(dataclasses.replace(scope, addresses=scope.addresses + NEIGHBOUR_ADDRESSES), batch)


WRONG: list[tuple[type[MemoryDriver], str]] = [
    (_DropsMark, "test_inserted_flows_are_read_back_as_they_were_sent"),
    (_DropsMark, "test_inserted_flows_are_exported_as_they_were_sent"),
    (_RemovesByKeyAlone, "test_removal_with_another_id_leaves_the_flow"),
    (_FlushesOnEmptyRemoval, "test_empty_batches_are_taken_and_do_nothing"),
    (_RemovesTheReverseToo, "test_removal_of_the_tuple_turned_round_leaves_the_flow"),
    (_LooksInEveryZone, "test_other_zones_are_not_touched"),
    (_RenewInserts, "test_renew_never_creates"),
    (_RenewInserts, "test_renew_sets_the_timeout_of_what_is_there"),
    (_ArrivalInserts, "test_arrival_leaves_what_is_there_and_makes_nothing"),
    (_ArrivalRemoves, "test_arrival_leaves_what_is_there_and_makes_nothing"),
    (_ForgetsToRenew, "test_renew_sets_the_timeout_of_what_is_there"),
    (_SharedZonesAreAllMine, "test_shared_zone_shows_the_flows_of_the_port_alone"),
    (_SharedZonesAreAllMine, "test_neighbours_flows_are_never_touched"),
    (_SharedZonesAreAllMine, "test_flow_with_a_neighbour_is_the_neighbours"),
    (_TakesTheNatsOfOthers, "test_place_of_another_guest_s_nat_is_taken_from_nobody"),
    (_KnowsNoBarring, "test_barred_flows_are_omitted_and_named_and_the_others_told"),
    (_KnowsNoBarring, "test_barred_flows_are_refused_and_the_others_put_in"),
    (_KnowsNoBarring, "test_watch_tells_a_flow_that_became_barred_as_removed"),
    (_TakesWhatItDoesNotDeclare, "test_undeclared_template_is_refused_by_record"),
    (_AnswersBackwards, "test_results_are_one_per_record_in_order"),
    (_DropsTheLastResult, "test_results_are_one_per_record_in_order"),
    (_GuessesAZone, "test_role_that_the_scope_has_not_is_refused"),
    (_WritesIntoItsArgument, "test_what_is_given_is_not_changed"),
    (_KeepsIds, "test_flow_that_is_made_again_has_another_id"),
    (_WatchWithoutRemovals, "test_watch_tells_what_was_made_and_what_went"),
    (_WatchTellsEverythingTwice, "test_changes_are_merged_to_what_is_now"),
    (_WatchBeginsLate, "test_watch_before_export_leaves_no_gap"),
    (_WatchClosesOnce, "test_watch_closes_more_than_once"),
    (_WatchesWithoutSayingSo, "test_watch_that_is_not_declared_raises"),
]


@pytest.mark.parametrize(("wrong", "promise"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_suite_finds_a_driver_that_breaks_a_promise(wrong: type[MemoryDriver], promise: str) -> None:
    suite = MemoryConformance()
    suite.driver_class = wrong
    with pytest.raises((AssertionError, OSError, IndexError)):
        getattr(suite, promise)()


# What the memory driver does beyond the contract.


@dataclasses.dataclass
class Rig:
    device: MemoryDevice
    driver: MemoryDriver
    scope: Scope
    now: list[float]


@pytest.fixture
def rig() -> Rig:
    now = [100.0]
    device = MemoryDevice("m", clock=lambda: now[0])
    return Rig(device, MemoryDriver(device), MemoryConformance().make_scope(), now)


def _exported(rig: Rig) -> int:
    return sum(len(batch) for batch in rig.driver.export(rig.scope) if isinstance(batch, Batch))


def test_flows_end_when_their_timeout_has_run_out(rig: Rig) -> None:
    sent = flows(TCP, 3)
    sent.rows["remainingTimeoutSeconds"] = [10, 20, 30]
    rig.driver.insert(rig.scope, sent)
    with rig.driver.watch(rig.scope) as watch:
        rig.now[0] += 20
        kept, found = rig.driver.read_back(rig.scope, sent)
        assert found.tolist() == [False, False, True]
        assert kept.rows["remainingTimeoutSeconds"].tolist() == [0, 0, 10]
        (removed,) = watch.collect().removals
    assert len(removed) == 2
    assert set(removed.rows["firewallEvent"]) == {FirewallEvent.DELETED}


def test_full_device_refuses_and_still_replaces() -> None:
    driver = MemoryDriver(MemoryDevice(capacity=3))
    scope = MemoryConformance().make_scope()
    made = driver.insert(scope, flows(TCP, 4))
    assert made["outcome"].tolist() == [Outcome.IMPORTED] * 3 + [Outcome.REFUSED]
    assert made["reason"][3] == Reason.TABLE_FULL
    assert (driver.insert(scope, flows(TCP, 3))["outcome"] == Outcome.IMPORTED).all()
    assert (driver.capabilities().capacity, driver.capabilities().in_use) == (3, 3)


def test_faults_refuse_the_chosen_flows(rig: Rig) -> None:
    rig.device.faults = Faults(
        refuse=lambda batch: batch.rows["sourceTransportPort"] == 20001, refuse_reason=Reason.CHAIN_TOO_LONG
    )
    made = rig.driver.insert(rig.scope, flows(TCP, 3))
    assert made["outcome"].tolist() == [Outcome.IMPORTED, Outcome.REFUSED, Outcome.IMPORTED]
    assert made["reason"].tolist() == [0, Reason.CHAIN_TOO_LONG, 0]


def test_faults_drop_a_field_that_reading_back_shows(rig: Rig) -> None:
    rig.device.faults.drop_fields = frozenset({"flowMark"})
    sent = flows(TCP, 3)
    assert (rig.driver.insert(rig.scope, sent)["outcome"] == Outcome.IMPORTED).all()
    lost = lost_fields(sent, rig.driver.read_back(rig.scope, sent)[0].rows)
    assert lost.tolist() == [1 << [field[0] for field in TCP.state].index("flowMark")] * 3


def test_faults_fail_in_the_middle_of_a_batch(rig: Rig) -> None:
    rig.device.faults.fail_after = 2
    with pytest.raises(DeviceFailed):
        rig.driver.insert(rig.scope, flows(TCP, 5))
    rig.device.faults.fail_after = None
    assert _exported(rig) == 2


def test_faults_lose_events_once_and_say_so(rig: Rig) -> None:
    with rig.driver.watch(rig.scope) as watch:
        rig.device.faults.lose_events = True
        rig.driver.insert(rig.scope, flows(TCP, 3))
        rig.device.faults.lose_events = False
        told = watch.collect()
        assert not told.is_complete
        assert not told.upserts
        assert watch.collect() == Changes()


def test_two_drivers_of_one_device_see_the_same_flows(rig: Rig) -> None:
    rig.driver.insert(rig.scope, flows(TCP, 3))
    other = MemoryDriver(rig.device)
    assert other.capabilities().device == rig.driver.capabilities().device == "m"
    assert other.read_back(rig.scope, flows(TCP, 3))[1].all()


def test_zones_of_different_namespaces_are_different(rig: Rig) -> None:
    rig.driver.insert(rig.scope, flows(TCP, 3))
    elsewhere = dataclasses.replace(rig.scope, namespace="elsewhere")
    assert not list(rig.driver.export(elsewhere))


def test_zone_that_plays_two_roles_is_told_once(rig: Rig) -> None:
    scope = dataclasses.replace(rig.scope, zones={ZoneRole.PORT: 7, ZoneRole.DNAT: 7, ZoneRole.SNAT: 8})
    rig.driver.insert(scope, flows(TCP, 3))
    (told,) = rig.driver.export(scope)
    assert isinstance(told, Batch)
    assert len(told) == 3


def test_undeclared_flows_of_the_device_are_omitted_by_count(rig: Rig) -> None:
    rig.driver.insert(rig.scope, flows(TCP, 3))
    (told,) = MemoryDriver(rig.device, templates=frozenset({"udp-ipv4"})).export(rig.scope)
    assert isinstance(told, Omitted)
    assert told.count == 3


def test_translated_flow_is_in_the_way_of_its_answer(rig: Rig) -> None:
    translated = flows(TEMPLATES["tcp-nat-ipv4"], 1)
    answer = flows(TCP, 1)
    for field, other in (
        ("sourceIPv4Address", "postNATDestinationIPv4Address"),
        ("destinationIPv4Address", "postNATSourceIPv4Address"),
        ("sourceTransportPort", "postNAPTDestinationTransportPort"),
        ("destinationTransportPort", "postNAPTSourceTransportPort"),
    ):
        answer.rows[field] = translated.rows[other]
    rig.driver.insert(rig.scope, answer)
    rig.driver.insert(rig.scope, translated)
    assert not rig.driver.read_back(rig.scope, answer)[1].any()
    assert rig.driver.read_back(rig.scope, translated)[1].all()


def test_watch_that_is_not_declared_is_refused() -> None:
    with pytest.raises(UndeclaredAbility):
        MemoryDriver(can_watch=False).watch(MemoryConformance().make_scope())


def test_threads_insert_and_remove_side_by_side(rig: Rig) -> None:
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            mine = flows(TCP, 20, first=first)
            for _ in range(10):
                rig.driver.insert(rig.scope, mine)
                names = rig.driver.read_back(rig.scope, mine)[0].identities
                assert (rig.driver.remove(rig.scope, names)["outcome"] == Outcome.REMOVED).all()
            rig.driver.insert(rig.scope, mine)
        except BaseException as error:  # noqa: BLE001 - told in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    with rig.driver.watch(rig.scope) as watch:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = watch.collect()
    assert not failures
    assert sum(map(len, told.upserts)) == _exported(rig) == 80


def test_every_template_goes_in_and_out(rig: Rig) -> None:
    scope = dataclasses.replace(rig.scope, zones={role: int(role) for role in ZoneRole})
    sent: dict[str, Template] = {}
    for name in sorted(rig.driver.capabilities().templates):
        template = TEMPLATES[name]
        batch = flows(template, 3, first=10 * len(sent))
        batch.rows["zoneRole"] = [1, 2, 3]
        assert (rig.driver.insert(scope, batch)["outcome"] == Outcome.IMPORTED).all()
        sent[name] = template
    told = list(rig.driver.export(scope))
    assert all(isinstance(batch, Batch) for batch in told)
    assert sum(len(batch) for batch in told if isinstance(batch, Batch)) == 3 * len(sent)
