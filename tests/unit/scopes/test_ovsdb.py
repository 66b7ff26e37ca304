"""What a copy of a database asks its server for, and when it knows that the server has answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sami_plugin.scopes import ovsdb
from sami_plugin.scopes.ovn import southbound_of
from sami_plugin.scopes.ovsdb import Copy

SECONDS = 5.0
TABLE = "Port_Binding"


def clauses(*names: str) -> list[list[str]]:
    return [["logical_port", "==", name] for name in names]


class Server:
    """Answers when the test lets it."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()
        self.condition: list[Any] = []
        """The newest that it was asked for."""
        self.is_slow = False
        """It has not answered that."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    told = Server()

    class Idl:
        IDL_S_MONITORING = state = 1

        def __init__(self, *_: object) -> None:
            self._session = SimpleNamespace(is_connected=lambda: True)
            self.cond_seqno = 0
            self.tables = {TABLE: SimpleNamespace(rows={})}

        def cond_change(self, table: str, condition: list[Any]) -> int:
            told.condition = list(condition)
            return self.cond_seqno + told.is_slow

        def run(self) -> bool:
            return True

    class Connection:
        def __init__(self, idl: Any, timeout: float) -> None:
            self.idl, self.lock = idl, threading.Lock()
            self.txns = SimpleNamespace(alert_notify=lambda: None)

        def start(self) -> None:
            told.is_asked.set()
            assert told.may_answer.wait(SECONDS)
            self.idl.run()

        def stop(self, timeout: float) -> None:
            pass

    schema = SimpleNamespace(schema_json={"tables": {}}, register_columns=lambda *_: None)
    connection = SimpleNamespace(OvsdbIdl=Idl, Connection=Connection)
    idlutils = SimpleNamespace(get_schema_helper=lambda *_: schema)
    monkeypatch.setattr(ovsdb, "libraries", lambda: (None, connection, idlutils))
    yield told
    told.may_answer.set()


@pytest.fixture
def copy(server: Server) -> Copy[Any]:
    """One of which the server has been asked, and has not answered yet."""
    made = southbound_of("tcp:192.0.2.1:6642")
    made.restrict(TABLE, clauses("old"))
    assert made.latest() is None
    assert server.is_asked.wait(SECONDS)
    return made


def test_server_is_asked_for_what_was_noted_while_it_was_waited_for(server: Server, copy: Copy[Any]) -> None:
    copy.restrict(TABLE, clauses("old", "newcomer"))
    server.may_answer.set()
    copy.current()
    copy._attempt().join(SECONDS)
    assert server.condition == clauses("old", "newcomer")


def test_answer_is_awaited_until_the_server_has_told_what_the_newest_condition_asks_for(
    server: Server, copy: Copy[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ovsdb, "RESTRICT_SECONDS", 0.0)
    assert copy.is_awaited(TABLE)
    server.may_answer.set()
    copy.current()
    assert not copy.is_awaited(TABLE)
    server.is_slow = True
    copy.restrict(TABLE, clauses("old", "newcomer"))
    assert copy.is_awaited(TABLE)
    server.is_slow = False
    assert not copy.is_awaited(TABLE)


def test_server_that_is_away_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovsdb, "libraries", refuse)
    copy = southbound_of("tcp:192.0.2.1:6642")
    assert copy.latest() is None
    copy._attempt().join(SECONDS)
    assert not copy.is_awaited(TABLE)


def refuse() -> None:
    raise ImportError
