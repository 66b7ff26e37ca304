"""The releases of Nova that are tried, each in an environment of its own below .nova-tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.errors import CommandFailed, LabUnavailable

CLONE = Path(__file__).parents[2]
FOLDER = CLONE / ".nova-tests"
REQUIREMENTS = Path(__file__).parent / "requirements"
DEBIANS_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True, slots=True)
class Release:
    """`is_debians`: the libraries are those of Debian's own packages, and pip adds what they do not have."""

    name: str
    what: str
    is_debians: bool
    is_eventlet: bool

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return REQUIREMENTS / f"nova-{self.name}.txt"


RELEASES = {
    release.name: release
    for release in (
        Release("26", "26.3.0 (Zed), Debian 12's libraries, eventlet", is_debians=True, is_eventlet=True),
        Release("34", "34.0.0 (2026.2), the newest libraries, native threads", is_debians=False, is_eventlet=False),
    )
}


def prepare(release: Release) -> None:
    """Make the release's environment, unless it is there; put this clone's SAMI into it in any case.

    Blocks: the first time some minutes. Raises LabError.
    """
    interpreter = DEBIANS_PYTHON if release.is_debians else sys.executable
    if release.is_debians:
        _check_debian()
    stamp = release.folder / "prepared"
    whole = f"{release.folder} {interpreter} {release}\n{release.requirements.read_text()}"
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != fingerprint:
        shutil.rmtree(release.folder, ignore_errors=True)
        words = ["--system-site-packages"] if release.is_debians else []
        _run([interpreter, "-m", "venv", *words, str(release.folder)])
        words = ["--no-deps"] if release.is_debians else []
        _pip(release, "install", *words, "--requirement", str(release.requirements))
        _link_data(release)
        stamp.write_text(fingerprint)
    _pip(release, "install", "--no-deps", "--force-reinstall", str(CLONE))


def _check_debian() -> None:
    for package, module in (("python3-nova", "nova"), ("python3-placement", "placement")):
        found = subprocess.run([DEBIANS_PYTHON, "-I", "-c", f"import {module}"], capture_output=True, check=False)
        if found.returncode:
            raise LabUnavailable(f"{package} is not installed", "run as root: tools/prepare openstack")


def _link_data(release: Release) -> None:
    """Nova's tests look for api-paste.ini beside the package; in a wheel it is a file of the environment."""
    (package,) = release.folder.glob("lib/python3*/site-packages/nova")
    (package.parent / "etc").symlink_to(release.folder / "etc")


def _pip(release: Release, *words: str) -> None:
    _run([str(release.python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words])


def _run(argv: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd=CLONE)
    if done.returncode:
        raise CommandFailed(argv, done.returncode, done.stderr[-4000:])
