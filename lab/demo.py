"""The demo: connections of migrating guests, without SAMI and with it.

    python -m lab.demo [--case a ...] [--output build/demo]

Every run has a lab of its own in a world of its own; several run side by side. The output folder gets result.json,
demo.png and a report of every run in runs/. Exit code: 0 when every run without SAMI died and every one with it
survived, 1 when not (stderr says which), 2 for wrong arguments, 125 when the lab cannot run here: then the same
migrations are shown with firewalls in memory, labelled as that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import isolation, picture
from lab.cases import CASES
from lab.errors import LabUnavailable
from lab.lab import KINDS

DEFAULT_CARRIER = "lab.carrier:Carrier"
SIDE_BY_SIDE = 5
RUN_SECONDS = 90.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the demo: a case, and which side of it."""

    letter: str
    side: str

    @property
    def name(self) -> str:
        """For people."""
        return f"({self.letter}) {self.side} SAMI"


@dataclass(slots=True)
class Running:
    """A job's process, when it began, and where its report will be."""

    process: subprocess.Popen
    began_at: float
    report: Path
    words: Path


class Demo:
    """Runs jobs, some side by side and some alone, and collects their reports by (case, side)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.output / "runs"
        self.reports: dict[tuple[str, str], dict[str, Any]] = {}
        self.failures: list[str] = []
        self._is_terminal = sys.stdout.isatty()

    def run(self, jobs: list[Job]) -> None:
        """Run all; one that needs a quiet machine runs when no other does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = [job for job in jobs if not CASES[job.letter].needs_quiet]
        alone = [job for job in jobs if CASES[job.letter].needs_quiet]
        self._run_some(beside, self.options.jobs)
        self._run_some(alone, 1)

    def _run_some(self, jobs: list[Job], side_by_side: int) -> None:
        waiting = list(jobs)
        running: dict[Job, Running] = {}
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    job = waiting.pop(0)
                    running[job] = self._start(job)
                    self._say(f"{job.name}: begins")
                for job, process in list(running.items()):
                    if self._is_over(job, process):
                        del running[job]
                time.sleep(POLL_SECONDS)
        finally:
            for left in running.values():
                left.process.kill()
                left.process.wait()

    def _start(self, job: Job) -> Running:
        report = self.folder / f"{job.letter}-{job.side}.json"
        report.unlink(missing_ok=True)
        words = report.with_suffix(".log")
        # A world that ends with us, should we be killed.
        argv = [sys.executable, "-m", "lab.isolation", "--with-parent", "--", sys.executable, "-m", "lab.run"]
        argv += ["--case", job.letter, "--kind", self.options.kind, "--report", str(report)]
        if job.side == "with":
            argv += ["--carrier", self.options.carrier]
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        with words.open("w") as out:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        return Running(process, time.monotonic(), report, words)

    def _is_over(self, job: Job, running: Running) -> bool:
        code: int | str | None = running.process.poll()
        if code is None:
            if time.monotonic() - running.began_at < RUN_SECONDS:
                return False
            running.process.kill()
            running.process.wait()
            code = f"no end after {RUN_SECONDS:g} s"
        if code == isolation.EXIT_UNAVAILABLE:
            raise LabUnavailable("a run said why", running.words.read_text().strip())
        if code != 0 or not running.report.exists():
            words = running.words.read_text().strip().splitlines()
            last = words[-1] if words else "no word"
            self.failures.append(f"{job.name} did not end well ({code}): {last}; see {running.words}")
            self._say(f"{job.name}: failed")
            return True
        report = json.loads(running.report.read_text())
        self.reports[job.letter, job.side] = report
        self._say(f"{job.name}: {end(report)}")
        self.failures += faults(job.name, report, is_with=job.side == "with")
        return True

    def _say(self, line: str) -> None:
        if self._is_terminal:
            print(line, flush=True)


Reports = dict[tuple[str, str], dict[str, Any]]
"""Of each run, by case and side."""


def result(reports: Reports, titles: Mapping[str, str]) -> dict[str, Any]:
    """What result.json holds."""
    cases = []
    for letter, title in titles.items():
        sides = {side: _run(reports[letter, side], side) for side in ("without", "with") if (letter, side) in reports}
        if sides:
            cases.append({"name": letter, "title": title, **sides})
    return {"cases": cases}


def _run(report: dict[str, Any], side: str) -> dict[str, Any]:
    keys = ["survived", "longest_stall_seconds", *(["flows", "milliseconds"] if side == "with" else [])]
    return {key: report[key] for key in keys}


def table(reports: Reports, titles: Mapping[str, str]) -> str:
    """The same for people."""
    width = max(map(len, titles.values())) + 4
    lines = [f"{'case':<{width}}  {'without SAMI':<22}  {'with SAMI':<22}  {'missing':>7}  {'left':>6}"]
    for letter, title in titles.items():
        ends = [end(reports[letter, side]) if (letter, side) in reports else "-" for side in ("without", "with")]
        if ends != ["-", "-"]:
            flows = reports.get((letter, "with"), {}).get("flows", {})
            counts = f"{flows.get('missing', '-'):>7}  {flows.get('left_behind', '-'):>6}"
            lines.append(f"{f'({letter}) {title}':<{width}}  {ends[0]:<22}  {ends[1]:<22}  {counts}")
    return "\n".join(lines)


def end(report: dict[str, Any]) -> str:
    """How a run ended, in a few words."""
    return f"{'survived' if report['survived'] else 'died'}, stall {report['longest_stall_seconds']:.2f} s"


def faults(name: str, report: dict[str, Any], *, is_with: bool) -> list[str]:
    """What is not as it has to be in a run of this name, with SAMI or without."""
    found = [
        f"{name}: {report['flows'][count]} flows {count.replace('_', ' ')}"
        for count in ("missing", "left_behind")
        if is_with and report["flows"].get(count)
    ]
    if report["survived"] != is_with:
        found.append(f"{name} {'survived' if report['survived'] else 'did not survive'}")
    return found


def show(reports: Reports, titles: dict[str, str], failures: list[str], output: Path) -> int:
    """Print the table, write result.json and the picture below `output`, say what failed; return the exit code."""
    print(table(reports, titles))
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(result(reports, titles), indent=1) + "\n")
    if reports:
        try:
            picture.draw(reports, titles, output / "demo.png")
        except ImportError:
            print("no picture: matplotlib is not installed", file=sys.stderr)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    """Run the demo with the command line's options; return the exit code."""
    options = _options()
    try:
        isolation.check_tools()
        demo = Demo(options)
        sides = ["without"] if options.without_only else ["without", "with"]
        demo.run([Job(letter, side) for letter in options.case for side in sides])
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        from lab import memory_demo

        made = memory_demo.show({letter: (CASES[letter].title, CASES[letter].hops) for letter in options.case})
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "result.json").write_text(json.dumps(made, indent=1) + "\n")
        return isolation.EXIT_UNAVAILABLE
    return show(demo.reports, {letter: case.title for letter, case in CASES.items()}, demo.failures, options.output)


def _options() -> argparse.Namespace:
    cases = "; ".join(f"{case.letter}: {case.title}" for case in CASES.values())
    parser = argparse.ArgumentParser(
        prog="python -m lab.demo",
        description=__doc__,
        epilog=f"Cases: {cases}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES), help="cases to run (default: all)")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the results (build/demo)")
    parser.add_argument("--kind", choices=KINDS, default="bridge", help="kind of host (bridge)")
    parser.add_argument("--jobs", type=int, default=SIDE_BY_SIDE, help=f"runs side by side ({SIDE_BY_SIDE})")
    carrier_help = f"who carries state ({DEFAULT_CARRIER})"
    parser.add_argument("--carrier", default=DEFAULT_CARRIER, metavar="MODULE:NAME", help=carrier_help)
    parser.add_argument("--without-only", action="store_true", help="run only the half without SAMI")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs: at least 1")
    module = options.carrier.partition(":")[0]
    if not options.without_only and (":" not in options.carrier or not _is_module(module)):
        parser.error(f"--carrier: there is no {options.carrier}; --without-only needs none")
    return options


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
