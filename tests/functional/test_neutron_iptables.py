"""Neutron's own rules, loaded into a real kernel, are read by the finder `bridge_iptables`: no other is needed.

The rules are those that Neutron 29.0.0 programmed for three ports of one network (tests/unit/scopes/neutron): the first
with allowed address pairs, the third without port security. `bridge` is the driver `iptables` of the Linux bridge
agent, `hybrid` is `iptables_hybrid`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import netaddr
import pytest

from lab.namespace import Namespace
from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes.bridge_iptables import BridgeIptablesScopes

pytestmark = pytest.mark.usefixtures("world")

RULES = Path(__file__).parents[1] / "unit" / "scopes" / "neutron"
TAPS = {"first": "tap1234abcd-5e", "second": "tap9876fedc-5e", "unfiltered": "tapaaaabbbb-5e"}
FIRST = ("192.0.2.7", "192.0.2.100", "2001:db8::7", "2001:db8::100")
LINK_LOCAL = ("fe80::f816:3eff:fe00:7", "fe80::200:5eff:fe00:101")


class Compute:
    """A host with Neutron's rules and the taps of the guests that are there."""

    def __init__(self, kind: str) -> None:
        self.namespace = Namespace(f"neutron-{kind}")
        # By a clock that goes on at each glance, no look is fresh any more when the next question comes.
        self.finder = BridgeIptablesScopes(clock=itertools.count().__next__)
        for guest, tap in TAPS.items():
            self.finder.learn(guest, (GuestPort(tap, claimed=(netaddr.IPAddress("192.0.2.66"),)),))
        for tool in ("iptables", "ip6tables"):
            self.namespace.run([f"{tool}-restore"], (RULES / f"{kind}.{tool}").read_text())

    def scopes(self, guest: str) -> tuple[Scope, ...]:
        def look() -> tuple[Scope, ...]:
            with self.namespace.inside():
                return self.finder.find(guest)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(look).result()


@pytest.fixture(params=["bridge", "hybrid"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def compute(kind: str) -> Iterator[Compute]:
    made = Compute(kind)
    yield made
    made.namespace.close()


def test_zone_and_addresses_are_neutrons_once_the_tap_is_there(compute: Compute, kind: str) -> None:
    assert compute.scopes("first") == ()
    for tap in TAPS.values():
        compute.namespace.ip(f"link add {tap} type bridge")
    (scope,) = compute.scopes("first")
    assert {str(address) for address in scope.addresses} == {*FIRST, *LINK_LOCAL}
    assert (scope.zones, scope.is_shared) == ({ZoneRole.PORT: 4097}, kind == "bridge")


def test_zone_is_the_networks_on_a_linux_bridge_and_the_ports_in_hybrid(compute: Compute, kind: str) -> None:
    for tap in TAPS.values():
        compute.namespace.ip(f"link add {tap} type bridge")
    (second,) = compute.scopes("second")
    assert second.zones == {ZoneRole.PORT: 4097 if kind == "bridge" else 4098}
    assert "192.0.2.8" in map(str, second.addresses)
    with compute.namespace.inside():
        neighbours = {str(address) for address in compute.finder.neighbours(second)}
    assert neighbours == ({*FIRST, *LINK_LOCAL, "192.0.2.66"} if kind == "bridge" else set())


def test_port_without_port_security_is_not_tracked_and_not_found(compute: Compute) -> None:
    compute.namespace.ip(f"link add {TAPS['unfiltered']} type bridge")
    assert compute.scopes("unfiltered") == ()
