"""What could not be discarded is tried again, and hits nothing of a guest that comes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import netaddr
import numpy as np
import pytest

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import DeviceFailed
from sami_plugin.handover.destination import NOT_DISCARDED
from sami_plugin.model.flows import Batch, names
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.results import Results
from sami_plugin.model.scope import Scope
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    SECOND_ADDRESS,
    ZONES,
    begin,
    finish,
    guest_with_flows,
    hosts_in,
    is_orphaned,
    ports,
    report,
    states,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
)


class TroubledDriver(MemoryDriver):
    """Fails when it is told to, or takes its time to remove."""

    forgets_answer = False
    """Of the next insert: the flows are in, and nobody is told so."""
    failures = 0
    """Of removals to come."""

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def insert(self, scope: Scope, batch: Batch) -> Results:
        made = super().insert(scope, batch)
        if self.forgets_answer:
            self.forgets_answer = False
            raise DeviceFailed("no answer")
        return made

    def remove(self, scope: Scope, identities: Batch) -> Results:
        assert self.goes_on.wait(20)
        if self.failures:
            self.failures -= 1
            raise DeviceFailed("busy")
        return super().remove(scope, identities)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with hosts_in(tmp_path, driver=lambda name: TroubledDriver(MemoryDevice(name))) as made:
        yield made


def driver_of(hosts: Hosts, host: str) -> TroubledDriver:
    driver = hosts.drivers[host]
    assert isinstance(driver, TroubledDriver)
    return driver


def in_doubt_at_destination(hosts: Hosts) -> str:
    """A guest whose flows are at the destination, by name alone, for the session has no answer of its firewall."""
    guest = guest_with_flows(hosts, 30)
    driver_of(hosts, "host-b").forgets_answer = True
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.say("host-b", Phase.STARTED, guest)
    until(lambda: is_orphaned(hosts))
    return guest


def announce(hosts: Hosts, guest: str) -> None:
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.say("host-b", Phase.STARTED, guest)


def outcomes(hosts: Hosts, guest: str) -> set[str]:
    return {report["outcome"] for report in hosts.reports("host-b", guest)}


def test_guest_that_has_come_with_another_migration_keeps_its_flows(hosts: Hosts) -> None:
    guest = in_doubt_at_destination(hosts)
    driver_of(hosts, "host-b").failures = 1
    announce(hosts, guest)  # nobody has said that the first migration is over
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    until_idle(hosts)
    assert len(ports(hosts, "host-b")) == 30
    assert ports(hosts, "host-a") == set()
    assert outcomes(hosts, guest) == {"moved", "failed"}


def test_nothing_is_put_in_while_something_is_discarded(hosts: Hosts) -> None:
    guest = in_doubt_at_destination(hosts)
    driver = driver_of(hosts, "host-b")
    driver.goes_on.clear()
    announce(hosts, guest)
    until(lambda: sorted(states(hosts, "host-b")) == ["ended", "receiving"])
    hosts.say("host-a", Phase.SUSPENDED, guest)
    wait_for_step(hosts, "host-b", guest, "in sync")
    driver.goes_on.set()
    until(lambda: states(hosts, "host-b") == ["complete"])
    finish(hosts, guest)
    until_idle(hosts)
    assert len(ports(hosts, "host-b")) == 30
    assert outcomes(hosts, guest) == {"moved", "unclear"}


def test_guest_that_starts_again_before_all_is_discarded_is_received(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts, 30)
    begin(hosts, guest)
    driver_of(hosts, "host-b").failures = 1
    hosts.say("host-a", Phase.ROLLBACK, guest)
    until(lambda: states(hosts, "host-b") == ["discarding"])
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    came = MigrationEvent(guest, Phase.STARTED, source="host-a", role="destination", is_incoming=True)
    hosts.agents["host-b"].tell(came)
    until(lambda: states(hosts, "host-b") == ["receiving"])
    finish(hosts, guest)
    until_idle(hosts)
    assert len(ports(hosts, "host-b")) == 30
    assert outcomes(hosts, guest) == {"moved", "failed"}


def test_what_may_have_been_there_before_is_named_once_however_often_the_rest_is_tried(hosts: Hosts) -> None:
    guest, resident = new_guest(), new_guest()
    flows = tcp_flows(2)
    flows.rows["destinationIPv4Address"][0] = int(netaddr.IPAddress(SECOND_ADDRESS))
    hosts.plug("host-a", guest, ZONES["host-a"], GUEST_ADDRESS, shared=True)
    hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), flows)
    hosts.plug("host-b", resident, ZONES["host-b"], SECOND_ADDRESS, shared=True)
    driver = driver_of(hosts, "host-b")
    driver.insert(hosts.scope("host-b", resident), flows.take(np.arange(1)))
    driver.forgets_answer, driver.failures = True, 2
    hosts.say("host-a", Phase.OUTGOING, guest)
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS, shared=True)
    hosts.say("host-b", Phase.STARTED, guest)
    until(lambda: is_orphaned(hosts))
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert driver.failures == 0
    assert len(ports(hosts, "host-b")) == 1
    named = report(hosts, "host-b", guest)["named"][NOT_DISCARDED]
    assert (named["count"], named["flows"]) == (1, [*names(flows.take(np.arange(1)))])


def test_what_a_session_put_in_is_discarded_by_the_one_that_goes_on_with_it(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts, 30)
    begin(hosts, guest)
    hosts.kill("host-a")
    hosts.start("host-a")
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    until(lambda: "continued" in outcomes(hosts, guest))
    until(lambda: states(hosts, "host-b") == ["receiving"])
    hosts.say("host-a", Phase.ROLLBACK, guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert ports(hosts, "host-b") == set()
    assert outcomes(hosts, guest) == {"continued", "stayed"}
