"""The report, and its reference page: whatever a report can hold is told there."""

from __future__ import annotations

import ast
import pathlib

import pytest

from sami_plugin.model.migration import Outcome, Phase
from sami_plugin.model.report import NAMES_PER_REASON, SPANS, Report
from sami_plugin.model.results import WORDS, Reason

ROOT = pathlib.Path(__file__).parents[3]
PAGE = (ROOT / "doc" / "source" / "reference" / "report.rst").read_text()
WRITERS = [
    ROOT / "sami_plugin" / name
    for name in ("handover/source.py", "handover/destination.py", "arriving.py", "session.py")
]


def new(role: str = "source") -> Report:
    return Report("session", "guest", role, "host-a", "host-b")


def written() -> tuple[set[str], set[str]]:
    """Steps and counts that the sessions write, as their source says."""
    steps, counts = set(), set()
    for path in WRITERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "note":
                steps |= {each.value for each in node.args if isinstance(each, ast.Constant)}
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.value, ast.Dict)
                and "_SAID" in ast.unparse(node.target)
            ):
                steps |= {each.value for each in node.value.values if isinstance(each, ast.Constant)}
            if isinstance(node, ast.FunctionDef) and node.name in ("_counts", "counts"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Dict):
                        counts |= {key.value for key in inner.keys if isinstance(key, ast.Constant)}
    return steps, counts


def test_page_tells_every_field() -> None:
    assert [field for field in new().as_dict() if f"``{field}``" not in PAGE] == []


def test_page_tells_every_step_and_count() -> None:
    steps, counts = written()
    assert {"asked", "ended", "proved", "in sync", "source purged"} <= steps
    assert {"exported", "imported", "left_behind"} <= counts
    assert [word for word in sorted(steps | counts) if f"``{word}``" not in PAGE] == []


def test_page_tells_every_outcome_phase_and_span() -> None:
    words = [each.value for each in Outcome] + [each.value for each in Phase]
    words += [f"{since} to {until}" for spans in SPANS.values() for since, until in spans]
    assert [word for word in words if f"``{word}``" not in PAGE] == []


def test_page_tells_every_reason() -> None:
    assert [words for reason, words in WORDS.items() if reason is not Reason.NONE and f"* {words}\n" not in PAGE] == []


def test_page_tells_how_many_flows_are_named() -> None:
    assert f"the first {NAMES_PER_REASON} of them" in PAGE


def test_step_is_noted_the_first_time() -> None:
    report = new()
    report.step("asked", 100.0, 1.0)
    report.step("asked", 200.0, 2.0)
    assert report.steps == {"asked": (100.0, 1.0)}


@pytest.mark.parametrize(("role", "since", "until"), [(role, *span) for role, spans in SPANS.items() for span in spans])
def test_span_is_given_where_both_steps_happened(role: str, since: str, until: str) -> None:
    report = new(role)
    report.step(since, 100.0, 1.0)
    assert report.as_dict()["milliseconds"] == {}
    report.step(until, 0.0, 1.0125)
    assert report.as_dict()["milliseconds"][f"{since} to {until}"] == 12.5


def test_names_are_limited_and_their_count_is_not() -> None:
    report = new()
    for start in range(0, 40, 15):
        report.name("refused: why", 15, tuple(f"flow {number}" for number in range(start, start + 15)))
    assert report.named["refused: why"]["count"] == 45
    assert report.named["refused: why"]["flows"] == [f"flow {number}" for number in range(20)]
