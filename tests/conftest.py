import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from lab import isolation

ROOT = Path(__file__).parent.parent

# How long an example takes tells how busy the machine is.
hypothesis.settings.register_profile("sami", deadline=None)
hypothesis.settings.load_profile("sami")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-step",
        action="store_true",
        help="in test_kill.py, kill agents before every step that lab.mortal counts, not only before some",
    )


@pytest.fixture
def world() -> None:
    """Fails, and does not skip, outside of a world: a test that did not run proves nothing."""
    if not isolation.is_inside():
        pytest.fail(
            "this test makes network namespaces; run: python -m lab.isolation -- python -m pytest tests",
            pytrace=False,
        )


@pytest.fixture
def machine_root() -> None:
    """Skips where nobody can become another user: for an ordinary user all tests run as an ordinary user."""
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        pytest.skip("only the machine's root can become another user; here every test runs as an ordinary user")


@pytest.fixture(scope="session")
def open_clone() -> Iterator[Path]:
    """This clone where an ordinary user can read it: root's home, where many clone, is root's alone."""
    if all(parent.stat().st_mode & 0o001 for parent in ROOT.parents):
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="sami-clone-") as folder:  # the mount ends with the world
        Path(folder).chmod(0o755)
        place = Path(folder, "clone")
        place.mkdir()
        subprocess.run(["mount", "--bind", ROOT, place], check=True)
        yield place
        subprocess.run(["umount", "--lazy", place], check=True)
