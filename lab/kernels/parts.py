"""Debian's kernels, downloaded and unpacked below .kernel-lab, not installed: `python -m lab.kernels.parts [SUITE]`."""

from __future__ import annotations

import fcntl
import lzma
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabUnavailable
from lab.isolation import search_path
from lab.packages import Apt, is_older, made, modules_of, pack

FOLDER = Path(__file__).parents[2] / ".kernel-lab"
SOURCES = Path(__file__).parent / "sources"
HOW = "run as root: tools/prepare kernels"

SUITES = ("bookworm", "bookworm-backports", "trixie-backports")
"""Linux 6.1, 6.12, and the newest that Debian has for its stable release."""
PACKAGE = "linux-image-amd64"  # the flavour for clouds has no 9p
MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "overlay", "9pnet_virtio", "9p")
PROGRAMS = ("qemu-system-x86_64", "busybox", "cpio", "depmod")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One that is unpacked."""

    suite: str
    folder: Path

    @property
    def image(self) -> Path:
        """What is booted."""
        return next(self.folder.rglob("vmlinuz*"))

    @property
    def modules(self) -> Path:
        """Its lib/modules/RELEASE."""
        # Beside it, in older ones, is the folder of the debugger's symbols.
        return next(self.folder.rglob("lib/modules/*/kernel")).parent

    @property
    def initramfs(self) -> Path:
        """Mounts the machine's root."""
        return self.folder / "initramfs.gz"


def check() -> None:
    """Raise LabUnavailable unless the programs are there that a lab takes."""
    for program in PROGRAMS:
        if shutil.which(program, path=search_path()) is None:
            raise LabUnavailable(f"{program} is not installed", HOW)


def fetch(suite: str = SUITES[0]) -> Kernel:
    """A suite's kernel; what is missing or out of date is made. Blocks: some 20 s the first time. Raises LabError."""
    check()
    FOLDER.mkdir(exist_ok=True)
    kernel = Kernel(suite, FOLDER / suite)
    with (FOLDER / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kernel.folder.exists():
            apt = Apt(FOLDER / f"apt-{suite}", suite)
            image = apt.dependency(PACKAGE, "linux-image-")
            # Before Linux 7 all is in one package.
            apt.unpack([image, *apt.dependencies(image, suffix=image.removeprefix("linux-image"))], kernel.folder)
            apt.clean()
        if is_older(kernel.initramfs, SOURCES / "init", kernel.modules):
            _pack_initramfs(kernel)
    return kernel


def _pack_initramfs(kernel: Kernel) -> None:
    root = kernel.folder / "initramfs"
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("bin", "modules", "proc", "machine", "written", "root"):
        (root / folder).mkdir(parents=True)
    shutil.copy(shutil.which("busybox", path=search_path()) or "", root / "bin")
    shutil.copy(SOURCES / "init", root)
    (root / "init").chmod(0o755)
    order = []
    for file in modules_of(kernel.modules.parents[2], kernel.modules.name, MODULES):
        packed = file.suffix == ".xz"  # insmod of busybox unpacks nothing
        name = file.stem if packed else file.name
        octets = file.read_bytes()
        (root / "modules" / name).write_bytes(lzma.decompress(octets) if packed else octets)
        order.append(f"{name}\n")
    (root / "modules/order").write_text("".join(order))
    pack(root, kernel.initramfs)


if __name__ == "__main__":
    sys.exit(made(lambda: [fetch(suite) for suite in sys.argv[1:] or SUITES[:1]]))
