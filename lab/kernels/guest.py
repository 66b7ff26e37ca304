"""A guest that runs one command as root, under a kernel of Debian's and on the machine's root.

QEMU emulates the processor: KVM is not used, which on a machine that is a guest itself is there and does not work. All
that the command writes is lost, but for one folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lab.deadline import STRETCHED
from lab.errors import DeadlinePassed, GuestDied
from lab.isolation import INSIDE, search_path
from lab.kernels.parts import SOURCES, Kernel

MEMORY_MIB = 1536
OUTPUT = "/output"  # not below /run, which a world of the lab has for itself
PASSED_ON = ("HOME", "LANG", "PATH", "PYTHONPATH")
BROKER = "SAMI_LAB_BROKER"
"""What says in a guest where the machine's broker is, as ADDRESS:PORT."""
GATEWAY = "10.0.2.2"  # QEMU's name for the machine's loopback
# Without the watchdog: on a busy machine it distrusts the emulated clock.
APPENDED = "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0 random.trust_cpu=on tsc=nowatchdog"


def run(kernel: Kernel, command: Sequence[str], output: Path, seconds: float, broker_port: int | None = None) -> int:
    """The command's exit code, once it has ended; what it writes is written to our stdout as it comes.

    It runs in the current folder, with `output` as $OUTPUT, in a world of the lab. With `broker_port` the guest has a
    way to the machine's loopback. Raises DeadlinePassed, and GuestDied if there is no code.
    """
    with tempfile.TemporaryDirectory(prefix="kernel-lab-") as name:
        folder = Path(name)
        shutil.copy(SOURCES / "session", folder)
        (folder / "command").write_text(_script(kernel, command, broker_port))
        console = folder / "console"
        # Not to outlive us, however we end.
        argv = ["setpriv", "--pdeathsig", "KILL", *_qemu(kernel, folder, output, console)]
        if broker_port is not None:
            argv += ["-nic", "user,model=virtio-net-pci,ipv6=off"]
        environment = os.environ | {"PATH": search_path()}
        qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
        try:
            assert qemu.stdout is not None
            copying = threading.Thread(target=_copy, args=(qemu.stdout,), daemon=True)
            copying.start()
            try:
                qemu.wait(seconds)
            except subprocess.TimeoutExpired as error:
                raise DeadlinePassed(f"the guest's command to end; its console: {_tail(console)}", seconds) from error
        finally:
            qemu.kill()
            qemu.wait()
            copying.join(5)
        try:
            return int((folder / "code").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise GuestDied(_tail(console)) from error


def _script(kernel: Kernel, command: Sequence[str], broker_port: int | None) -> str:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PATH": search_path(), "OUTPUT": OUTPUT, STRETCHED: kernel.suite}
    if broker_port is not None:
        environment[BROKER] = f"{GATEWAY}:{broker_port}"
    lines = [f"cd {shlex.quote(os.getcwd())}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [f"export {INSIDE}=$(stat -L -c %i /proc/self/ns/mnt)"]
    if broker_port is not None:
        # And no route to anywhere else.
        lines += ["modprobe virtio_net", "ip address add 10.0.2.15/24 dev eth0", "ip link set eth0 up"]
    return "\n".join((*lines, f"exec {shlex.join(command)}", ""))


def _qemu(kernel: Kernel, folder: Path, output: Path, console: Path) -> list[str]:
    argv = ["qemu-system-x86_64", "-accel", "tcg,tb-size=512", "-cpu", "max", "-m", str(MEMORY_MIB)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-kernel", str(kernel.image), "-initrd", str(kernel.initramfs), "-append", APPENDED]
    argv += ["-serial", f"file:{console}", "-device", "virtio-rng-pci"]
    # A stdio device would take the end of stdin for its own, and the guest's first write would never end.
    argv += ["-device", "virtio-serial-pci", "-chardev", "file,id=out,path=/dev/fd/1"]
    argv += ["-device", "virtserialport,chardev=out"]
    for tag, path, options in (
        ("root", Path("/"), ",readonly=on"),
        ("modules", kernel.modules, ",readonly=on"),
        ("lab", folder, ""),
        ("output", output.resolve(), ""),
    ):
        # Several of the machine's filesystems are below one share: remap keeps their inodes apart.
        shared = f"local,id={tag},path={str(path).replace(',', ',,')},security_model=none,multidevs=remap{options}"
        argv += ["-fsdev", shared, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return argv


def _copy(told: BinaryIO) -> None:
    while piece := told.read1(1 << 16):  # type: ignore[attr-defined]
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


def _tail(console: Path) -> str:
    return console.read_text(errors="replace")[-3000:].strip() if console.exists() else ""
