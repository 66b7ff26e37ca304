"""Two or three hosts in memory, and the words of a usual migration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sami_plugin.agent import Hypervisor
from sami_plugin.codec import compression, ipfix
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import DeviceFailed
from sami_plugin.handover import DestinationSession, SourceSession
from sami_plugin.migration.decision import StartExport
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, Omitted, ZoneRole
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.protocols import TcpState
from sami_plugin.model.results import Results
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Limits, Settings
from sami_plugin.session import Session
from sami_plugin.testing.hosts import Hosts, new_guest

SessionT = TypeVar("SessionT", bound=Session)

ALL = set(range(1000, 1100))
"""Source ports of the flows of `guest_with_flows`."""
ZONES = {"host-a": 4097, "host-b": 5201, "host-c": 6305}
GUEST_ADDRESS = "192.0.2.7"
SECOND_ADDRESS = "192.0.2.8"
SETTINGS = Settings(
    Limits(delta_seconds=0.02, resync_seconds=0.5, open_seconds=5.0, arrival_seconds=20.0, watch_seconds=0.1),
    batch_flows=40,
    started_seconds=0.0,
)


def hosts_in(
    folder: Path,
    settings: Settings = SETTINGS,
    driver: Callable[[str], MemoryDriver] = lambda name: MemoryDriver(MemoryDevice(name)),
    hypervisors: Mapping[str, Hypervisor] | None = None,
) -> Hosts:
    """The three of them."""
    return Hosts(folder, tuple(ZONES), driver, settings=settings, hypervisors=hypervisors)


def limited(**limits: Any) -> Settings:
    """SETTINGS with other limits."""
    return replace(SETTINGS, limits=replace(SETTINGS.limits, **limits))


def brief(**limits: Any) -> Settings:
    """As limited; who calls an agent that is away gives up soon: no thread outlives its test for long."""
    return replace(limited(**limits), call_seconds=0.3)


IMPATIENT = limited(arrival_seconds=0.5)
"""For guests whose flows nobody asks for when they have left."""


def tcp_flows(count: int, source: str = GUEST_ADDRESS, first_port: int = 1000) -> Batch:
    template = TEMPLATES["tcp-ipv4"]
    rows = template.empty(count)
    rows["zoneRole"] = ZoneRole.PORT
    rows["protocolIdentifier"] = 6
    rows["sourceIPv4Address"] = int.from_bytes(map(int, source.split(".")), "big")
    rows["destinationIPv4Address"] = 0xC6336401
    rows["sourceTransportPort"] = np.arange(first_port, first_port + count)
    rows["destinationTransportPort"] = 443
    rows["conntrackStatus"] = FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.ASSURED
    rows["remainingTimeoutSeconds"] = 432000
    rows["tcpConnectionState"] = TcpState.ESTABLISHED
    return Batch(template, rows)


def zone_scope(host: str, zone: int | None = None) -> Scope:
    return Scope("any", "any", {ZoneRole.PORT: ZONES[host] if zone is None else zone}, ())


def held(hosts: Hosts, host: str, zone: int | None = None) -> set[tuple[int, int]]:
    """Source port and mark of each flow in the host's zone."""
    found = set()
    # Around what a test has made of the driver.
    for batch in MemoryDriver.export(hosts.drivers[host], zone_scope(host, zone)):
        assert not isinstance(batch, Omitted)
        found |= {(int(row["sourceTransportPort"]), int(row["flowMark"])) for row in batch.rows}
    return found


def ports(hosts: Hosts, host: str, zone: int | None = None) -> set[int]:
    """Source port of each flow in the host's zone."""
    return {port for port, _ in held(hosts, host, zone)}


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def until_idle(hosts: Hosts) -> None:
    for name, agent in hosts.agents.items():
        assert agent.wait_until_idle(20), f"{name} still has sessions"


def prepare(hosts: Hosts, guest: str) -> None:
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")


def begin(hosts: Hosts, guest: str, source: str = "host-a", destination: str = "host-b") -> None:
    """The guest is copied, and what it had at first is in the destination's firewall."""
    begin_before_its_router(hosts, guest, source, destination)
    session = [one for one in hosts.agents[destination].sessions() if one.guest == guest][-1]
    assert isinstance(session, DestinationSession)
    until(session.has_caught_up.is_set)


def begin_before_its_router(hosts: Hosts, guest: str, source: str = "host-a", destination: str = "host-b") -> None:
    """All is told, and some of it has no zone at the destination yet."""
    hosts.say(source, Phase.OUTGOING, guest, destination=destination)
    hosts.say(destination, Phase.PREPARE, guest, source)
    hosts.plug(destination, guest, ZONES[destination], GUEST_ADDRESS)
    hosts.say(destination, Phase.STARTED, guest)
    wait_for_step(hosts, destination, guest, "in sync")


def wait_for_step(hosts: Hosts, host: str, guest: str, step: str) -> None:
    until = time.monotonic() + 10
    while not hosts.has_step(host, guest, step):
        assert time.monotonic() < until, f"{host} never came to {step!r}"
        time.sleep(0.005)


def finish(hosts: Hosts, guest: str, source: str = "host-a", destination: str = "host-b") -> None:
    hosts.say(source, Phase.SUSPENDED, guest)
    hosts.unplug(source, guest)
    hosts.say(destination, Phase.RESUMED, guest)
    hosts.say(source, Phase.STOPPED, guest)


def guest_with_flows(hosts: Hosts, count: int = 100, timeout: int = 432000) -> str:
    """A guest on host-a."""
    guest = new_guest()
    hosts.plug("host-a", guest, ZONES["host-a"], GUEST_ADDRESS)
    flows = tcp_flows(count)
    flows.rows["remainingTimeoutSeconds"] = timeout
    hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), flows)
    return guest


def mark(hosts: Hosts, host: str, guest: str, port: int, value: int) -> None:
    """Traffic changes an entry where it is."""
    driver, scope = hosts.drivers[host], hosts.agents[host].host.scopes.find(guest)[0]
    assert isinstance(driver, MemoryDriver)
    with driver.device.lock:
        place, entry = driver._find(scope, tcp_flows(1, first_port=port), 0)
        assert place is not None
        assert entry is not None
        entry.row["flowMark"] = value
        driver.device.changed(place, entry)


def report(hosts: Hosts, host: str, guest: str) -> dict[str, Any]:
    return hosts.reports(host, guest)[0]


def states(hosts: Hosts, host: str) -> list[str]:
    """Of the host's sessions, oldest first."""
    return [one._state() for one in hosts.agents[host].sessions()]


def is_orphaned(hosts: Hosts) -> bool:
    return states(hosts, "host-b") == ["orphaned"]


@contextmanager
def threadless(session: SessionT) -> Iterator[SessionT]:
    """A session that no thread runs."""
    try:
        yield session
    finally:
        session._close()
        session.line.finish()


@contextmanager
def leaving_session(hosts: Hosts, guest: str) -> Iterator[SourceSession]:
    """One on host-a that has looked at what the guest has, and that no thread runs."""
    host = hosts.agents["host-a"].host
    session = SourceSession(host, host.new_id(), guest, "host-b", lambda _: None, is_outgoing=True)
    host.journal.begin(session.id, guest, "source", "host-b", "offered")
    session._start_export(StartExport())
    with threadless(session):
        yield session


class FailsOnce(MemoryDriver):
    """What is named in `what` fails the next time."""

    what = ""

    def capabilities(self, scope: Scope | None = None) -> Any:
        self._fail("capabilities")
        return super().capabilities(scope)

    def read_back(self, scope: Scope, batch: Batch) -> Any:
        self._fail("read_back")
        return super().read_back(scope, batch)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        self._fail("insert")
        return super().insert(scope, batch)

    def remove(self, scope: Scope, identities: Batch) -> Results:
        self._fail("remove")
        return super().remove(scope, identities)

    def _fail(self, what: str) -> None:
        if what == self.what:
            self.what = ""
            raise DeviceFailed("the kernel dropped messages for lack of room in the receive buffer")


def words(hosts: Hosts, guest: str, *phases: tuple[str, Phase]) -> None:
    """What the host's hypervisor says when it is asked after the agent's start, as libvirt does."""
    for host, phase in phases:
        hosts.agents[host].note(MigrationEvent(guest, phase, source="host-a", destination="host-b"))


def leave(hosts: Hosts, guest: str) -> None:
    """The guest leaves while the destination's agent is away."""
    hosts.say("host-a", Phase.SUSPENDED, guest)
    hosts.unplug("host-a", guest)
    hosts.say("host-a", Phase.STOPPED, guest)


def sessions_follow(hosts: Hosts) -> bool:
    """The one session of each host has all that its guest had when it began."""
    leaving, coming = hosts.agents["host-a"].sessions(), hosts.agents["host-b"].sessions()
    is_alone = len(leaving) == len(coming) == 1
    return is_alone and states(hosts, "host-a") == ["following"] and "in sync" in coming[0].report.steps


def payload(*batches: Batch) -> bytes:
    return compression.compress(ipfix.encode(list(batches), export_time=0, enterprise=32473), "zlib")


@contextmanager
def session_in(hosts: Hosts, guest: str, ports_of_guest: int) -> Iterator[DestinationSession]:
    """One that is being sent flows of a guest with so many ports."""
    host = hosts.agents["host-b"].host
    session = DestinationSession(host, host.new_id(), guest, "host-a", lambda _: None)
    session._declared = host.driver.capabilities().templates
    session._known = replace(session._known, ports=ports_of_guest, is_started=True)
    with threadless(session):
        yield session


class HeldUpExport(MemoryDriver):
    """Of the guest that has left: a large table."""

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device)
        self.of = ""
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        if scope.guest == self.of:
            self.has_begun.set()
            assert self.may_end.wait(10)
        yield from super().export(scope)
