"""sami session and sami report: what the journal says."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from sami_plugin.journal.journal import Journal
from tests.unit.cli.command_line import CommandLine

GUEST, OTHER = "6ac30000-0000-4000-8000-000000000001", "6bd40000-0000-4000-8000-000000000002"
FIRST, SECOND, THIRD = (f"{digit}0000000-0000-4000-8000-000000000000" for digit in "123")
AT = 1_790_000_000.0


def report(role: str, host: str, *steps: tuple[str, float]) -> dict[str, Any]:
    return {
        "session": FIRST,
        "guest": GUEST,
        "role": role,
        "host": host,
        "peer": "host-b",
        "request_id": "req-5f2d0c2e",
        "outcome": "moved",
        "reason": "",
        "verdict": {"verdict": "ask", "policy": "AskOperator", "flows": 6, "places": 4, "losses": {"no room": 2}},
        "flows": {"exported": 100, "left_behind": 2},
        "named": {"refused: it is full": {"count": 25, "flows": ["tcp 192.0.2.7:1 > 198.51.100.1:443"]}},
        "remarks": ["skipped what is unknown here: element 9"],
        "steps": [{"step": name, "at": AT + at, "monotonic": 50 + at} for name, at in steps],
        "milliseconds": {"asked to suspended": 800.0},
    }


SOURCE = report("source", "host-a", ("asked", 0.1), ("suspended", 0.9), ("proved", 1.2))
DESTINATION = report("destination", "host-b", ("asked", 0.0), ("resumed", 1.0), ("ended", 1.3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The journal of a host that a guest left twice, the second time just now, and another one once."""
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    journal.begin(FIRST, GUEST, "source", "host-b", "asked")
    journal.record(FIRST, 1, "peer said Open", "exporting", ["StartExport"], is_durable=False)
    journal.know(FIRST, peer="host-b", ports=[{"addresses": ["192.0.2.7", "2001:db8::7"]}])
    journal.end(FIRST, "ended", "moved", SOURCE)
    journal.begin(THIRD, OTHER, "source", "host-c", "asked")
    journal.begin(SECOND, GUEST, "source", "host-b", "exporting")
    journal.record(SECOND, 1, "peer said Open", "exporting", ["StartExport", "ExportNext"], is_durable=False)
    journal.close()
    return path


@pytest.fixture
def peer_path(tmp_path: Path) -> Path:
    path = tmp_path / "peer.sqlite"
    journal = Journal(path)
    journal.begin(FIRST, GUEST, "destination", "host-a", "asked")
    journal.end(FIRST, "ended", "moved", DESTINATION)
    journal.close()
    return path


def test_list_has_the_newest_first_and_can_be_of_one_guest(sami: CommandLine, path: Path) -> None:
    assert sami("session", "list", "--journal", path, "-f", "json") == 0
    rows = json.loads(sami.out)
    assert [row["Session"] for row in rows] == [SECOND, THIRD, FIRST]
    assert rows[2]["Outcome"] == "moved"
    assert rows[0]["Outcome"] is None
    assert rows[0]["Started"].endswith("+00:00")
    assert sami("session", "list", "--journal", path, "--guest", GUEST[:4], "-f", "value", "-c", "Session") == 0
    assert sami.out.split() == [SECOND, FIRST]


def test_state_of_a_session_under_way_is_the_one_that_it_is_in_now(sami: CommandLine, path: Path) -> None:
    journal = Journal(path)
    journal.record(SECOND, 2, "peer said Answer", "copying", ["ExportNext"], is_durable=False)
    journal.close()
    assert sami("session", "list", "--journal", path, "-f", "json") == 0
    assert [row["State"] for row in json.loads(sami.out)] == ["copying", "asked", "ended"]
    assert sami("session", "show", SECOND, "--journal", path, "-f", "value", "-c", "state") == 0
    assert sami.out.strip() == "copying"


def test_journal_is_the_one_that_the_configuration_names(sami: CommandLine, path: Path, tmp_path: Path) -> None:
    file = tmp_path / "agent.conf"
    file.write_text(f"[agent]\njournal = {path}\n")
    assert sami("session", "list", "--config-file", file, "-f", "value", "-c", "Session") == 0
    assert SECOND in sami.out


@pytest.mark.parametrize("content", ["[agent]\nenterprise_number\n", "agent]\n"])
def test_wrong_configuration_is_one_line(sami: CommandLine, tmp_path: Path, content: str) -> None:
    file = tmp_path / "agent.conf"
    file.write_text(content)
    assert sami("session", "list", "--config-file", file) == 1
    assert str(file) in sami.err
    assert sami.err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [("session", "list"), ("session", "show", "1"), ("report", "1"), ("refusal", "list")]
)
@pytest.mark.parametrize("kind", ["missing", "directory", "text", "database"])
def test_what_is_no_journal_is_one_line(sami: CommandLine, tmp_path: Path, command: tuple[str, ...], kind: str) -> None:
    path = tmp_path / "journal"
    match kind:
        case "directory":
            path.mkdir()
        case "text":
            path.write_text("no database, but long enough to be looked at as one" * 20)
        case "database":
            path.touch()
    assert sami(*command, "--journal", path) == 1
    assert str(path) in sami.err
    assert sami.err.count("\n") == 1
    assert "fault of sami" not in sami.err
    assert ("is a directory" in sami.err) is (kind == "directory")
    assert sami.out == ""


def test_show_tells_every_decision(sami: CommandLine, path: Path) -> None:
    assert sami("session", "show", FIRST[:3], "--journal", path, "-f", "json") == 0
    shown = json.loads(sami.out)
    assert (shown["session"], shown["state"], shown["outcome"]) == (FIRST, "ended", "moved")
    assert shown["flows"] == {"exported": 100, "left_behind": 2}
    assert [(one["event"], one["actions"]) for one in shown["decisions"]] == [("peer said Open", ["StartExport"])]
    assert sami("session", "show", FIRST, "--journal", path) == 0
    assert "peer said Open  ->  exporting: StartExport" in sami.out


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (SOURCE["verdict"], "ask (AskOperator): 4 of 6 flows have a place; 2: no room"),
        (
            {"verdict": "veto", "flows": None, "places": 0, "losses": {}},
            "veto: 0 of an unknown number of flows have a place",
        ),
        ({}, ""),
        (None, ""),
    ],
)
def test_show_tells_what_was_said_before_memory_was_copied(
    sami: CommandLine, tmp_path: Path, said: dict[str, Any] | None, shown: str
) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    journal.begin(FIRST, GUEST, "source", "host-b", "asked")
    told = {name: value for name, value in SOURCE.items() if name != "verdict"}  # so are reports of before
    journal.end(FIRST, "ended", "moved", told if said is None else {**told, "verdict": said})
    journal.close()
    assert sami("session", "show", FIRST, "--journal", path, "-c", "verdict") == 0
    (line,) = (line for line in sami.out.splitlines() if "verdict" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["verdict", shown]
    assert sami("session", "show", FIRST, "--journal", path, "-f", "json", "-c", "verdict") == 0
    assert json.loads(sami.out) == {"verdict": said or {}}
    assert sami("report", FIRST, "--journal", path) == 0
    assert ("| verdict |" in sami.out) == bool(said)


def test_guest_stands_for_its_newest_session(sami: CommandLine, path: Path) -> None:
    assert sami("session", "show", GUEST, "--journal", path, "-f", "value", "-c", "session") == 0
    assert sami.out.strip() == SECOND


@pytest.mark.parametrize("text", ["req-5f2d0c2e", "req-5f2", "192.0.2.7", "2001:db8::7"])
def test_session_is_found_by_the_request_that_moved_the_guest_and_by_an_address(
    sami: CommandLine, path: Path, text: str
) -> None:
    assert sami("session", "show", text, "--journal", path, "-f", "value", "-c", "session") == 0
    assert sami.out.strip() == FIRST
    assert ("session", "request_id") in reported(sami, text, "--journal", path)


@pytest.mark.parametrize("text", ["192.0.2.70", "192.0.2", "eq-5f2d0c2e"])
def test_other_addresses_and_requests_are_nobody_s(sami: CommandLine, path: Path, text: str) -> None:
    assert sami("report", text, "--journal", path) == 1
    assert "no session, guest or request begins with" in sami.err


@pytest.mark.parametrize(("text", "said"), [("6", "3 sessions or guests"), ("ff", "no session"), ("", "no session")])
def test_what_is_nobodys_or_several_ones_prefix_is_refused(sami: CommandLine, path: Path, text: str, said: str) -> None:
    assert sami("session", "show", text, "--journal", path) == 1
    assert said in sami.err
    assert "sami session list" in sami.err


# report


def reported(sami: CommandLine, *arguments: object) -> dict[tuple[str, str], tuple[Any, list[str]]]:
    assert sami("report", *arguments, "-f", "json") == 0
    return {(row["Part"], row["What"]): (row["Value"], row["Detail"]) for row in json.loads(sami.out)}


def test_report_tells_what_moved_what_did_not_and_when(sami: CommandLine, path: Path) -> None:
    rows = reported(sami, FIRST, "--journal", path)
    assert rows["session", "outcome"] == ("moved", [])
    assert [rows["verdict", name][0] for name in ("verdict", "policy", "flows", "places", "losses: no room")] == [
        "ask",
        "AskOperator",
        6,
        4,
        2,
    ]
    assert rows["flows", "left behind"][0] == 2
    assert rows["named", "refused: it is full"] == (25, ["tcp 192.0.2.7:1 > 198.51.100.1:443", "... and 24 more"])
    assert ("remark", "skipped what is unknown here: element 9") in rows
    assert rows["step", "asked"][0] == 0
    assert rows["step", "proved"][0] == 1100
    assert rows["step", "proved"][1][0].endswith("+300.000")
    assert rows["span", "asked to suspended"][0] == 800


def test_report_of_a_session_under_way_is_made_of_its_decisions(sami: CommandLine, path: Path) -> None:
    rows = reported(sami, SECOND, "--journal", path)
    assert rows["session", "outcome"][0] == "under way, exporting"
    assert ("step", "peer said Open") in rows
    assert "no report yet" in sami.err


def test_picture_is_of_one_host_or_of_both(sami: CommandLine, path: Path, peer_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    assert sami("report", FIRST, "--journal", path, "--picture", one) == 0
    assert sami("report", FIRST, "--journal", path, "--picture", both, "--peer-journal", peer_path) == 0
    assert one.read_bytes()[:4] == both.read_bytes()[:4] == b"\x89PNG"
    assert str(both) in sami.err


def test_picture_without_matplotlib_names_the_extra(
    sami: CommandLine, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sami("report", FIRST, "--journal", path, "--picture", tmp_path / "p.png") == 1
    assert "sami_plugin[plots]" in sami.err


@pytest.mark.parametrize("name", ["picture.gif", "none/picture.png"])
def test_picture_that_cannot_be_written_is_one_line(sami: CommandLine, path: Path, tmp_path: Path, name: str) -> None:
    assert sami("report", FIRST, "--journal", path, "--picture", tmp_path / name) == 1
    assert sami.err.count("\n") == 1
    assert "--picture" in sami.err


def test_picture_of_nothing_is_refused(sami: CommandLine, path: Path, tmp_path: Path) -> None:
    assert sami("report", THIRD, "--journal", path, "--picture", tmp_path / "p.png") == 1
    assert "no steps" in sami.err
    assert not (tmp_path / "p.png").exists()


def test_peer_journal_without_the_session_is_one_line(sami: CommandLine, path: Path, tmp_path: Path) -> None:
    Journal(tmp_path / "empty.sqlite").close()
    arguments = ("--journal", path, "--picture", tmp_path / "p.png", "--peer-journal", tmp_path / "empty.sqlite")
    assert sami("report", FIRST, *arguments) == 1
    assert sami.err.startswith("sami: no session")


def test_refusals_are_listed_with_who_why_and_how_often(sami: CommandLine, path: Path) -> None:
    journal = Journal(path)
    journal.count_refusals({("host-x", "NotAuthorised: nothing shows that the guest moves there"): 2})
    journal.close()
    assert sami("refusal", "list", "--journal", path, "-f", "json") == 0
    (row,) = json.loads(sami.out)
    assert (row["Who"], row["Count"]) == ("host-x", 2)
    assert row["Reason"].startswith("NotAuthorised: nothing shows")
    assert row["First"].endswith("+00:00")
    assert row["First"] <= row["Last"]


def test_journal_of_before_refusals_were_counted_has_none(sami: CommandLine, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as journal:
        journal.execute("DROP TABLE refusals")
    assert sami("refusal", "list", "--journal", path, "-f", "json") == 0
    assert json.loads(sami.out) == []
