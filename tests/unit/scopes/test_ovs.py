"""What Open vSwitch's database and flows say of ports, where Neutron's firewall is in Open vSwitch."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.errors import NotAvailable, NotPermitted
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes import open_vswitch
from sami_plugin.scopes.open_vswitch import Bridge, Flow, Integration, Interface, bridge_of, flows_of, loaded, number_of
from sami_plugin.scopes.ovs import OvsScopes, addresses_of, knowledge_of, zones_of
from tests.unit.scopes.open_vswitch_texts import BASE_EGRESS, TRANSIENT, TRANSIENT_14
from tests.unit.scopes.test_loading import configured

FIRST, SECOND, UNFILTERED = "tap1234abcd-5e", "tap9876fedc-5e", "tapaaaabbbb-5e"
FIRST_PORT = "1234abcd-5e00-4000-8000-000000000007"


def addresses(*texts: str) -> Addresses:
    return tuple(map(netaddr.IPAddress, texts))


OWN = addresses("192.0.2.7", "192.0.2.100", "2001:db8::100", "2001:db8::7", "fe80::f816:3eff:fe00:7")
BRIDGE = Bridge(
    {
        FIRST: Interface(FIRST, FIRST_PORT, 1, 3, False),
        SECOND: Interface(SECOND, "9876fedc-5e00-4000-8000-000000000008", 2, 3, False),
        UNFILTERED: Interface(UNFILTERED, "aaaabbbb-5e00-4000-8000-000000000009", 3, 3, False),
    },
    {},
    True,
)


class FakeIntegration(Integration):
    def __init__(self, bridge: Bridge = BRIDGE, *texts: str) -> None:
        self.bridge = bridge
        self.texts = texts or (TRANSIENT, BASE_EGRESS)

    def look(self) -> Bridge:
        return self.bridge

    def flows(self, match: str) -> Iterator[Flow]:
        field, _, value = match.partition("=")
        for text in self.texts:
            for flow in flows_of(text):
                if (str(flow.table) if field == "table" else flow.match.get(field)) == value:
                    yield flow


def told(bridge: Bridge = BRIDGE, *texts: str, trust_guest_xml: bool = False) -> OvsScopes:
    finder = OvsScopes(FakeIntegration(bridge, *texts), trust_guest_xml)
    finder.learn("g", (GuestPort(FIRST, interface_id=FIRST_PORT),))
    return finder


def changed(name: str, **fields: Any) -> Bridge:
    return replace(BRIDGE, interfaces={**BRIDGE.interfaces, name: replace(BRIDGE.interfaces[name], **fields)})


# -------------------------------------------------------------------------------------- what Neutron has programmed


@pytest.mark.parametrize("transient", [TRANSIENT, TRANSIENT_14])
def test_port_has_its_networks_zone_shared_and_the_addresses_it_may_send_from(transient: str) -> None:
    (scope,) = told(BRIDGE, transient, BASE_EGRESS).find("g")
    assert scope == Scope(FIRST, "g", {ZoneRole.PORT: 3}, scope.addresses, is_shared=True, barred_marks=1)
    assert set(scope.addresses) == set(OWN)  # allowed address pairs among them, 203.0.113.0/24 not: it is a network


def test_neighbours_are_the_ports_of_the_same_network_that_are_filtered() -> None:
    finder = told()
    assert finder.neighbours(finder.find("g")[0]) == addresses("192.0.2.8", "fe80::f816:3eff:fe00:8")


def test_neighbour_in_another_network_or_gone_is_none() -> None:
    for bridge in (
        changed(SECOND, tag=4),
        replace(BRIDGE, interfaces={FIRST: BRIDGE.interfaces[FIRST]}),
    ):
        finder = told(bridge)
        assert finder.neighbours(finder.find("g")[0]) == ()


def test_only_port_of_its_network_shares_the_zone_all_the_same() -> None:
    assert told(replace(BRIDGE, interfaces={FIRST: BRIDGE.interfaces[FIRST]})).find("g")[0].is_shared


def test_port_without_port_security_has_no_zone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    finder = told()
    finder.learn("u", (GuestPort(UNFILTERED, claimed=addresses("192.0.2.9")),))
    assert finder.find("u") == ()
    assert "no rule gives its packets a zone yet" in caplog.text


# ------------------------------------------------------------------------------------------------- what is not so yet


@pytest.mark.parametrize(
    ("bridge", "texts"),
    [
        (replace(BRIDGE, interfaces={}), ()),
        (changed(FIRST, tag=None), ()),
        (changed(FIRST, tag=5), ()),  # a number that its flows do not have
        (changed(FIRST, number=9), ()),  # opened again; its flows are those of its former number
        (BRIDGE, ("", "")),
        (BRIDGE, (TRANSIENT, "")),
        (BRIDGE, (BASE_EGRESS,)),
    ],
)
def test_port_is_not_here_before_database_and_flows_agree(bridge: Bridge, texts: tuple[str, ...]) -> None:
    assert told(bridge, *texts).find("g") == ()


def test_device_that_is_another_port_here_is_not_the_guests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    finder = told()
    finder.learn("g", (GuestPort(FIRST, interface_id="9876fedc-5e00-4000-8000-000000000008"),))
    assert finder.find("g") == ()
    assert f"{FIRST} is not known here: it is port {FIRST_PORT} here" in caplog.text


def test_device_is_enough_where_the_description_names_no_port() -> None:
    finder = told()
    finder.learn("g", (GuestPort(FIRST),))
    assert finder.find("g")


@pytest.mark.parametrize("is_trusted", [False, True])
def test_claims_count_only_where_the_operator_says_so(is_trusted: bool) -> None:
    finder = told(BRIDGE, TRANSIENT, "", trust_guest_xml=is_trusted)
    finder.learn("g", (GuestPort(FIRST, claimed=addresses("192.0.2.7")),))
    assert [scope.addresses for scope in finder.find("g")] == ([addresses("192.0.2.7")] if is_trusted else [])


# ------------------------------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize(
    "flow",
    [
        "table=71, priority=65,ip,reg5=0x1,in_port=1,nw_src=192.0.2.7 actions=resubmit(,94)",
        "table=71, priority=65,ip,reg5=0x1,in_port=1,nw_src=192.0.2.7 actions=ct(table=72,zone=7)",
        "table=71, priority=65,ip,reg5=0x1,in_port=1,nw_src=192.0.2.7 actions=ct(table=72,zone=NXM_NX_REG7[0..15])",
        "table=72, priority=65,ip,reg5=0x1,in_port=1,nw_src=192.0.2.7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, priority=65,ip,reg5=0x1,nw_src=192.0.2.7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, priority=65,ip,in_port=LOCAL,nw_src=192.0.2.7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, priority=65,tcp,in_port=1,nw_src=192.0.2.7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, ip,in_port=1,nw_src=192.0.2.7,nw_dst=192.0.2.8 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, priority=65,ip,in_port=1,nw_src=192.0.2.0/24 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, priority=65,ip,in_port=1,nw_src=0.0.0.0 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
        "table=71, priority=65,ip,in_port=1 actions=ct(table=72,zone=NXM_NX_REG6[0..15])",
    ],
)
def test_flow_that_is_about_something_else_says_no_address(flow: str) -> None:
    assert addresses_of(flows_of(flow)) == {}


@pytest.mark.parametrize(
    ("flow", "zones"),
    [
        ("table=60, in_port=1 actions=load:0x3->NXM_NX_REG6[],resubmit(,71)", {1: 3}),
        ("table=60, in_port=1 actions=set_field:0x1->reg5,set_field:3->reg6,resubmit(,71)", {1: 3}),
        ("table=60, in_port=1 actions=load:0x3->NXM_NX_REG6[],resubmit(,73)", {}),
        ("table=60, in_port=1 actions=load:0x3->NXM_NX_REG5[],resubmit(,71)", {}),
        ("table=60, in_port=1,dl_vlan=3 actions=load:0x3->NXM_NX_REG6[],resubmit(,71)", {}),
        ("table=0, in_port=1 actions=load:0x3->NXM_NX_REG6[],resubmit(,71)", {}),
        ("in_port=1 actions=load:0x3->NXM_NX_REG6[],resubmit(,71)", {}),
    ],
)
def test_zone_is_what_the_flow_of_the_port_puts_into_the_register(flow: str, zones: dict[int, int]) -> None:
    assert zones_of(flows_of(flow)) == zones


WORDS = st.sampled_from(
    [
        *re.split(r"([,= \n])", TRANSIENT + BASE_EGRESS),
        "actions=",
        "in_port=0x",
        "load:0x99999999999->NXM_NX_REG6[]",
        "\0",
    ]
)


@given(st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=40))
def test_any_text_is_read(words: list[str]) -> None:
    flows = list(flows_of("".join(words)))
    knowledge_of(BRIDGE, zones_of(flows), addresses_of(flows))


@given(st.text(max_size=40).filter(lambda text: "in_port" not in text))
def test_line_of_noise_changes_nothing(line: str) -> None:
    text = TRANSIENT + BASE_EGRESS
    noisy = list(flows_of(f"{text}{line}\n"))
    assert zones_of(noisy) == zones_of(flows_of(text))
    assert addresses_of(noisy) == addresses_of(flows_of(text))


@given(st.integers(0, 0xFFFFFFFF))
def test_numbers_are_read_as_they_are_written(number: int) -> None:
    assert number_of(hex(number)) == number_of(str(number)) == number
    assert loaded(f"a,load:{number:#x}->NXM_NX_REG6[0..15],b", "NXM_NX_REG6") == number


# ---------------------------------------------------------------------------------------------------------- database


def interface(name: str, ofport: list[int], **external_ids: str) -> SimpleNamespace:
    ids = {key.replace("_", "-"): value for key, value in external_ids.items()}
    return SimpleNamespace(name=name, ofport=ofport, external_ids=ids)


def port(one: SimpleNamespace, tag: list[int], other_config: dict[str, str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=one.name, interfaces=[one], tag=tag, other_config=other_config or {})


def database(*ports: SimpleNamespace, datapath_type: str = "") -> dict[str, Any]:
    bridge = SimpleNamespace(name="br-int", ports=ports, external_ids={"k": "v"}, datapath_type=datapath_type)
    other = SimpleNamespace(name="br-ex", ports=[port(interface("eth0", [1]), [])], external_ids={}, datapath_type="")
    return {"Bridge": SimpleNamespace(rows={1: other, 2: bridge})}


@pytest.mark.parametrize(
    ("tag", "other_config", "expected"),
    [
        ([3], {}, 3),
        ([], {"tag": "3"}, 3),
        ([4095], {"tag": "3"}, 3),  # not wired yet, and the number is settled
        ([4095], {}, None),
        ([], {}, None),
        ([], {"tag": "x"}, None),
        ([], {"tag": "0"}, None),
        ([], {"tag": "99999"}, None),
    ],
)
def test_tag_is_the_agents_word_before_the_switchs(tag: list[int], other_config: dict[str, str], expected: int) -> None:
    told = bridge_of(database(port(interface("tap1", [4], iface_id="p"), tag, other_config)), "br-int")
    assert told is not None
    assert told.interfaces == {"tap1": Interface("tap1", "p", 4, expected, False)}


def test_interface_that_is_not_open_is_not_there() -> None:
    told = bridge_of(database(port(interface("tap1", [-1]), [3]), port(interface("tap2", []), [3])), "br-int")
    assert told is not None
    assert told.interfaces == {}


def test_bridge_of_another_name_is_none() -> None:
    assert bridge_of(database(), "br-x") is None


def test_datapath_in_user_space_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    bridge = Integration("unix:/nowhere/db.sock", "br-int")
    bridge._copy = SimpleNamespace(current=lambda: bridge_of(database(datapath_type="netdev"), "br-int"))  # type: ignore[assignment]
    for _ in range(2):
        bridge.look()
    assert [record.message for record in caplog.records if "user space" in record.message] == [
        "br-int has a datapath in user space, which tracks connections by itself: the kernel has none of its ports"
    ]


def test_socket_that_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = tmp_path / "db.sock"
    socket.touch()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(NotPermitted, match=r"db\.sock may not be opened by this process; run the agent in the group"):
        Integration(f"unix:{socket}", "br-int").look()


@pytest.mark.parametrize(
    ("connection", "target"),
    [("unix:/run/ovs/db.sock", "unix:/run/ovs/br-x.mgmt"), ("tcp:127.0.0.1:6640", "br-x"), ("unix:db.sock", "br-x")],
)
def test_finder_takes_its_options_and_finds_the_bridges_socket_beside_the_databases(
    connection: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def output_of(argv: list[str], package: str, needs: str) -> tuple[str, str]:
        asked.append(argv)
        return TRANSIENT, ""

    monkeypatch.setattr(open_vswitch, "output_of", output_of)
    text = f"[ovs]\novsdb_connection = {connection}\nintegration_bridge = br-x\n[agent]\ntrust_guest_xml = true\n"
    finder = OvsScopes.from_conf(configured(tmp_path, text))
    assert finder._trusts_claims
    assert len(list(finder._integration.flows("table=60"))) == len(TRANSIENT.splitlines())
    assert [argv[-2:] for argv in asked] == [[target, "table=60"]]


def test_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ovsdbapp", None)
    monkeypatch.setitem(sys.modules, "ovs", None)
    with pytest.raises(NotAvailable, match=r"the package ovsdbapp cannot be imported .*sami_plugin\[ovs\]"):
        Integration("unix:/nowhere/db.sock", "br-int").look()
