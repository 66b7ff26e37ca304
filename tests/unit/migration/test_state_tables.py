"""The page of states is drawn from the tables, and every entry of a table can come about."""

from __future__ import annotations

import pytest

from tools import state_tables

EACH = pytest.mark.parametrize("role", state_tables.ROLES, ids=lambda role: role.name)


def test_page_is_current() -> None:
    assert state_tables.PAGE.read_text() == state_tables.page(), "run: python -m tools.state_tables"


@EACH
def test_every_entry_of_the_table_can_come_about(role: state_tables.Role) -> None:
    found = state_tables.explore(role)
    assert [(state, cause) for state, row in role.table.items() for cause in row if (state, cause) not in found] == []


@EACH
def test_every_state_is_told(role: state_tables.Role) -> None:
    assert {state.name for state in role.table} == {*state_tables.states_told(role.module), "ENDED"}
    assert set(role.table) == set(role.module.State)
