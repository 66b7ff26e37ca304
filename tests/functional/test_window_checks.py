"""A flow that was put in is tracked without window checks until both ends have spoken, and then with them again.

What that is good for: an RST that no end has sent, with a number out of the window, ends what is tracked without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lab.deadline import wait_until
from lab.errors import DeadlinePassed
from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, encode, keep_events_on, windows
from sami_plugin.drivers.linux_conntrack.encode import Request
from sami_plugin.model.flows import Batch, FlowStatus
from sami_plugin.model.protocols import TcpState
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.model.scope import Scope
from tests.two_sides import HERE, HERE6, THERE, THERE6, scope_of, two_sides

LIBERAL = 0x08
RST = 0x04
RST_SECONDS = 10
"""What a flow lives after an RST (nf_conntrack_tcp_timeout_close)."""
ENDS = {4: (HERE, THERE), 6: (HERE6, THERE6)}


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    with two_sides() as made:
        yield made


@pytest.fixture
def scope(sides: tuple[Namespace, Namespace]) -> Scope:
    return scope_of(sides[0])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[LinuxConntrackDriver]:
    monkeypatch.setattr(windows, "LOOK_SECONDS", (0.05,) * 200)
    made = LinuxConntrackDriver()
    yield made
    made.close()


class Connection:
    """The guest's, to a peer."""

    def __init__(self, sides: tuple[Namespace, Namespace], family: int) -> None:
        self.sides, self.family = sides, family
        here, there = ENDS[family]
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        with sides[1].inside():
            listener = socket.create_server((there, 0), family=kind)
        with sides[0].inside():
            self.here = socket.create_connection(listener.getsockname()[:2], source_address=(here, 0))
        self.there, _ = listener.accept()
        listener.close()
        self.talk()

    def talk(self, octets: int = 1) -> None:
        """The peer sends so many, and as many come back."""
        for giver, taker in ((self.there, self.here), (self.here, self.there)):
            sending = threading.Thread(target=giver.sendall, args=(bytes(octets),))
            sending.start()
            taker.settimeout(20)
            left = octets
            while left:
                left -= len(taker.recv(1 << 16))
            sending.join()

    def forge(self) -> None:
        """RSTs as if from the peer, with numbers all over: at most one can be of the window."""
        kind = socket.AF_INET6 if self.family == 6 else socket.AF_INET
        with self.sides[1].inside(), socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            source, destination = self.there.getsockname(), self.here.getsockname()
            pseudo = b"".join(socket.inet_pton(kind, end[0]) for end in (source, destination))
            for number in range(0, 1 << 32, 1 << 29):
                segment = struct.pack("!HHIIBBHHH", source[1], destination[1], number, 0, 0x50, RST, 0, 0, 0)
                checked = pseudo + struct.pack("!II", len(segment), socket.IPPROTO_TCP) + segment
                words = np.frombuffer(checked, ">u2").sum(dtype=np.uint32)
                while words >> 16:
                    words = (words & 0xFFFF) + (words >> 16)
                raw.sendto(segment[:16] + struct.pack("!H", ~int(words) & 0xFFFF) + segment[18:], (destination[0], 0))

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture(params=[4, 6])
def connection(sides: tuple[Namespace, Namespace], request: pytest.FixtureRequest) -> Iterator[Connection]:
    with contextlib.closing(Connection(sides, request.param)) as made:
        yield made


def tracked(scope: Scope) -> Batch:
    """As the kernel has it, by a driver that waits for nothing."""
    with contextlib.closing(LinuxConntrackDriver()) as other:
        return told(other, scope)


def told(driver: LinuxConntrackDriver, scope: Scope) -> Batch:
    (batch,) = (part for part in driver.export(scope) if isinstance(part, Batch) and "tcp" in part.template.name)
    return batch


def flags(batch: Batch) -> tuple[list[int], list[int]]:
    return batch.rows["tcpTrackingFlags"].tolist(), batch.rows["reverseTcpTrackingFlags"].tolist()


def is_liberal(scope: Scope) -> bool:
    """In both directions; in neither, it is not."""
    ((one,), (other,)) = flags(tracked(scope))
    assert one & LIBERAL == other & LIBERAL
    return bool(one & LIBERAL)


def moved(driver: LinuxConntrackDriver, scope: Scope, **change: int) -> Batch:
    """Takes the entry away and puts it in again; the flow as it was asked for, with its new id."""
    flow = tracked(scope)
    assert driver.remove(scope, flow.identities)["outcome"].tolist() == [Outcome.REMOVED]
    for name, value in change.items():
        flow.rows[name] |= value
    assert driver.insert(scope, flow)["outcome"].tolist() == [Outcome.IMPORTED]
    flow.rows["flowId"] = tracked(scope).rows["flowId"]
    return flow


def test_checks_are_back_when_both_ends_have_spoken(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection
) -> None:
    assert not is_liberal(scope)
    flow = moved(driver, scope)
    assert is_liberal(scope)
    driver.arrived(scope, flow)
    with pytest.raises(DeadlinePassed):  # nobody has spoken, and a check now would know no window
        wait_until(lambda: not is_liberal(scope), "checks", 0.5)
    connection.talk()
    wait_until(lambda: not is_liberal(scope), "window checks to be back", 5)
    kept, _ = driver.read_back(scope, flow)
    assert not lost_fields(flow, kept.rows).any()
    connection.talk(20_000_000)
    assert tracked(scope).rows["tcpConnectionState"].tolist() == [TcpState.ESTABLISHED]
    connection.forge()
    assert tracked(scope).rows["remainingTimeoutSeconds"] > RST_SECONDS


def test_forged_end_is_believed_where_nobody_asks_for_the_checks(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection
) -> None:
    moved(driver, scope)
    connection.talk()
    assert is_liberal(scope)
    connection.forge()
    assert tracked(scope).rows["remainingTimeoutSeconds"] <= RST_SECONDS


def test_what_the_source_did_not_check_is_not_checked_here(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection
) -> None:
    flow = moved(driver, scope, tcpTrackingFlags=LIBERAL)
    driver.arrived(scope, flow)
    connection.talk()

    def is_checked_backwards() -> bool:
        return not flags(tracked(scope))[1][0] & LIBERAL

    wait_until(is_checked_backwards, "the other direction to be checked", 5)
    assert flags(tracked(scope))[0][0] & LIBERAL


def test_entry_of_another_id_is_left_as_it_is(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection
) -> None:
    flow = moved(driver, scope)
    flow.rows["flowId"] ^= 1
    driver.arrived(scope, flow)
    connection.talk()
    with pytest.raises(DeadlinePassed):
        wait_until(lambda: not is_liberal(scope), "checks", 0.5)
    flow.rows["flowId"] = 0  # as after a start of the agent, which does not know the ids any more
    driver.arrived(scope, flow)
    wait_until(lambda: not is_liberal(scope), "window checks to be back", 5)


def liberal(batch: Batch) -> list[int]:
    return [flag & LIBERAL for one in flags(batch) for flag in one]


def test_flow_that_moves_on_before_it_is_checked_is_to_be_checked_at_the_next_host(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "LOOK_SECONDS", (60.0,))
    with keep_events_on(scope.namespace), driver.watch(scope) as watch:
        flow = moved(driver, scope, tcpTrackingFlags=LIBERAL)
        assert liberal(told(driver, scope)) == [LIBERAL, LIBERAL]
        another = flow.take(np.array([0]))
        another.rows["flowId"] ^= 1
        driver.arrived(scope, another)
        assert liberal(told(driver, scope)) == [LIBERAL, LIBERAL], "that is another flow"
        driver.arrived(dataclasses.replace(scope, namespace="/nowhere"), flow)
        driver.arrived(dataclasses.replace(scope, guest="another"), flow)
        assert liberal(told(driver, scope)) == [LIBERAL, LIBERAL], "those are elsewhere, and another's"
        driver.arrived(scope, flow)
        assert liberal(told(driver, scope)) == [LIBERAL, 0]
        (changed,) = watch.collect().upserts
        assert liberal(changed) == [LIBERAL, 0]
        assert liberal(tracked(scope)) == [LIBERAL, LIBERAL], "the kernel cannot check it yet"


def test_flow_that_is_checked_while_a_watch_looks_at_it_is_told_as_it_was_asked_for(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's answer is older than the check, and after the last look nobody looks again."""
    monkeypatch.setattr(windows, "LOOK_SECONDS", (60.0,))
    with keep_events_on(scope.namespace), driver.watch(scope) as watch:
        flow = moved(driver, scope)
        driver.arrived(scope, flow)
        connection.talk()
        look = driver._look

        def look_and_be_overtaken(*given: Any) -> Any:
            found = look(*given)
            patched.undo()
            ((_, _, _, one),) = driver._window_checks._due
            driver._window_checks._due.clear()
            assert not len(driver._checked(one.scope, one.batch))
            return found

        with monkeypatch.context() as patched:
            patched.setattr(driver, "_look", look_and_be_overtaken)
            (changed,) = watch.collect().upserts
        assert liberal(changed) == [0, 0]
        assert not is_liberal(scope)


@pytest.mark.parametrize("is_asked", [False, True])
def test_flow_that_moves_on_while_it_is_looked_at_is_to_be_checked_too(
    driver: LinuxConntrackDriver,
    scope: Scope,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    is_asked: bool,
) -> None:
    flow, seen = moved(driver, scope), []
    done = threading.Event()

    def look(scope: Scope, batch: Batch) -> Batch:
        seen.append(liberal(told(driver, scope)))
        done.set()
        return batch.take(np.arange(0))

    monkeypatch.setattr(driver._window_checks, "_check", look)
    if is_asked:
        driver.arrived(scope, flow)
    else:
        look(scope, flow)
    assert done.wait(5)
    assert seen == [[0, 0] if is_asked else [LIBERAL, LIBERAL]]


def test_what_the_kernel_refuses_is_asked_for_again(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = moved(driver, scope)
    connection.talk()
    with monkeypatch.context() as patched:
        patched.setitem(encode._KINDS, Request.CHECK_WINDOWS, encode._KINDS[Request.INSERT])  # it is there: EEXIST
        encode.layout.cache_clear()
        assert len(driver._checked(scope, flow)) == 1
    encode.layout.cache_clear()
    assert is_liberal(scope)
    assert not len(driver._checked(scope, flow))
    assert not is_liberal(scope)


def test_what_is_not_there_is_not_asked_for_again(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection
) -> None:
    flow = moved(driver, scope)
    assert len(driver._checked(scope, flow)) == 1
    flow.rows["sourceTransportPort"] = 1
    assert not len(driver._checked(scope, flow))


def test_offloaded_flow_stays_as_the_kernel_has_it(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = moved(driver, scope)
    connection.talk()
    found, is_there = driver.read_back(scope, flow)
    found.rows["conntrackStatus"] |= np.uint32(FlowStatus.OFFLOAD)  # no insert sets that
    with monkeypatch.context() as patched:
        patched.setattr(driver, "read_back", lambda scope, batch: (found, is_there.copy()))
        assert not len(driver._checked(scope, flow))
    assert is_liberal(scope)


def test_entry_of_a_shared_zone_may_have_been_put_in_anew(
    driver: LinuxConntrackDriver, scope: Scope, connection: Connection
) -> None:
    flow = moved(driver, scope)
    flow.rows["flowId"] ^= 1
    driver.arrived(dataclasses.replace(scope, is_shared=True), flow)
    connection.talk()
    wait_until(lambda: not is_liberal(scope), "window checks to be back", 5)
