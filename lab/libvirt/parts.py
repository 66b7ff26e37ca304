"""What the lab takes beyond Debian's packages, made below .libvirt-lab of this clone: `python -m lab.libvirt.parts`.

A newer QEMU and a guest's kernel are downloaded and unpacked, not installed; apt works in folders of the lab's own, so
the machine's sources stay as they are. The C programs and the guest's initramfs are built of `sources`. What is there
and up to date stays; a run that finds all of it takes no time. `tools/prepare libvirt` runs it, after it has installed
the packages.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.errors import CommandFailed, LabError, LabUnavailable
from lab.isolation import search_path

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

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


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
        if _is_older(program, source):
            print(f"Building {program.name}")
            _run(["gcc", "-O2", "-Wall", "-static", "-o", program, source])
    if _is_older(INITRAMFS, SOURCES / "init", STREAMS, DIRTY, KERNEL):
        print(f"Building {INITRAMFS.name}")
        _pack_initramfs(FOLDER / "initramfs")


class Apt:
    """apt-get with lists, cache and sources of its own below `folder`, and the mirror that the machine uses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._options = [
            f"-oDir::Etc::sourcelist={folder}/sources.list",
            "-oDir::Etc::sourceparts=-",
            f"-oDir::State::lists={folder}/lists",
            f"-oDir::Cache={folder}",
            "-oAPT::Sandbox::User=root",
        ]

    def unpack(self, packages: Sequence[str], target: Path, suite: str = "") -> None:
        """Download packages of the release (or of its `suite`) and unpack them into `target`, all or nothing."""
        print(f"Downloading {' '.join(packages)}")
        self._update()
        debs = self._folder / target.name
        shutil.rmtree(debs, ignore_errors=True)
        debs.mkdir()
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        _run(["apt-get", *self._options, "-qq", "-t", release + suite, "download", *packages], cwd=debs)
        new = target.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        for deb in debs.glob("*.deb"):
            _run(["dpkg", "-x", deb, new])
        new.rename(target)

    def dependency(self, package: str, prefix: str) -> str:
        """The first package that `package` depends on whose name begins with `prefix`."""
        self._update()
        for line in _run(["apt-cache", *self._options, "depends", package]).splitlines():
            word, _, name = line.strip().partition(": ")
            if word == "Depends" and name.startswith(prefix):
                return name
        raise LabError(f"the package {package} depends on no {prefix}*")

    def clean(self) -> None:
        """Remove lists and downloads."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _update(self) -> None:
        if (self._folder / "lists").exists():
            return
        for name in ("lists/partial", "archives/partial"):
            (self._folder / name).mkdir(parents=True)
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        wanted = ["--format", "$(REPO_URI)", f"Codename: {release}", "Component: main", "Created-By: Packages"]
        mirrors = _run(["apt-get", "indextargets", *wanted]).split()
        if not mirrors:
            raise LabError(f"apt knows no mirror of {release}; check /etc/apt/sources.list, then: apt-get update")
        suites = (release, f"{release}-backports")
        lines = [f"deb [signed-by={KEYS}] {mirrors[0]} {suite} main\n" for suite in suites]
        (self._folder / "sources.list").write_text("".join(lines))
        _run(["apt-get", *self._options, "-qq", "update"])


def _check_libraries(program: Path) -> None:
    missing = [line.split()[0] for line in _run(["ldd", program]).splitlines() if "not found" in line]
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
    modules = _modules()
    for module in modules:
        shutil.copy(module, root / "modules")
    (root / "modules/order").write_text("".join(f"{module.name}\n" for module in modules))
    pack(root, INITRAMFS)


def pack(root: Path, archive: Path) -> None:
    """Make a compressed archive of a folder, as the kernel unpacks one at its start; all or nothing."""
    files = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    new = archive.with_suffix(".new")
    with new.open("wb") as packed:
        made = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=files.encode(), capture_output=True, check=True
        )
        subprocess.run(["gzip", "-9n"], input=made.stdout, stdout=packed, check=True)
    new.rename(archive)


def _modules() -> list[Path]:
    """The kernel's module files that MODULES need, in the order to load them."""
    version = kernel_image().name.removeprefix("vmlinuz-")
    _run(["depmod", "-b", KERNEL, version])
    order: list[Path] = []
    for name in MODULES:
        for line in _run(["modprobe", "-d", KERNEL, "-S", version, "--show-depends", name]).splitlines():
            verb, _, path = line.strip().partition(" ")
            if verb == "insmod" and Path(path) not in order:
                order.append(Path(path))
    return order


def _is_older(made: Path, *sources: Path) -> bool:
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def _run(argv: Sequence[str | Path], cwd: Path | None = None) -> str:
    environment = os.environ | {"PATH": search_path(), "LC_ALL": "C"}
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise CommandFailed([str(word) for word in argv], done.returncode, done.stderr)
    return done.stdout


def main(make: Callable[[], None] = fetch) -> int:
    """Fetch and build; the exit code says whether all is there."""
    try:
        make()
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
