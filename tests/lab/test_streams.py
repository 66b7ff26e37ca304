"""What is concluded from a stream's log, without a kernel."""

import math

import numpy as np
import pytest

from lab.libvirt.streams import ARRIVAL, Arrivals, judge

MS = 1000
BEGIN_US = 50_000_000
GUEST_CLOCK_US = 7_000_000  # what the guest's clock says when the machine's says BEGIN_US


def log(milliseconds: int, pause_at: int = 0, pause: int = 0) -> Arrivals:
    """One packet each way every millisecond; at `pause_at` the guest and its clock stand for `pause` milliseconds."""
    rows = np.zeros(milliseconds, ARRIVAL)
    numbers = np.arange(milliseconds, dtype="u8")
    stood = np.where(numbers >= pause_at, pause, 0).astype("u8") * MS
    rows["at_us"] = BEGIN_US + numbers * MS + stood
    rows["sent_us"] = GUEST_CLOCK_US + numbers * MS
    rows["arrived_us"] = rows["sent_us"] - np.uint64(100)
    rows["sequence"] = rows["highest"] = rows["received"] = numbers + 1
    return rows


def seconds(milliseconds: float) -> float:
    return BEGIN_US / 1e6 + milliseconds / 1000


def test_nothing_is_lost_of_a_steady_stream():
    report = judge(log(1000), seconds(0), seconds(999))
    for direction in (report.to_outside, report.to_guest):
        assert (direction.lost, direction.duplicates) == (0, 0)
        assert direction.longest_gap_ms == pytest.approx(1, abs=0.2)


def test_a_pause_that_the_guest_does_not_see_is_a_gap_in_both_directions():
    report = judge(log(1000, pause_at=500, pause=300), seconds(0), seconds(1299))
    assert report.to_outside.longest_gap_ms == pytest.approx(301)
    assert report.to_outside.gap_began_at == pytest.approx(seconds(499))
    assert report.to_guest.longest_gap_ms == pytest.approx(301, abs=1)


def test_packets_that_were_under_way_for_long_do_not_stretch_the_guests_clock():
    rows = log(1000)
    rows["at_us"][300:600] = rows["at_us"][600]  # held up, then all at once
    report = judge(rows, seconds(0), seconds(999))
    assert report.to_outside.longest_gap_ms == pytest.approx(301)
    assert report.to_guest.longest_gap_ms == pytest.approx(1, abs=0.2)


def test_losses_and_duplicates_are_told_apart_in_both_directions():
    rows = log(1000)
    rows["received"][500:] -= np.uint64(20)  # 30 lost on the way to the guest, 10 came twice
    rows["duplicates"][500:] = 10
    rows = np.concatenate([rows[:100], rows[140:], rows[-5:]])  # 40 lost and 5 doubled on the way back
    report = judge(rows, seconds(0), seconds(999))
    assert (report.to_guest.lost, report.to_guest.duplicates) == (30, 10)
    assert (report.to_outside.lost, report.to_outside.duplicates) == (40, 5)


def test_silence_at_the_end_is_a_gap():
    report = judge(log(1000), seconds(0), seconds(5000))
    assert report.to_outside.longest_gap_ms == pytest.approx(4001, abs=1)


def test_a_stream_without_a_packet_has_an_endless_gap():
    report = judge(log(1000), seconds(2000), seconds(3000))
    assert report.to_outside.received == report.to_guest.received == 0
    assert math.isinf(report.to_outside.longest_gap_ms)
    assert math.isinf(report.to_guest.longest_gap_ms)
