"""Runs a command under a unit of systemd, as the program behind ExecStart, with all that the unit forbids.

As a program, by path: unit.py UNIT-FILE FOLDER COMMAND...

A systemd of its own is the first process of new pid, mount and cgroup namespaces, and starts nothing else. The command
may write into FOLDER besides what the unit lets it. What it says goes to our stdout. Ends, and the command with it, on
SIGTERM; what it made of cgroups is gone then, or when the next one begins.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SYSTEMD = "/lib/systemd/systemd"
UNITS = Path("/run/systemd/system")
PREFIX = "sami-lab-"

# What stands for the machine's own boot is left out. The clone that is tested and its Python may be where the unit
# hides what is there, in a home or below /tmp; what is installed is not.
OVERRIDES = """[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart={command}
Environment=PYTHONUNBUFFERED=1
StandardOutput=append:{words}
StandardError=append:{words}
ReadWritePaths={folder}
ProtectHome=tmpfs
BindReadOnlyPaths={clone} {python}
"""
TARGET = """[Unit]
DefaultDependencies=no
Wants={unit}
"""
FIRST = f"""
mount --make-rprivate /
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin {SYSTEMD} --system --unit=lab.target --show-status=no
"""


def main(unit: Path, folder: str, command: list[str]) -> int:
    """The exit code of the systemd, or of the signal that ended it."""
    words = os.readlink("/proc/self/fd/1")
    override = UNITS / f"{unit.name}.d" / "lab.conf"
    override.parent.mkdir(parents=True, exist_ok=True)
    (UNITS / unit.name).write_text(unit.read_text())
    clone, python = Path(__file__).parents[2], sys.base_prefix
    override.write_text(
        OVERRIDES.format(command=shlex.join(command), words=words, folder=folder, clone=clone, python=python)
    )
    (UNITS / "lab.target").write_text(TARGET.format(unit=unit.name))
    with tempfile.TemporaryDirectory() as mount:
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", mount], check=True)
        for left in Path(mount).glob(f"{PREFIX}*"):
            _remove(left)
        ours = Path(mount, f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}")
        try:
            ours.mkdir()
            return _run(ours)
        finally:
            _remove(ours)
            subprocess.run(["umount", mount], check=True)


def _remove(group: Path) -> None:
    """Unless something runs there."""
    for here, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(here)


def _run(group: Path) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    join = f"echo 0 > {shlex.quote(str(group / 'cgroup.procs'))}"
    enter = ["unshare", "--mount", "--pid", "--cgroup", "--fork", "--kill-child", "sh", "-ec", FIRST]
    first = subprocess.Popen(
        ["sh", "-ec", f"{join}; exec {shlex.join(enter)}"],
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, ()),
    )
    if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
        first.kill()  # and with it, by the kernel, all that is in its namespaces
    code = first.wait()
    while "populated 1" in (group / "cgroup.events").read_text():
        time.sleep(0.005)  # the kernel is still ending what was in there, and a group that is not empty cannot go
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
