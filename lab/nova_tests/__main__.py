"""Nova's own tests of live migration, of two releases, without our notification driver and with it.

    python -m lab.nova_tests [--release 26] [--kind functional] [--wide] [--output build/nova-tests]

Runs them without the driver, with it and an agent that answers; and those that the driver has something to announce in
with nobody at its socket, and with an agent that never answers. Every test has to end as it
does without the driver, Nova has to call the same in the same order, and each live migration has to be announced at its
destination before anything is prepared there. A test that fails without the driver as well is named, and is no fault.
The output folder gets result.json and all logs. Exit code: 0 when there is no fault, 1 when there is one (stderr says
which) or when the tests could not be run, 125 when they cannot run here: release 26 takes what
`tools/prepare openstack` gets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lab.command import exit_code
from lab.nova_tests import findings, releases
from lab.nova_tests.chosen import KINDS
from lab.nova_tests.releases import RELEASES, Release
from lab.nova_tests.run import AGENTS, UNTOUCHED, Ran, run

COLUMNS = ("release", "run", "passed", "failed", "skipped", "announced", "longest wait", "faults")


def try_release(release: Release, output: Path, kinds: Collection[str], *, is_wide: bool) -> list[dict[str, Any]]:
    """What came of each run, a row for each. Blocks for minutes; raises LabError."""
    say(f"Nova {release.what}: its environment")
    releases.prepare(release)
    rows = []
    made: dict[str, Ran] = {}
    only = None
    for name in AGENTS:
        if name == UNTOUCHED and not is_wide:
            continue
        began = time.monotonic()
        if "with" in made:
            only = {event["test"] for event in findings.announcing(made["with"]) if event["test"] is not None}
        ran = made[name] = run(release, name, output / release.name / name, kinds=kinds, is_wide=is_wide, only=only)
        faults = faults_of(ran, made, release, only)
        rows.append(row(release, ran, faults, made.get("without", ran)))
        say(f"Nova {release.name}, {name}: {len(ran.outcomes)} tests in {time.monotonic() - began:.0f} s")
    return rows


def faults_of(ran: Ran, made: dict[str, Ran], release: Release, only: set[str] | None) -> list[str]:
    """All that is wrong in a run, of those that were `made`."""
    if ran.name == UNTOUCHED:
        return []
    if ran.name == "without":
        # What watching changes would be ours, and hide what the driver does.
        return findings.outcome_differences(made[UNTOUCHED], ran) if UNTOUCHED in made else []
    without = made["without"] if only is None else made["without"].of(only)
    faults = findings.differences(without, ran)
    if ran.name == "with":
        faults += findings.order_faults(ran, release.name)
    longest = max(findings.held(ran), default=0.0)
    if longest > findings.MOST_HELD_SECONDS:
        faults.append(f"Nova waited {longest:.1f} s for the driver")
    return faults


def row(release: Release, ran: Ran, faults: list[str], without: Ran) -> dict[str, Any]:
    """A run, for the table and for result.json."""
    ends = Counter(outcome.ended for outcome in ran.outcomes.values())
    return {
        "release": release.name,
        "nova": release.what,
        "run": ran.name,
        "outcomes": dict(ends),
        "to be announced": len(findings.announcing(ran)),
        "announced": len(ran.announcements),
        "migrations": sum(1 for _ in findings.migrations(ran)),
        "waits": findings.held(ran),
        "failed without the driver as well": {
            test: findings.last_line(outcome.words)
            for test, outcome in ran.outcomes.items()
            if outcome.ended == "failed" and test in without.outcomes and without.outcomes[test].ended == "failed"
        },
        "absent": ran.absent,
        "faults": faults,
        "tests": {test: outcome.ended for test, outcome in sorted(ran.outcomes.items())},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, for people."""
    lines = [COLUMNS]
    for one in rows:
        ends = one["outcomes"]
        announced = f"{one['announced']} of {one['to be announced']}" if one["to be announced"] else ""
        wait = f"{max(one['waits']):.2f} s" if one["waits"] else ""
        others = len(one["tests"]) - ends.get("passed", 0) - ends.get("failed", 0)
        numbers = (str(ends.get("passed", 0)), str(ends.get("failed", 0)), str(others))
        lines.append((one["release"], one["run"], *numbers, announced, wait, str(len(one["faults"]))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)) for line in lines)


def say(line: str) -> None:
    """Progress, for who waits."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.nova_tests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", action="append", choices=RELEASES, help="of Nova; may be repeated (all)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of tests; may be repeated (all)")
    parser.add_argument(
        "--wide", action="store_true", help="more tests, and before all a run in which Nova is not even watched"
    )
    parser.add_argument("--output", type=Path, default=Path("build/nova-tests"), help="folder for the results")
    options = parser.parse_args()

    def work() -> int:
        rows: list[dict[str, Any]] = []
        for name in options.release or RELEASES:
            rows += try_release(RELEASES[name], options.output, options.kind or KINDS, is_wide=options.wide)
            (options.output / "result.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(table(rows))
        for one in rows:
            where = f"Nova {one['release']}, {one['run']}"
            if one["run"] == "without":
                for test, words in one["failed without the driver as well"].items():
                    print(f"{where}: {test} fails: {words}")
            for fault in one["faults"]:
                print(f"{where}: {fault}", file=sys.stderr)
        return 1 if any(one["faults"] for one in rows) else 0

    return exit_code(work, "the run failed")


if __name__ == "__main__":
    sys.exit(main())
