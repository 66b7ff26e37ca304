"""Runs the simulator from the command line.

python -m sami_plugin.testing.simulator --runs 20000 --jobs 2
python -m sami_plugin.testing.simulator --seed 4711
python -m sami_plugin.testing.simulator --runs 5000 --mix crash=1 moves=3
"""

# ruff: noqa: T201 - it prints what it finds

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from sami_plugin.testing.simulator.mix import Mix
from sami_plugin.testing.simulator.soak import FLOOR_TURNS, SLICE, Slice, played

Fixed = dict[str, Any]
"""Fields of the mix that are as they are given in each run."""

MOST_TOLD = 10
"""Failing seeds that are told; a mistake that breaks every run is seen in the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """:returns: 0 where no promise was broken, 1 where one was, 2 where the arguments are wrong."""
    options = _parser().parse_args(arguments)
    fixed = dict(options.mix)
    if options.seed is not None:
        return _replay(options.seed, fixed)
    return _soak(options.first, options.runs, options.jobs, fixed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sami_plugin.testing.simulator",
        description="Migrations between hosts in memory, with all that may go wrong, each from one seed.",
        epilog="Exit status: 0 where every promise was kept, 1 where one was broken, 2 for wrong arguments.",
    )
    parser.add_argument("--runs", type=_positive, default=1000, metavar="N", help="how many runs (1000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the seed of the first of them (0)")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes at a time (1)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="play this one run, and print its story")
    parser.add_argument(
        "--mix",
        type=_field,
        nargs="+",
        default=[],
        metavar="FIELD=NUMBER",
        help="what happens more often, or less, than the seed would have it; mix.py says what there is",
    )
    return parser


def _field(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    known = Mix.__dataclass_fields__
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name} has to be a number") from None
    if number < 0 or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{name} has to be 0 or more")
    return name, int(number) if number.is_integer() else number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("has to be 1 or more")
    return number


def _replay(seed: int, fixed: Fixed) -> int:
    from sami_plugin.testing.simulator.world import World

    world = World(seed, **fixed)
    violations = world.run()
    print(world.story.drawn())
    for violation in violations:
        print(f"VIOLATED {violation}")
    if not violations:
        print("Every promise was kept.")
    return 1 if violations else 0


def _soak(first: int, runs: int, jobs: int, fixed: Fixed) -> int:
    began = time.monotonic()
    mix = "".join([" --mix" if fixed else "", *(f" {name}={value}" for name, value in fixed.items())])
    failed = 0
    done, cpu_seconds, floors = 0, 0.0, []
    for part in _parts(first, runs, jobs, fixed):
        done += part.runs
        cpu_seconds += part.cpu_seconds
        floors.append(part.floor_seconds)
        for seed, violations in part.failed.items():
            failed += 1
            if failed <= MOST_TOLD:
                print(f"\nseed {seed}: replay with: python -m sami_plugin.testing.simulator --seed {seed}{mix}")
                print(*(f"    {violation}" for violation in violations), sep="\n", flush=True)
        rate = done / (time.monotonic() - began)
        print(
            f"\r{done} of {runs} runs, {rate:.0f} a second, {done / cpu_seconds:.0f} per CPU second, {failed} failed ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print(file=sys.stderr)
    if failed > MOST_TOLD:
        print(f"and {failed - MOST_TOLD} seeds more")
    print(
        f"{done} runs in {time.monotonic() - began:.0f} s, "
        f"{done / cpu_seconds:.0f} per CPU second, {failed} broke a promise"
    )
    turns = FLOOR_TURNS / statistics.mean(floors)
    print(
        f"The floor, making an object and keeping it in a dictionary, was {turns / 1e6:.2f} million a CPU second: "
        f"a run takes as long as {turns * cpu_seconds / done:.0f} of them"
    )
    return 1 if failed else 0


def _parts(first: int, runs: int, jobs: int, fixed: Fixed) -> Iterator[Slice]:
    starts = range(first, first + runs, SLICE)
    counts = [min(SLICE, first + runs - start) for start in starts]
    play = partial(played, **fixed)
    if jobs == 1:
        yield from map(play, starts, counts)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(play, starts, counts)


if __name__ == "__main__":
    sys.exit(main())
