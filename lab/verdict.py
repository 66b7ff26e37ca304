"""Did a connection survive? Pure functions on what a receiver logged."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

FIRST_BYTES_WITHIN_SECONDS = 5.0
WINDOW_SECONDS = 2.0
LEAST_WATCHED_SECONDS = 2 * WINDOW_SECONDS
WATCHED_SECONDS = 12.0


class Sample(NamedTuple):
    """At `time` (CLOCK_MONOTONIC seconds) the receiver had taken `total` bytes since its start."""

    time: float
    total: int


def parse_samples(text: str) -> list[Sample]:
    """The samples of a log of lab/programs.py; a last line that is still being written is left out."""
    whole = text[: text.rfind("\n") + 1]
    return [Sample(float(time), int(total)) for time, total in (line.split() for line in whole.splitlines())]


def has_survived(samples: Sequence[Sample], cut_over_at: float, watched_seconds: float = WATCHED_SECONDS) -> bool:
    """True when the receiver got new bytes within 5 s of the cut-over, and from then on in every 2 s, wherever they
    begin, until 12 s after it. Samples that end earlier prove nothing, hence False.

    Raises ValueError for less than 4 s: in one window what was left in the receive buffer would do for life.
    """
    if watched_seconds < LEAST_WATCHED_SECONDS:
        raise ValueError(f"{watched_seconds} s: a receive buffer would do for life; watch {LEAST_WATCHED_SECONDS} s")
    if not samples or samples[-1].time < cut_over_at + watched_seconds:
        return False
    end = cut_over_at + watched_seconds
    growths = [time for time in growth_times(samples) if cut_over_at < time <= end]
    if not growths or growths[0] > cut_over_at + FIRST_BYTES_WITHIN_SECONDS:
        return False
    moments = [*growths, end]
    return all(later - earlier <= WINDOW_SECONDS for earlier, later in pairwise(moments))


def longest_stall_seconds(samples: Sequence[Sample], paused_at: float, until: float | None = None) -> float:
    """The longest time from the pause on (up to `until`, or the last sample) in which the byte count did not grow."""
    end = until if until is not None else (samples[-1].time if samples else paused_at)
    growths = [time for time in growth_times(samples) if time <= end]
    before = [time for time in growths if time <= paused_at]
    moments = [max(before, default=paused_at), *(time for time in growths if time > paused_at), end]
    return max(later - earlier for earlier, later in pairwise(moments))


def growth_times(samples: Iterable[Sample]) -> list[float]:
    """The times at which the byte count was larger than in the sample before."""
    times, last = [], None
    for sample in samples:
        if last is not None and sample.total > last:
            times.append(sample.time)
        last = sample.total
    return times
