"""A scope in the journal."""

from __future__ import annotations

import json

import netaddr

from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.scope import Scope

SCOPE = Scope(
    "tap1",
    "g",
    {ZoneRole.PORT: 7},
    (netaddr.IPAddress("192.0.2.7"),),
    "/run/netns/f",
    is_shared=True,
    translations=(netaddr.IPAddress("203.0.113.7"),),
    barred_marks=1,
)


def test_scope_is_read_from_the_journal_as_it_was_written() -> None:
    assert Scope.from_dict(json.loads(json.dumps(SCOPE.as_dict()))) == SCOPE


def test_scope_of_an_older_journal_bars_and_translates_nothing() -> None:
    told = SCOPE.as_dict()
    del told["barred_marks"], told["translations"]
    assert (Scope.from_dict(told).barred_marks, Scope.from_dict(told).translations) == (0, ())
