"""What the doctor and `sami hook status` look at on a host whose guests are libvirt's, in the order of mending."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sami_plugin.cli import hook_file
from sami_plugin.cli.checks import Check, Result
from sami_plugin.cli.hook_file import State
from sami_plugin.cmd import libvirt_hook
from sami_plugin.errors import SamiError

_WAIT_SECONDS = 2.0
_LIBVIRT_SECONDS = 10.0
_NOT_PERMITTED = "this user may not connect, and libvirt's hooks run as root"
URI = "qemu:///system"


@dataclass(frozen=True, slots=True)
class Seen:
    """The hook of this host, its daemon, and the socket that it speaks to."""

    path: Path
    state: State
    is_executable: bool
    daemon: hook_file.Daemon | None
    is_told: bool | None
    """None where that cannot be seen."""
    settings_file: str
    settings: libvirt_hook.Settings
    complaints: list[str]
    silence: str
    """Why nobody answers on the hook's socket; empty if somebody does."""

    @property
    def install(self) -> str:
        """The command that puts the hook in place."""
        folder = "" if str(self.path.parent) == hook_file.FOLDER else f" --folder {self.path.parent}"
        name = "" if self.path.name == hook_file.NAME else f" --name {self.path.name}"
        return f"sami hook install{folder}{name}"

    @property
    def is_in_place(self) -> bool:
        """Whether libvirt can run it."""
        return self.state in (State.CURRENT, State.ANOTHER_VERSION) and self.is_executable


def look(path: Path, run_folder: str = hook_file.RUN_FOLDER, settings_file: str | None = None) -> Seen:
    """:raises ConfigurationError, NotPermitted: the hook's file cannot be read."""
    settings_file = settings_file or libvirt_hook.SETTINGS
    settings, complaints = libvirt_hook.read_settings(settings_file)
    daemon = hook_file.daemon(run_folder)
    return Seen(
        path,
        hook_file.state(path),
        hook_file.is_executable(path),
        daemon,
        hook_file.is_told(path, daemon),
        settings_file,
        settings,
        complaints,
        silence(settings.socket),
    )


def is_expected(uri: str) -> bool:
    """Whether this host's guests are libvirt's, so that the checks of libvirt are of use."""
    return bool(uri) or hook_file.daemon() is not None or os.path.exists(f"{hook_file.FOLDER}/{hook_file.NAME}")


def libvirt(uri: str) -> Iterator[Check]:
    """Whether the agent can ask libvirt; blocks for some seconds at most."""
    name = "libvirt-python"
    mend = "pip install sami_plugin[libvirt], or Debian's python3-libvirt with the system's Python"
    asked = "import libvirt, sys; c = libvirt.open(sys.argv[1]); print(c.getHostname(), c.getLibVersion())"
    try:
        # In a process of its own: a daemon that hangs does not hang us.
        done = subprocess.run(
            [sys.executable, "-c", asked, uri or URI],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIBVIRT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        yield Check(name, Result.OK, "can be imported")
        yield Check("libvirt", Result.MISSING, f"{uri or URI} does not answer", "look at libvirt's log; restart it")
        return
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if said.startswith(("ImportError", "ModuleNotFoundError")):
        yield Check(name, Result.MISSING, said, mend)
        return
    yield Check(name, Result.OK, "can be imported")
    if done.returncode:
        yield Check("libvirt", Result.MISSING, f"{uri or URI}: {said}", "systemctl start libvirtd, or virtqemud.socket")
    elif not uri:
        reason = "the agent is not told to ask it: it hears nothing of guests that leave this host"
        yield Check("libvirt", Result.MISSING, reason, f"set uri = {URI} in the group [libvirt] of sami-agent.conf")
    else:
        host, version = done.stdout.split()
        told = f"{int(version) // 1_000_000}.{int(version) // 1000 % 1000}.{int(version) % 1000}"
        yield Check("libvirt", Result.OK, f"{uri} answers: libvirt {told} on {host}")


def checks(seen: Seen, agent_socket: str) -> Iterator[Check]:
    """Whether libvirt calls the hook, and whether the hook speaks to where the agent listens."""
    yield _installed(seen)
    if seen.is_in_place:
        yield _told(seen)
    yield _settings(seen, agent_socket)


def hook(uri: str, agent_socket: str) -> Iterator[Check]:
    """All of a host whose guests are libvirt's, in order."""
    yield from libvirt(uri)
    try:
        seen = look(hook_file.path_of(hook_file.FOLDER, hook_file.NAME))
    except SamiError as error:
        yield Check("hook", Result.MISSING, str(error), "sami hook install")
        return
    yield from checks(seen, agent_socket)


def _installed(seen: Seen) -> Check:
    name = "hook"
    if seen.state is State.FOREIGN:
        mend = "move it away, then sami hook install; or name another file with --name"
        return Check(name, Result.MISSING, f"{seen.path} is not the hook of sami_plugin", mend)
    if seen.state is State.ABSENT:
        return Check(name, Result.MISSING, f"{seen.path} is not there", seen.install)
    if not seen.is_executable:
        return Check(name, Result.MISSING, f"{seen.path} is not executable: libvirt skips it", seen.install)
    if seen.path.stat().st_mode & 0o022:
        reason = f"others than its owner may write to {seen.path}, which libvirt runs as root"
        return Check(name, Result.LIMITED, reason, seen.install)
    if seen.state is State.ANOTHER_VERSION:
        return Check(name, Result.LIMITED, f"{seen.path} is of another version", seen.install)
    return Check(name, Result.OK, f"{seen.path} is in place")


def _told(seen: Seen) -> Check:
    name = "hook is called"
    if seen.daemon is None:
        reason = "no libvirt daemon can be seen here, so whether it looked for hooks since is unknown"
        return Check(name, Result.LIMITED, reason, "systemctl reload libvirtd, or virtqemud")
    daemon, mend = f"{seen.daemon.name} (pid {seen.daemon.pid})", f"systemctl reload {seen.daemon.name}"
    if seen.is_told:
        return Check(name, Result.OK, f"{daemon} has looked for hooks since there is one")
    if seen.is_told is None:
        reason = f"{daemon} is older than the hook; whether it was reloaded since cannot be seen"
        return Check(name, Result.LIMITED, reason, f"{mend}, if that was not done")
    return Check(name, Result.MISSING, f"{daemon} has not looked for hooks since there is one", mend)


def _settings(seen: Seen, agent_socket: str) -> Check:
    name = "hook's socket"
    file = seen.settings_file
    if os.path.realpath(seen.settings.socket) != os.path.realpath(agent_socket):
        reason = f"the hook speaks to {seen.settings.socket}, the agent listens at {agent_socket}"
        return Check(name, Result.MISSING, reason, f"write socket = {agent_socket} into {file}")
    if seen.complaints:
        return Check(
            name, Result.LIMITED, "; ".join(seen.complaints), f"mend {file}; libvirt-hook.conf.sample shows how"
        )
    return Check(name, Result.OK, f"the hook speaks to {agent_socket}, as the agent is configured to listen")


def listens(seen: Seen) -> Check:
    """Whether an agent does, at the hook's socket."""
    path = seen.settings.socket
    if seen.silence == _NOT_PERMITTED:
        return Check("agent", Result.LIMITED, f"{path}: {seen.silence}", "run as root")
    if seen.silence:
        return Check("agent", Result.MISSING, f"{path}: {seen.silence}", "start sami-agent")
    return Check("agent", Result.OK, f"an agent listens at {path}")


def silence(path: str) -> str:
    """Why nobody can be reached at a unix socket; empty if somebody can."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        tried.settimeout(_WAIT_SECONDS)
        try:
            tried.connect(path)
        except FileNotFoundError:
            return "no agent listens: there is no such socket"
        except ConnectionRefusedError:
            return "no agent listens: it has ended without removing its socket"
        except PermissionError:
            return _NOT_PERMITTED
        except OSError as error:
            return error.strerror or str(error)
    return ""


def access(path: str) -> str | None:
    """Who may connect to a socket, in words; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    mode = stat.S_IMODE(found.st_mode)
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    may = ["root"]
    if mode & 0o200 and owner != "root":
        may.append(owner)
    if mode & 0o020:
        may.append(f"group {group}")
    if mode & 0o002:
        may.append("everybody")
    return f"{', '.join(may)} (mode {mode:04o}, {owner}:{group})"
