"""A short hunt; the long one is ``python -m tests.fuzz.codec --inputs 1000000``."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.codec import TARGET
from tests.fuzz.hunt import Found, Target, hunt
from tests.fuzz.mutations import mutate


def test_codec_takes_or_refuses_whatever_comes() -> None:
    counts = hunt(TARGET, inputs=100_000, seed=20240229)
    # Inputs that are all refused at the door would test nothing behind it.
    assert counts["taken"] > 2_000
    assert counts["Malformed"] > 10_000
    assert counts["NotUnderstood"] > 10


def test_same_seed_gives_the_same_inputs() -> None:
    first, second = (
        [mutate(random.Random(number), each, TARGET.corpus) for number, each in enumerate(TARGET.corpus)]
        for _ in range(2)
    )
    assert first == second


def test_hunt_finds_other_errors_and_slow_and_greedy_decoders() -> None:
    def careless(octets: bytes) -> object:
        return octets[40]

    def slow(octets: bytes) -> object:
        return sum(range(200_000))

    def greedy(octets: bytes) -> object:
        return bytes(1 << 24)

    for decode in (careless, slow, greedy):
        target = Target("wrong", (bytes(50),), decode, (), seconds=0.0001)
        with pytest.raises(Found):
            hunt(target, 1000, seed=1)
