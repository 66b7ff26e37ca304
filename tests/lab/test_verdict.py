import pytest

from lab.verdict import Sample, has_survived, longest_stall_seconds, parse_samples

CUT_OVER_AT = 100.0


def samples(*growths: float, end: float = 113.0) -> list[Sample]:
    """A sample every 0.1 s from 98 s to `end`; the count grew at every one of `growths`."""
    times = [round(98 + step / 10, 1) for step in range(round((end - 98) * 10) + 1)]
    return [Sample(time, sum(1000 for growth in growths if growth <= time)) for time in times]


def every(step: float, start: float, end: float) -> list[float]:
    return [start + step * number for number in range(round((end - start) / step) + 1)]


def test_a_steady_stream_survives():
    assert has_survived(samples(*every(0.5, 98, 113)), CUT_OVER_AT)


def test_a_stream_that_starts_again_within_five_seconds_survives():
    assert has_survived(samples(*every(0.5, 104.5, 113)), CUT_OVER_AT)


def test_a_stream_that_starts_again_later_died():
    assert not has_survived(samples(*every(0.5, 105.5, 113)), CUT_OVER_AT)


def test_a_window_without_bytes_is_death():
    assert not has_survived(samples(*every(0.5, 98, 106), *every(0.5, 108.5, 113)), CUT_OVER_AT)


def test_bytes_that_were_only_left_in_the_receive_buffer_are_no_life():
    assert not has_survived(samples(*every(0.5, 98, 99.5), 100.1), CUT_OVER_AT)


def test_a_watch_in_which_a_receive_buffer_would_do_for_life_is_refused():
    left_over = samples(*every(0.5, 98, 99.5), 100.1)
    assert not has_survived(left_over, CUT_OVER_AT, 4.0)
    with pytest.raises(ValueError, match="receive buffer"):
        has_survived(left_over, CUT_OVER_AT, 3.9)


def test_a_stream_that_was_not_watched_to_the_end_is_not_alive():
    assert not has_survived(samples(*every(0.5, 98, 105), end=105), CUT_OVER_AT)
    assert not has_survived([], CUT_OVER_AT)


def test_the_stall_counts_from_the_last_bytes_before_the_pause():
    assert longest_stall_seconds(samples(*every(0.5, 98, 99.5), *every(0.5, 101.5, 113)), 99.8) == pytest.approx(2.0)


def test_the_stall_of_a_dead_stream_lasts_to_the_end():
    assert longest_stall_seconds(samples(*every(0.5, 98, 99.5)), 99.8) == pytest.approx(13.5)


def test_a_stall_before_the_pause_does_not_count():
    assert longest_stall_seconds(samples(98.5, *every(0.1, 101, 113)), 101.5, until=112.9) == pytest.approx(0.1)


def test_a_line_that_is_being_written_is_left_out():
    assert parse_samples("1.5 10\n2.5 20\n3.5 3") == [Sample(1.5, 10), Sample(2.5, 20)]
