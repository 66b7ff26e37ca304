"""An attack is tried twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sami_plugin.channel import tls


def both(monkeypatch: pytest.MonkeyPatch, attack: Callable[[], bool], take_out: Callable[[], None]) -> None:
    """The attack fails, and succeeds once its defence is taken out."""
    assert not attack(), "the attack succeeded"
    with monkeypatch.context():
        take_out()
        assert attack(), "the attack fails without the defence too, so this test does not show that it is one"


def believe_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes out that a certificate has to name the host that speaks."""
    real = tls.Channel._enter

    def enter(channel: tls.Channel, stream: Any) -> None:
        stream.peer = lambda: channel.peer
        real(channel, stream)

    monkeypatch.setattr(tls.Channel, "_enter", enter)
