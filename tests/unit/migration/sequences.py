"""Random lives of a session."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from sami_plugin.migration.decision import Event, Found, LetGo, OperatorSaid, PeerLost, PeerSaid, Returns, Superseded
from sami_plugin.model.migration import Phase
from sami_plugin.model.settings import Limits
from tests.unit.migration.shell import guest
from tools.state_tables import MESSAGES

LIMITS = Limits(
    delta_seconds=1, resync_seconds=4, hold_seconds=9, open_seconds=10, zone_seconds=2, arrival_seconds=20,
    watch_seconds=1, session_seconds=100, verdict_seconds=5, ask_seconds=15, reservation_seconds=40,
)  # fmt: skip

events = st.one_of(
    st.sampled_from([guest(phase) for phase in Phase]),
    st.sampled_from([PeerSaid(message) for message in MESSAGES]),
    st.sampled_from([PeerLost("lost"), Superseded(), Returns(), Found("host-a"), Found("host-x")]),
    st.sampled_from([OperatorSaid(may_come=True), OperatorSaid(may_come=False), LetGo()]),
)
pauses = st.sampled_from([0.0, 0.0, 0.0, 0.5, 3.0, 12.0, 21.0, 60.0])


def lives(likely: list[Event]) -> st.SearchStrategy[list[tuple[float, Event]]]:
    """Pauses and events; those of a usual migration come more often, and often in their order."""
    usual = st.tuples(pauses, st.sampled_from(likely))
    odd = st.tuples(pauses, events)
    in_order = st.lists(pauses, min_size=len(likely), max_size=len(likely)).map(
        lambda waits: list(zip(waits, likely, strict=True))
    )
    mixed = st.lists(st.one_of(usual, odd), max_size=14)
    cut = st.tuples(in_order, st.integers(0, len(likely)), mixed, st.integers(0, len(likely))).map(
        lambda life: life[0][: life[1]] + life[2] + life[0][life[3] :]
    )
    return st.one_of(mixed, cut)


choices = st.lists(st.sampled_from(["all", "all", "part", "fails"]), max_size=12)


def endless(drawn: list[str]) -> Iterator[str]:
    """The drawn choices, then success for ever."""
    return itertools.chain(drawn, itertools.repeat("all"))
