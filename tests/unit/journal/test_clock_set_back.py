"""The wall clock is set back between two sessions: they are in the order in which they were begun all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sami_plugin.journal import journal as journal_module
from sami_plugin.journal.journal import Journal

ONE, TWO, THREE = "3" * 8, "2" * 8, "1" * 8
"""Neither their names are in that order, nor the hours at which they begin."""


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """Each time that anybody looks, it is an hour earlier."""
    hours = iter(range(1000, 0, -1))
    clock = SimpleNamespace(time=lambda: next(hours) * 3600.0)
    monkeypatch.setattr(journal_module, "time", clock)
    made = Journal(tmp_path / "journal.sqlite")
    yield made
    made.close()


def test_sessions_of_a_guest_that_left_and_comes_back_are_gone_on_with_in_that_order(journal: Journal) -> None:
    journal.begin(ONE, "guest", "source", "host-b", "watching")
    journal.begin(TWO, "another", "source", "host-b", "waiting")
    journal.begin(THREE, "guest", "destination", "host-b", "receiving")
    began = {row["session"]: row["started_at"] for row in journal.sessions()}
    assert began[ONE] > began[TWO] > began[THREE]
    assert [row["session"] for row in journal.unfinished()] == [ONE, TWO, THREE]
    assert [row["session"] for row in journal.sessions()] == [THREE, TWO, ONE]
    assert (journal.newest("guest"), journal.newest("another")) == (THREE, TWO)


def test_session_that_goes_on_with_others_is_the_one_that_both_hosts_know_by_their_id(journal: Journal) -> None:
    journal.begin(ONE, "guest", "source", "host-b", "following")
    for former, session in ((ONE, TWO), (TWO, THREE)):
        journal.go_on(former, session, ONE, "drained", (), {"outcome": "continued"})
        found = journal.known_as(ONE, "source")
        assert found is not None
        assert found["session"] == journal.newest("guest") == session
        assert [row["session"] for row in journal.unfinished()] == [session]
    assert [row["session"] for row in journal.sessions()] == [THREE, TWO, ONE]
