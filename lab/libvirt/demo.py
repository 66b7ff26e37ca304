"""The demo on real libvirt: connections of QEMU guests that migrate live, without SAMI and with it.

    python -m lab.libvirt.demo [--output build/demo-libvirt]

All guests of a side migrate at the same time. The output folder gets result.json, demo.png and the agents' logs. Exit
code: 0 when every connection without SAMI died and every one with it survived, 1 when not (stderr says which) or when
the lab failed, 125 when it cannot run here: it takes the machine's root and what `tools/prepare libvirt` gets.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lab import demo, isolation, verdict
from lab.broker import Broker
from lab.command import exit_code
from lab.deadline import wait_until
from lab.errors import LabError
from lab.libvirt import parts, traffic
from lab.libvirt.agents import Sami
from lab.libvirt.guest import ECHO_PORT, Guest
from lab.libvirt.lab import LibvirtLab
from lab.libvirt.migration import Migration
from lab.traffic import Traffic

SOURCE, DESTINATION = "a", "b"
SETTLED_BYTES = 300_000
SETTLE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Case:
    """`begin` starts the connection that is judged, and takes away what would admit it anew."""

    title: str
    begin: Callable[[LibvirtLab, Guest], Traffic]


def _download(lab: LibvirtLab, guest: Guest, family: int) -> Traffic:
    flow = traffic.download(lab, guest, family=family)
    guest.close_egress()
    return flow


def _revoked(lab: LibvirtLab, guest: Guest) -> Traffic:
    guest.allow("tcp", ECHO_PORT)
    flow = traffic.echo(lab, guest)
    guest.revoke("tcp", ECHO_PORT)
    guest.close_egress()
    return flow


CASES = {
    "a": Case("a download that the guest began, no ingress rule", partial(_download, family=4)),
    "b": Case("the same over IPv6", partial(_download, family=6)),
    "c": Case("an echo whose admitting rule was removed", _revoked),
}


def run_side(side: str, sami: Sami | None, lab: LibvirtLab) -> dict[str, dict[str, Any]]:
    """One guest for each case, all at once; the reports by case, as the demo in namespaces has them."""
    guests = {letter: lab.add_guest(f"{letter}-{side}", SOURCE, is_awaited=False) for letter in CASES}
    for guest in guests.values():
        guest.wait_until_ready(lab.hosts[SOURCE])
    flows = {letter: case.begin(lab, guests[letter]) for letter, case in CASES.items()}
    for flow in flows.values():
        wait_until(lambda flow=flow: flow.samples()[-1].total > SETTLED_BYTES, "traffic", SETTLE_SECONDS)
    moves = {letter: lab.start_migration(guest, SOURCE, DESTINATION) for letter, guest in guests.items()}
    for letter, move in moves.items():
        result = move.wait()
        if not result.is_ok:
            raise LabError(f"the migration of case {letter} failed: {result.words}")
    reports = {letter: _report(lab, move, flows[letter], sami) for letter, move in moves.items()}
    for guest in guests.values():
        lab.remove_guest(guest)
    return reports


def _report(lab: LibvirtLab, move: Migration, flow: Traffic, sami: Sami | None) -> dict[str, Any]:
    times = {
        "outgoing": move.began_at,
        "copying": move.wait_for("MIGRATION_ITERATION 1").time,
        "paused": move.wait_for("SUSPENDED/MIGRATED").time,
        "resumed": move.wait_for("RESUMED/MIGRATED", move.destination).time,
    }
    until = times["resumed"] + verdict.WATCHED_SECONDS
    wait_until(lambda: flow.samples()[-1].time > until, "the time that is watched", verdict.WATCHED_SECONDS + 10)
    samples = flow.samples()
    flows: dict[str, int] = {}
    milliseconds: dict[str, float] = {}
    if sami is not None:
        reports = sami.reports(move.guest)
        for host, names in ((SOURCE, ("exported", "purged", "left_behind")), (DESTINATION, ("imported", "refused"))):
            flows |= {name: reports[host]["flows"][name] for name in names}
            milliseconds |= reports[host]["milliseconds"]
    return {
        "survived": verdict.has_survived(samples, times["resumed"]),
        "longest_stall_seconds": round(verdict.longest_stall_seconds(samples, times["paused"], until), 3),
        "flows": flows,
        "milliseconds": milliseconds,
        "samples": [(time, total) for time, total in samples if time <= until],
        "times": [times],
        "hops": (SOURCE, DESTINATION),
    }


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.libvirt.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo-libvirt"), help="folder for the results")
    options = parser.parse_args()

    def work() -> int:
        parts.check()
        isolation.enter([sys.executable, "-m", "lab.libvirt.demo", *sys.argv[1:]])
        return _show(options.output)

    return exit_code(work, "the demo failed")


def _show(output: Path) -> int:
    reports: demo.Reports = {}
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(LibvirtLab())
        _say("three guests migrate without SAMI ...")
        sides = {"without": run_side("without", None, lab)}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        broker = stack.enter_context(Broker(folder))
        sami = stack.enter_context(Sami(lab, broker))
        _say("three guests migrate with SAMI ...")
        sides["with"] = run_side("with", sami, lab)
        output.mkdir(parents=True, exist_ok=True)
        for name, agent in sami.agents.items():
            shutil.copy(agent.log, output / f"agent-{name}.log")
    for side, by_case in sides.items():
        for letter, report in by_case.items():
            reports[letter, side] = report
            failures += demo.faults(f"({letter}) {side} SAMI", report, is_with=side == "with")
    return demo.show(reports, {letter: case.title for letter, case in CASES.items()}, failures, output)


def _say(line: str) -> None:
    if sys.stdout.isatty():
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
