"""At which writes of its journal an agent is killed, while a guest goes through a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

MOST_WRITES = 60
"""More than a session writes."""


def writes(config: pytest.Config, chosen: Sequence[int], deaths: Sequence[bool]) -> Iterator[int]:
    """Those chosen, or with --every-write all, and so each gap between two, up to one that the
    agent does not come to.

    Of each it has to be added to `deaths` whether the agent died at it.
    """
    if not config.getoption("--every-write"):
        yield from chosen
        return
    for write in range(MOST_WRITES):
        yield write
        if not deaths[-1]:
            return
    raise AssertionError(f"the session writes more than {MOST_WRITES} times")
