"""Whatever a broker does to messages, each comes out once and in its turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.channel.ordering import Inbox
from sami_plugin.errors import IllegalMessage

MOST = 16

payloads = st.lists(st.binary(max_size=3), min_size=1, max_size=MOST)


def state_of(inbox: Inbox) -> tuple[object, ...]:
    return inbox.next_number, dict(inbox._waiting), dict(inbox._seen)


@given(payloads, st.data())
def test_any_order_and_repetition_gives_each_message_once_and_in_order(sent: list[bytes], data: st.DataObject) -> None:
    numbered = list(enumerate(sent))
    again = data.draw(st.lists(st.sampled_from(numbered), max_size=20))
    arriving = data.draw(st.permutations(numbered + again))
    inbox = Inbox(MOST)
    got = []
    for number, payload in arriving:
        got += inbox.accept(number, payload)
        assert got == sent[: len(got)]
        assert inbox.next_number == len(got)
    assert got == sent


@given(payloads, st.data())
def test_other_bytes_under_a_used_number_are_refused_and_change_nothing(sent: list[bytes], data: st.DataObject) -> None:
    inbox = Inbox(MOST)
    for number, payload in data.draw(st.permutations(list(enumerate(sent)))):
        inbox.accept(number, payload)
        before = state_of(inbox)
        with pytest.raises(IllegalMessage, match=f"message {number} came again with other bytes"):
            inbox.accept(number, payload + b"!")
        assert state_of(inbox) == before
        assert inbox.accept(number, payload) == []
        assert state_of(inbox) == before


@pytest.mark.parametrize("number", [-1, MOST, 10**9])
def test_number_out_of_the_window_is_refused_and_changes_nothing(number: int) -> None:
    inbox = Inbox(MOST)
    inbox.accept(1, b"early")
    before = state_of(inbox)
    with pytest.raises(IllegalMessage, match="out of the window"):
        inbox.accept(number, b"")
    assert state_of(inbox) == before


def test_window_moves_on_and_what_is_remembered_stays_small() -> None:
    inbox = Inbox(MOST)
    for number in range(1000):
        assert inbox.accept(number, b"%d" % number) == [b"%d" % number]
        assert inbox.accept(max(0, number - MOST), b"%d" % max(0, number - MOST)) == []
    assert inbox.accept(3, b"so old that nobody knows its bytes") == []
    assert len(inbox._seen) <= MOST + 1
    assert not inbox._waiting


def test_message_that_fills_the_gap_brings_those_that_waited() -> None:
    inbox = Inbox()
    assert inbox.accept(2, b"c") == []
    assert inbox.accept(1, b"b") == []
    assert inbox.accept(0, b"a") == [b"a", b"b", b"c"]
