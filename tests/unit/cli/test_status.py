"""sami status: how this host's agent is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sami_plugin.hooks.local_socket import LocalSocket
from sami_plugin.journal.journal import Journal
from tests.unit.cli.command_line import CommandLine

GUEST = "6ac30000-0000-4000-8000-000000000001"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "agent.conf"
    path.write_text(f"[agent]\nhost = host-b\njournal = {tmp_path}/journal\nsocket = {tmp_path}/agent.sock\n")
    return path


def shown(sami: CommandLine, conf: Path) -> dict[str, Any]:
    assert sami("status", "--config-file", conf, "-f", "json") == 0
    found: dict[str, Any] = json.loads(sami.out)
    return found


def test_host_on_which_no_agent_has_run_is_told_so(sami: CommandLine, conf: Path) -> None:
    found = shown(sami, conf)
    assert (found["host"], found["driver"], found["flows"]) == ("host-b", "linux_conntrack", 0)
    assert found["agent"].startswith("does not listen at")
    assert "no agent has run here yet" in found["journal"]


def test_programs_are_told_the_same_fields_with_and_without_a_journal(
    sami: CommandLine, conf: Path, tmp_path: Path
) -> None:
    without = shown(sami, conf)
    assert {name for name, value in without.items() if value is None} >= {"under way", "last day", "kinds of refusals"}
    Journal(tmp_path / "journal").close()
    found = shown(sami, conf)
    assert list(found) == list(without)
    assert found["journal"] == f"{tmp_path}/journal"
    assert (found["under way"], found["last ended"], found["kinds of refusals"]) == ([], None, 0)


def test_what_was_done_in_the_last_day_is_added_up(sami: CommandLine, conf: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for number, (role, outcome, imported) in enumerate(
        [("destination", "moved", 7), ("destination", "moved", 5), ("source", "stayed", 0), ("source", "moved", 1)]
    ):
        journal.begin(f"s{number}", GUEST, role, "host-a", "asked")
        journal.end(f"s{number}", "ended", outcome, {"flows": {"imported": imported, "refused": 1, "verified": 99}})
    journal._db.execute("UPDATE sessions SET ended_at = ended_at - 90000 WHERE session = 's3'")
    journal.begin("s4", GUEST, "destination", "host-a", "receiving")
    journal.count_refusals({("host-x", "NotAuthorised: no"): 1})
    journal.close()
    listening = LocalSocket(tmp_path / "agent.sock", lambda event: None)
    listening.start()
    try:
        found = shown(sami, conf)
    finally:
        listening.stop()
    assert found["agent"] == f"listens at {tmp_path}/agent.sock"
    assert found["under way"] == [f"{GUEST} destination receiving host-a"]
    assert found["last day"] == ["2 moved, as destination", "1 stayed, as source"]
    assert found["last day's flows"] == ["12 imported", "3 refused"]
    assert found["kinds of refusals"] == 1
    assert found["last ended"].endswith("+00:00")


def test_what_is_no_journal_is_one_line(sami: CommandLine, conf: Path, tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    assert sami("status", "--config-file", conf) == 1
    assert "is a directory and no journal" in sami.err
    assert sami.err.count("\n") == 1
