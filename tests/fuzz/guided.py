"""Spoiled inputs that coverage guides, for each target: ``python -m tests.fuzz.guided --seconds 60``.

Atheris notes which branches of ours an input takes; what takes new ones is kept and spoiled further. What was kept for
good is in ``corpus``. A find is written into the working folder, and ``--input FILE`` tries it again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha1
from pathlib import Path

from tests.fuzz.hunt import Target
from tests.fuzz.mutations import mutate

CORPUS = Path(__file__).parent / "corpus"
WORK = Path("build/fuzz")
TARGETS = ("codec", "messages", "packets", "events", "sockets", "hook")
HANG_SECONDS = 10
MOST_OCTETS = 1 << 14
MOST_MEBIBYTES = 1024


def load(name: str) -> Target:
    """The target of this name, all of whose code counts the branches that it takes."""
    import atheris

    with atheris.instrument_imports(include=["sami_plugin"], enable_loader_override=False):
        from importlib import import_module

        module = import_module(f"tests.fuzz.{name}")
    target: Target = module.target() if hasattr(module, "target") else module.TARGET
    return target


def run(name: str, arguments: Sequence[str]) -> None:
    """Hunts the target in this process, which ends with it. `arguments` are libFuzzer's."""
    import atheris

    logging.disable(logging.CRITICAL)
    target = load(name)

    def spoil(octets: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)
        if generator.random() < 0.5:
            made: bytes = atheris.Mutate(octets, most)
            return made
        return mutate(generator, octets, target.corpus, target.mutators)[:most]

    def attempt(octets: bytes) -> None:
        with contextlib.suppress(target.refusals):
            target.decode(octets)

    seeds = WORK / name / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    for octets in target.corpus:
        (seeds / sha1(octets, usedforsecurity=False).hexdigest()).write_bytes(octets)
    # A merge runs the program, which libFuzzer takes for one file, again and again.
    program = WORK / name / "program"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.fuzz.guided --alone {name} "$@"\n')
    program.chmod(0o755)
    atheris.Setup([str(program), *arguments], attempt, custom_mutator=spoil)
    atheris.Fuzz()


def hunt(name: str, limit: str) -> tuple[int, float, str]:
    """Hunts the target in a process of its own: how many inputs it had, for how many seconds, and what was found."""
    found = WORK / name
    for folder in (found / "new", CORPUS / name):
        folder.mkdir(parents=True, exist_ok=True)
    options = [
        limit,
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={MOST_MEBIBYTES}",
        f"-max_len={MOST_OCTETS}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    folders = [str(found / "new"), str(CORPUS / name), str(found / "seeds")]
    (found / "seeds").mkdir(exist_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.guided", "--alone", name, *options, *folders],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    (found / "log").write_text(done.stderr)
    counted = re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    inputs = int(counted[-1]) if counted else 0
    what = "" if done.returncode == 0 else f"ended with {done.returncode}; see {found}/log"
    return inputs, time.monotonic() - began, what


def keep(name: str) -> None:
    """Adds to the corpus what takes branches that nothing there takes, as little of it as will do."""
    folders = [str(CORPUS / name), str(WORK / name / "new"), str(WORK / name / "seeds")]
    subprocess.run(
        [sys.executable, "-m", "tests.fuzz.guided", "--alone", name, "-merge=1", *folders],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def main() -> int:
    if sys.argv[1:2] == ["--alone"]:
        run(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--seconds", type=int, default=60, help="for each target (default: %(default)s)")
    how_long.add_argument("--inputs", type=int, help="for each target, instead of a time")
    how_long.add_argument("--input", type=Path, metavar="FILE", help="try this one alone, and show what it raises")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default: processors)")
    parser.add_argument("--keep", action="store_true", help="add what is new to the corpus")
    options = parser.parse_args()
    for name in options.targets:
        if name not in TARGETS:
            parser.error(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    targets = options.targets or TARGETS
    if options.input is not None:
        if len(targets) != 1:
            parser.error("--input needs one target")
        load(targets[0]).decode(options.input.read_bytes())
        return 0
    limit = f"-runs={options.inputs}" if options.inputs else f"-max_total_time={options.seconds}"
    total, finds = 0, 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, (inputs, seconds, what) in zip(targets, pool.map(lambda one: hunt(one, limit), targets), strict=True):
            sys.stdout.write(f"{name}: {inputs} inputs in {seconds:.0f} s: {what or 'nothing found'}\n")
            sys.stdout.flush()
            total += inputs
            finds += bool(what)
            if options.keep and not what:
                keep(name)
    sys.stdout.write(f"{total} inputs, {finds} finds\n")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
