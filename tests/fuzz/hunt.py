"""Hunts a decoder: spoils valid inputs and sees that it only ever refuses them, quickly and without much memory.

A target is a corpus of valid inputs, a function that decodes one and raises what it may raise, and what that is.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fuzz.mutations import MUTATORS, Mutator, mutate


@dataclass(frozen=True)
class Target:
    name: str
    corpus: tuple[bytes, ...]
    decode: Callable[[bytes], object]
    """May check what it has decoded; an AssertionError is a find."""
    refusals: tuple[type[Exception], ...]
    """What `decode` may raise."""
    mutators: tuple[Mutator, ...] = MUTATORS
    seconds: float = 0.05
    """The most that an input may take, besides `seconds_per_octet`."""
    seconds_per_octet: float = 5e-6
    octets: int = 1 << 16
    """The most memory that an input may take, besides `octets_per_octet`."""
    octets_per_octet: int = 24


class Found(AssertionError):
    """The decoder did with this input what it must not do."""

    def __init__(self, target: Target, seed: int, number: int, octets: bytes, what: str) -> None:
        super().__init__(f"{target.name}, seed {seed}, input {number}: {what}\n{octets.hex()}")
        self.octets = octets


Told = Callable[[int, Counter[str]], None]


def hunt(target: Target, inputs: int, seed: int, tell: Told = lambda done, counts: None) -> Counter[str]:
    """What became of `inputs` spoiled inputs: ``taken``, or the name of the refusal. Raises `Found`."""
    counts: Counter[str] = Counter()
    for number in range(inputs):
        # Each input has a generator of its own, so a find is made again without what went before it.
        generator = random.Random(f"{seed}/{number}")
        octets = mutate(generator, generator.choice(target.corpus), target.corpus, target.mutators)
        began = time.perf_counter()
        try:
            counts[_outcome(target, octets)] += 1
        except Exception as error:
            raise Found(target, seed, number, octets, f"raised {error!r}") from error
        limit = target.seconds + target.seconds_per_octet * len(octets)
        if time.perf_counter() - began > limit and _quickest(target, octets) > limit:
            raise Found(target, seed, number, octets, f"took more than {limit:.3f} s")
        if number % 64 == 0:
            used, may = _memory(target, octets), target.octets + target.octets_per_octet * len(octets)
            if used > may:
                raise Found(target, seed, number, octets, f"took {used} octets of memory, more than {may}")
        if number % 1000 == 999:
            tell(number + 1, counts)
    return counts


def _outcome(target: Target, octets: bytes) -> str:
    try:
        target.decode(octets)
    except target.refusals as refusal:
        return type(refusal).__name__
    return "taken"


def _quickest(target: Target, octets: bytes) -> float:
    """The quickest of a few runs: a busy machine is no find."""
    runs = []
    for _ in range(5):
        began = time.perf_counter()
        _outcome(target, octets)
        runs.append(time.perf_counter() - began)
    return min(runs)


def _memory(target: Target, octets: bytes) -> int:
    tracemalloc.start()
    try:
        _outcome(target, octets)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main(target: Target, arguments: Sequence[str] | None = None) -> int:
    """The command line of a target's module."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{target.name}", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many inputs to try")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same inputs")
    options = parser.parse_args(arguments)
    is_terminal = sys.stderr.isatty()
    began = time.monotonic()

    def tell(done: int, counts: Counter[str]) -> None:
        if is_terminal:
            share = 100 * done // options.inputs
            sys.stderr.write(f"\r{target.name}: {done} of {options.inputs} ({share} %), {dict(counts)} ")
            sys.stderr.flush()

    try:
        counts = hunt(target, options.inputs, options.seed, tell)
    except Found as found:
        sys.stderr.write(f"\n{found}\n")
        return 1
    finally:
        if is_terminal:
            sys.stderr.write("\n")
    seconds = time.monotonic() - began
    sys.stdout.write(f"{target.name}: {options.inputs} inputs, seed {options.seed}, {seconds:.1f} s: {dict(counts)}\n")
    return 0
