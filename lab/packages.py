"""Debian packages that are downloaded and unpacked, not installed, and what the labs make of kernels among them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.errors import CommandFailed, LabError
from lab.isolation import search_path

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Apt:
    """apt-get with lists, cache and sources of its own below `folder`, and the mirror that the machine uses."""

    def __init__(self, folder: Path, *suites: str) -> None:
        """Without `suites` it knows the machine's release and that one's backports."""
        self._folder = folder
        release = _release()
        self._suites = suites or (release, f"{release}-backports")
        self._options = [
            f"-oDir::Etc::sourcelist={folder}/sources.list",
            "-oDir::Etc::sourceparts=-",
            f"-oDir::State::lists={folder}/lists",
            f"-oDir::Cache={folder}",
            "-oAPT::Sandbox::User=root",
        ]

    def unpack(self, packages: Sequence[str], target: Path, suite: str = "") -> None:
        """Download packages of the first suite (or of its `suite`) and unpack them into `target`, all or nothing."""
        print(f"Downloading {' '.join(packages)}")
        self._update()
        debs = self._folder / target.name
        shutil.rmtree(debs, ignore_errors=True)
        debs.mkdir()
        run(["apt-get", *self._options, "-qq", "-t", self._suites[0] + suite, "download", *packages], cwd=debs)
        new = target.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        for deb in debs.glob("*.deb"):
            run(["dpkg", "-x", deb, new])
        new.rename(target)

    def dependency(self, package: str, prefix: str) -> str:
        """The first package that `package` depends on whose name begins with `prefix`."""
        found = self.dependencies(package, prefix)
        if not found:
            raise LabError(f"the package {package} depends on no {prefix}*")
        return found[0]

    def dependencies(self, package: str, prefix: str = "", suffix: str = "") -> list[str]:
        """The packages that `package` depends on whose names begin and end so."""
        self._update()
        lines = run(["apt-cache", *self._options, "depends", package]).splitlines()
        told = [line.strip().partition("Depends: ") for line in lines]
        return [name for before, _, name in told if not before and name.startswith(prefix) and name.endswith(suffix)]

    def clean(self) -> None:
        """Remove lists and downloads."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _update(self) -> None:
        if (self._folder / "lists").exists():
            return
        for name in ("lists/partial", "archives/partial"):
            (self._folder / name).mkdir(parents=True)
        release = _release()
        wanted = ["--format", "$(REPO_URI)", f"Codename: {release}", "Component: main", "Created-By: Packages"]
        mirrors = run(["apt-get", "indextargets", *wanted]).split()
        if not mirrors:
            raise LabError(f"apt knows no mirror of {release}; check /etc/apt/sources.list, then: apt-get update")
        lines = [f"deb [signed-by={KEYS}] {mirrors[0]} {suite} main\n" for suite in self._suites]
        (self._folder / "sources.list").write_text("".join(lines))
        run(["apt-get", *self._options, "-qq", "update"])


def _release() -> str:
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def modules_of(base: Path, release: str, names: Sequence[str]) -> list[Path]:
    """The files that these modules of a kernel need, in the order to load them; its lib/modules is below `base`."""
    run(["depmod", "-b", base, release])
    order: list[Path] = []
    for name in names:
        for line in run(["modprobe", "-d", base, "-S", release, "--show-depends", name]).splitlines():
            verb, _, path = line.strip().partition(" ")
            if verb == "insmod" and Path(path) not in order:
                order.append(Path(path))
    return order


def pack(root: Path, target: Path) -> None:
    """Make an initramfs of all that is below `root`."""
    files = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    with target.with_suffix(".new").open("wb") as packed:
        archive = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=files.encode(), capture_output=True, check=True
        )
        subprocess.run(["gzip", "-9n"], input=archive.stdout, stdout=packed, check=True)
    target.with_suffix(".new").rename(target)


def is_older(made: Path, *sources: Path) -> bool:
    """Whether it has to be made, or made anew."""
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def run(argv: Sequence[str | Path], cwd: Path | None = None) -> str:
    """What a command writes. Raises CommandFailed."""
    environment = os.environ | {"PATH": search_path(), "LC_ALL": "C"}
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise CommandFailed([str(word) for word in argv], done.returncode, done.stderr)
    return done.stdout


def made(make: Callable[[], object]) -> int:
    """Fetch and build; the exit code says whether all is there."""
    try:
        make()
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
