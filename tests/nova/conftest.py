from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import isolation
from lab.errors import LabUnavailable
from lab.openstack import parts
from lab.openstack.lab import OpenStackLab
from lab.openstack.sami import Sami

LOGS = Path("build/test-nova/logs")


@pytest.fixture(scope="session")
def openstack_here() -> None:
    """Skips where the machine has no OpenStack for a lab, saying what to run; fails outside of a world."""
    try:
        parts.check()
    except LabUnavailable as error:
        pytest.skip(str(error))
    if not isolation.is_inside():
        pytest.fail("run: python -m lab.isolation -- python -m pytest tests/nova", pytrace=False)


@pytest.fixture(scope="session")
def lab(openstack_here: None) -> Iterator[OpenStackLab]:
    """One for all tests; its logs stay in LOGS."""
    with OpenStackLab(logs=LOGS) as lab:
        yield lab


@pytest.fixture(scope="session")
def sami(lab: OpenStackLab) -> Iterator[Sami]:
    """On all hosts from the first test on that asks for it; `Sami.away` takes agents and hooks away for a while."""
    with Sami(lab, arrival_limit=20, open_seconds=8) as running:
        yield running
