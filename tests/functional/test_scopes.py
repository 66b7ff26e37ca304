"""What the finders read of a real kernel's rules is what the lab wrote there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import netaddr
import pytest

from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.migration import Call
from lab.port import is_ipv6
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes import bridge_iptables
from sami_plugin.scopes.bridge_iptables import BridgeIptablesScopes
from sami_plugin.scopes.learned import LearnedScopes
from sami_plugin.scopes.routed_nftables import RoutedNftablesScopes

pytestmark = pytest.mark.usefixtures("world")

Found = tuple[int, bool, frozenset[str]]


class HostFinder:
    """A finder that looks from inside the host's network namespace, as that host's agent does."""

    def __init__(self, host: Host, finder: LearnedScopes) -> None:
        self._host = host
        self.finder = finder

    def scope(self, guest: Guest) -> Scope | None:
        # What is of the process is not of the thread: in the first thread /proc/net would be right by chance.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(self._find, guest.uuid).result()
        assert len(found) <= 1
        return found[0] if found else None

    def _find(self, guest: str) -> tuple[Scope, ...]:
        with self._host.namespace.inside():
            return self.finder.find(guest)

    def neighbours(self, scope: Scope) -> set[str]:
        with self._host.namespace.inside():
            return {str(address) for address in self.finder.neighbours(scope)}


class Finders:
    """One for each host of a lab."""

    def __init__(self, lab: Lab, trust_guest_xml: bool = False) -> None:
        kind = RoutedNftablesScopes if lab.kind == "routed" else BridgeIptablesScopes
        self._of = {
            # By a clock that goes on at each glance, no look is fresh any more when the next question comes.
            host.name: HostFinder(host, kind(trust_guest_xml, clock=itertools.count().__next__))
            for host in lab.hosts.values()
        }

    def learn(self, guest: Guest, *, has_claims: bool = False) -> None:
        claims: Addresses = tuple(map(netaddr.IPAddress, guest.addresses)) if has_claims else ()
        for one in self._of.values():
            one.finder.learn(guest.uuid, (GuestPort(guest.tap, guest.port.mac, "br0", claims),))

    def __getitem__(self, name: str) -> HostFinder:
        return self._of[name]


def said_by(scope: Scope | None) -> Found | None:
    if scope is None:
        return None
    return scope.zones[ZoneRole.PORT], scope.is_shared, frozenset(map(str, scope.addresses))


def said_by_the_file(host: Host, guest: Guest) -> Found | None:
    """What the lab's own finder's file says."""
    for port in json.loads(host.scope_file.read_text())["ports"]:
        if port["guest"] == guest.uuid:
            return port["zone"], port["shared"], frozenset(port["addresses"])
    return None


def forbid_spoofing(lab: Lab, guest: Guest) -> None:
    for host in lab.hosts.values():
        for address in guest.addresses:
            tool = "ip6tables" if is_ipv6(address) else "iptables"
            match = ["-m", "physdev", "--physdev-in", guest.tap, "!", "-s", address]
            host.run([tool, "-A", "FORWARD", *match, "-j", "DROP"])


@pytest.fixture(params=["bridge", "routed", "shared by rules", "shared by claims"])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, Finders, list[Guest]]]:
    """A lab with two guests on host a, and finders that may know all of them."""
    kind, _, by = request.param.partition(" by ")
    with Lab(kind=kind) as lab:
        finders = Finders(lab, trust_guest_xml=by == "claims")
        guests = [lab.add_guest(name, "a") for name in ("g", "h")]
        for guest in guests:
            finders.learn(guest, has_claims=by == "claims")
            if by == "rules":
                forbid_spoofing(lab, guest)
        yield lab, finders, guests


def test_ports_are_found_where_they_are_before_and_after_they_move(made: tuple[Lab, Finders, list[Guest]]) -> None:
    lab, finders, guests = made
    a, b = lab.hosts["a"], lab.hosts["b"]
    for guest in guests:
        assert said_by(finders["a"].scope(guest)) == said_by_the_file(a, guest) is not None
        assert finders["b"].scope(guest) is None  # the rules are there already, the tap is not
    guest = guests[0]
    lab.migrate(guest, "a", "b", copy_seconds=0.1)
    assert finders["a"].scope(guest) is None
    assert said_by(finders["b"].scope(guest)) == said_by_the_file(b, guest) is not None
    assert said_by(finders["a"].scope(guests[1])) == said_by_the_file(a, guests[1]) is not None


def test_neighbours_are_the_guests_that_are_here_in_the_same_zone(made: tuple[Lab, Finders, list[Guest]]) -> None:
    lab, finders, (guest, other) = made
    scope = finders["a"].scope(guest)
    assert scope is not None
    is_shared = lab.kind == "shared"
    assert finders["a"].neighbours(scope) == (set(other.addresses) if is_shared else set())
    lab.migrate(other, "a", "b", copy_seconds=0.1)
    assert finders["a"].neighbours(scope) == set()


@pytest.mark.parametrize("kind", ["bridge", "shared", "routed"])
def test_port_is_not_here_until_its_rules_are(kind: str) -> None:
    with Lab(kind=kind) as lab:
        finders = Finders(lab, trust_guest_xml=True)
        guest = lab.add_guest("g", "a", on=())
        finders.learn(guest, has_claims=True)
        assert finders["a"].scope(guest) is None
        lab.hosts["a"].firewall.program(guest.port)
        scope = finders["a"].scope(guest)
        assert scope is not None
        assert scope.zones == {ZoneRole.PORT: lab.hosts["a"].zone(guest)}


@pytest.mark.parametrize("kind", ["bridge", "routed"])
def test_port_is_found_once_both_its_tap_and_its_rules_have_come(kind: str) -> None:
    with Lab(kind=kind) as lab:
        finders, there = Finders(lab), lab.hosts["b"]
        guest = lab.add_guest("g", "a", on=("a",))
        finders.learn(guest)
        seen: dict[str, Found | None] = {}

        def look(when: str) -> Call:
            return Call(lambda: seen.update({when: said_by(finders["b"].scope(guest))}))

        late = Call(lambda: there.firewall.program(guest.port))
        lab.migrate(
            guest, "a", "b", copy_seconds=0.1, at={"moved": look("tap"), "resumed": late, "stopped": look("both")}
        )
        assert seen == {"tap": None, "both": said_by_the_file(there, guest)}


def test_addresses_of_a_shared_zone_are_not_taken_of_claims_alone() -> None:
    with Lab(kind="shared") as lab:
        finders = Finders(lab)
        for name in ("g", "h"):
            finders.learn(lab.add_guest(name, "a"), has_claims=True)
        assert [finders["a"].scope(guest) for guest in lab.guests.values()] == [None, None]


@pytest.mark.parametrize("zones", ["{ tap-g : 9, tap-h : 9 }", "@zones"])
def test_routes_of_the_host_say_whose_an_address_is_in_a_shared_zone(zones: str) -> None:
    """Beside a set with as much in it as a list of addresses to drop may have, which no look at the rules lists."""
    with Lab(kind="routed") as lab:
        finders, host = Finders(lab), lab.hosts["a"]
        guests = [lab.add_guest(name, "a", on=()) for name in ("g", "h")]
        named = "map zones { typeof iifname : ct zone; elements = { tap-g : 9, tap-h : 9 } }"
        blocked = ", ".join(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(50_000))
        many = f"set blocked {{ type ipv4_addr; elements = {{ {blocked} }} }}"
        rules = [f"ct zone set iifname map {zones}", "ip saddr @blocked drop"]
        chain = ["chain c {", "type filter hook prerouting priority raw", *rules, "}"]
        host.run(["nft", "-f", "-"], "\n".join(["table inet z {", named, many, *chain, "}", ""]))
        for guest, other in (guests, guests[::-1]):
            finders.learn(guest)
            scope = finders["a"].scope(guest)
            assert scope is not None
            assert said_by(scope) == (9, True, set(guest.addresses))
            assert finders["a"].neighbours(scope) == set(other.addresses)


def test_older_iptables_is_read_as_well(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with Lab(kind="bridge") as lab:
        finders = Finders(lab)
        guest = lab.add_guest("g", "a", on=())
        finders.learn(guest)
        for tool, address in (("iptables-legacy", guest.v4), ("ip6tables-legacy", guest.v6)):
            for match in (["-m", "physdev", "--physdev-in", guest.tap], ["-d", address]):
                lab.hosts["a"].run([tool, "-t", "raw", "-A", "PREROUTING", *match, "-j", "CT", "--zone", "9"])
        assert finders["a"].scope(guest) is None
        assert "there are rules of iptables-legacy too, and they are not read" in caplog.text
        monkeypatch.setattr(bridge_iptables, "TOOLS", ("iptables-legacy-save", "ip6tables-legacy-save"))
        assert said_by(finders["a"].scope(guest)) == (9, False, {guest.v4, guest.v6})


def test_nothing_of_the_agents_own_namespace_is_mixed_in() -> None:
    with Lab(kind="bridge") as lab:
        finders = Finders(lab)
        guest = lab.add_guest("g", "a")
        finders.learn(guest)
        assert finders["a"].scope(guest) is not None
        assert finders["a"].finder.find(guest.uuid) == ()  # asked here, outside of the host
        assert finders["a"].scope(guest) is not None
