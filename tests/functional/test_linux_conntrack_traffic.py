"""Traffic of kinds that not every kernel tracks, through a firewall that lets in nothing but what it knows.

Entries are taken away, as on a host that the guest has not been on, and put in by the driver. What of it takes more
than this kernel has (sockets of SCTP, tunnels) is in tests/kernels.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import netaddr
import pytest

from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.model.flows import Batch, ZoneRole
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.model.scope import Scope

HERE, THERE = "10.9.0.1", "10.9.0.2"
FIREWALL = """table inet firewall {
  chain out { type filter hook output priority raw; ct zone set 5; }
  chain in { type filter hook prerouting priority raw; ct zone set 5; }
  chain guard {
    type filter hook input priority filter; policy drop;
    ct state established accept; meta l4proto icmp accept;
  }
}
"""
SECONDS = 0.4
"""Longer than a packet takes, and short enough to wait for one that does not come."""


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver()
    yield made
    made.close()


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    """The guest's, with a firewall, and its peer's."""
    with contextlib.ExitStack() as undo:
        near, far = Namespace("kinds-near"), Namespace("kinds-far")
        for namespace in (near, far):
            undo.callback(namespace.close)
        near.ip("link add eth0 type veth peer name eth0 netns kinds-far")
        for namespace, address in ((near, HERE), (far, THERE)):
            namespace.ip(f"address add {address}/24 dev eth0", "link set eth0 up")
        near.run(["nft", "-f", "-"], FIREWALL)
        yield near, far


@pytest.fixture
def scope(sides: tuple[Namespace, Namespace]) -> Scope:
    return Scope("port", "guest", {ZoneRole.PORT: 5}, (netaddr.IPAddress(HERE),), sides[0].path)


def of(template: str, driver: LinuxConntrackDriver, scope: Scope) -> Batch:
    """The flows of this template; there are no others but of ICMP."""
    told = [part for part in driver.export(scope) if not (isinstance(part, Batch) and "icmp" in part.template.name)]
    assert [part.template.name for part in told if isinstance(part, Batch)] == [template], told
    (batch,) = told
    assert isinstance(batch, Batch)
    return batch


def moves(
    template: str, driver: LinuxConntrackDriver, scope: Scope, arrives: Callable[[], bool], change: dict[str, int]
) -> Batch:
    """Takes the entry away and puts it in again, with what is to be `change`d in it; the entry as it was."""
    assert arrives()
    flow = of(template, driver, scope)
    assert len(flow) == 1
    assert driver.remove(scope, flow.identities)["outcome"].tolist() == [Outcome.REMOVED]
    assert not arrives(), "the firewall lets in what it does not know"
    sent = Batch(flow.template, flow.rows.copy())
    for name, value in change.items():
        sent.rows[name] = value
    assert driver.insert(scope, sent)["outcome"].tolist() == [Outcome.IMPORTED]
    kept, present = driver.read_back(scope, sent)
    assert present.all()
    assert not lost_fields(sent, kept.rows).any()
    return flow


def test_udplite_goes_on(sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver) -> None:
    with contextlib.ExitStack() as undo:
        ends = []
        for namespace, address, port in zip(sides, (HERE, THERE), (4000, 5000), strict=True):
            with namespace.inside():
                end = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE))
            end.bind((address, port))
            end.settimeout(SECONDS)
            ends.append(end)
        here, there = ends
        # The kernel takes the checksum of UDP-Lite for one of UDP, over another pseudo-header, and all of it for wrong
        # (nf_conntrack_proto_udp.c, udplite_error).
        sides[0].sysctl("nf_conntrack_checksum", 0)

        def arrives() -> bool:
            there.sendto(b"back", (HERE, 4000))
            with contextlib.suppress(TimeoutError):
                return here.recv(100) == b"back"
            return False

        here.sendto(b"forth", (THERE, 5000))
        assert there.recv(100) == b"forth"
        moves("udplite-ipv4", driver, scope, arrives, {})
        assert all(arrives() for _ in range(3))
        assert len(of("udplite-ipv4", driver, scope)) == 1
