"""No place is promised twice, and some are promised to nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.migration.places import SPARE, Places


def test_device_without_a_limit_takes_all() -> None:
    assert Places(5.0).take("s", 10**9, lambda: (None, 0)) == 10**9


def test_headroom_is_left_alone() -> None:
    places = Places(10.0)
    assert places.take("s", 200, lambda: (100, 40)) == 50
    assert places.take("s", 1, lambda: (100, 95)) == 0


def test_what_one_session_is_putting_in_or_may_put_in_is_not_another_s() -> None:
    places = Places(0.0)
    assert places.take("one", 60, lambda: (100, 0)) == 60
    assert places.take("other", 60, lambda: (100, 0)) == 40 - 40 // 16  # and "one" has its spare places
    places.used("one")
    places.release("other")
    assert places.take("third", 60, lambda: (100, 60)) == 40 - 40 // 16
    places.release("one")
    assert places.take("third", 60, lambda: (100, 60)) == 40


def test_where_there_is_plenty_a_few_more_need_no_question() -> None:
    places, asked = Places(0.0), []

    def look() -> tuple[int, int]:
        asked.append(1)
        return 1_000_000, 0

    assert places.take("s", 10, look) == 10
    for _ in range(SPARE // 10):
        assert places.take("s", 10, look) == 10
    assert len(asked) == 1
    assert places.take("s", 1, look) == 1
    assert len(asked) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3000), st.sampled_from(["put", "late", "end"])), max_size=60
    ),
    st.integers(0, 20_000),
    st.floats(0, 100),
)
def test_device_never_has_more_than_it_may(life: list[tuple[str, int, str]], capacity: int, headroom: float) -> None:
    """Sessions put in at once what they took, or only when they are about to ask again."""
    places = Places(headroom)
    in_use = 0
    waiting = dict.fromkeys("abc", 0)
    for session, wanted, how in life:
        in_use, waiting[session] = in_use + waiting[session], 0
        places.used(session)
        waiting[session] = places.take(session, wanted, lambda used=in_use: (capacity, used))
        assert waiting[session] <= wanted
        if how != "late":
            in_use, waiting[session] = in_use + waiting[session], 0
            places.used(session)
        if how == "end":
            places.release(session)
        assert in_use + sum(waiting.values()) <= max(0, int(capacity * (1 - headroom / 100)))


def test_who_was_promised_a_place_waits_for_it_while_another_session_puts_in_its_own() -> None:
    places = Places(0.0)
    assert places.promise("one", 3, lambda: (8, 4)) == 3
    assert places.promise("other", 1, lambda: (8, 4)) == 1
    assert places.take("one", 3, lambda: (8, 4)) == 3
    # The device has the three by now, and "one" has not come to say `used`: they are counted twice.
    assert places.needs_to_wait("other", 1, lambda: (8, 7))
    places.used("one")
    assert not places.needs_to_wait("other", 1, lambda: (8, 7))
    assert places.take("other", 1, lambda: (8, 7)) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 5), st.booleans()), max_size=60), st.integers(0, 40)
)
def test_promise_is_kept_where_nobody_else_takes_what_is_free(life: list[tuple[str, int, bool]], capacity: int) -> None:
    """Sessions ask for places one after the other, take them in parts, and say `used` only later, if at all."""
    places = Places(0.0)
    in_use = 0
    promised: dict[str, int] = {}

    def look() -> tuple[int, int]:
        return capacity, in_use

    def take(session: str, wanted: int) -> int:
        assert places.take(session, wanted, look) == wanted
        promised[session] -= wanted
        return wanted

    for session, most, is_late in life:
        places.used(session)
        wanted = min(most, promised.get(session, 10))
        if not wanted or places.needs_to_wait(session, wanted, look):
            continue
        if session not in promised:
            promised[session] = places.promise(session, 10, look)
            continue
        in_use += take(session, wanted)
        if not is_late:
            places.used(session)
    for session in promised:
        places.used(session)
    for session, left in promised.items():
        in_use += take(session, left)
        places.used(session)
