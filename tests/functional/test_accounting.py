"""What a kernel counted of a flow, and when it began: told where it is asked for, taken by who can be given it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, keep_events_on
from sami_plugin.drivers.memory import MemoryDriver
from sami_plugin.model.flows import ACCOUNTING, Batch
from sami_plugin.model.results import Outcome, lost_fields
from tests.two_sides import HERE, HERE6, SECONDS, THERE, THERE6, scope_of, two_sides

FIELDS = {*ACCOUNTING}
FAMILIES = pytest.mark.parametrize(("here", "there"), [(HERE, THERE), (HERE6, THERE6)], ids=["ipv4", "ipv6"])


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    with two_sides() as made, keep_events_on(made[0].path):
        for name in ("nf_conntrack_acct", "nf_conntrack_timestamp"):
            made[0].run(["sysctl", "-qw", f"net.netfilter.{name}=1"])
        yield made


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver(accounting=True)
    yield made
    made.close()


class Talk:
    """Datagrams of 100 octets from `HERE`, and answers of 50."""

    def __init__(self, sides: tuple[Namespace, Namespace], here: str, there: str) -> None:
        self._ends = []
        for side, address, port in ((sides[0], here, 4000), (sides[1], there, 5000)):
            with side.inside():
                end = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            end.bind((address, port))
            end.settimeout(SECONDS)
            self._ends.append(end)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()

    def goes_on(self, times: int) -> None:
        here, there = self._ends
        for _ in range(times):
            here.sendto(bytes(100), there.getsockname()[:2])
            there.recv(2000)
            there.sendto(bytes(50), here.getsockname()[:2])
            here.recv(2000)


def of_udp(driver: LinuxConntrackDriver, near: Namespace) -> Batch:
    (flow,) = (
        part for part in driver.export(scope_of(near)) if isinstance(part, Batch) and part.template.name[:3] == "udp"
    )
    assert len(flow) == 1
    return flow


@FAMILIES
def test_flow_tells_what_was_counted_and_when_it_began_where_it_is_asked_for(
    sides: tuple[Namespace, Namespace], driver: LinuxConntrackDriver, here: str, there: str
) -> None:
    near, _ = sides
    header = (40 if ":" in here else 20) + 8
    before = time.time_ns() // 1_000_000
    with Talk(sides, here, there) as talk, driver.watch(scope_of(near)) as watch:
        talk.goes_on(3)
        after = time.time_ns() // 1_000_000
        flow = of_udp(driver, near)
        told = {name: int(flow.rows[name][0]) for name in FIELDS}
        began = told.pop("flowStartMilliseconds")
        assert before <= began <= after
        assert told == {
            "packetTotalCount": 3,
            "octetTotalCount": 3 * (100 + header),
            "reversePacketTotalCount": 3,
            "reverseOctetTotalCount": 3 * (50 + header),
        }
        (changed,) = watch.collect().upserts
        assert changed.rows[[*FIELDS]].tolist() == flow.rows[[*FIELDS]].tolist(), "events tell something else"
        with contextlib.closing(LinuxConntrackDriver()) as unasked:
            usual = of_udp(unasked, near)
        assert usual.template == flow.template.usual
        assert not lost_fields(usual, flow.under(usual.template).rows).any()


@FAMILIES
def test_device_that_can_be_given_it_has_it_and_a_kernel_lacks_it_by_name(
    sides: tuple[Namespace, Namespace], driver: LinuxConntrackDriver, here: str, there: str
) -> None:
    near, _ = sides
    scope, vendors = scope_of(near), MemoryDriver()
    with Talk(sides, here, there) as talk:
        talk.goes_on(2)
        flow = of_udp(driver, near)
        assert vendors.insert(scope, flow)["outcome"].tolist() == [Outcome.IMPORTED]
        kept, _ = vendors.read_back(scope, flow)
        assert not lost_fields(flow, kept.rows).any()
        # A counter that has grown since is the one that was given.
        talk.goes_on(1)
        assert not lost_fields(flow, of_udp(driver, near).rows).any()
        assert driver.remove(scope, flow.identities)["outcome"].tolist() == [Outcome.REMOVED]
        assert driver.insert(scope, flow)["outcome"].tolist() == [Outcome.IMPORTED]
        kept, is_there = driver.read_back(scope, flow)
        assert is_there.all()
        (lost,) = lost_fields(flow, kept.rows)
        assert {name for bit, (name, *_) in enumerate(flow.template.state) if int(lost) >> bit & 1} == FIELDS
        talk.goes_on(1)
        assert of_udp(driver, near).rows["packetTotalCount"].tolist() == [1], "it counts from 0 here"


def test_host_that_counts_nothing_tells_usual_flows(driver: LinuxConntrackDriver) -> None:
    with two_sides() as sides, Talk(sides, HERE, THERE) as talk:
        talk.goes_on(1)
        assert not of_udp(driver, sides[0]).template.is_extended
