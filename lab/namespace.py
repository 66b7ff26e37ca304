"""A network namespace with a name, and what runs in it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.deadline import wait_until
from lab.errors import CommandFailed, LabError
from lab.isolation import CLONE_NEWNET, search_path

_libc = ctypes.CDLL(None, use_errno=True)

# Nobody of the lab invents addresses: no link-local ones, no router advertisements, no duplicate address detection,
# and a link that goes down keeps its IPv6 addresses.
QUIET = {
    "net.ipv6.conf.{}.addr_gen_mode": 1,
    "net.ipv6.conf.{}.accept_ra": 0,
    "net.ipv6.conf.{}.accept_dad": 0,
    "net.ipv6.conf.{}.dad_transmits": 0,
    "net.ipv6.conf.{}.keep_addr_on_down": 1,
    "net.ipv4.conf.{}.rp_filter": 0,
}


class Namespace:
    """One network namespace at `path`. Made by the constructor, gone with `close()`, processes included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"
        self._started: list[subprocess.Popen] = []
        # Held while a process is between fork and exec, so that who lists the processes sees only whole ones.
        self.starting = threading.RLock()
        _command(["ip", "netns", "add", name])
        with self.inside():
            for every in ("all", "default"):
                for key, value in QUIET.items():
                    _write_sysctl(key.format(every), value)
        self.ip("link set lo up")

    def close(self) -> None:
        """End what was started here and delete the namespace. May be repeated."""
        with self.starting:
            for process in self._started:
                process.kill()
            for process in self._started:
                process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()
            self._started.clear()
        if os.path.exists(self.path):
            # Children of what we started; nobody else can be in a namespace that we made.
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _command(["ip", "netns", "del", self.name])

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread, and what it starts, is in this namespace; other threads are not moved."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _set_namespace(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _set_namespace(home)
        finally:
            os.close(home)

    def run(self, argv: Sequence[str], text: str | None = None) -> str:
        """Run a command here, `text` on its stdin; return its stdout. Blocks. Raises CommandFailed."""
        with self.inside():
            return _command(list(argv), text)

    def start(self, argv: Sequence[str], **options) -> subprocess.Popen:
        """Start a process here in a session of its own; `close()` kills it. `options` are Popen's."""
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": _environment()} | options
        with self.starting, self.inside():
            process = subprocess.Popen(list(argv), **options)
            self._started.append(process)
        return process

    def ip(self, *commands: str) -> None:
        """Run `ip` commands here, in order, in one process; the first that fails ends it. Raises CommandFailed."""
        self.run(["ip", "-batch", "-"], "\n".join(commands) + "\n")

    def bridge(self, *commands: str) -> None:
        """As `ip`, for the tool `bridge`."""
        self.run(["bridge", "-batch", "-"], "\n".join(commands) + "\n")

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Set a sysctl of this namespace when a value is given; return what it is now.

        A name without a dot is one of net.netfilter. Raises LabError where the kernel has none or keeps it for root.
        """
        full = name if "." in name else f"net.netfilter.{name}"
        with self.inside():
            try:
                if value is not None:
                    _write_sysctl(full, value)
                return _sysctl_path(full).read_text().strip()
            except OSError as error:
                raise LabError(f"sysctl {full} in {self.name}: {error.strerror}") from error

    def pids(self) -> list[int]:
        """The processes whose first thread is here, this very process never among them."""
        here = os.stat(self.path)
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    there = os.stat(f"/proc/{entry}/ns/net")
                    if (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev):
                        found.append(int(entry))
        return found

    def stop_processes(self, seconds: float = 5.0) -> list[int]:
        """SIGSTOP to every process here; return their pids once all threads are stopped. Raises DeadlinePassed."""
        stopped: set[int] = set()

        def all_stopped() -> bool:
            # A process may have forked before the signal came, so look again until a look finds nothing new.
            new = [pid for pid in self.pids() if pid not in stopped]
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                stopped.add(pid)
            return not new and all(_is_stopped(pid) for pid in stopped)

        wait_until(all_stopped, f"the processes of {self.name} to stop", seconds)
        return sorted(stopped)

    def continue_processes(self) -> None:
        """SIGCONT to every process here."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] not in "TtZX":
                    return False
    except OSError:  # it ended meanwhile
        pass
    return True


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise LabError(f"cannot enter a network namespace: {os.strerror(error)}")


def _sysctl_path(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


def _write_sysctl(name: str, value: int | str) -> None:
    _sysctl_path(name).write_text(f"{value}\n")


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": search_path(), "LC_ALL": "C"}


def _command(argv: list[str], text: str | None = None) -> str:
    done = subprocess.run(
        argv,
        input=text if text is not None else "",
        capture_output=True,
        text=True,
        env=_environment(),
        check=False,
    )
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stderr + (f"\n{text}" if text else ""))
    return done.stdout
