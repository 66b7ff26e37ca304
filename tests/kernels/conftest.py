import os

import pytest

from lab.deadline import STRETCHED


@pytest.fixture(scope="session")
def kernel_lab() -> None:
    """Skips where the machine's own kernel would be tested, which may lack what it takes."""
    if STRETCHED not in os.environ:
        pytest.skip("it takes a kernel of Debian's: make test-kernels")


@pytest.fixture(scope="session")
def machine() -> None:
    """Skips in a guest: there is no other one in it."""
    if STRETCHED in os.environ:
        pytest.skip("it boots guests, and this is one")
