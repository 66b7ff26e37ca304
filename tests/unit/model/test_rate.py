"""So many at once, and so many a second in the long run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.model.rate import TokenBucket


def test_as_many_at_once_as_may_and_then_one_at_a_time() -> None:
    bucket = TokenBucket(3, 2.0)
    assert [bucket.take(100.0) for _ in range(5)] == [True, True, True, False, False]
    assert not bucket.take(100.4)
    assert bucket.take(100.5)
    assert not bucket.take(100.5)


@given(st.lists(st.floats(0, 5), max_size=200), st.integers(1, 20), st.floats(0.1, 50))
def test_never_more_than_may(pauses: list[float], at_once: int, per_second: float) -> None:
    bucket, now, taken = TokenBucket(at_once, per_second), 1000.0, 0
    for pause in pauses:
        now += pause
        taken += bucket.take(now)
        assert taken <= at_once + (now - 1000.0) * per_second + 1e-6
