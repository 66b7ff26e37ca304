"""A distributed router's part on a host: what the finder sees of it, and how a connection that it translates moves.

The router is a real namespace with the rules that Neutron's L3 agent sets; of Open vSwitch there is what its database
and its flows say.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import netaddr
import pytest

from lab.deadline import STRETCH, wait_until
from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.model.flows import Batch, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.scopes.neutron_dvr import NeutronDvrScopes
from sami_plugin.scopes.open_vswitch import Bridge, Interface
from tests.unit.scopes.test_ovs import BRIDGE, FIRST, FIRST_PORT, FakeIntegration

pytestmark = pytest.mark.usefixtures("world")

ROUTER = "qrouter-11111111-5e00-4000-8000-000000000001"
INSIDE, OUTSIDE = "qr-aaaabbbb-5e", "rfp-11111111-5"
GUEST, FLOATING, PEER = "192.0.2.7", "198.51.100.7", "203.0.113.9"
SECOND = "192.0.2.8"
RULES = f"""*nat
:neutron-l3-agent-PREROUTING - [0:0]
:neutron-l3-agent-float-snat - [0:0]
-A PREROUTING -j neutron-l3-agent-PREROUTING
-A POSTROUTING -j neutron-l3-agent-float-snat
-A neutron-l3-agent-PREROUTING -d {FLOATING}/32 -i {OUTSIDE} -j DNAT --to-destination {GUEST}
-A neutron-l3-agent-float-snat -s {GUEST}/32 -j SNAT --to-source {FLOATING} --random-fully
COMMIT
"""
SECONDS = 0.4 * STRETCH
"""Longer than a packet takes here, and short enough to wait for one that does not come."""


@pytest.fixture
def router() -> Iterator[dict[str, Namespace]]:
    """The router, a guest's place inside and its peer's outside."""
    with contextlib.ExitStack() as undo:
        made = {}
        for role, name in (("router", ROUTER), ("guest", "dvr-guest"), ("peer", "dvr-peer")):
            made[role] = Namespace(name)
            undo.callback(made[role].close)
        for role, device, address, own in (
            ("guest", INSIDE, GUEST, "192.0.2.1"),
            ("peer", OUTSIDE, PEER, "203.0.113.1"),
        ):
            made["router"].ip(
                f"link add {device} type veth peer name eth0 netns {made[role].name}",
                f"address add {own}/24 dev {device}",
                f"link set {device} up",
            )
            made[role].ip(f"address add {address}/24 dev eth0", "link set eth0 up", f"route add default via {own}")
        made["router"].sysctl("net.ipv4.ip_forward", 1)
        made["router"].run(["iptables-restore"], RULES)
        yield made


def bridge(*, tag: int = 3) -> Bridge:
    inside = Interface(INSIDE, "aaaabbbb-5e00-4000-8000-000000000002", 4, tag, is_installed=False)
    return replace(BRIDGE, interfaces={**BRIDGE.interfaces, INSIDE: inside})


def finder_of(known: Bridge, namespaces: str | Path = "/run/netns") -> NeutronDvrScopes:
    finder = NeutronDvrScopes(FakeIntegration(known), namespaces=namespaces)
    finder.learn("g", (GuestPort(FIRST, interface_id=FIRST_PORT),))
    return finder


def test_router_that_goes_and_one_that_comes_is_seen(router: dict[str, Namespace]) -> None:
    finder = finder_of(bridge())
    assert len(finder.find("g")) == 2
    router["router"].close()
    wait_until(lambda: [scope.port for scope in finder.find("g")] == [FIRST], "the router to be missed")


def test_guest_has_a_scope_in_the_router_of_its_network(router: dict[str, Namespace]) -> None:
    finder = finder_of(bridge())
    port, routed = finder.find("g")
    assert (port.port, port.namespace, dict(port.zones)) == (FIRST, None, {ZoneRole.PORT: 3})
    assert (routed.port, routed.namespace) == (f"{FIRST}@{ROUTER}", router["router"].path)
    assert (dict(routed.zones), routed.is_shared) == ({ZoneRole.DNAT: 0}, True)
    assert routed.addresses == port.addresses
    assert list(map(str, routed.translations)) == [FLOATING]
    assert finder.namespaces() == (None, router["router"].path)
    assert netaddr.IPAddress(SECOND) in finder.neighbours(routed)
    assert not set(routed.addresses) & set(finder.neighbours(routed))
    assert finder.neighbours(port) == finder.neighbours(routed)  # they are of the one network


def test_router_of_other_networks_is_not_the_guests(router: dict[str, Namespace]) -> None:
    finder = finder_of(bridge(tag=4))
    assert [scope.port for scope in finder.find("g")] == [FIRST]
    assert finder.namespaces() == (None, router["router"].path)


def test_neighbours_are_those_of_all_networks_of_the_router(router: dict[str, Namespace]) -> None:
    moved = bridge()
    moved = replace(moved, interfaces={name: replace(one, tag=3) for name, one in moved.interfaces.items()})
    (_, routed) = finder_of(moved).find("g")
    apart = {
        name: replace(one, tag=7) if name not in (FIRST, INSIDE) else one for name, one in moved.interfaces.items()
    }
    assert finder_of(replace(moved, interfaces=apart)).neighbours(routed) == ()


def test_name_that_is_no_namespace_is_no_router(tmp_path: Path) -> None:
    (tmp_path / ROUTER).touch()
    finder = finder_of(bridge(), tmp_path)
    assert [scope.port for scope in finder.find("g")] == [FIRST]


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver()
    yield made
    made.close()


@pytest.mark.parametrize("is_carried", [False, True], ids=["without", "with"])
@pytest.mark.parametrize(
    ("begun_by", "tcp_loose", "lives_anyway"),
    [
        ("guest", 1, False),  # its port outside was drawn by lot (--random-fully)
        ("guest", 0, False),
        ("peer", 1, True),  # the kernel takes it up in its midst, and the rules make of it what it was
        ("peer", 0, False),
    ],
)
def test_connection_through_a_floating_ip(
    router: dict[str, Namespace],
    driver: LinuxConntrackDriver,
    begun_by: str,
    tcp_loose: int,
    *,
    lives_anyway: bool,
    is_carried: bool,
) -> None:
    router["router"].sysctl("nf_conntrack_tcp_loose", tcp_loose)
    (_, scope) = finder_of(bridge()).find("g")
    with contextlib.ExitStack() as undo:
        guest, peer = connection(router, begun_by, undo)

        def arrives() -> bool:
            peer.send(b"piece")
            with contextlib.suppress(TimeoutError):
                return bool(guest.recv(100))
            return False

        assert arrives()
        (flow,) = [part for part in driver.export(scope) if isinstance(part, Batch) and "tcp" in part.template.name]
        assert flow.template.name == "tcp-nat-ipv4"
        # As in the router's part on the host where the guest goes to.
        assert driver.remove(scope, flow.identities)["outcome"].tolist() == [Outcome.REMOVED]
        if is_carried:
            assert driver.insert(scope, flow)["outcome"].tolist() == [Outcome.IMPORTED]
            kept, present = driver.read_back(scope, flow)
            assert present.all()
            assert not lost_fields(flow, kept.rows).any()
        assert arrives() is (is_carried or lives_anyway)


def connection(
    router: dict[str, Namespace], begun_by: str, undo: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """The guest's end and its peer's."""
    other = "peer" if begun_by == "guest" else "guest"
    with router[other].inside():
        listener = undo.enter_context(socket.create_server(("0.0.0.0", 80)))
    with router[begun_by].inside():
        begun = undo.enter_context(socket.socket())
    begun.settimeout(SECONDS * 5)
    begun.connect((PEER if begun_by == "guest" else FLOATING, 80))
    listener.settimeout(SECONDS * 5)
    taken = undo.enter_context(listener.accept()[0])
    ends = (begun, taken) if begun_by == "guest" else (taken, begun)
    ends[0].settimeout(SECONDS)
    return ends
