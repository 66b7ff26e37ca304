"""Before which steps an agent is killed, as `lab.mortal` counts them, while a guest goes through a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

MOST_STEPS = 90
"""More than a session takes."""


def steps(config: pytest.Config, chosen: Sequence[int], deaths: Sequence[bool]) -> Iterator[int]:
    """Those chosen, or with --every-step all, and so each gap between two, up to one that the
    agent does not come to.

    Of each it has to be added to `deaths` whether the agent died at it.
    """
    if not config.getoption("--every-step"):
        yield from chosen
        return
    for step in range(MOST_STEPS):
        yield step
        if not deaths[-1]:
            return
    raise AssertionError(f"the session takes more than {MOST_STEPS} steps")
