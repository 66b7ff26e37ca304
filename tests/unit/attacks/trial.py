"""An attack is tried twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def both(monkeypatch: pytest.MonkeyPatch, attack: Callable[[], bool], take_out: Callable[[], None]) -> None:
    """The attack fails, and succeeds once its defence is taken out."""
    assert not attack(), "the attack succeeded"
    with monkeypatch.context():
        take_out()
        assert attack(), "the attack fails without the defence too, so this test does not show that it is one"
