"""What the lab takes beyond Debian's packages, made below .libvirt-lab of this clone: `python -m lab.libvirt.parts`.

A newer QEMU and a guest's kernel are downloaded and unpacked, not installed; apt works in folders of the lab's own, so
the machine's sources stay as they are. The C programs and the guest's initramfs are built of `sources`. What is there
and up to date stays; a run that finds all of it takes no time. `tools/prepare libvirt` runs it, after it has installed
the packages.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from lab.errors import LabError, LabUnavailable
from lab.isolation import search_path
from lab.packages import Apt, is_older, made, modules_of, pack, run

FOLDER = Path(__file__).parents[2] / ".libvirt-lab"
SOURCES = Path(__file__).parent / "sources"
HOW = "run as root: tools/prepare libvirt"

# QEMU 7.2, Debian 12's, loses writes of a TCG guest that dirties memory while it migrates.
QEMU = FOLDER / "qemu"
QEMU_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
KERNEL = FOLDER / "kernel"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_net")
INITRAMFS = FOLDER / "initramfs.gz"
ENTER = FOLDER / "enter"
HOOK = FOLDER / "hook"
STREAMS = FOLDER / "streams"
DIRTY = FOLDER / "dirty"


def check() -> None:
    """Raise LabUnavailable unless everything is there that a lab takes; says what is missing and what to run."""
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"] or os.geteuid() != 0:
        raise LabUnavailable("it makes device files, and this is not the machine's root", "run it as root")
    for program in ("libvirtd", "virsh"):
        if shutil.which(program, path=search_path()) is None:
            raise LabUnavailable(f"{program} is not installed", HOW)
    if importlib.util.find_spec("libvirt") is None:
        raise LabUnavailable("libvirt-python is not in this environment", HOW)
    for part in (QEMU, KERNEL, INITRAMFS, ENTER, HOOK, STREAMS):
        if not part.exists():
            raise LabUnavailable(f"{part} is not there", HOW)


def kernel_image() -> Path:
    """The guest's kernel."""
    return next(KERNEL.glob("boot/vmlinuz-*"))


def fetch() -> None:
    """Make what is missing or out of date. Blocks: some 20 s the first time. Raises LabError."""
    FOLDER.mkdir(exist_ok=True)
    apt = Apt(FOLDER / "apt")
    if not QEMU.exists():
        apt.unpack(QEMU_PACKAGES, QEMU, suite="-backports")
        _check_libraries(QEMU / "usr/bin/qemu-system-x86_64")
    if not KERNEL.exists():
        apt.unpack([apt.dependency(KERNEL_PACKAGE, "linux-image-")], KERNEL)
    apt.clean()
    for program in (ENTER, HOOK, STREAMS, DIRTY):
        source = SOURCES / f"{program.name}.c"
        if is_older(program, source):
            print(f"Building {program.name}")
            run(["gcc", "-O2", "-Wall", "-static", "-o", program, source])
    if is_older(INITRAMFS, SOURCES / "init", STREAMS, DIRTY, KERNEL):
        print(f"Building {INITRAMFS.name}")
        _pack_initramfs(FOLDER / "initramfs")


def _check_libraries(program: Path) -> None:
    missing = [line.split()[0] for line in run(["ldd", program]).splitlines() if "not found" in line]
    if missing:
        raise LabError(f"{program} lacks {', '.join(missing)}; {HOW}")


def _pack_initramfs(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("bin", "dev", "proc", "sys", "run", "modules"):
        (root / folder).mkdir(parents=True)
    busybox = shutil.which("busybox", path=search_path())
    if busybox is None:
        raise LabUnavailable("busybox is not installed", HOW)
    for program in (Path(busybox), STREAMS, DIRTY):
        shutil.copy(program, root / "bin")
    shutil.copy(SOURCES / "init", root)
    (root / "init").chmod(0o755)
    version = kernel_image().name.removeprefix("vmlinuz-")
    modules = modules_of(KERNEL, version, MODULES)
    for module in modules:
        shutil.copy(module, root / "modules")
    (root / "modules/order").write_text("".join(f"{module.name}\n" for module in modules))
    pack(root, INITRAMFS)


if __name__ == "__main__":
    sys.exit(made(fetch))
