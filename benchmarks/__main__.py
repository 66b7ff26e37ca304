"""All benchmarks: a table on the screen and result.json.

    python -m benchmarks [--flows 100000] [--repeat 5] [--output build/bench]

Runs in namespaces of its own, with a RabbitMQ of its own; needs root. The machine is noisy: what counts is the ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import floor, transfer
from benchmarks.result import row
from lab import isolation
from lab.errors import LabUnavailable

LIMITS = (
    ("export to purge over RabbitMQ", "ratio to the floor", 2.0),
    ("arrived to purged and proved", "seconds", 1.0),
    ("pause to last changes applied", "seconds", 0.020),
    ("with TLS beside without: export to purge", "ratio", 1.10),
    ("with TLS beside without: pause to last changes", "seconds more", 0.003),
    ("idle agent", "share of a core", 0.03),
)


def main() -> int:
    """1: a figure misses its limit; 125: the lab cannot run here."""
    options = _options()
    if not isolation.is_inside():
        isolation.enter([sys.executable, "-W", "ignore", "-m", "benchmarks", *sys.argv[1:]])

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    try:
        rows = [
            _driver(options.flows, options.repeat, progress),
            *transfer.transfers(options.flows, options.repeat, progress),
            transfer.last_changes(options.flows, 1000, max(options.repeat, 7), progress),
            *transfer.with_and_without_tls(options.flows, 1000, max(options.repeat, 7), progress),
            transfer.idle(10_000, 10.0, progress),
        ]
    except LabUnavailable as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return isolation.EXIT_UNAVAILABLE
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps({"benchmarks": rows}, indent=1) + "\n")
    print(_table(rows))
    missed = list(_missed(rows))
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


def _driver(flows: int, repeat: int, progress: transfer.Progress) -> dict[str, Any]:
    batch = floor.flows(flows)
    seconds: list[dict[str, float]] = []
    with floor.namespaces() as (here, there):
        for run in range(repeat):
            progress(f"{run + 1} of {repeat}: {flows} flows through the driver alone")
            seconds.append(
                {
                    "driver": sum(floor.through_driver(here, there, batch).values()),
                    "floor": sum(floor.floor(here, there, batch).values()),
                }
            )
    return row("driver alone, one thread", flows, *([run[name] for run in seconds] for name in ("driver", "floor")))


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    missed = []
    for start, what, limit in LIMITS:
        made = next(one for one in rows if one["name"].startswith(start))
        match what:
            case "seconds":
                figure = made["seconds"]
            case "seconds more":
                figure = made["seconds"] - made["floor_seconds"]
            case _:
                figure = made["ratio"]
        if figure > limit:
            missed.append(f"{made['name']}: {what} {figure} is over {limit}")
        peer = made["peer"]
        if peer is not None and peer["seconds"] < 1.8 * made["seconds"]:
            missed.append(
                f"{made['name']}: {peer['seconds'] / made['seconds']:.2f} times faster than {peer['name']}, not 1.8"
            )
    return missed


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':58}{'flows':>8}{'seconds':>10}{'floor':>10}{'ratio':>8}{'peer':>10}"]
    for made in rows:
        peer = f"{made['peer']['seconds']:10.3f}" if made["peer"] else ""
        lines.append(
            f"{made['name']:58}{made['flows']:8}{made['seconds']:10.4f}{made['floor_seconds']:10.4f}"
            f"{made['ratio']:8.3f}{peer}"
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flows", type=_positive, default=100_000, help="flows of the guest (100000)")
    parser.add_argument("--repeat", type=_positive, default=5, help="runs of each benchmark (5)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder for result.json (build/bench)")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("has to be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
