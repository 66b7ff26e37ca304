"""Pid 1 of a host: makes the host's own view of the machine, says "ready PID" on stdout, then reaps orphans for ever.

Standard library only, started by path in new mount, uts and pid namespaces: first.py NAME LAB-FOLDER HOST-FOLDER QEMU.
HOST-FOLDER has etc and var, which are laid over the machine's, and is seen as /run/lab in the host. LAB-FOLDER is
seen at the same path as outside.
"""

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x2000, 0x4000, 0x40000
DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "net/tun": (10, 200),
}
LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "fd/0",
    "stdout": "fd/1",
    "stderr": "fd/2",
}
# Whole folders of the newer QEMU, not an overlay of both: a module of the old one that is still seen makes the new one
# exit as soon as libvirt asks for its types.
QEMU_PARTS = ("bin/qemu-system-x86_64", "lib/x86_64-linux-gnu/qemu", "share/qemu", "share/seabios")

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); raises OSError."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    if _libc.mount(*words, flags, data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def furnish(lab: Path, host: Path, qemu: Path) -> None:
    """All mounts. A fresh /sys shows the links of this network namespace; the machine's /dev and /run are not seen."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for part in QEMU_PARTS:
        mount(qemu / "usr" / part, Path("/usr") / part, flags=MS_BIND)
    for top in ("etc", "var"):
        work = host / f"{top}.work"
        work.mkdir()
        mount("overlay", f"/{top}", "overlay", data=f"lowerdir=/{top},upperdir={host / top},workdir={work}")
    run = host / "run"
    run.mkdir()
    mount("tmpfs", run, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for seen_as, folder in ((run / lab.relative_to("/run"), lab), (run / "lab", host)):
        seen_as.mkdir()
        mount(folder, seen_as, flags=MS_BIND)
    mount(run, "/run", flags=MS_MOVE)
    make_devices(Path("/dev"))


def make_devices(dev: Path) -> None:
    """An own /dev without kvm, so that QEMU uses TCG; userfaultfd is what post-copy needs."""
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=755")
    for folder in ("net", "pts", "shm"):
        (dev / folder).mkdir()
    misc = {name: int(minor) for minor, name in map(str.split, Path("/proc/misc").read_text().splitlines())}
    for name, numbers in {**DEVICES, "userfaultfd": (10, misc["userfaultfd"])}.items():
        os.mknod(dev / name, 0o20666, os.makedev(*numbers))
        (dev / name).chmod(0o666)
    mount("devpts", dev / "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    mount("shm", dev / "shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)


def reap() -> None:
    """For ever. QEMU makes itself a daemon, and libvirt takes a zombie for alive."""
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    pid = os.readlink("/proc/self")  # the outer /proc yet, so our pid as our starter sees it
    socket.sethostname(sys.argv[1])
    furnish(*map(Path, sys.argv[2:]))
    print("ready", pid, flush=True)
    reap()
