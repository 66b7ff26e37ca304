"""What the integration bridge's database and flows, and OVN's southbound database, say of logical ports."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.errors import ConfigurationError, NotAvailable
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes import ovn
from sami_plugin.scopes.open_vswitch import Bridge, Interface, flows_of
from sami_plugin.scopes.ovn import (
    OvnScopes,
    addresses_of,
    adjacent_of,
    bound_of,
    floating_ips_of,
    knowledge_of,
    numbers_of,
    southbound_of,
)
from sami_plugin.scopes.ovsdb import Credentials
from tests.unit.scopes.open_vswitch_texts import OVN_PHYSICAL, OVN_PORT_SECURITY, OVN_ROUTER
from tests.unit.scopes.test_loading import configured
from tests.unit.scopes.test_ovs import FakeIntegration

TAP, PORT = "tap1234abcd-5e", "1234abcd-5e00-4000-8000-000000000007"
KEY = f"ct-zone-{PORT}"


def addresses(*texts: str) -> Addresses:
    return tuple(map(netaddr.IPAddress, texts))


OWN = addresses(
    "192.0.2.7", "192.0.2.100", "2001:db8::7", "2001:db8::100", "fe80::200:5eff:fe00:101", "fe80::f816:3eff:fe00:7"
)
BRIDGE = Bridge({TAP: Interface(TAP, PORT, 1, None, True)}, {KEY: "8", "ct-zone-cr-lrp-ext": "5"}, True)


class Told(OvnScopes):
    """A finder of a host with this bridge and these flows."""

    def __init__(self, bridge: Bridge = BRIDGE, *texts: str, bound: dict[str, Addresses] | None = None) -> None:
        super().__init__(FakeIntegration(bridge, *(texts or (OVN_PHYSICAL, OVN_PORT_SECURITY))))
        self.bound = bound or {}
        self.learn("g", (GuestPort(TAP, interface_id=PORT),))

    def _bound(self, bridge: Bridge) -> dict[str, Addresses]:
        return self.bound


def with_ids(**external_ids: str) -> Bridge:
    return replace(BRIDGE, external_ids={key.replace("_", "-"): value for key, value in external_ids.items()})


def test_port_has_the_zone_that_ovn_wrote_and_the_addresses_of_its_port_security() -> None:
    assert Told().find("g") == (Scope(TAP, "g", {ZoneRole.PORT: 8}, OWN, barred_marks=1),)


def test_zone_of_the_port_alone_counts_and_not_the_routers() -> None:
    ids = {f"{KEY}_dnat": "2", f"{KEY}_snat": "3", "ct-zone-": "4"}
    assert Told(replace(BRIDGE, external_ids=ids)).find("g") == ()
    nameless = replace(BRIDGE.interfaces[TAP], port="")
    finder = Told(replace(BRIDGE, interfaces={TAP: nameless}, external_ids=ids))
    finder.learn("g", (GuestPort(TAP, claimed=addresses("192.0.2.7")),))
    assert finder.find("g") == ()


@pytest.mark.parametrize("zone", ["", "0", "65536", "x", "8 ", "-1", "08"])
def test_zone_that_is_none_is_not_taken(zone: str) -> None:
    assert Told(replace(BRIDGE, external_ids={KEY: zone})).find("g") == ()


def test_port_whose_flows_ovn_has_not_finished_is_not_here_yet() -> None:
    interface = replace(BRIDGE.interfaces[TAP], is_installed=False)
    finder = Told(replace(BRIDGE, interfaces={TAP: interface}), bound={PORT: addresses("192.0.2.7")})
    assert finder.find("g") == ()


def test_port_without_port_security_has_the_addresses_that_are_claimed() -> None:
    finder = Told(BRIDGE, OVN_PHYSICAL, "")
    assert finder.find("g") == ()
    finder.learn("g", (GuestPort(TAP, claimed=addresses("192.0.2.66")),))
    assert [scope.addresses for scope in finder.find("g")] == [addresses("192.0.2.66")]


def test_southbound_database_adds_to_what_the_flows_say() -> None:
    more = addresses("192.0.2.7", "192.0.2.200")
    (scope,) = Told(bound={PORT: more}).find("g")
    assert set(scope.addresses) == {*OWN, *more}
    assert Told(BRIDGE, "", "", bound={PORT: more}).find("g")[0].addresses == more


def test_flows_of_another_port_say_nothing_of_this_one() -> None:
    for wrong in ("reg14=0x2", "metadata=0x2", "reg14=0x1/0x3"):
        name = wrong.split("=")[0]
        text = re.sub(rf"{name}=0x1\b", wrong, OVN_PORT_SECURITY)
        assert Told(BRIDGE, OVN_PHYSICAL, text).find("g") == ()


@pytest.mark.parametrize(
    "flow",
    [
        "table=73, ip,reg14=0x1,metadata=0x1,nw_src=192.0.2.7 actions=load:0x1->NXM_NX_REG10[12]",
        "table=73, ip,reg14=0x1,metadata=0x1,nw_src=192.0.2.0/24 actions=load:0->NXM_NX_REG10[12]",
        "table=73, udp,reg14=0x1,metadata=0x1,nw_src=192.0.2.7 actions=load:0->NXM_NX_REG10[12]",
        "table=75, ip,reg14=0x1,metadata=0x1,nw_src=192.0.2.7 actions=load:0->NXM_NX_REG10[12]",
        "table=73, ip,reg14=0x1,nw_src=192.0.2.7 actions=load:0->NXM_NX_REG10[12]",
        "table=73, ip,metadata=0x1,nw_src=192.0.2.7 actions=load:0->NXM_NX_REG10[12]",
    ],
)
def test_flow_that_is_about_something_else_says_no_address(flow: str) -> None:
    assert addresses_of(flows_of(flow)) == {}


def test_southbound_rows_are_read_with_what_they_have() -> None:
    rows = {
        1: SimpleNamespace(logical_port="a", mac=["fa:16:3e:00:00:07 192.0.2.7 2001:db8::7"], port_security=[]),
        2: SimpleNamespace(logical_port="b", mac=["unknown"], port_security=["fa:16:3e:00:00:08 192.0.2.8 10.0.0.0/8"]),
        3: SimpleNamespace(logical_port="c", mac=["router"]),  # OVN before 22.09 has no such column
        4: SimpleNamespace(logical_port="d", mac=["fa:16:3e:00:00:07 dynamic 0.0.0.0 224.0.0.1"], port_security=[]),
    }
    told = bound_of({"Port_Binding": SimpleNamespace(rows=rows)})
    assert told == {"a": addresses("192.0.2.7", "2001:db8::7"), "b": addresses("192.0.2.8"), "c": (), "d": ()}


def test_southbound_database_is_asked_for_the_ports_of_this_bridge_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = southbound_of("tcp:127.0.0.1:1")
    assert copy._conditions == {"Port_Binding": []}  # none
    monkeypatch.setattr(copy, "latest", lambda: None)
    finder = OvnScopes(FakeIntegration(BRIDGE, OVN_PHYSICAL, OVN_PORT_SECURITY), copy)
    finder.learn("g", (GuestPort(TAP),))
    assert finder.find("g")
    assert copy._conditions == {"Port_Binding": [["logical_port", "==", PORT]]}


class Southbound:
    """A copy of the southbound database that tells as much as the test says."""

    def __init__(self) -> None:
        self.told: dict[str, Addresses] | None = None
        self.awaits = True

    def restrict(self, table: str, condition: list[Any]) -> None:
        pass

    def latest(self) -> dict[str, Addresses] | None:
        return self.told

    def is_awaited(self, table: str) -> bool:
        return self.awaits


@pytest.fixture
def now() -> list[float]:
    return [0.0]


def waiting(southbound: Southbound, now: list[float], security: str = "") -> OvnScopes:
    """Of a guest whose description says an address."""
    finder = OvnScopes(FakeIntegration(BRIDGE, OVN_PHYSICAL, security), southbound)  # type: ignore[arg-type]
    finder._clock = lambda: now[0]
    finder.learn("g", (GuestPort(TAP, claimed=addresses("192.0.2.7")),))
    return finder


def test_description_does_not_count_before_the_southbound_database_has_answered(now: list[float]) -> None:
    southbound = Southbound()
    finder = waiting(southbound, now)
    assert finder.namespaces() == (None,)  # the agent starts all the same
    for southbound.told in (None, {"another": addresses("192.0.2.9")}):
        now[0] += 1
        with pytest.raises(NotAvailable, match=f"{TAP}: OVN's southbound database has not said yet"):
            finder.find("g")
    southbound.told, southbound.awaits = {PORT: addresses("192.0.2.7", "192.0.2.100")}, False
    now[0] += 1
    assert finder.find("g")[0].addresses == addresses("192.0.2.7", "192.0.2.100")
    southbound.told, southbound.awaits = None, True  # it lost the connection: the port is no new one
    now[0] += 1
    assert finder.find("g")[0].addresses == addresses("192.0.2.7")


def test_southbound_database_that_goes_on_not_answering_is_warned_of_and_waited_for_no_longer(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    finder = waiting(Southbound(), now)
    for now[0] in (100.0, 104.9):
        with pytest.raises(NotAvailable):
            finder.find("g")
    for now[0] in (105.0, 106.0):
        assert finder.find("g")[0].addresses == addresses("192.0.2.7")
    assert caplog.text.count(f"port {PORT}: OVN's southbound database has not told it within 5 s") == 1


def test_southbound_database_is_not_waited_for_where_it_is_away_or_the_bridge_says_the_addresses(
    now: list[float],
) -> None:
    southbound = Southbound()
    assert set(waiting(southbound, now, OVN_PORT_SECURITY).find("g")[0].addresses) == set(OWN)
    southbound.awaits = False
    assert waiting(southbound, now).find("g")[0].addresses == addresses("192.0.2.7")


FILES = "".join(f"ovn_sb_{name} = /{name}\n" for name in ("private_key", "certificate", "ca_cert"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("ovn_sb_connection = tcp:192.0.2.1:6642\n", [("tcp:192.0.2.1:6642", None)]),
        (
            f"ovn_sb_connection = ssl:192.0.2.1:6642\n{FILES}",
            [("ssl:192.0.2.1:6642", Credentials("/private_key", "/certificate", "/ca_cert"))],
        ),
    ],
)
def test_finder_takes_its_options(
    text: str, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(ovn, "southbound_of", lambda connection, credentials: made.append((connection, credentials)))
    OvnScopes.from_conf(configured(tmp_path, f"[ovn]\n{text}"))
    assert made == expected


def test_some_of_the_files_for_tls_are_refused(tmp_path: Path) -> None:
    text = "[ovn]\novn_sb_connection = ssl:192.0.2.1:6642\novn_sb_certificate = /c\n"
    with pytest.raises(ConfigurationError, match="ovn_sb_private_key, ovn_sb_ca_cert"):
        OvnScopes.from_conf(configured(tmp_path, text))


WORDS = st.sampled_from(re.split(r"([,= \n])", OVN_PHYSICAL + OVN_PORT_SECURITY))


@given(st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=40))
def test_any_text_is_read(words: list[str]) -> None:
    flows = list(flows_of("".join(words)))
    knowledge_of(BRIDGE, numbers_of(flows), addresses_of(flows), {})


@given(st.lists(st.text(max_size=30), max_size=4), st.lists(st.text(max_size=30), max_size=4))
def test_any_row_is_read(mac: list[str], security: list[str]) -> None:
    row = SimpleNamespace(logical_port="p", mac=mac, port_security=security)
    bound_of({"Port_Binding": SimpleNamespace(rows={1: row})})


ROUTED = replace(BRIDGE, external_ids={**BRIDGE.external_ids, "ct-zone-r_dnat": "2", "ct-zone-r_snat": "4"})


def test_router_is_where_the_flows_lead_to_with_what_it_translates() -> None:
    port, routed = Told(ROUTED, OVN_PHYSICAL, OVN_PORT_SECURITY, OVN_ROUTER).find("g")
    assert routed == Scope(
        f"{TAP}@r",
        "g",
        {ZoneRole.DNAT: 2, ZoneRole.SNAT: 4},
        port.addresses,
        is_shared=True,
        translations=addresses("198.51.100.7", "2001:db8:f::7"),
    )


def test_router_that_has_gone_has_no_neighbours_but_an_error() -> None:
    finder = Told(ROUTED, OVN_PHYSICAL, OVN_PORT_SECURITY, OVN_ROUTER)
    _, routed = finder.find("g")
    assert finder.neighbours(routed) == ()
    with pytest.raises(NotAvailable, match="router r is not on this host any more"):
        finder.neighbours(replace(routed, zones={ZoneRole.DNAT: 3, ZoneRole.SNAT: 4}))


@pytest.mark.parametrize(
    "external_ids",
    [
        {},
        {"ct-zone-r_dnat": "2"},
        {"ct-zone-r_snat": "4"},
        {"ct-zone-r_dnat": "2", "ct-zone-r_snat": "5"},
        {"ct-zone-r_dnat": "2", "ct-zone-s_snat": "4"},
    ],
)
def test_router_is_not_here_before_ovn_has_emptied_its_zones(external_ids: dict[str, str]) -> None:
    bridge = replace(BRIDGE, external_ids={**BRIDGE.external_ids, **external_ids})
    assert len(Told(bridge, OVN_PHYSICAL, OVN_PORT_SECURITY, OVN_ROUTER).find("g")) == 1


def test_router_that_translates_nothing_for_the_port_is_none_of_its() -> None:
    flows = "\n".join(line for line in OVN_ROUTER.splitlines() if "nat(src" not in line)
    assert len(Told(ROUTED, OVN_PHYSICAL, OVN_PORT_SECURITY, flows).find("g")) == 1


def test_datapaths_that_packets_go_on_to_are_told_with_their_zones() -> None:
    switch, router = {ZoneRole.DNAT: 7, ZoneRole.SNAT: 5}, {ZoneRole.DNAT: 2, ZoneRole.SNAT: 4}
    assert adjacent_of(flows_of(OVN_ROUTER)) == {1: {2: router}, 2: {1: switch}, 3: {2: router}}


def test_floating_ips_are_those_of_single_addresses() -> None:
    own = addresses("192.0.2.7", "192.0.2.8", "2001:db8::7")
    floating = addresses("198.51.100.7", "198.51.100.8", "2001:db8:f::7")
    assert floating_ips_of(flows_of(OVN_ROUTER)) == {one: (behind,) for one, behind in zip(own, floating, strict=True)}


@given(st.text(alphabet="ct(commit,)zone=NXM_REG1[0.15]nat(src=198.51.100.7,dst:>-set_field ", max_size=120))
def test_actions_of_noise_are_no_router_s(noise: str) -> None:
    line = f" table=65, priority=1,reg15=0x2,metadata=0x1 actions={noise}"
    floating_ips_of(flows_of(line))
    adjacent_of(flows_of(line))
