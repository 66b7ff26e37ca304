"""What a driver is told of the flows whose guest has arrived, and what becomes of those that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.model.flows import Batch
from sami_plugin.model.migration import Phase
from sami_plugin.model.results import WORDS, Outcome, Reason, Results, results
from sami_plugin.model.scope import Scope
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    ZONES,
    begin,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    limited,
    until,
    until_idle,
    wait_for_step,
)

LIBERAL = 0x08
HOLD_SECONDS = 5


class Easing(MemoryDriver):
    """As Linux: what is put in it tracks liberally, until it is told that the guest has arrived."""

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device)
        self.put_in: list[int] = []
        """Flags of all flows that it was given."""
        self.arrivals: dict[int, int] = {}
        """Flags by port of what it was told of."""
        self.may_look = threading.Event()
        self.may_look.set()
        self.renewed: Reason | None = None

    def insert(self, scope: Scope, batch: Batch) -> Results:
        self.put_in += batch.rows["tcpTrackingFlags"].tolist()
        eased = Batch(batch.template, batch.rows.copy())
        eased.rows["tcpTrackingFlags"] |= LIBERAL
        return super().insert(scope, eased)

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        self.may_look.wait(20)
        return super().read_back(scope, batch)

    def renew(self, scope: Scope, batch: Batch) -> Results:
        if self.renewed is None:
            return super().renew(scope, batch)
        return results(len(batch), Outcome.REFUSED, self.renewed)

    def arrived(self, scope: Scope, batch: Batch) -> None:
        columns = (batch.rows[name].tolist() for name in ("sourceTransportPort", "tcpTrackingFlags"))
        self.arrivals |= dict(zip(*columns, strict=True))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with hosts_in(tmp_path, limited(hold_seconds=HOLD_SECONDS), lambda name: Easing(MemoryDevice(name))) as made:
        yield made


@pytest.fixture
def guest(hosts: Hosts) -> str:
    made = guest_with_flows(hosts, timeout=2 * HOLD_SECONDS)  # short enough to be given more on the way
    for zone in easing(hosts, "host-a").device._zones.values():
        for entry in zone.entries.values():
            entry.row["tcpTrackingFlags"] &= ~np.uint8(LIBERAL)  # the guest's own traffic made these
    return made


def easing(hosts: Hosts, host: str) -> Easing:
    driver = hosts.drivers[host]
    assert isinstance(driver, Easing)
    return driver


def moves(hosts: Hosts, guest: str) -> None:
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)


def runs_and_its_source_is_lost(hosts: Hosts, guest: str) -> None:
    """While what was put in is still being looked at."""
    driver = easing(hosts, "host-b")
    driver.may_look.clear()
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.say("host-b", Phase.STARTED, guest)
    until(lambda: len(held(hosts, "host-b")) == 100)
    hosts.say("host-b", Phase.RESUMED, guest)
    (session,) = hosts.agents["host-b"].sessions()
    session.refuse("the source is lost")
    driver.may_look.set()
    until(lambda: hosts.reports("host-b", guest))


def runs_and_its_sources_agent_begins_anew(hosts: Hosts, guest: str) -> None:
    begin(hosts, guest)
    hosts.say("host-b", Phase.RESUMED, guest)
    wait_for_step(hosts, "host-b", guest, "resumed")
    hosts.kill("host-a")
    hosts.start("host-a")
    finish(hosts, guest)
    until(lambda: any(one["outcome"] != "continued" for one in hosts.reports("host-b", guest)))


ARRIVING: list[Callable[[Hosts, str], None]] = [
    moves,
    runs_and_its_source_is_lost,
    runs_and_its_sources_agent_begins_anew,
]


@pytest.mark.parametrize("how", ARRIVING)
def test_driver_is_told_of_all_that_came_as_the_source_had_it(
    hosts: Hosts, guest: str, how: Callable[[Hosts, str], None]
) -> None:
    how(hosts, guest)
    driver = easing(hosts, "host-b")
    until(lambda: len(driver.arrivals) == 100)
    assert not any(flags & LIBERAL for flags in driver.arrivals.values())
    assert not easing(hosts, "host-a").arrivals


def test_guest_that_is_lost_to_its_source_has_its_flows_counted(hosts: Hosts, guest: str) -> None:
    runs_and_its_source_is_lost(hosts, guest)
    assert hosts.reports("host-b", guest)[0]["flows"]["imported"] == 100


def test_driver_is_told_nothing_of_a_guest_that_stays(hosts: Hosts, guest: str) -> None:
    begin(hosts, guest)
    hosts.say("host-a", Phase.RESUMED, guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert not easing(hosts, "host-b").arrivals


def test_what_vanished_is_put_in_again_as_it_was_asked_for(hosts: Hosts, guest: str) -> None:
    begin(hosts, guest)
    driver = easing(hosts, "host-b")
    assert len(driver.put_in) == 100
    (session,) = hosts.agents["host-b"].sessions()
    until(session.has_caught_up.is_set)  # else what is gone by the first look was never there
    for place, zone in driver.device._zones.items():
        for entry in list(zone.entries.values()):
            driver.device.drop(place, entry)
    until(lambda: len(held(hosts, "host-b")) == 100)
    assert not any(flags & LIBERAL for flags in driver.put_in)


def test_refused_renewal_is_told_once(hosts: Hosts, guest: str) -> None:
    begin(hosts, guest)
    easing(hosts, "host-b").renewed = Reason.NOT_PERMITTED
    told = f"more time was refused before the guest came: {WORDS[Reason.NOT_PERMITTED]}"
    (session,) = hosts.agents["host-b"].sessions()
    until(lambda: told in session.report.remarks)
    finish(hosts, guest)
    until_idle(hosts)
    assert hosts.reports("host-b", guest)[0]["remarks"].count(told) == 1
