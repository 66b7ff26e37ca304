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
