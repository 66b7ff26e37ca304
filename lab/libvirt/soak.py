"""What a guest's streams notice of many migrations: `python -m lab.libvirt.soak`, some twelve minutes.

A guest that rewrites memory all the time holds TCP and UDP streams of 1,000 packets a second each way, begun by either
end, over IPv4 and IPv6. No rule admits a packet of them: they live by their entries. It migrates with SAMI to and fro.
These round trips alternate with those of the same guest on hosts without any firewall and without SAMI; beside
that the gap in the streams is judged. There are eight kinds of stream; where an emulated guest does not bear them all,
which is measured first, guests come one after the other, each with its share.

The output folder gets result.json, moves.jsonl (each migration), libvirt's events and the agents' logs. Exit code: 0
when no connection was lost, every migration's flows were complete before the guest ran, and the gap holds beside the
one without firewall; 1 when not, or when the lab failed; 125 when the lab cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab import isolation
from lab.broker import Broker
from lab.command import exit_code
from lab.deadline import wait_until
from lab.errors import CommandFailed, DeadlinePassed, LabError, LabUnavailable
from lab.libvirt import figures, parts, traffic
from lab.libvirt.agents import HOOK, Sami
from lab.libvirt.figures import Move, Pair
from lab.libvirt.guest import STREAM_PORT, Guest
from lab.libvirt.lab import LibvirtLab
from lab.libvirt.migration import Migration
from lab.libvirt.streams import PACKETS_PER_SECOND, Direction, Stream, Streams
from lab.verdict import has_survived

Kind = tuple[str, int, bool]
KINDS: tuple[Kind, ...] = (
    # Every half has both protocols, both families and both beginners.
    ("tcp", 4, True),
    ("udp", 6, True),
    ("tcp", 6, False),
    ("udp", 4, False),
    ("tcp", 6, True),
    ("udp", 4, True),
    ("tcp", 4, False),
    ("udp", 6, False),
)
SIZES = (8, 4, 2)
DIRTY_MIB = 8
TRY_SECONDS = 20.0
TRY_CLEAN_SECONDS = 5  # one alone may be luck
STEADY_SECONDS = 300.0
AFTER_SECONDS = 2.0
DEAD_SECONDS = 10.0
IDLE_SECONDS = 30.0
HOOK_RUNS = 30
START_RUNS = 8
# Longer than streams are untracked while there is no firewall.
UDP_SECONDS = 1800


class ConnectionLost(Exception):
    """Streams of the guest did not go on, so it is of no more use."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = tuple(names)


class Soak:
    """One guest with its streams on host a, and its migrations to and fro."""

    def __init__(self, lab: LibvirtLab, name: str, kinds: Sequence[Kind]) -> None:
        self.lab = lab
        self.guest: Guest = lab.add_guest(name, "a", dirty_mib=DIRTY_MIB)
        self.sessions = 0
        for protocol in figures.PROTOCOLS:
            self.guest.allow(protocol, STREAM_PORT)
        self.streams = Streams(lab)
        self.every: list[Stream] = []
        for protocol, family, is_guests in kinds:
            self.every.append(self.streams.begin(self.guest, protocol, family, is_guests=is_guests))
        for protocol in figures.PROTOCOLS:
            self.guest.revoke(protocol, STREAM_PORT)
        self.guest.close_egress()

    def end(self) -> None:
        """The guest is gone, and so are its streams."""
        self.streams.stop()
        self.lab.remove_guest(self.guest)

    def migrate(self, source: str, destination: str, sami: Sami | None) -> Move:
        """Once, and everything that is measured of it; without `sami` neither SAMI nor a firewall must be there.

        Raises ConnectionLost where streams had died before it.
        """
        self.wait_until_steady(STEADY_SECONDS)
        migration = self.lab.start_migration(self.guest, source, destination)
        ended = migration.wait()
        if not ended.is_ok:
            raise LabError(f"libvirt did not migrate {self.guest.name}: {ended.words}")
        paused = migration.wait_for("SUSPENDED/MIGRATED").time
        resumed = migration.wait_for("RESUMED/MIGRATED", migration.destination).time
        gaps, began_at, lost = self._gaps(migration, resumed)
        shown: dict[str, Any] = {}
        if sami is not None:
            self.sessions += 1
            shown = arrival(sami.reports(self.guest, self.sessions)[destination], paused, resumed)
        way = f"{source} to {destination}"
        pause_ms, before_ms = (resumed - paused) * 1000, (paused - began_at) * 1000
        return Move(sami is not None, way, ended.seconds, pause_ms, gaps, before_ms, lost, **shown)

    def wait_until_steady(self, seconds: float, clean_seconds: int = 1) -> None:
        """Until the guest bore a whole second, or so many in a row: else its gaps are the machine's.

        Raises ConnectionLost where a stream is silent, LabUnavailable where all are but slow.
        """
        try:
            wait_until(lambda: self._was_clean(clean_seconds), "a clean second", seconds)
        except DeadlinePassed as error:
            dead = [name for name, direction in self._directions(DEAD_SECONDS).items() if not direction.received]
            if dead:
                raise ConnectionLost(dead) from error
            raise LabUnavailable("the machine has no time for the streams", "end what else runs on it") from error

    def _was_clean(self, seconds: int) -> bool:
        return all(
            _is_clean(direction)
            for _ in range(seconds)
            for direction in self._directions(1, is_next=seconds > 1).values()
        )

    def slowest(self) -> int:
        """Packets that the worst stream took in the last second."""
        return min(direction.received - direction.lost for direction in self._directions(1).values())

    def _gaps(self, migration: Migration, resumed: float) -> tuple[dict[str, float], float, tuple[str, ...]]:
        """The longest by protocol, when the longest of all began, and what did not go on."""
        gaps: dict[str, float] = {}
        longest = (0.0, 0.0)
        lost = []
        for stream in self.every:
            protocol = stream.name.partition("/")[0]
            report = self.streams.report(stream, migration.began_at, resumed + AFTER_SECONDS)
            for name, direction in _named(stream, report):
                longest = max(longest, (direction.longest_gap_ms, direction.gap_began_at))
                gaps[protocol] = max(gaps.get(protocol, 0.0), direction.longest_gap_ms)
                if protocol == "tcp" and direction.lost:
                    lost.append(f"{name}: {direction.lost} packets of a TCP stream")
                elif not self._goes_on(stream, name, resumed + AFTER_SECONDS):
                    lost.append(name)
        return gaps, longest[1], tuple(lost)

    def _goes_on(self, stream: Stream, name: str, since: float) -> bool:
        """TCP may be quiet for long before it sends again, so one that is quiet is looked at for longer."""
        begin, end = since - 1, since
        while not dict(_named(stream, self.streams.report(stream, begin, end)))[name].received:
            if end >= since + DEAD_SECONDS:
                return False
            begin, end = end, end + 1
        return True

    def _directions(self, seconds: float, *, is_next: bool = False) -> dict[str, Direction]:
        """All streams' directions by name, of these last seconds or of the next."""
        end = time.monotonic() + (seconds if is_next else 0)
        return {
            name: direction
            for stream in self.every
            for name, direction in _named(stream, self.streams.report(stream, end - seconds, end))
        }


def _named(stream: Stream, report: Any) -> list[tuple[str, Direction]]:
    return [(f"{stream.name} to the outside", report.to_outside), (f"{stream.name} to the guest", report.to_guest)]


def _is_clean(direction: Direction) -> bool:
    return direction.received > 0.95 * PACKETS_PER_SECOND and not direction.lost


def arrival(report: dict[str, Any], paused: float, resumed: float) -> dict[str, Any]:
    """What a destination's report tells of an arrival, as fields of Move."""
    at = {step["step"]: step["monotonic"] for step in report["steps"]}
    complete = at.get("complete")
    return {
        # A zone that was never found is a failure, and not a late one.
        "had_zone": at.get("scope known", resumed) <= resumed,
        "complete_after_pause_ms": None if complete is None else (complete - paused) * 1000,
        "is_complete_before_resume": complete is not None and complete < resumed,
    }


@dataclass(slots=True)
class Measured:
    """What was measured until now, of all guests."""

    moves: list[Move] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Run:
    """A lab with SAMI, and what is measured in it."""

    def __init__(self, lab: LibvirtLab, sami: Sami) -> None:
        self.lab = lab
        self.sami = sami
        self.measured = Measured()
        self.others: dict[str, Any] = {}
        self._guests = 0
        for host in lab.hosts.values():
            for name in ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"):
                host.network.sysctl(name, UDP_SECONDS)

    def share(self, sizes: Sequence[int]) -> list[Sequence[Kind]]:
        """The kinds of stream, a guest each, in groups of the first of these sizes that a guest bears."""
        held = {}
        for size in sizes:
            say(f"does a guest bear {size} streams of {PACKETS_PER_SECOND} packets a second each way?")
            soak = None
            try:
                soak = self.soak(KINDS[:size])
                soak.wait_until_steady(TRY_SECONDS, TRY_CLEAN_SECONDS)
            except (LabUnavailable, DeadlinePassed):
                held[f"slowest_of_{size}_streams"] = soak.slowest() if soak is not None else 0
            else:
                held[f"slowest_of_{size}_streams"] = soak.slowest()
                self.others["streams_at_a_time"] = size
                self.others["packets_in_a_second"] = held
                return [KINDS[begin : begin + size] for begin in range(0, len(KINDS), size)]
            finally:
                if soak is not None:
                    soak.end()
        raise LabUnavailable(f"a guest does not bear {sizes[-1]} streams", "end what else runs on this machine")

    def soak(self, kinds: Sequence[Kind]) -> Soak:
        """A new guest with such streams."""
        self._guests += 1
        return Soak(self.lab, f"soak{self._guests}", kinds)

    def group(self, kinds: Sequence[Kind], trips: int, paired_trips: int) -> None:
        """So many round trips with SAMI, so many of them beside one without firewall."""
        soak = self.soak(kinds)
        for trip in range(trips):
            try:
                if trip < paired_trips:
                    self._pair(soak, is_ours_first=trip % 2 == 0)
                else:
                    self._trip(soak, self.sami)
            except ConnectionLost as error:
                self.measured.lost += error.names
                say(f"lost: {error}")
                soak.end()
                soak = self.soak(kinds)
            say(f"{sum(move.has_sami for move in self.measured.moves)} migrations with SAMI")
        soak.end()

    def _pair(self, soak: Soak, is_ours_first: bool) -> None:
        if is_ours_first:
            ours, without = self._trip(soak, self.sami), self._trip_without(soak)
        else:
            without, ours = self._trip_without(soak), self._trip(soak, self.sami)
        self.measured.pairs += zip(without, ours, strict=True)

    def _trip_without(self, soak: Soak) -> list[Move]:
        # The streams' entries wait on host a; SAMI made them in the trip before, so they put up with any window.
        with self.sami.away(), contextlib.ExitStack() as stack:
            for host in self.lab.hosts.values():
                stack.enter_context(host.without_firewall())
            return self._trip(soak, None)

    def _trip(self, soak: Soak, sami: Sami | None) -> list[Move]:
        made = []
        for way in (("a", "b"), ("b", "a")):
            move = soak.migrate(*way, sami)
            made.append(move)
            self.measured.moves.append(move)
            if move.lost:
                raise ConnectionLost(move.lost)
        return made

    def idle(self) -> None:
        """What agents cost while nothing migrates."""
        say(f"agents are idle for {IDLE_SECONDS:g} s")
        before = {name: agent.cpu_seconds() for name, agent in self.sami.agents.items()}
        time.sleep(IDLE_SECONDS)  # what is measured
        self.others["idle_agent_cpu_seconds_per_minute"] = {
            name: round((agent.cpu_seconds() - before[name]) * 60 / IDLE_SECONDS, 3)
            for name, agent in self.sami.agents.items()
        }

    def hook(self) -> None:
        """What the hook costs a guest that starts and does not migrate; the floor is a Python that does nothing."""
        say("guests start with the hook and without")
        guest = self.lab.add_guest("starter", "a")
        host, xml = self.lab.hosts["a"], guest.xml()

        def called(argv: list[str]) -> float:
            began = time.monotonic()
            process = host.start(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            process.communicate(xml.encode())
            if process.returncode != 0:
                raise CommandFailed(argv, process.returncode, "a hook never fails")
            return (time.monotonic() - began) * 1000

        def started() -> float:
            host.virsh("destroy", guest.name)
            began = time.monotonic()
            host.virsh("create", "--paused", "/dev/stdin", text=xml)
            return (time.monotonic() - began) * 1000

        hook = [f"/etc/libvirt/hooks/qemu.d/{HOOK}", guest.name, "started", "begin", "-"]
        calls = [(called(hook), called(["/usr/bin/python3", "-IS", "-c", "pass"])) for _ in range(HOOK_RUNS)]
        starts = []
        for _ in range(START_RUNS):
            with_hook = started()
            with self.without_hook():
                starts.append((with_hook, started()))
        self.lab.remove_guest(guest)
        self.others["hook_ms"] = dict(zip(("one_call", "python_alone"), np.median(calls, axis=0).round(1), strict=True))
        medians = np.median(starts, axis=0).round(1)
        self.others["guest_start_ms"] = dict(zip(("with_hook", "without_hook"), medians, strict=True))

    @contextlib.contextmanager
    def without_hook(self) -> Iterator[None]:
        """Within it host a has no hook of SAMI."""
        host = self.lab.hosts["a"]
        program = host.path(f"/etc/libvirt/hooks/qemu.d/{HOOK}").read_bytes()
        host.remove_hook(HOOK)
        try:
            yield
        finally:
            kept = host.folder / "hook.kept"
            kept.write_bytes(program)
            host.install_hook(kept, HOOK)

    def three_at_once(self) -> None:
        """Three guests with a download each, two one way and one the other, at the same time."""
        say("three guests at once")
        ways = {"three1": ("a", "b"), "three2": ("a", "b"), "three3": ("b", "a")}
        guests = [self.lab.add_guest(name, way[0], is_awaited=False) for name, way in ways.items()]
        for guest in guests:
            guest.wait_until_ready(self.lab.hosts[ways[guest.name][0]])
        flows = [traffic.download(self.lab, guest) for guest in guests]
        for guest in guests:
            guest.close_egress()
        began = time.monotonic()
        running = [self.lab.start_migration(guest, *ways[guest.name]) for guest in guests]
        ended = [migration.wait() for migration in running]
        survived, complete = [], []
        for migration, flow in zip(running, flows, strict=True):
            paused = migration.wait_for("SUSPENDED/MIGRATED").time
            resumed = migration.wait_for("RESUMED/MIGRATED", migration.destination).time
            until = resumed + DEAD_SECONDS
            wait_until(lambda flow=flow, until=until: flow.samples()[-1].time > until, "time", DEAD_SECONDS + 10)
            survived.append(has_survived(flow.samples(), resumed, DEAD_SECONDS))
            report = self.sami.reports(migration.guest)[migration.destination.name]
            complete.append(arrival(report, paused, resumed)["is_complete_before_resume"])
        for guest in guests:
            self.lab.remove_guest(guest)
        self.measured.lost += [guest.name for guest, lives in zip(guests, survived, strict=True) if not lives]
        self.others["three_at_once"] = {
            "seconds": round(max(one.ended_at for one in ended) - began, 2),
            "connections_lost": survived.count(False),
            "complete_before_resume": complete.count(True),
        }


def run(migrations: int, pairs: int, sizes: Sequence[int], output: Path) -> int:
    """See the module."""
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(LibvirtLab())
        broker = stack.enter_context(Broker(Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))))
        sami = stack.enter_context(Sami(lab, broker))
        stack.callback(_keep_logs, lab, sami, output)
        whole = Run(lab, sami)
        groups = whole.share(sizes)
        whole.idle()
        whole.hook()
        whole.three_at_once()
        stopped = []
        try:
            for number, kinds in enumerate(groups):
                whole.group(kinds, *(_part(count // 2, len(groups), number) for count in (migrations, pairs)))
        except LabError as error:  # what was measured until then is shown all the same
            stopped.append(f"the run ended before its time: {error}")
    others = {**whole.others, "dirtied_mib": DIRTY_MIB, "seconds": round(time.monotonic() - began)}
    made = figures.result(whole.measured.moves, whole.measured.pairs, others)
    # What died between two migrations, or beside them, is lost as well.
    made["connections_lost"] = len(whole.measured.lost)
    (output / "result.json").write_text(json.dumps(made, indent=1) + "\n")
    rows = [json.dumps(dataclasses.asdict(move)) for move in whole.measured.moves]
    (output / "moves.jsonl").write_text("\n".join(rows) + "\n")
    print(figures.table(made))
    found = stopped + [f"lost: {name}" for name in whole.measured.lost] + figures.faults(made)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


def _part(total: int, parts_count: int, number: int) -> int:
    """So many of a total fall to this part of several."""
    return total // parts_count + (number < total % parts_count)


def _keep_logs(lab: LibvirtLab, sami: Sami, output: Path) -> None:
    shutil.copy(lab.folder / "events", output / "events")
    for name, agent in sami.agents.items():
        shutil.copy(agent.log, output / f"agent-{name}.log")


def say(line: str) -> None:
    """Progress, for who waits."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.libvirt.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--migrations", type=int, default=50, help="with SAMI, in all, an even number (50)")
    parser.add_argument("--pairs", type=int, default=50, help="of them, beside one without firewall, even (50)")
    parser.add_argument("--streams", type=int, choices=SIZES, help="at a time; without it, as many as a guest bears")
    parser.add_argument("--output", type=Path, default=Path("build/libvirt"), help="folder for the results")
    options = parser.parse_args()
    if not 2 <= options.pairs <= options.migrations or options.pairs % 2 or options.migrations % 2:
        parser.error("--pairs: at least 2, and no more than --migrations; both even, for guests come back")

    def work() -> int:
        parts.check()
        isolation.enter([sys.executable, "-m", "lab.libvirt.soak", *sys.argv[1:]])
        sizes = SIZES if options.streams is None else (options.streams,)
        return run(options.migrations, options.pairs, sizes, options.output)

    return exit_code(work, "the run failed")


if __name__ == "__main__":
    sys.exit(main())
