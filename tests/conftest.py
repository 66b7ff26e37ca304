from pathlib import Path

import pytest

from lab import isolation


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
