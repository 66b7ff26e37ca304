"""The demo on a real OpenStack: a guest's download while Nova migrates the guest live, without SAMI and with it.

    python -m lab.openstack.demo [--migrations 5] [--natural 3] [--turns 5] [--output build/nova]

The guest opened the connection and only its peer sends: the destination admits a packet of it only where conntrack
knows it. In the migrations that count the destination's rules are in force before the guest runs there, as they are
where memory takes longer to be copied than Neutron's agent takes (the lab holds a guest that comes for 4 s). With
natural timing the lab's small guest is there sooner, the destination is open at first, and a connection may live by
luck; that is shown besides. Each side begins with a migration there and one back that do not count: a nova-compute
that has just been started takes seconds longer for its first one, and SAMI's driver takes effect by such a start.
How long migrations take is compared at last, in turns:
there and back with no agent and no hook, then with them, for a machine is faster now and slower then. The
output folder gets result.json, demo.png and all logs. Exit code: 0 when every
connection with SAMI survived and most without it died, 1 when not (stderr says why) or when the lab failed, 125 when it
cannot run here: it takes the machine's root and what `tools/prepare openstack` gets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import isolation, picture, verdict
from lab.command import exit_code
from lab.deadline import wait_until
from lab.errors import LabError
from lab.openstack import parts, traffic
from lab.openstack.guest import Guest
from lab.openstack.lab import OpenStackLab
from lab.openstack.migration import Migration
from lab.openstack.sami import Sami
from lab.traffic import Traffic
from lab.verdict import Sample

HOLD_SECONDS = 4.0
SETTLED_OCTETS = 5 * traffic.PIECE_OCTETS
SETTLE_SECONDS = 20.0
LOOK_SECONDS = 0.1
QUIET_SECONDS = 3.0
TITLES = {
    "a": "the destination's rules are in force before the guest runs there",
    "b": "natural timing",
    "c": "one connection through all migrations",
}


@dataclass(frozen=True, slots=True)
class Moved:
    """One migration and what it did to the download. Times are CLOCK_MONOTONIC seconds.

    `rules_at` is when the destination's rules were first seen in force.
    """

    source: str
    destination: str
    seconds: float
    began_at: float
    copying_at: float
    paused_at: float
    resumed_at: float
    rules_at: float
    samples: list[Sample]

    @property
    def has_survived(self) -> bool:
        """Whether the download went on."""
        return verdict.has_survived(self.samples, self.resumed_at)

    @property
    def stall_seconds(self) -> float:
        """The longest time in which nothing arrived."""
        return verdict.longest_stall_seconds(self.samples, self.paused_at, self.resumed_at + verdict.WATCHED_SECONDS)

    @property
    def rules_are_first(self) -> bool:
        """Whether the rules were in force before the guest ran there."""
        return self.rules_at < self.resumed_at

    @property
    def times(self) -> dict[str, float]:
        """For the picture."""
        return {
            "copying": self.copying_at,
            "outgoing": self.began_at,
            "paused": self.paused_at,
            "resumed": self.resumed_at,
        }


class Demo:
    """Both sides on one lab."""

    def __init__(self, lab: OpenStackLab, guest: Guest) -> None:
        self.lab = lab
        self.guest = guest

    def move(self, flow: Traffic, hold_seconds: float) -> Moved:
        """Migrate the guest once and watch the download. Raises LabError where the migration fails."""
        settled = _total(flow) + SETTLED_OCTETS
        wait_until(lambda: _total(flow) > settled, "traffic", SETTLE_SECONDS)
        source = self.guest.host
        destination = self.lab.hosts[next(name for name in self.lab.hosts if name != source)]
        with contextlib.ExitStack() as stack:
            if hold_seconds:
                stack.enter_context(destination.held(hold_seconds))
            migration = self.lab.start_migration(self.guest, destination.name)
            rules_at = destination.wait_for_rules(self.guest.tap)
            result = migration.wait()
        if (result.status, result.host) != ("completed", destination.name):
            raise LabError(f"Nova's migration ended as {result}; nova-compute's logs say why")
        return self._watch(migration, flow, result.seconds, rules_at)

    def warm_up(self, move: Callable[[], object]) -> None:
        """Each nova-compute's first migrations as source and destination since its start."""
        for _ in self.lab.hosts:
            move()

    def without(self, count: int, hold_seconds: float) -> list[Moved]:
        """So many migrations, each with a download of its own."""
        made = []
        for _ in range(count):
            flow = traffic.download(self.lab, self.guest)
            made.append(self.move(flow, hold_seconds))
            flow.stop()
            say(f"without SAMI: {words(made[-1])}")
        return made

    def with_sami(self, sami: Sami, flow: Traffic, count: int, hold_seconds: float) -> list[Moved]:
        """So many migrations of one download. A session that does not end on both hosts is a failure."""
        made: list[Moved] = []
        before = min(agent.ended(self.guest.uuid) for agent in sami.agents.values())
        for number in range(1, count + 1):
            made.append(self.move(flow, hold_seconds))
            sami.reports(self.guest, before + number)
            say(f"with SAMI: {words(made[-1])}")
        return made

    def in_turns(self, sami: Sami, turns: int) -> dict[str, list[float]]:
        """Seconds that migrations take with natural timing, there and back without agents and hooks, and then with.

        The first one of agents that have just been started does not count. Each begins when the one before it is over
        for everybody.
        """
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for turn in range(1, turns + 1):
            with sami.away():
                seconds["without"] += [self._seconds() for _ in self.lab.hosts]
            before = min(agent.ended(self.guest.uuid) for agent in sami.agents.values())
            timed = []
            for number in range(1, len(self.lab.hosts) + 2):
                timed.append(self._seconds())
                sami.reports(self.guest, before + number)
            seconds["with"] += timed[1:]
            sides = (" and ".join(f"{one:.1f} s" for one in seconds[side][-2:]) for side in seconds)
            say(f"turn {turn}: without {' with '.join(sides)}")
        return seconds

    def _seconds(self) -> float:
        time.sleep(QUIET_SECONDS)  # pacing: Neutron's and Nova's own work afterwards is over in a second or two
        destination = next(name for name in self.lab.hosts if name != self.guest.host)
        result = self.lab.start_migration(self.guest, destination).wait()
        if (result.status, result.host) != ("completed", destination):
            raise LabError(f"Nova's migration ended as {result}; nova-compute's logs say why")
        return result.seconds

    def _watch(self, migration: Migration, flow: Traffic, seconds: float, rules_at: float) -> Moved:
        copying = migration.wait_for("MIGRATION_ITERATION 1").time
        paused = migration.wait_for("SUSPENDED/MIGRATED").time
        resumed = migration.wait_for("RESUMED/MIGRATED", migration.destination).time
        until = resumed + verdict.WATCHED_SECONDS
        wait_until(
            lambda: flow.samples()[-1].time > until,
            "the time that is watched",
            verdict.WATCHED_SECONDS + 10,
            poll_seconds=LOOK_SECONDS,
        )
        samples = [sample for sample in flow.samples() if migration.began_at - 3 <= sample.time <= until + LOOK_SECONDS]
        return Moved(
            migration.source,
            migration.destination,
            seconds,
            migration.began_at,
            copying,
            paused,
            resumed,
            rules_at,
            samples,
        )


def words(moved: Moved) -> str:
    """For people."""
    early = moved.resumed_at - moved.rules_at
    rules = f"rules {abs(early):.1f} s {'before' if early > 0 else 'after'} the guest ran"
    end = "lives" if moved.has_survived else "dies"
    way = f"{moved.source} to {moved.destination}"
    return f"{way} in {moved.seconds:.1f} s, {rules}: the download {end}, stall {moved.stall_seconds:.2f} s"


def figures(moves: list[Moved]) -> dict[str, Any]:
    """What result.json says of some migrations."""
    return {
        "migrations": len(moves),
        "connections_lost": sum(not moved.has_survived for moved in moves),
        "longest_stall_seconds": round(max(moved.stall_seconds for moved in moves), 3),
        "migration_seconds": round(statistics.median(moved.seconds for moved in moves), 2),
    }


Sides = dict[str, dict[str, list[Moved]]]
"""Migrations by timing, "held" and "natural", and by side, "without" and "with"."""


def result(sides: Sides, turns: dict[str, list[float]]) -> dict[str, Any]:
    """What result.json holds; `turns` are seconds by side."""
    made = {side: figures(moves) for side, moves in sides["held"].items()}
    for side, moves in sides["natural"].items():
        if moves:
            early = sum(moved.rules_are_first for moved in moves)
            made[side]["natural"] = {**figures(moves), "rules_before_the_guest_ran": early}
    for side, seconds in turns.items():
        if seconds:
            median = round(statistics.median(seconds), 2)
            made[side]["in_turns"] = {"migrations": len(seconds), "migration_seconds": median}
    return made


def table(sides: Sides) -> str:
    """The same for people."""
    lines = [f"{'':<44}  {'migrations':>10}  {'lost':>4}  {'longest stall':>13}  {'migration':>9}  {'rules first':>11}"]
    names = {"held": "rules in force before the guest runs", "natural": "natural timing"}
    for timing, by_side in sides.items():
        for side, moves in by_side.items():
            if moves:
                made, early = figures(moves), sum(moved.rules_are_first for moved in moves)
                lines.append(
                    f"{f'{names[timing]}, {side}':<44}  {made['migrations']:>10}  {made['connections_lost']:>4}  "
                    f"{made['longest_stall_seconds']:>11.2f} s  {made['migration_seconds']:>7.1f} s  "
                    f"{early:>4} of {len(moves):>2}"
                )
    return "\n".join(lines)


def compared(turns: dict[str, list[float]]) -> str:
    """How much longer migrations took with SAMI, for people."""
    without, ours = (statistics.median(turns[side]) for side in ("without", "with"))
    count = len(turns["with"])
    return f"in turns, {count} each: median {without:.2f} s without agents, {ours:.2f} s with: {ours - without:+.2f} s"


def faults(sides: Sides) -> list[str]:
    """What does not hold of what the demo claims, in words."""
    found = []
    without, ours = sides["held"]["without"], sides["held"]["with"]
    for side, moves in sides["held"].items():
        late = sum(not moved.rules_are_first for moved in moves)
        if late:
            found.append(f"{side} SAMI the guest ran before the destination's rules {late} times: nothing is shown")
    lost = sum(not moved.has_survived for moved in without)
    if 2 * lost <= len(without):
        found.append(f"without SAMI {lost} of {len(without)} connections died, not most of them")
    for timing, by_side in sides.items():
        died = sum(not moved.has_survived for moved in by_side["with"])
        if died:
            found.append(f"with SAMI the connection died {died} times ({timing} timing); the agents' logs say more")
    return found if ours else ["nothing was migrated with SAMI"]


def draw(sides: Sides, path: Path) -> None:
    """The picture. Raises ImportError."""
    reports = {}
    for letter, timing in (("a", "held"), ("b", "natural")):
        for side, moves in sides[timing].items():
            if moves:
                # The one that shows best what the side is about.
                shown = next((moved for moved in moves if not moved.has_survived), moves[0])
                reports[letter, side] = _drawn([shown])
    reports["c", "with"] = _drawn(sides["held"]["with"])
    picture.draw(reports, TITLES, path)


def _drawn(moves: list[Moved]) -> dict[str, Any]:
    samples = sorted({(sample.time, sample.total) for moved in moves for sample in moved.samples})
    return {
        "survived": all(moved.has_survived for moved in moves),
        "longest_stall_seconds": max(moved.stall_seconds for moved in moves),
        "samples": samples,
        "times": [moved.times for moved in moves],
        "hops": (moves[0].source, *(moved.destination for moved in moves)),
    }


def _total(flow: Traffic) -> int:
    return flow.samples()[-1].total


def say(line: str) -> None:
    """Progress."""
    print(line, flush=True)


def _run(options: argparse.Namespace) -> int:
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    sides: Sides = {"held": {}, "natural": {}}
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(OpenStackLab(say, logs=output / "logs"))
        say("Nova boots a guest")
        demo = Demo(lab, lab.add_guest("demo", "a"))
        demo.warm_up(lambda: demo.without(1, 0))
        sides["held"]["without"] = demo.without(options.migrations, HOLD_SECONDS)
        sides["natural"]["without"] = demo.without(options.natural, 0)
        say("SAMI is put on the hosts")
        sami = stack.enter_context(Sami(lab))
        flow = traffic.download(lab, demo.guest)
        demo.warm_up(lambda: demo.with_sami(sami, flow, 1, 0))
        sides["held"]["with"] = demo.with_sami(sami, flow, options.migrations, HOLD_SECONDS)
        sides["natural"]["with"] = demo.with_sami(sami, flow, options.natural, 0)
        flow.stop()
        turns = demo.in_turns(sami, options.turns)
    print(table(sides))
    if options.turns:
        print(compared(turns))
    (output / "result.json").write_text(json.dumps(result(sides, turns), indent=1) + "\n")
    try:
        draw(sides, output / "demo.png")
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
    failures = faults(sides)
    for failure in failures:
        print(f"{failure}; logs are in {output / 'logs'}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.openstack.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/nova"), help="folder for the results (build/nova)")
    parser.add_argument("--migrations", type=int, default=5, help="of each side that count (5)")
    parser.add_argument("--natural", type=int, default=3, help="of each side besides, with natural timing (3)")
    parser.add_argument("--turns", type=int, default=5, help="there and back without and with, for the time (5)")
    options = parser.parse_args()
    if options.migrations < 1 or options.natural < 0 or options.turns < 0:
        parser.error("--migrations: at least 1; --natural, --turns: at least 0")

    def work() -> int:
        parts.check()
        isolation.enter([sys.executable, "-m", "lab.openstack.demo", *sys.argv[1:]])
        return _run(options)

    return exit_code(work, f"the demo failed, logs are in {options.output / 'logs'}")


if __name__ == "__main__":
    sys.exit(main())
