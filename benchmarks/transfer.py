"""Flows moving between two real agents over a real RabbitMQ, beside the floor of the same run."""

from __future__ import annotations

import json
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from oslo_config import cfg

from benchmarks import floor
from benchmarks.result import Progress, row
from lab.agents import AGENT, IN_CLEAR, AgentProcess, file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.journal.journal import Journal
from sami_plugin.model.migration import Phase
from sami_plugin.model.packet import Packet
from sami_plugin.model.scope import Scope
from sami_plugin.transport.rpc import Transport

GUEST_ADDRESS = "192.0.2.1"
ZONES = (floor.SOURCE_ZONE, floor.DESTINATION_ZONE)


class Pair:
    """Two agents of two namespaces; `guest` is on one of them."""

    def __init__(
        self, folder: Path, namespaces: list[str], url: str, addresses: list[str], program: Sequence[str]
    ) -> None:
        self.guest = str(uuid.uuid4())
        self.url = url
        self.scopes = [floor.scope(path, zone) for path, zone in zip(namespaces, ZONES, strict=True)]
        self._files = [folder / f"ports-{name}.json" for name in "ab"]
        self._addresses = addresses
        for side in (0, 1):
            self.plug(side, False)
        self.agents = [
            AgentProcess(folder, name, file_and_broker(file, url), program=program)
            for name, file in zip("ab", self._files, strict=True)
        ]

    def plug(self, side: int, is_here: bool) -> None:
        """The guest's port is on this side, or not."""
        scope = self.scopes[side]
        port = {
            "port": "tap-bench",
            "guest": self.guest,
            "namespace": scope.namespace,
            "zone": ZONES[side],
            "addresses": self._addresses,
        }
        # The namespace stays listed, so that an agent attends to it from its start.
        idle = {**port, "guest": str(uuid.UUID(int=0)), "addresses": []}
        new = self._files[side].with_suffix(".new")
        new.write_text(json.dumps({"ports": [port if is_here else idle]}))
        new.rename(self._files[side])

    def begin(self, source: int) -> None:
        here, there = self.agents[source], self.agents[1 - source]
        here.tell(Phase.OUTGOING, self.guest, destination=there.name)
        there.tell(Phase.PREPARE, self.guest, here.name)
        self.plug(1 - source, True)
        there.tell(Phase.STARTED, self.guest)

    def finish(self, source: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pause, arrive; returns both reports once both sessions have ended."""
        here, there = self.agents[source], self.agents[1 - source]
        counts = [agent.ended(self.guest) for agent in self.agents]
        here.tell(Phase.SUSPENDED, self.guest)
        self.plug(source, False)
        there.tell(Phase.RESUMED, self.guest)
        here.tell(Phase.STOPPED, self.guest)
        for agent, count in zip(self.agents, counts, strict=True):
            wait_until(lambda a=agent, c=count: a.ended(self.guest) > c, f"agent {agent.name} to end its session", 15)
        return here.reports(self.guest)[0], there.reports(self.guest)[0]

    def wait_until_all_is_told(self, side: int) -> None:
        """Blocks until the agent of this side, the source, has told all that was there at first.

        The destination's journal says nothing of that if it learned only afterwards where the port is.
        """

        def is_all_told() -> bool:
            journal = Journal(self.agents[side].journal, read_only=True)
            try:
                newest = journal.sessions()[0]["session"]
                return any(decision["state"] == "following" for decision in journal.decisions(newest))
            finally:
                journal.close()

        wait_until(is_all_told, "the first export to be over", 60)

    def round_trips(self, count: int) -> list[float]:
        """Seconds of calls through the broker that carry nothing."""
        transport = Transport(cfg.ConfigOpts(), "bench", self.url)
        try:
            transport.call("a", "none", Packet(0, 1, b""), 10.0)
            return [floor.timed(lambda: transport.call("a", "none", Packet(0, 1, b""), 10.0)) for _ in range(count)]
        finally:
            transport.cleanup()


@contextmanager
def pair(program: Sequence[str] = AGENT) -> Iterator[Pair]:
    """Two namespaces, two agents and a broker, for as long as the block."""
    with (
        tempfile.TemporaryDirectory() as folder,
        floor.namespaces() as paths,
        Broker(Path(folder)) as broker,
    ):
        made = Pair(Path(folder), paths, broker.url, [GUEST_ADDRESS], program)
        with made.agents[0], made.agents[1]:
            yield made


def move(made: Pair, source: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both reports."""
    made.begin(source)
    return made.finish(source)


class Took(NamedTuple):
    """Seconds until the source had proved that all is gone there."""

    in_all: float
    """From its first look on."""
    since_arrived: float
    """From when the destination said that the guest runs there."""


def move_all(made: Pair, source: int, flows: int) -> Took:
    """As `move`.

    :raises RuntimeError: not all flows moved.
    """
    here, there = move(made, source)
    expected = {"exported": flows, "purged": flows, "left_behind": 0}
    if any(here["flows"][name] != count for name, count in expected.items()):
        raise RuntimeError(f"not all flows left: {here['flows']}")
    if there["flows"]["imported"] != flows or there["flows"]["verified"] < flows:
        raise RuntimeError(f"not all flows arrived: {there['flows']}")
    at, arrived = ({step["step"]: step["monotonic"] for step in report["steps"]} for report in (here, there))
    return Took(at["proved"] - at["export began"], at["proved"] - arrived["arrived"])


def transfers(flows: int, repeat: int, progress: Progress) -> list[dict[str, Any]]:
    """Floor, tool and move in turn, so that all meet the same machine; medians."""
    batch = floor.flows(flows)
    moves: list[Took] = []
    floors: list[dict[str, float]] = []
    tools: list[float] = []
    with pair() as made, floor.namespaces() as (here, there):
        LinuxConntrackDriver().insert(made.scopes[0], batch)
        made.plug(0, True)
        move(made, 0)  # the first one opens connections and declares queues
        for run in range(repeat):
            progress(f"{run + 1} of {repeat}: {flows} flows over RabbitMQ, the floor, conntrack(8)")
            moves.append(move_all(made, 1 - run % 2, flows))
            floors.append(floor.floor(here, there, batch))
            tools.append(sum(floor.tool_pipeline(here, there, batch).values()))
    return [
        row(
            "export to purge over RabbitMQ",
            flows,
            [took.in_all for took in moves],
            [sum(took.values()) for took in floors],
            tools,
        ),
        row(
            "arrived to purged and proved over RabbitMQ",
            flows,
            [took.since_arrived for took in moves],
            [took["delete"] + took["prove gone"] for took in floors],
        ),
    ]


def last_changes(flows: int, new_per_second: int, repeat: int, progress: Progress) -> dict[str, Any]:
    """From the guest's pause to the last changes being in the destination's kernel; beside the broker's round trip."""
    took: list[float] = []
    with pair() as made:
        driver = LinuxConntrackDriver()
        driver.insert(made.scopes[0], floor.flows(flows))
        made.plug(0, True)
        made.begin(0)
        made.finish(0)
        floors = made.round_trips(20)
        for run in range(repeat):
            progress(f"{run + 1} of {repeat}: last changes of {flows} flows, {new_per_second} new ones a second")
            took.append(_last_change(made, new_per_second, run))
    return row(f"pause to last changes applied, {new_per_second} new a second", flows, took, floors)


def _last_change(made: Pair, new_per_second: int, run: int) -> float:
    """Seconds from the pause to the last changes being applied; runs alternate in direction, from b to a first."""
    source = 1 - run % 2
    with newcomers(LinuxConntrackDriver(), made.scopes[source], new_per_second, run) as stop:
        made.begin(source)
        made.wait_until_all_is_told(source)
        time.sleep(1.0)  # of steady state, which is what is measured
        stop.set()
        here, there = made.finish(source)
    at = {step["step"]: step["monotonic"] for step in (*here["steps"], *there["steps"])}
    return at["last changes applied"] - at["suspended"]


def with_and_without_tls(flows: int, new_per_second: int, repeat: int, progress: Progress) -> list[dict[str, Any]]:
    """Both in turn, so that both meet the same machine: the floor here is the same without TLS."""
    moves: tuple[list[float], list[float]] = ([], [])
    changes: tuple[list[float], list[float]] = ([], [])
    with pair() as secured, pair(IN_CLEAR) as in_clear:
        for made in (secured, in_clear):
            LinuxConntrackDriver().insert(made.scopes[0], floor.flows(flows))
            made.plug(0, True)
            move(made, 0)
        for run in range(repeat):
            progress(f"{run + 1} of {repeat}: {flows} flows with and without TLS")
            for made, seconds in zip((secured, in_clear), moves, strict=True):
                seconds.append(move_all(made, 1 - run % 2, flows).in_all)
        for made in (secured, in_clear):
            if repeat % 2:  # back to where `_last_change` begins
                move(made, 0)
        for run in range(repeat):
            progress(f"{run + 1} of {repeat}: last changes with and without TLS")
            for made, seconds in zip((secured, in_clear), changes, strict=True):
                seconds.append(_last_change(made, new_per_second, run))
    return [
        row("with TLS beside without: export to purge", flows, *moves),
        row("with TLS beside without: pause to last changes applied", flows, *changes),
    ]


@contextmanager
def newcomers(driver: LinuxConntrackDriver, scope: Scope, per_second: int, run: int) -> Iterator[threading.Event]:
    """New flows in the scope at a steady pace, until the event is set or the block ends."""
    stop = threading.Event()
    share = max(1, per_second // 100)

    def insert() -> None:
        begun, number = time.monotonic(), 0
        while not stop.is_set():
            batch = floor.flows(share)
            batch.rows["sourceIPv4Address"] += 0x01000000 * (run + 1) + number * share
            driver.insert(scope, batch)
            number += 1
            stop.wait(max(0.0, begun + number * share / per_second - time.monotonic()))

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()


def idle(events_per_second: int, seconds: float, progress: Progress) -> dict[str, Any]:
    """Processor time of an agent while nothing migrates and other zones of its kernel tell events."""
    progress(f"an idle agent beside {events_per_second} foreign events a second")
    with pair() as made:
        driver, foreign = LinuxConntrackDriver(), floor.scope(made.scopes[0].namespace or "", 77)
        batch = floor.flows(events_per_second // 20)
        before, begun, events = made.agents[0].cpu_seconds(), time.monotonic(), 0
        while (now := time.monotonic()) < begun + seconds:
            driver.insert(foreign, batch)
            driver.remove(foreign, batch.identities)
            events += 2 * len(batch)
            time.sleep(max(0.0, begun + events / events_per_second - time.monotonic()))
        lasted = now - begun
        used = made.agents[0].cpu_seconds() - before
        return row(f"idle agent, {events / lasted:.0f} foreign events a second: CPU seconds of", 0, [used], [lasted])
