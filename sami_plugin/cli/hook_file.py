"""libvirt's hook on this host: its file, and whether libvirt's daemon calls it.

libvirt looks for hooks when it starts and when it is reloaded, and if it finds none for qemu, it never calls any. If it
found one, it looks into the folder at each call, so that another one is called at once (libvirt's virhook.c).
"""

from __future__ import annotations

import enum
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sami_plugin.cmd import libvirt_hook
from sami_plugin.errors import ConfigurationError, NotPermitted

FOLDER = "/etc/libvirt/hooks/qemu.d"
NAME = "50-sami"
RUN_FOLDER = "/run"
DAEMONS = ("virtqemud", "libvirtd")
MODE = 0o755
OURS = b"# This is sami-libvirt-hook of sami_plugin"
"""Begins the second line of every version of the file."""


class State(enum.Enum):
    """What stands where the hook is to be."""

    ABSENT = "no"
    CURRENT = "yes"
    ANOTHER_VERSION = "another version"
    FOREIGN = "not ours"


def path_of(folder: str, name: str) -> Path:
    """:raises ConfigurationError: the name is none that a hook may have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigurationError(
            f"--name {name}: takes letters, digits, '-', '_' and '.', and begins with one of the first"
        )
    return Path(os.path.abspath(folder), name)


def shipped() -> bytes:
    """The hook of this version."""
    return Path(libvirt_hook.__file__).read_bytes()


def state(path: Path) -> State:
    """:raises ConfigurationError, NotPermitted: it cannot be read."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return State.ABSENT
    except OSError as error:
        raise _told(error, path) from error
    if found == shipped():
        return State.CURRENT
    lines = found.split(b"\n", 2)
    return State.ANOTHER_VERSION if len(lines) > 1 and lines[1].startswith(OURS) else State.FOREIGN


def is_executable(path: Path) -> bool:
    """Whether libvirt, which is root, would run it."""
    return path.is_file() and bool(path.stat().st_mode & 0o111)


def install(path: Path) -> State:
    """Puts the hook there, whole or not at all; what was there before.

    :raises ConfigurationError, NotPermitted: it cannot be put there, or what is there is not ours.
    """
    before = state(path)
    if before is State.FOREIGN:
        raise ConfigurationError(f"{path} is there already and is not ours; --name puts the hook beside it")
    if not path.parent.parent.is_dir() and not path.parent.parent.parent.is_dir():
        raise ConfigurationError(f"there is no folder {path.parent}: is libvirt installed? --folder names another")
    since = time.time_ns() if before is State.ABSENT or not is_executable(path) else path.stat().st_mtime_ns
    part = None
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # libvirt runs whatever is executable in that folder: this is not, until it is whole.
        descriptor, part = tempfile.mkstemp(prefix=".sami-", dir=path.parent)
        with open(descriptor, "wb") as file:
            file.write(shipped())
            file.flush()
            # Whoever replaces the file leaves the time since when there is one: `is_told` compares it.
            os.utime(file.fileno(), ns=(since, since))
            os.fsync(file.fileno())
        # Closed by now: the kernel runs no file that somebody has open for writing, and libvirt would stop the guest.
        os.chmod(part, MODE)
        os.rename(part, path)
    except OSError as error:
        if part is not None and os.path.exists(part):
            os.unlink(part)
        raise _told(error, path) from error
    return before


def remove(path: Path) -> bool:
    """Removes the hook; whether it was there. The folder stays.

    :raises ConfigurationError, NotPermitted: what is there is not ours, or cannot be removed.
    """
    before = state(path)
    if before is State.FOREIGN:
        raise ConfigurationError(f"{path} is not ours, and stays; --name names ours")
    if before is State.ABSENT:
        return False
    try:
        path.unlink()
    except OSError as error:
        raise _told(error, path) from error
    return True


def _told(error: OSError, path: Path) -> ConfigurationError | NotPermitted:
    if isinstance(error, PermissionError):
        return NotPermitted(f"{path}: {error.strerror}; run as root")
    return ConfigurationError(f"{path}: {error.strerror}")


@dataclass(frozen=True, slots=True)
class Daemon:
    """The libvirt daemon that runs on this host. Moments are seconds since 1970."""

    name: str
    pid: int
    started: float
    reloaded: float | None
    """When it was started or reloaded last, where systemd can say."""


def daemon(run_folder: str = RUN_FOLDER) -> Daemon | None:
    """The daemon that has guests of qemu; None where none can be seen."""
    for name in DAEMONS:
        try:
            pid = int(Path(run_folder, f"{name}.pid").read_text(encoding="ascii"))
            # A pid file may be left over, and its number somebody else's.
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() != name:
                continue
            ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        except (OSError, ValueError):
            continue
        up_seconds = ticks / os.sysconf("SC_CLK_TCK")
        started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + up_seconds
        return Daemon(name, pid, started, _reloaded(name, run_folder))
    return None


def _reloaded(name: str, run_folder: str) -> float | None:
    if not Path(run_folder, "systemd", "system").is_dir():
        return None
    show = ("systemctl", "show", "--value", "--property=StateChangeTimestampMonotonic", f"{name}.service")
    try:
        told = int(subprocess.run(show, capture_output=True, text=True, check=False, timeout=5).stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return time.time() - time.monotonic() + told / 1e6 if told else None


def is_told(path: Path, daemon: Daemon | None) -> bool | None:
    """Whether the daemon calls hooks for qemu: one was there when it looked. None where that cannot be seen."""
    if daemon is None:
        return None
    looked = max(daemon.started, daemon.reloaded or 0)
    if any(since <= looked for since in _since(path)):
        return True
    return None if daemon.reloaded is None else False


def _since(path: Path) -> list[float]:
    """Since when each executable hook for qemu is there; of ours that is its modification, see `install`."""
    found = []
    for other in (path.parent.parent / "qemu", *_entries(path.parent)):
        try:
            if is_executable(other):
                status = other.stat()
                found.append(status.st_mtime if other == path else status.st_ctime)
        except OSError:
            continue
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
