"""Of what is put in, the newest is kept."""

from __future__ import annotations

from sami_plugin.model.newest import Newest


def test_the_oldest_of_too_many_is_forgotten() -> None:
    known = Newest[int](2)
    for number, name in enumerate("abc"):
        known.put(name, number)
    assert [*known.items()] == [("b", 1), ("c", 2)]


def test_what_is_put_again_is_the_newest_and_takes_nobody_s_place() -> None:
    known = Newest[int](2)
    for number, name in enumerate("aba"):
        known.put(name, number)
    assert [*known.items()] == [("b", 1), ("a", 2)]
    known.put("c", 3)
    assert [*known] == ["a", "c"]
