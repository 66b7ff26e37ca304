"""That an agent is killed where a test has said, and nowhere else."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from lab import mortal

COUNTS = """
import pathlib, sys
from lab import mortal
for _ in range(3):
    mortal.count(pathlib.Path(sys.argv[1]))
    print(flush=True)
"""


def test_who_is_disarmed_while_it_counts_lives_on(tmp_path: Path) -> None:
    has_ended = threading.Event()

    def steps() -> None:
        while not has_ended.is_set():
            mortal.count(tmp_path)

    agent = threading.Thread(target=steps)
    agent.start()
    try:
        for _ in range(500):
            mortal.arm(tmp_path, 1_000_000)
            assert mortal.disarm(tmp_path)
            assert not mortal.disarm(tmp_path), "what was taken away is there again"
    finally:
        has_ended.set()
        agent.join()


def test_process_is_killed_before_the_step_that_was_chosen(tmp_path: Path) -> None:
    mortal.arm(tmp_path, 2)
    agent = subprocess.run([sys.executable, "-c", COUNTS, tmp_path], stdout=subprocess.PIPE, check=False)
    assert (agent.returncode, agent.stdout) == (-signal.SIGKILL, b"\n\n")
    assert not mortal.disarm(tmp_path)
