"""Commands in a guest end as they would here, and guests end with what started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.deadline import wait_until
from lab.kernels import parts

pytestmark = [pytest.mark.usefixtures("machine"), pytest.mark.timeout(300)]

SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def kernel() -> parts.Kernel:
    return parts.fetch()


def argv(*command: str, seconds: float = SECONDS, output: Path | None = None) -> list[str]:
    more = ["--output", str(output)] if output is not None else []
    return [sys.executable, "-m", "lab.kernels", "-t", str(seconds), *more, "--", *command]


def run(*command: str, seconds: float = SECONDS, output: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = argv(*command, seconds=seconds, output=output)
    return subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_command_runs_under_the_kernel_in_this_folder_and_its_exit_code_comes_back(
    kernel: parts.Kernel, tmp_path: Path
) -> None:
    # A word with all that a shell would take for its own.
    odd = "a 'b' \"c\" $d `e`"
    script = (
        'uname -r; pwd; echo "$1"; echo $KERNEL_LAB; echo kept >$OUTPUT/file; echo lost >lost-in-the-guest; exit 42'
    )
    done = run("sh", "-c", script, "sh", odd, output=tmp_path / "new")
    assert done.returncode == 42, done.stderr
    assert done.stdout.splitlines() == [kernel.modules.name, os.getcwd(), odd, kernel.suite]
    assert (tmp_path / "new" / "file").read_text() == "kept\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert not Path("lost-in-the-guest").exists()


def test_modules_are_loaded_as_they_are_asked_for() -> None:
    script = "ip link add v type veth && nft add table inet t && modprobe openvswitch && modprobe sctp"
    done = run("sh", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr


def test_guest_that_takes_too_long_is_ended() -> None:
    done = run("sh", "-c", "echo begun; sleep 1000", seconds=40)
    assert done.returncode == 124
    assert done.stdout == "begun\n"
    assert "time over" in done.stderr


def test_guest_that_dies_is_told_from_a_command_that_fails() -> None:
    done = run("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100")
    assert done.returncode == 125
    assert "the guest died" in done.stderr
    assert "Kernel panic" in done.stderr


def test_guest_ends_with_what_started_it() -> None:
    starter = subprocess.Popen(argv("sh", "-c", "echo begun; sleep 1000"), stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"begun\n"
    (qemu,) = children(starter.pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_until(lambda: not Path(f"/proc/{qemu}").exists() or is_zombie(qemu), "QEMU to end", 10)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
