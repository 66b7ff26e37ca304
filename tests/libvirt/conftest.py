from collections.abc import Iterator

import pytest

from lab import isolation
from lab.errors import LabUnavailable
from lab.libvirt import parts
from lab.libvirt.lab import LibvirtLab


@pytest.fixture(scope="session")
def libvirt_here() -> None:
    """Skips where the machine has no libvirt for a lab, saying what to run; fails outside of a world."""
    try:
        parts.check()
    except LabUnavailable as error:
        pytest.skip(str(error))
    if not isolation.is_inside():
        pytest.fail("run: python -m lab.isolation -- python -m pytest tests/libvirt", pytrace=False)


@pytest.fixture(scope="module")
def lab(libvirt_here: None) -> Iterator[LibvirtLab]:
    """One lab of two hosts for all tests of a module."""
    with LibvirtLab() as lab:
        yield lab
