"""Runs the simulator from the command line.

python -m sami_plugin.testing.simulator --runs 20000 --jobs 2
python -m sami_plugin.testing.simulator --seed 4711
"""

# ruff: noqa: T201 - it prints what it finds

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from sami_plugin.testing.simulator.soak import SLICE, Slice, played

MOST_TOLD = 10
"""Failing seeds that are told; a mistake that breaks every run is seen in the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """:returns: 0 where no promise was broken, 1 where one was, 2 where the arguments are wrong."""
    options = _parser().parse_args(arguments)
    if options.seed is not None:
        return _replay(options.seed)
    return _soak(options.first, options.runs, options.jobs)


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
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("has to be 1 or more")
    return number


def _replay(seed: int) -> int:
    from sami_plugin.testing.simulator.world import World

    world = World(seed)
    violations = world.run()
    print(world.story.drawn())
    for violation in violations:
        print(f"VIOLATED {violation}")
    if not violations:
        print("Every promise was kept.")
    return 1 if violations else 0


def _soak(first: int, runs: int, jobs: int) -> int:
    began = time.monotonic()
    failed: dict[int, list[str]] = {}
    done, cpu_seconds = 0, 0.0
    for part in _parts(first, runs, jobs):
        done += part.runs
        cpu_seconds += part.cpu_seconds
        failed |= part.failed
        rate = done / (time.monotonic() - began)
        print(
            f"\r{done} of {runs} runs, {rate:.0f} a second, {done / cpu_seconds:.0f} per CPU second, "
            f"{len(failed)} failed ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print(file=sys.stderr)
    for seed, violations in sorted(failed.items())[:MOST_TOLD]:
        print(f"seed {seed}: replay with: python -m sami_plugin.testing.simulator --seed {seed}")
        for violation in violations:
            print(f"    {violation}")
    if len(failed) > MOST_TOLD:
        print(f"and {len(failed) - MOST_TOLD} seeds more")
    print(
        f"{done} runs in {time.monotonic() - began:.0f} s, "
        f"{done / cpu_seconds:.0f} per CPU second, {len(failed)} broke a promise"
    )
    return 1 if failed else 0


def _parts(first: int, runs: int, jobs: int) -> Iterator[Slice]:
    starts = range(first, first + runs, SLICE)
    counts = [min(SLICE, first + runs - start) for start in starts]
    if jobs == 1:
        yield from map(played, starts, counts)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(played, starts, counts)


if __name__ == "__main__":
    sys.exit(main())
