"""Short hunts, and a short run of what `make fuzz` does for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import events, guided, hook, packets, sockets
from tests.fuzz.hunt import hunt


def test_spoiled_packets_are_heard_by_nobody() -> None:
    counts = hunt(packets.target(), 300, seed=1)
    assert counts["taken"] < 300
    assert sum(counts.values()) == 300


def test_spoiled_events_are_refused_or_are_events() -> None:
    counts = hunt(events.TARGET, 4000, seed=1)
    assert min(counts["OperatorError"], counts["Malformed"], counts["taken"]) > 50, counts


def test_whatever_comes_over_the_socket_is_answered_line_by_line() -> None:
    counts = hunt(sockets.TARGET, 4000, seed=1)
    assert min(counts["Refused"], counts["taken"], counts["Asked"]) > 300, counts


def test_hook_says_an_event_or_nothing_whatever_libvirt_gives() -> None:
    counts = hunt(hook.TARGET, 4000, seed=1)
    assert min(counts["NoGuest"], counts["taken"]) > 500, counts


def _guided(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Atheris counts branches with an agent of its own, which coverage and xdist know nothing of.
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.guided", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", guided.TARGETS)
def test_guided_hunt_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python, and building it takes clang")
    done = _guided(tmp_path, name, "--seconds", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    inputs = int(done.stdout.splitlines()[-1].split()[0])
    assert inputs > 50, done.stdout


def test_guided_hunt_tells_what_it_finds(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python, and building it takes clang")
    done = _guided(tmp_path, "--alone", "careless", "-max_total_time=20", f"-artifact_prefix={tmp_path}/")
    assert done.returncode != 0
    assert "IndexError" in done.stdout + done.stderr
    assert [path for path in tmp_path.glob("crash-*") if len(path.read_bytes()) <= 40]


def test_target_that_is_none_is_named(tmp_path: Path) -> None:
    done = _guided(tmp_path, "codex")
    assert done.returncode == 2
    assert "there is no target 'codex'; there are codec, messages" in done.stderr
