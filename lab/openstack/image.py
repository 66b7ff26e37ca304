"""A second image: a guest that SSH gets into, and that asks the cloud for its address and for who may log in.

It is the guest of `lab.libvirt` with one archive more behind its initramfs: another init, and Debian's dropbear, which
is unpacked and not installed. `python -m lab.openstack.image` makes the archive; `tools/prepare tempest` runs it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from lab.errors import LabError, LabUnavailable
from lab.libvirt import parts as libvirt_parts
from lab.libvirt.guest import KERNEL_WORDS
from lab.openstack import content, parts
from lab.openstack.api import Cloud
from lab.packages import Apt, is_older, made, pack

NAME = "guest-that-asks"
USER = "root"
INIT = parts.SOURCES / "init-that-asks"
DROPBEAR = parts.FOLDER / "dropbear"
# What of it is not on every machine that the lab runs on: the C library is.
PACKAGES = ("dropbear-bin", "libtomcrypt1", "libtommath1")
ARCHIVE = parts.FOLDER / "image.gz"
HOW = "run as root: tools/prepare tempest"


def check() -> None:
    """Raise LabUnavailable where the archive is not there."""
    if not ARCHIVE.exists():
        raise LabUnavailable(f"{ARCHIVE} is not there", HOW)


def fetch() -> None:
    """Make what is missing or out of date. Blocks some seconds. Raises LabError."""
    if not DROPBEAR.exists():
        apt = Apt(parts.FOLDER / "apt")
        apt.unpack(PACKAGES, DROPBEAR)
        apt.clean()
    if is_older(ARCHIVE, INIT, DROPBEAR):
        print(f"Building {ARCHIVE.name}")
        _pack(parts.FOLDER / "image")


def register(cloud: Cloud) -> str:
    """Have Glance know it; the image's id. May be repeated."""
    kernel = content.image(cloud, "guest-kernel", libvirt_parts.kernel_image().read_bytes())
    octets = libvirt_parts.INITRAMFS.read_bytes() + ARCHIVE.read_bytes()
    ramdisk = content.image(cloud, f"{NAME}-ramdisk", octets)
    disk = bytes(content.DISK_OCTETS)
    return content.image(cloud, NAME, disk, kernel_id=kernel, ramdisk_id=ramdisk, os_command_line=KERNEL_WORDS)


def _pack(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("bin", "etc/dropbear", "lib", "lib64", "root"):
        (root / folder).mkdir(parents=True)
    shutil.copy(INIT, root / "init")
    (root / "init").chmod(0o755)
    (root / "root").chmod(0o700)
    (root / "etc/passwd").write_text(f"{USER}:x:0:0::/root:/bin/sh\n")
    program = DROPBEAR / "usr/sbin/dropbear"
    shutil.copy(program, root / "bin")
    for name, file in _libraries(program).items():
        shutil.copy(file, root / ("lib64" if name.startswith("ld-linux") else "lib") / name)
    pack(root, ARCHIVE)


def _libraries(program: Path) -> dict[str, Path]:
    """What the program is linked with, by name."""
    places = DROPBEAR / "usr/lib/x86_64-linux-gnu"
    said = subprocess.run(
        ["ldd", program], capture_output=True, text=True, check=True, env={"LD_LIBRARY_PATH": str(places)}
    ).stdout
    found = {}
    for line in said.splitlines():
        name, _, place = line.strip().partition(" => ")
        path = (place or name).partition(" (")[0]
        if path.startswith("/"):
            found[Path(name.partition(" (")[0]).name] = Path(path)
        elif "linux-vdso" not in name:
            raise LabError(f"{program} lacks {name}; {HOW}")
    return found


if __name__ == "__main__":
    sys.exit(made(fetch))
