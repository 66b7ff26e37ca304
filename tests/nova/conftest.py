from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import isolation
from lab.errors import LabUnavailable
from lab.openstack import parts, traffic
from lab.openstack.guest import Guest
from lab.openstack.lab import OpenStackLab
from lab.openstack.sami import Sami
from lab.traffic import Traffic
from tests.nova.case import Case, downloading, goes_on

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


@pytest.fixture(scope="session")
def movers() -> list[tuple[Guest, Traffic]]:
    return []


@pytest.fixture
def case(
    lab: OpenStackLab, sami: Sami, movers: list[tuple[Guest, Traffic]], request: pytest.FixtureRequest
) -> Iterator[Case]:
    """One guest with one download goes through everything. After a connection that died there is another one, after a
    test that failed another guest."""
    if not movers:
        movers.append(downloading(lab, f"mover-{request.session.testsfailed}", "a"))
    guest, flow = movers[-1]
    if not goes_on(flow):
        flow.stop()
        flow = traffic.download(lab, guest)
        movers.append((guest, flow))
    failed = request.session.testsfailed
    yield Case(lab, sami, guest, flow)
    if request.session.testsfailed > failed:
        movers.clear()
        lab.remove_guest(guest)
