"""What the demo on OpenStack says of what it measured; no lab is needed."""

from __future__ import annotations

from lab.openstack.demo import Moved, Sides, compared, faults, figures, result, table
from lab.verdict import Sample

RESUMED_AT = 10.0


def moved(*, lives: bool, rules_at: float = RESUMED_AT - 2) -> Moved:
    end = RESUMED_AT + 13
    totals = [int(min(at, end if lives else RESUMED_AT - 1) * 1000) for at in range(int(end))]
    samples = [Sample(float(at), total) for at, total in enumerate(totals)]
    return Moved("a", "b", 7.5, 3.0, 5.0, RESUMED_AT - 0.2, RESUMED_AT, rules_at, [*samples, Sample(end, totals[-1])])


def sides(without: list[Moved], ours: list[Moved], natural: list[Moved] | None = None) -> Sides:
    return {"held": {"without": without, "with": ours}, "natural": {"without": [], "with": natural or []}}


def test_figures_of_a_side() -> None:
    made = figures([moved(lives=True), moved(lives=False)])
    assert (made["migrations"], made["connections_lost"], made["migration_seconds"]) == (2, 1, 7.5)
    assert made["longest_stall_seconds"] > 10


def test_result_has_a_run_for_each_side_and_natural_timing_besides() -> None:
    turns = {"without": [5.0, 6.0, 5.2], "with": [5.4, 7.0, 5.1]}
    made = result(sides([moved(lives=False)], [moved(lives=True)], [moved(lives=True, rules_at=RESUMED_AT + 1)]), turns)
    assert set(made) == {"without", "with"}
    assert made["with"]["natural"]["rules_before_the_guest_ran"] == 0
    assert "natural" not in made["without"]
    assert made["with"]["in_turns"] == {"migrations": 3, "migration_seconds": 5.4}
    assert compared(turns).endswith("median 5.20 s without agents, 5.40 s with: +0.20 s")


def test_claim_holds_where_all_die_without_and_none_with() -> None:
    both = sides([moved(lives=False)] * 3, [moved(lives=True)] * 3)
    assert faults(both) == []
    assert "rules in force before the guest runs, with" in table(both)


def test_connection_that_died_with_sami_is_a_fault_with_either_timing() -> None:
    died, lived = moved(lives=False), moved(lives=True)
    assert faults(sides([died], [lived, died]))
    assert faults(sides([died], [lived], [died]))


def test_connections_that_live_without_sami_are_a_fault() -> None:
    assert faults(sides([moved(lives=True), moved(lives=False)], [moved(lives=True)]))


def test_rules_that_came_too_late_show_nothing() -> None:
    assert faults(sides([moved(lives=False, rules_at=RESUMED_AT + 1)], [moved(lives=True)]))
