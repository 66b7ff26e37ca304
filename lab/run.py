"""One case, once, in this world: `python -m lab.isolation -- python -m lab.run --case a --report FILE`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab import judge, verdict
from lab.cases import CASES, Case
from lab.contract import Carrier, NoCarrier
from lab.deadline import wait_until
from lab.errors import DeadlinePassed, LabUnavailable
from lab.guest import Guest
from lab.isolation import EXIT_UNAVAILABLE
from lab.lab import KINDS, Lab
from lab.migration import Call, Record
from lab.traffic import Traffic

# What must have been received before the guest leaves a host, so that the connection is well under way there.
SETTLED_BYTES = 300_000
SETTLE_SECONDS = 8.0
END_SECONDS = verdict.WATCHED_SECONDS + 10.0


@dataclass(slots=True)
class Report:
    """What one run showed. `flows` and `milliseconds` are the carrier's, with `missing` and `left_behind` by the judge
    summed over all hops; `samples` and `times` (one dict per hop, by phase) are CLOCK_MONOTONIC."""

    case: str
    hops: tuple[str, ...]
    survived: bool
    longest_stall_seconds: float
    flows: dict[str, int] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    samples: list[tuple[float, int]] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def run_case(case: Case, kind: str, carrier: Carrier) -> Report:
    """Build a lab, let the guest migrate, watch its connection until 12 s after the last cut-over. Blocks."""
    with Lab(kind=kind) as lab, contextlib.ExitStack() as stack:
        guest = lab.add_guest("g", case.hops[0])
        stack.callback(carrier.stop)
        carrier.start(lab)
        watched = case.begin(lab, guest)
        report = Report(case.letter, case.hops, False, 0.0)
        for number, (here, there) in enumerate(zip(case.hops, case.hops[1:], strict=False)):
            _settle(watched)
            record, before, after = _hop(case, lab, guest, carrier, here, there, number)
            report.times.append(record.times)
            report.errors += [f"{host} {phase}: {error!r}" for host, phase, error in record.errors]
            is_last = number == len(case.hops) - 2
            if is_last:
                _watch(watched, record.cut_over_at + verdict.WATCHED_SECONDS)
            else:
                _settle(watched)
            _sum(report, carrier.result(guest))
            left = judge.table(lab.hosts[here], guest, lab.folder / f"left-{number}").of(guest.addresses)
            _count(report, "missing", len(judge.missing(before.table(), after.table())))
            _count(report, "left_behind", len(left))
        until = record.cut_over_at + verdict.WATCHED_SECONDS
        samples = watched.samples()
        report.samples = [(time, total) for time, total in samples if time <= until]
        report.survived = verdict.has_survived(samples, record.cut_over_at)
        report.longest_stall_seconds = round(verdict.longest_stall_seconds(samples, record.paused_at, until), 3)
        return report


def _hop(
    case: Case, lab: Lab, guest: Guest, carrier: Carrier, here: str, there: str, number: int
) -> tuple[Record, judge.Dump, judge.Dump]:
    """Migrate once; the source's table as it was in the pause, the destination's as it was when the guest ran there."""
    dumps: dict[str, judge.Dump] = {}

    def begin(name: str, host: str) -> Callable[[], None]:
        def call() -> None:
            dumps[name] = judge.dump(lab.hosts[host], lab.hosts[host].zone(guest), lab.folder / f"{name}-{number}")

        return call

    record = lab.migrate(
        guest,
        here,
        there,
        carrier.tell,
        copy_seconds=case.copy_seconds,
        at={
            # Nothing changes on the source in the pause, so the dump may run beside the carrier's work; it must be over
            # before the guest runs, for then the source is purged.
            "paused": Call(begin("before", here)),
            "moved": Call(lambda: dumps["before"].wait()),
            "running": Call(begin("after", there)),
        },
    )
    return record, dumps["before"], dumps["after"]


def _settle(watched: Traffic) -> None:
    start = watched.samples()[-1].total if watched.samples() else 0
    # One that is dead by now never settles; the verdict says so, not we.
    with contextlib.suppress(DeadlinePassed):
        wait_until(lambda: _total(watched) >= start + SETTLED_BYTES, "traffic", SETTLE_SECONDS)


def _total(watched: Traffic) -> int:
    samples = watched.samples()
    return samples[-1].total if samples else 0


def _watch(watched: Traffic, until: float) -> None:
    time.sleep(max(0.0, until - time.monotonic()))  # the time that is watched, not a wait for something
    wait_until(lambda: watched.samples()[-1].time > until, "the receiver's last sample", END_SECONDS)


def _sum(report: Report, result: dict[str, dict[str, Any]]) -> None:
    for name, number in result["flows"].items():
        _count(report, name, number)
    report.milliseconds = result["milliseconds"]


def _count(report: Report, name: str, number: int) -> None:
    report.flows[name] = report.flows.get(name, 0) + number


def load_carrier(name: str | None) -> Carrier:
    """What MODULE:NAME returns, called without arguments; None carries nothing. Raises ImportError, AttributeError."""
    if name is None:
        return NoCarrier()
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def main() -> int:
    """Run the case that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab.run", description=__doc__)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--kind", choices=KINDS, default="bridge", help="kind of host")
    parser.add_argument("--carrier", metavar="MODULE:NAME", help="who carries state; without it nobody does")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    try:
        report = run_case(CASES[options.case], options.kind, load_carrier(options.carrier))
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE
    options.report.write_text(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
