from collections.abc import Callable
from typing import Any

import pytest

from lab.libvirt.figures import Move, difference_interval, faults, ratio_interval, result
from lab.libvirt.soak import arrival


def with_sami(gap: float = 100.0, **others: Any) -> Move:
    good = {"complete_after_pause_ms": 5.0, "is_complete_before_resume": True}
    return Move(True, "a to b", 1.0, 80.0, {"tcp": gap, "udp": gap / 2}, 30.0, **(good | others))


def without(gap: float = 100.0) -> Move:
    return Move(False, "a to b", 1.0, 80.0, {"tcp": gap, "udp": gap / 2}, 30.0)


def of(*pairs: tuple[Move, Move]) -> dict[str, Any]:
    return result([move for pair in pairs for move in pair], pairs, {})


def report(**steps: float) -> dict[str, Any]:
    return {"steps": [{"step": name.replace("_", " "), "monotonic": at} for name, at in steps.items()]}


def test_a_good_run_holds() -> None:
    made = of((without(), with_sami()), (without(110), with_sami(105)))
    assert faults(made) == []
    assert made["migrations"] == 2
    assert made["pause_to_complete_ms"] == {"median": 5.0, "p99": 5.0, "max": 5.0}
    assert made["gap_ms"]["without_firewall"] == 105
    assert made["gap_ms"]["udp"]["with_sami"] == 51.2


@pytest.mark.parametrize(
    "move",
    [
        with_sami(lost=("tcp/4/guest to the guest",)),
        with_sami(is_complete_before_resume=False),
        with_sami(complete_after_pause_ms=None, is_complete_before_resume=False),
    ],
)
def test_one_bad_migration_is_enough(move: Move) -> None:
    good = [(without(), with_sami())] * 49
    assert len(faults(of(*good, (without(), move)))) == 1


def test_move_whose_zone_came_late_counts_apart() -> None:
    late = with_sami(had_zone=False, is_complete_before_resume=False, complete_after_pause_ms=300.0)
    made = of((without(), with_sami()), (without(), late))
    assert (made["moves_without_zone"], made["complete_before_resume_share"]) == (1, 1)
    assert faults(made) == []


def test_run_of_which_nothing_is_known_does_not_hold() -> None:
    made = result([], [], {})
    assert made["gap_ms"] is None
    assert len(faults(made)) == 2


def test_gap_that_is_longer_for_sure_does_not_hold() -> None:
    made = of(*[(without(100 + n), with_sami(110 + n)) for n in range(10)])
    assert [fault.split(":")[0] for fault in faults(made)] == ["the gap is longer than without firewall"]


def test_gap_that_may_be_chance_holds_only_while_the_medians_are_near() -> None:
    gaps = [(100.0, 300.0), (300.0, 100.0), (100.0, 120.0), (300.0, 320.0), (200.0, 215.0)]
    assert faults(of(*[(without(one), with_sami(other)) for one, other in gaps])) == []
    far = of(*[(without(one), with_sami(other + 20)) for one, other in gaps])
    assert far["gap_ms"]["ratio_low"] < 1
    assert faults(far) == ["the gap is 35 ms longer than without firewall (medians)"]


@pytest.mark.parametrize("interval", [ratio_interval, difference_interval])
def test_interval_is_the_same_for_the_same_pairs_and_holds_the_value(interval: Callable[..., Any]) -> None:
    pairs = [(100.0 + 7 * n % 40, 105.0 + 11 * n % 40) for n in range(20)]
    value, low, high = interval(pairs)
    assert low <= value <= high
    assert interval(pairs) == (value, low, high)


def test_flows_that_were_complete_before_the_guest_ran() -> None:
    assert arrival(report(scope_known=1.0, complete=2.01), paused=2.0, resumed=2.2) == {
        "had_zone": True,
        "complete_after_pause_ms": pytest.approx(10),
        "is_complete_before_resume": True,
    }


def test_zone_that_came_after_the_guest_ran_is_a_late_one() -> None:
    shown = arrival(report(scope_known=2.5, complete=2.6), paused=2.0, resumed=2.2)
    assert (shown["had_zone"], shown["is_complete_before_resume"]) == (False, False)


def test_zone_that_never_came_is_a_failure() -> None:
    shown = arrival(report(asked=1.0), paused=2.0, resumed=2.2)
    assert (shown["had_zone"], shown["complete_after_pause_ms"]) == (True, None)
