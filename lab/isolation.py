"""The lab's own world: mount, network and pid namespaces, and a user namespace where we are not root.

    python -m lab.isolation -- COMMAND...

runs COMMAND in it: signals are passed on, the exit code is passed back (125: the lab cannot run here; 127: no such
command). Worlds side by side do not see each other. However the outer process ends, SIGKILL included, the kernel ends
all processes of the world, and with them its mounts and network namespaces: nothing is on disk, nothing is left.

In the world: a fresh /proc and /sys (else /sys/class/net is another namespace's), an empty tmpfs on /run (so /run/netns
and /run/xtables.lock are the world's own), mounts private, loopback up.
"""

import argparse
import contextlib
import ctypes
import errno
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import traceback
from typing import NoReturn

from lab.errors import LabUnavailable

# Holds the inode of the world's mount namespace, so a variable inherited by something outside is not believed.
INSIDE = "SAMI_LAB_WORLD"
HOW = "python -m lab.isolation -- COMMAND..."

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1
EXIT_UNAVAILABLE = 125
EXIT_NO_COMMAND = 127

TOOLS = {
    "ip": "iproute2",
    "bridge": "iproute2",
    "iptables-restore": "iptables",
    "ip6tables-restore": "iptables",
    "nft": "nftables",
    "conntrack": "conntrack",
}
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}

_libc = ctypes.CDLL(None, use_errno=True)


def is_inside() -> bool:
    """True in a process that runs in a world of the lab."""
    return os.environ.get(INSIDE) == str(os.stat("/proc/self/ns/mnt").st_ino)


def enter(argv: list[str]) -> None:
    """Return at once when inside; else run `argv` (usually the caller's own command line) inside and exit as it did.

    May be called from one thread only, before any other is started. Raises LabUnavailable.
    """
    if not is_inside():
        leave_as(run(argv))


def run(argv: list[str], dies_with_parent: bool = False) -> int:
    """Run `argv` in a new world and return its wait status (see os.waitstatus_to_exitcode). Blocks until it ended.

    The calling process must have one thread; it stays in the new network and mount namespace. With `dies_with_parent`
    it is killed, and the world with it, when the thread that started it ends. Raises LabUnavailable.
    """
    parent = os.getppid()
    check_tools()
    unshare()
    if dies_with_parent:
        # After unshare: a new user namespace changes credentials, and that clears the request.
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            leave_as(signal.SIGKILL)
    alive_read, alive_write = os.pipe()  # the child learns from it that we died before it asked to be told
    status_read, status_write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON | {signal.SIGCHLD})
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(alive_write)
        os.close(status_read)
        _be_first(argv, alive_read, status_write)
    os.close(alive_read)
    os.close(status_write)
    status = _pass_signals_until_end(child)
    told = os.read(status_read, 32)
    return int(told) if told else status


def leave_as(status: int) -> NoReturn:
    """End this process as another ended whose wait status this is: with the same code, or by the same signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    sys.exit(os.waitstatus_to_exitcode(status))


def check_tools() -> None:
    """Raise LabUnavailable when a tool is missing, with the Debian packages that have it."""
    path = search_path()
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        raise LabUnavailable(f"no {', '.join(missing)} in {path}", f"run: apt-get install {packages}")


def search_path() -> str:
    """PATH with the sbin folders, which an ordinary user's has not."""
    return f"{os.environ.get('PATH', '')}:{SBIN}".lstrip(":")


def unshare() -> None:
    """Put this process into new namespaces; its children are the first in the pid namespace. Raises LabUnavailable."""
    uid, gid = os.geteuid(), os.getegid()
    world = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET
    # Root of a container may lack CAP_SYS_ADMIN and yet be allowed a user namespace.
    if uid == 0 and _libc.unshare(world) == 0:
        return
    if _libc.unshare(world | CLONE_NEWUSER) != 0:
        reason = ctypes.get_errno()
        raise LabUnavailable(
            f"namespaces need root or a user namespace, and the kernel refused one ({os.strerror(reason)})",
            _mend(reason),
        )
    try:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    except OSError as error:
        missing = f"the kernel did not let us map root into the user namespace ({error})"
        raise LabUnavailable(missing, _mend(error.errno)) from error


def _mend(reason: int | None) -> str:
    if reason in (errno.ENOSPC, errno.EUSERS):
        return "run as root, or raise sysctl user.max_user_namespaces"
    return (
        "run as root, or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
        "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), user.max_user_namespaces above 0; "
        "in a container give it CAP_SYS_ADMIN and no seccomp filter on unshare and mount"
    )


def _be_first(argv: list[str], alive: int, status_pipe: int) -> NoReturn:
    """Pid 1 of the world: makes the mounts, starts the command. When it ends, the kernel ends all others."""
    code = EXIT_UNAVAILABLE
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        poll = select.poll()
        poll.register(alive, select.POLLHUP)
        if poll.poll(0):
            os._exit(code)
        _furnish()
        environment = os.environ | {INSIDE: str(os.stat("/proc/self/ns/mnt").st_ino), "PATH": search_path()}
        command = os.fork()
        if command == 0:
            _become(argv, environment)
        os.write(status_pipe, str(_pass_signals_until_end(command)).encode())
        code = 0
    except LabUnavailable as error:
        print(error, file=sys.stderr)
    except BaseException:  # noqa: BLE001, a forked child must not return into its parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _become(argv: list[str], environment: dict[str, str]) -> NoReturn:
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(EXIT_NO_COMMAND)


def _furnish() -> None:
    quiet = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _mount("none", "/", None, MS_REC | MS_PRIVATE, "make mounts private")
    _mount("proc", "/proc", "proc", quiet, "mount a fresh /proc")
    _mount("sysfs", "/sys", "sysfs", quiet, "mount a fresh /sys")
    _mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mount a private /run")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, env=os.environ | {"PATH": search_path()})


def _mount(source: str, target: str, kind: str | None, flags: int, what: str) -> None:
    # In a user namespace the kernel allows a fresh /proc only where the old one is visible and unmasked.
    encoded = kind.encode() if kind else None
    if _libc.mount(source.encode(), target.encode(), encoded, flags, None) != 0:
        reason = ctypes.get_errno()
        raise LabUnavailable(f"cannot {what} ({os.strerror(reason)})", _mend(reason))


def _pass_signals_until_end(child: int) -> int:
    """Wait for `child`, reap orphans, pass signals on; return the child's wait status. The signals must be blocked."""
    while True:
        told = signal.sigwaitinfo(PASSED_ON | {signal.SIGCHLD})
        if told.si_signo == signal.SIGCHLD:
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == child:
                    return status
                if pid == 0:
                    break
        elif told.si_code <= 0:  # above 0 it is the terminal's, and the terminal told the child as well
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, told.si_signo)


def main() -> int:
    """Run the command line's COMMAND; end as it does."""
    parser = argparse.ArgumentParser(prog="python -m lab.isolation", description="Run a command in a world of its own.")
    parser.add_argument("--with-parent", action="store_true", help="be killed when our starter ends")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    arguments = parser.parse_args()
    try:
        leave_as(run(arguments.command, arguments.with_parent))
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main())
