"""What a guest's streams notice of many migrations: `python -m lab.libvirt.soak`, some ten minutes.

A guest that rewrites memory all the time holds TCP and UDP streams of 1,000 packets a second each way, begun by either
end, over IPv4 and IPv6. No rule admits a packet of them: they live by their entries. It migrates with SAMI again and
again; some of these migrations alternate with the same migration of the same guest without any firewall, beside which
the gap in the streams is judged. An emulated guest bears four such streams beside its other work, so two guests come
one after the other, each with half of the eight kinds.

result.json and a table. Exit code: 0 when no connection was lost, every migration's flows were complete before the
guest ran, and the gap holds beside the one without firewall; 1 when not; 125 when the lab cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab import isolation
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import CommandFailed, DeadlinePassed, LabUnavailable
from lab.libvirt import parts
from lab.libvirt.agents import HOOK, Sami
from lab.libvirt.guest import STREAM_PORT, Guest
from lab.libvirt.lab import LibvirtLab
from lab.libvirt.streams import PACKETS_PER_SECOND, Direction, Stream, Streams

KINDS = (
    (("tcp", 4, True), ("udp", 6, True), ("tcp", 6, False), ("udp", 4, False)),
    (("tcp", 6, True), ("udp", 4, True), ("tcp", 4, False), ("udp", 6, False)),
)
DIRTY_MIB = 8
STEADY_SECONDS = 60.0
AFTER_SECONDS = 2.0
IDLE_SECONDS = 20.0
HOOK_RUNS = 30
RESAMPLES = 10_000
MOST_RATIO, MOST_DIFFERENCE_MS = 1.05, 20.0


@dataclass(slots=True)
class Measured:
    """What the migrations showed; times in milliseconds."""

    lost: list[str] = field(default_factory=list)
    complete_before_resume: list[bool] = field(default_factory=list)
    without_zone: int = 0
    pause_to_complete: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """With SAMI and the firewall, of every migration."""
    pairs: list[tuple[float, float]] = field(default_factory=list)
    """Gap without firewall, gap with SAMI, one after the other."""
    downtime: list[float] = field(default_factory=list)


class Soak:
    """One guest with its streams, and its migrations to and fro."""

    def __init__(self, lab: LibvirtLab, sami: Sami, number: int, measured: Measured) -> None:
        self.lab = lab
        self.sami = sami
        self.measured = measured
        self.guest: Guest = lab.add_guest(f"soak{number}", "a", dirty_mib=DIRTY_MIB)
        for protocol in ("tcp", "udp"):
            self.guest.allow(protocol, STREAM_PORT)
        self.streams = Streams(lab)
        self.every: list[Stream] = [
            self.streams.begin(self.guest, protocol, family, is_guests=is_guests)
            for protocol, family, is_guests in KINDS[number]
        ]
        self.sessions = 0
        for protocol in ("tcp", "udp"):
            self.guest.revoke(protocol, STREAM_PORT)
        self.guest.close_egress()

    def end(self) -> None:
        """The guest is gone, and so are its streams."""
        self.streams.stop()
        self.lab.remove_guest(self.guest)

    def migrate(self) -> tuple[float, float, float]:
        """Once; the longest gap of any stream in either direction in ms, and when it was paused and ran again."""
        self._wait_until_steady()
        here = self.lab.host_of(self.guest.name).name
        there = "b" if here == "a" else "a"
        move = self.lab.start_migration(self.guest, here, there)
        result = move.wait()
        if not result.is_ok:
            raise LabUnavailable(f"libvirt did not migrate: {result.words}", "see libvirtd's log")
        self.sessions += 1
        paused = move.wait_for("SUSPENDED/MIGRATED").time
        resumed = move.wait_for("RESUMED/MIGRATED", self.lab.hosts[there]).time
        gaps = []
        for stream in self.every:
            report = self.streams.report(stream, move.began_at, resumed + AFTER_SECONDS)
            end = self.streams.report(stream, resumed + AFTER_SECONDS / 2, resumed + AFTER_SECONDS)
            for name, direction, last in (
                ("to the outside", report.to_outside, end.to_outside),
                ("to the guest", report.to_guest, end.to_guest),
            ):
                gaps.append(direction.longest_gap_ms)
                if not last.received or (stream.name.startswith("tcp") and direction.lost):
                    self.measured.lost.append(f"{stream.name} {name}, {here} to {there}")
        return max(gaps), paused, resumed

    def migrate_with_sami(self) -> float:
        """Once, with everything that is measured; the gap in ms."""
        gap, paused, resumed = self.migrate()
        there = self.lab.host_of(self.guest.name).name
        report = self.sami.reports(self.guest, self.sessions)[there]
        at = {step["step"]: step["monotonic"] for step in report["steps"]}
        complete = at.get("complete", float("inf"))
        if at.get("scope known", float("inf")) > resumed:
            self.measured.without_zone += 1
        else:
            self.measured.complete_before_resume.append(complete < resumed)
        self.measured.pause_to_complete.append((complete - paused) * 1000)
        self.measured.downtime.append((resumed - paused) * 1000)
        self.measured.gaps.append(gap)
        return gap

    @contextlib.contextmanager
    def without_firewall(self) -> Iterator[None]:
        """Within it nothing on either host looks at a packet of a guest."""
        for host in self.lab.hosts.values():
            for command in ("iptables", "ip6tables"):
                host.run([command, "-I", "FORWARD", "-j", "ACCEPT"])
                host.run([command, "-t", "raw", "-I", "PREROUTING", "-j", "CT", "--notrack"])
        try:
            yield
        finally:
            for host in self.lab.hosts.values():
                for command in ("iptables", "ip6tables"):
                    host.run([command, "-t", "raw", "-D", "PREROUTING", "-j", "CT", "--notrack"])
                    host.run([command, "-D", "FORWARD", "-j", "ACCEPT"])

    def _wait_until_steady(self) -> None:
        """Until the guest bore a whole second: else its gaps are the machine's."""

        def is_steady() -> bool:
            end = time.monotonic() + 1
            reports = [self.streams.report(stream, end - 1, end) for stream in self.every]
            return all(_is_clean(direction) for one in reports for direction in (one.to_outside, one.to_guest))

        wait_until(is_steady, "the machine to have time for the streams", STEADY_SECONDS)


def _is_clean(direction: Direction) -> bool:
    return direction.received > 0.95 * PACKETS_PER_SECOND and not direction.lost


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The ratio of medians, and its 95 % bootstrap interval over the pairs."""
    table = np.array(pairs)
    chosen = np.random.default_rng(1).integers(0, len(table), (RESAMPLES, len(table)))
    ratios = np.median(table[chosen, 1], axis=1) / np.median(table[chosen, 0], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(table[:, 1]) / np.median(table[:, 0])), float(low), float(high)


def hook_milliseconds(lab: LibvirtLab, guest: Guest) -> dict[str, float]:
    """What the hook costs a guest that starts and does not migrate, beside an interpreter that does nothing."""
    host, xml = lab.hosts["a"], guest.xml()

    def median(argv: list[str]) -> float:
        took = []
        for _ in range(HOOK_RUNS):
            began = time.monotonic()
            process = host.start(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            process.communicate(xml.encode())
            if process.returncode != 0:
                raise CommandFailed(argv, process.returncode, "a hook never fails")
            took.append((time.monotonic() - began) * 1000)
        return round(float(np.median(took)), 1)

    return {
        "started": median([f"/etc/libvirt/hooks/qemu.d/{HOOK}", guest.name, "started", "begin", "-"]),
        "interpreter_alone": median(["/usr/bin/python3", "-IS", "-c", "pass"]),
    }


def result(measured: Measured, others: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds."""
    without, with_sami = (round(float(np.median([pair[side] for pair in measured.pairs])), 1) for side in (0, 1))
    ratio, low, high = interval(measured.pairs)
    took = measured.pause_to_complete
    return {
        "migrations": len(measured.gaps),
        "connections_lost": len(measured.lost),
        "complete_before_resume_share": float(np.mean(measured.complete_before_resume)),
        "moves_without_zone": measured.without_zone,
        "pause_to_complete_ms": {
            "median": round(float(np.median(took)), 1),
            "p99": round(float(np.percentile(took, 99)), 1),
            "max": round(max(took), 1),
        },
        "gap_ms": {
            "without_firewall": without,
            "with_sami": with_sami,
            "ratio": round(ratio, 3),
            "ratio_low": round(low, 3),
            "ratio_high": round(high, 3),
            "pairs": len(measured.pairs),
        },
        "pause_ms": {"median": round(float(np.median(measured.downtime)), 1), "max": round(max(measured.downtime), 1)},
        **others,
    }


def faults(made: dict[str, Any], lost: list[str]) -> list[str]:
    """What does not hold."""
    gap = made["gap_ms"]
    found = [f"lost: {one}" for one in lost]
    if made["complete_before_resume_share"] < 1:
        found.append("flows were not complete before the guest ran")
    if gap["ratio_low"] > MOST_RATIO or gap["with_sami"] - gap["without_firewall"] > MOST_DIFFERENCE_MS:
        found.append(f"the gap does not hold beside the one without firewall: {gap}")
    return found


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.libvirt.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--migrations", type=int, default=50, help="with SAMI, in all (50)")
    parser.add_argument("--pairs", type=int, default=16, help="of them, beside one without firewall (16)")
    parser.add_argument("--output", type=Path, default=Path("build/libvirt"), help="folder for result.json")
    options = parser.parse_args()
    if not 2 <= options.pairs <= options.migrations:
        parser.error("--pairs: at least 2, and no more than --migrations")
    try:
        parts.check()
        isolation.enter([sys.executable, "-m", "lab.libvirt.soak", *sys.argv[1:]])
        return run(options.migrations, options.pairs, options.output)
    except (LabUnavailable, DeadlinePassed) as error:
        print(error, file=sys.stderr)
        return isolation.EXIT_UNAVAILABLE


def run(migrations: int, pairs: int, output: Path) -> int:
    """See the module."""
    measured = Measured()
    others: dict[str, Any] = {"streams_at_a_time": len(KINDS[0]), "dirtied_mib": DIRTY_MIB}
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(LibvirtLab())
        broker = stack.enter_context(Broker(Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))))
        sami = stack.enter_context(Sami(lab, broker))
        before = {name: agent.cpu_seconds() for name, agent in sami.agents.items()}
        time.sleep(IDLE_SECONDS)  # what is measured
        others["idle_agent_cpu_share"] = {
            name: round((agent.cpu_seconds() - before[name]) / IDLE_SECONDS, 4) for name, agent in sami.agents.items()
        }
        for number in range(len(KINDS)):
            soak = Soak(lab, sami, number, measured)
            if number == 0:
                others["hook_ms"] = hook_milliseconds(lab, soak.guest)
            _half(soak, migrations // 2, pairs // 2, number)
            soak.end()
    made = result(measured, others)
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(made, indent=1) + "\n")
    for name, value in made.items():
        print(f"{name:32}{value}")
    found = faults(made, measured.lost)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


def _half(soak: Soak, migrations: int, pairs: int, number: int) -> None:
    for turn in range(migrations):
        if sys.stderr.isatty():
            print(f"\rguest {number + 1} of 2, migration {turn + 1} of {migrations} ", end="", file=sys.stderr)
        if turn >= pairs:
            soak.migrate_with_sami()
            continue
        with soak.without_firewall():
            without = soak.migrate()[0]
            soak.sami.reports(soak.guest, soak.sessions)
        soak.measured.pairs.append((without, soak.migrate_with_sami()))


if __name__ == "__main__":
    sys.exit(main())
