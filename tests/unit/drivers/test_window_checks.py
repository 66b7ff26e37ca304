"""When flows that have arrived are looked at, and for how long."""

from __future__ import annotations

import threading

import netaddr
import numpy as np
import pytest

from lab.deadline import wait_until
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, windows
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.windows import WindowChecks
from sami_plugin.errors import NotAvailable
from sami_plugin.model.flows import TEMPLATES, Batch, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import flows

SCOPE = Scope("port", "guest", {ZoneRole.PORT: 7}, (netaddr.IPAddress("192.0.2.1"),))
FLOWS = flows(TEMPLATES["tcp-ipv4"], 3)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "LOOK_SECONDS", (0.01,) * 4)


class Looks:
    """What was asked for, and how it went."""

    def __init__(self, *answers: object) -> None:
        self.asked: list[int] = []
        self._answers = list(answers)

    def __call__(self, scope: Scope, batch: Batch) -> Batch:
        self.asked.append(len(batch))
        answer = self._answers.pop(0) if self._answers else len(batch)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, int)
        return batch.take(np.arange(answer))


def looked(looks: Looks, count: int) -> WindowChecks:
    """One that was given flows, and has looked so often."""
    checks = WindowChecks(looks)
    checks.begin(SCOPE, FLOWS)
    wait_until(lambda: len(looks.asked) >= count, f"{count} looks")
    return checks


def test_only_what_is_left_is_asked_for_again_and_not_for_ever() -> None:
    looks = Looks(2)
    checks = looked(looks, 4)
    checks.begin(SCOPE, FLOWS.take(np.array([0])))
    wait_until(lambda: len(looks.asked) >= 8, "those of the second time")
    checks.close()
    assert looks.asked == [3, 2, 2, 2, 1, 1, 1, 1]
    assert not checks._due


@pytest.mark.parametrize("error", [NotAvailable("no descriptors"), OSError(24, "too many open files")])
def test_look_that_fails_is_made_again(error: Exception) -> None:
    looks = Looks(error, 0)
    looked(looks, 2).close()
    assert looks.asked == [3, 3]


def test_what_is_done_is_not_asked_for_again() -> None:
    looks = Looks(0)
    checks = looked(looks, 1)
    wait_until(lambda: not checks._due, "nothing to be left")
    checks.close()
    assert looks.asked == [3]


def test_nothing_is_looked_at_after_the_end() -> None:
    before = {*threading.enumerate()}
    looks = Looks()
    checks = WindowChecks(looks)
    checks.close()
    checks.begin(SCOPE, FLOWS)
    checks.close()
    assert not looks.asked
    checks = looked(looks, 1)
    checks.close()
    seen = len(looks.asked)
    checks.begin(SCOPE, FLOWS)
    assert len(looks.asked) == seen
    assert {*threading.enumerate()} <= before


def test_thread_that_could_not_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(0, 0)
    checks = WindowChecks(looks)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no threads")))
        with pytest.raises(RuntimeError):
            checks.begin(SCOPE, FLOWS)
    checks.begin(SCOPE, FLOWS)
    wait_until(lambda: len(looks.asked) == 2, "both looks")
    checks.close()


def test_flow_of_which_one_end_s_scale_is_not_known_stays_without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in its handshake: by the peer's answer the kernel learns the peer's scale, and never the guest's."""
    asked: list[list[int]] = []
    monkeypatch.setattr(windows.WindowChecks, "begin", lambda self, scope, batch: asked.append(ports(batch)))
    opened = flows(TEMPLATES["tcp-ipv4"], 4)
    scale = nl.FLAG_WINDOW_SCALE
    opened.rows["tcpTrackingFlags"], opened.rows["reverseTcpTrackingFlags"] = (0, scale, 0, scale), (0, 0, scale, scale)
    driver = LinuxConntrackDriver()
    driver.arrived(SCOPE, opened)
    driver.close()
    both_or_none = [0, 3]
    assert asked == [[ports(opened)[at] for at in both_or_none]]


def ports(batch: Batch) -> list[int]:
    return [int(port) for port in batch.rows["sourceTransportPort"]]
