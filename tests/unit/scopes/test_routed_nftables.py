"""What nftables' rules and the host's routes say of ports."""

from __future__ import annotations

import json
from typing import Any

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.errors import ConfigurationError, NotAvailable, NotPermitted
from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes import command, routed_nftables
from sami_plugin.scopes.routed_nftables import RoutedNftablesScopes, routes_of, rules_of, ruleset_of
from sami_plugin.scopes.rules import Knowledge

HERE = ("lo", "uplink", "tap-g", "tap-h")

# Written by nft 1.0.6 for two guests of the lab.
RECORDED = """{"nftables": [
{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
{"table": {"family": "inet", "name": "lab", "handle": 4}},
{"chain": {"family": "inet", "table": "lab", "name": "out-tap-g", "handle": 1}},
{"chain": {"family": "inet", "table": "lab", "name": "zones", "handle": 5, "type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept"}},
{"chain": {"family": "inet", "table": "lab", "name": "forward", "handle": 6, "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
{"rule": {"family": "inet", "table": "lab", "chain": "out-tap-g", "handle": 7, "expr": [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"drop": null}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "out-tap-g", "handle": 9, "expr": [{"return": null}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "zones", "handle": 22, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "icmpv6", "field": "type"}}, "right": {"set": ["nd-neighbor-solicit", "nd-neighbor-advert"]}}}, {"notrack": null}, {"accept": null}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "zones", "handle": 23, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "tap-g"}}, {"mangle": {"key": {"ct": {"key": "zone"}}, "value": 4097}}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "zones", "handle": 24, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "uplink"}}, {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "10.92.0.11"}}, {"mangle": {"key": {"ct": {"key": "zone"}}, "value": 4097}}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "zones", "handle": 25, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "uplink"}}, {"match": {"op": "==", "left": {"payload": {"protocol": "ip6", "field": "daddr"}}, "right": "fd92::b"}}, {"mangle": {"key": {"ct": {"key": "zone"}}, "value": 4097}}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "zones", "handle": 26, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "tap-h"}}, {"mangle": {"key": {"ct": {"key": "zone"}}, "value": 4098}}]}},
{"rule": {"family": "inet", "table": "lab", "chain": "forward", "handle": 31, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "tap-g"}}, {"jump": {"target": "out-tap-g"}}]}}
]}"""  # noqa: E501

IPV4_ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
uplink\t00000000\t0102FEA9\t0003\t0\t0\t0\t00000000\t0\t0\t0
tap-g\t0B005C0A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
tap-h\t0C005C0A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
tap-g\t00005C0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
*\t0D005C0A\t00000000\t0205\t0\t0\t0\tFFFFFFFF\t0\t0\t0
"""
IPV6_ROUTES = """\
fd92000000000000000000000000000b 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000400 00000001 00000000 00000001    tap-g
fd920000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000400 00000001 00000000 00000001    tap-g
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001       lo
fe80000000000000fc163efffe000007 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001    tap-g
fe800000000000000000000000000000 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 00300001    tap-g
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
"""  # noqa: E501


def addresses(*texts: str) -> tuple[netaddr.IPAddress, ...]:
    return tuple(map(netaddr.IPAddress, texts))


def none_asked(*_: str) -> list[Any]:
    return []


class Told(RoutedNftablesScopes):
    """A finder of a host with these rules and routes."""

    def __init__(self, ruleset: str, *routes: str, trust_guest_xml: bool = False) -> None:
        super().__init__(trust_guest_xml)
        self._ruleset = ruleset
        self._routes = routes or ("", "")
        for tap in ("tap-g", "tap-h"):
            self.learn(tap[-1], (GuestPort(tap),))

    def _look(self) -> Knowledge:
        return Knowledge.of(*rules_of(ruleset_of(self._ruleset), none_asked), HERE, routes_of(*self._routes))


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def by(right: Any, op: str = "==", key: str = "iifname") -> dict[str, Any]:
    return match({"meta": {"key": key}}, right, op)


def end(field: str, right: Any, op: str = "==", protocol: str = "ip") -> dict[str, Any]:
    return match({"payload": {"protocol": protocol, "field": field}}, right, op)


def sets_zone(value: Any, **key: str) -> dict[str, Any]:
    return {"mangle": {"key": {"ct": {"key": "zone", **key}}, "value": value}}


def looked_up(key: Any, data: Any) -> dict[str, Any]:
    return {"map": {"key": key, "data": data}}


IIFNAME = {"meta": {"key": "iifname"}}
DADDR = {"payload": {"protocol": "ip", "field": "daddr"}}
NETWORK = {"prefix": {"addr": "192.0.2.0", "len": 24}}


def ruleset(*rules: list[Any], chain: str = "c", hook: str = "prerouting", family: str = "ip", more: Any = ()) -> str:
    place = {"family": family, "table": "t"}
    things = [
        {"chain": {**place, "name": chain, "type": "filter", "hook": hook}},
        {"chain": {**place, "name": "d"}},
        {"set": {**place, "name": "taps", "type": "ifname", "elem": ["tap-g"]}},
        {"map": {**place, "name": "zones", "type": "ifname", "map": "mark", "elem": [["tap-g", 7], ["tap-h", 8]]}},
        *more,
        *({"rule": {**place, "chain": chain, "expr": rule}} for rule in rules),
    ]
    return json.dumps({"nftables": things})


def known(*rules: list[Any], **options: Any) -> Knowledge:
    return Knowledge.of(*rules_of(ruleset_of(ruleset(*rules, **options)), none_asked), HERE)


def in_chain_d(*expr: Any) -> list[Any]:
    return [{"rule": {"family": "ip", "table": "t", "chain": "d", "expr": list(expr)}}]


# ------------------------------------------------------------------------------------------------------- named sets

BLOCKED = match({"concat": [DADDR, {"payload": {"protocol": "tcp", "field": "dport"}}]}, "@blocked")


def test_elements_of_a_set_are_asked_for_once_and_only_where_a_rule_needs_them() -> None:
    place = {"family": "ip", "table": "t"}
    names = ("ours", "blocked", "dropped", "unused")
    sets = [{"set": {**place, "name": name}} for name in names]
    asked: list[tuple[str, str, str]] = []

    def ask(*what: str) -> list[Any]:
        asked.append(what)
        return ["tap-g", "tap-h"]

    rules = [
        [by("@ours"), sets_zone(7)],
        [by("@ours"), {"accept": None}],
        [end("saddr", "@dropped"), {"drop": None}],
        [BLOCKED, {"counter": None}],
    ]
    read, begins = rules_of(ruleset_of(ruleset(*rules, more=sets)), ask)
    assert Knowledge.of(read, begins, HERE).zones == {"tap-g": {7}, "tap-h": {7}}
    assert asked == [("set", "ip t", "ours")]


@pytest.mark.parametrize("name", ["a b", "x; flush ruleset", "ü", "-f", ""])
def test_a_set_with_a_name_that_nft_would_not_take_as_one_is_not_asked_for(name: str) -> None:
    more = [{"set": {"family": "ip", "table": "t", "name": name}}]
    read, _ = rules_of(ruleset_of(ruleset([by(f"@{name}"), sets_zone(7)], more=more)), refuse_to_be_asked)
    assert read[0].is_conditional


def refuse_to_be_asked(*what: str) -> list[Any]:
    raise AssertionError(what)


# ------------------------------------------------------------------------------------------------------ recordings


def test_ports_of_a_recorded_host() -> None:
    finder = Told(RECORDED, IPV4_ROUTES, IPV6_ROUTES)
    assert finder.find("g") == (Scope("tap-g", "g", {ZoneRole.PORT: 4097}, addresses("10.92.0.11", "fd92::b")),)
    assert finder.find("h") == (Scope("tap-h", "h", {ZoneRole.PORT: 4098}, addresses("10.92.0.12")),)


def test_routes_to_hosts_are_those_that_are_used_and_not_the_hosts_own() -> None:
    assert routes_of(IPV4_ROUTES, IPV6_ROUTES) == {
        "tap-g": addresses("10.92.0.11", "fd92::b"),
        "tap-h": addresses("10.92.0.12"),
    }


def test_ways_to_guests_of_other_hosts_are_no_neighbours() -> None:
    """In a routed network each of them has a host route, and so has a guest that has left."""
    set_by = '"tap-h"}}, {"mangle"', '{"set": ["tap-h", "uplink"]}}}, {"mangle"'
    shared = RECORDED.replace("4098", "4097").replace(*set_by)
    left = IPV4_ROUTES.replace("tap-g\t0B005C0A\t00000000\t0005", "uplink\t0B005C0A\t0102FEA9\t0007")
    elsewhere = "uplink\t32005C0A\t0102FEA9\t0007\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
    scope = Told(shared, IPV4_ROUTES + elsewhere, IPV6_ROUTES).find("g")[0]
    assert Told(shared, IPV4_ROUTES + elsewhere, IPV6_ROUTES).neighbours(scope) == addresses("10.92.0.12")
    assert Told(shared, left + elsewhere, "").neighbours(scope) == addresses("10.92.0.12")
    flat = left.replace("0102FEA9\t0007", "00000000\t0005")  # the way to it is the link itself
    assert Told(shared, flat, "").neighbours(scope) == addresses("10.92.0.12")


@pytest.mark.parametrize(
    ("rule", "family", "versions"),
    [
        ([by("tap-g"), sets_zone(7)], "inet", {4, 6}),
        ([by("tap-g"), sets_zone(7)], "ip", {4}),
        ([by("tap-g"), sets_zone(7)], "ip6", {6}),
        ([by("tap-g"), end("saddr", "192.0.2.7"), sets_zone(7)], "inet", {4}),
    ],
)
def test_family_of_which_packets_get_a_zone(rule: list[Any], family: str, versions: set[int]) -> None:
    assert known(rule, family=family).versions == {"tap-g": versions}


def test_addresses_by_destination_where_there_are_no_routes() -> None:
    assert Told(RECORDED).find("g")[0].addresses == addresses("10.92.0.11", "fd92::b")


def test_host_routes_say_the_addresses_in_a_shared_zone() -> None:
    finder = Told(RECORDED.replace("4098", "4097"), IPV4_ROUTES, IPV6_ROUTES)
    scope = finder.find("g")[0]
    assert (scope.is_shared, scope.addresses) == (True, addresses("10.92.0.11", "fd92::b"))
    assert finder.neighbours(scope) == addresses("10.92.0.12")
    assert finder.neighbours(finder.find("h")[0]) == addresses("10.92.0.11", "fd92::b")


# ------------------------------------------------------------------------------------------------------------ zones

ZONES = [
    ([by("tap-g"), sets_zone(7)], {"tap-g": {7}}),
    ([by("tap-g", key="iif"), sets_zone(7)], {"tap-g": {7}}),
    ([by("tap-g"), {"counter": {"packets": 1, "bytes": 2}}, sets_zone(7), {"accept": None}], {"tap-g": {7}}),
    ([by("tap-g"), {"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}, sets_zone(7)], {"tap-g": {7}}),
    ([by({"set": ["tap-g", "tap-h"]}), sets_zone(7)], {"tap-g": {7}, "tap-h": {7}}),
    ([by({"set": [{"elem": {"val": "tap-g", "comment": "web"}}]}), sets_zone(7)], {"tap-g": {7}}),
    ([by("@taps"), sets_zone(7)], {"tap-g": {7}}),
    ([sets_zone(looked_up(IIFNAME, {"set": [["tap-g", 7], ["tap-h", 8]]}))], {"tap-g": {7}, "tap-h": {8}}),
    ([sets_zone(looked_up(IIFNAME, "@zones"))], {"tap-g": {7}, "tap-h": {8}}),
    ([by("tap-g"), sets_zone(looked_up(IIFNAME, "@zones"))], {"tap-g": {7}}),
    ([by("tap-g"), end("saddr", "192.0.2.7"), sets_zone(7)], {"tap-g": {7}}),
]
NO_ZONES = [
    [by("tap-g", op="!="), sets_zone(7)],
    [by("tap-*"), sets_zone(7)],
    [by({"set": ["tap-g", "tap-*"]}), sets_zone(7)],
    [by("@nobody"), sets_zone(7)],
    [by({"range": ["tap-g", "tap-h"]}), sets_zone(7)],
    [match({"meta": {"key": "oifname"}}, "tap-g"), sets_zone(7)],
    [sets_zone(7)],
    [by("tap-g"), sets_zone(7, dir="original")],
    [by("tap-g"), sets_zone(65536)],
    [by("tap-g"), sets_zone(-1)],
    [by("tap-g"), sets_zone(True)],
    [by("tap-g"), sets_zone("7")],
    [by("tap-g"), sets_zone({"meta": {"key": "mark"}})],
    [by("tap-g"), end("saddr", {"prefix": {"addr": "192.0.2.0", "len": 24}}), sets_zone(7)],
    [by("tap-g"), end("saddr", "192.0.2.7", op="!="), sets_zone(7)],
    [by("tap-g"), match({"payload": {"protocol": "tcp", "field": "dport"}}, 22), sets_zone(7)],
    [by("tap-g"), {"xt": None}, sets_zone(7)],
    [by("tap-g"), by("tap-g"), sets_zone(7)],
    [sets_zone(looked_up({"meta": {"key": "mark"}}, {"set": [[1, 7]]}))],
    [by("tap-g"), sets_zone(looked_up(DADDR, {"set": [[NETWORK, 7]]}))],
    [by("tap-g"), sets_zone(looked_up(DADDR, {"set": [["192.0.2.7", 7]]}))],
]


@pytest.mark.parametrize(("rule", "zones"), ZONES)
def test_zone_by_device(rule: list[Any], zones: dict[str, set[int]]) -> None:
    assert known(rule).zones == zones


@pytest.mark.parametrize("rule", NO_ZONES)
def test_rule_that_does_not_give_all_packets_of_the_tap_a_zone_gives_none(rule: list[Any]) -> None:
    assert known(rule).zones == {}


@pytest.mark.parametrize("family", ["inet", "ip", "ip6"])
def test_any_family_that_routes_counts(family: str) -> None:
    assert known([by("tap-g"), sets_zone(7)], family=family).zones == {"tap-g": {7}}


@pytest.mark.parametrize(("family", "hook"), [("bridge", "prerouting"), ("netdev", "ingress"), ("ip", "output")])
def test_chains_where_no_routed_packet_begins_count_not(family: str, hook: str) -> None:
    assert known([by("tap-g"), sets_zone(7)], family=family, hook=hook).zones == {}


JUMPS = [
    [by("tap-g"), {"jump": {"target": "d"}}],
    [by("tap-g"), {"goto": {"target": "d"}}],
    [{"vmap": {"key": IIFNAME, "data": {"set": [["tap-g", {"jump": {"target": "d"}}]]}}}],
]


@pytest.mark.parametrize("jump", JUMPS)
def test_chain_of_a_port_gives_its_zone_and_its_address(jump: list[Any]) -> None:
    found = known(jump, more=[*in_chain_d(sets_zone(7)), *in_chain_d(end("saddr", "192.0.2.7"), {"return": None})])
    assert (found.zones, found.own) == ({"tap-g": {7}}, {"tap-g": addresses("192.0.2.7")})


def test_zones_by_destination_network_in_a_chain_of_a_port_are_not_the_zone_of_its_tap() -> None:
    by_destination = sets_zone(looked_up(DADDR, {"set": [["192.0.2.8", 7], [NETWORK, 5]]}))
    found = known(JUMPS[0], more=in_chain_d(by_destination))
    assert (found.zones, found.destinations) == ({}, {7: addresses("192.0.2.8")})


def test_chain_that_others_get_to_gives_nobody_a_zone() -> None:
    other = [{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["new", {"jump": {"target": "d"}}]]}}}]
    assert known(*JUMPS[:1], other, more=in_chain_d(sets_zone(7))).zones == {}
    assert known(more=in_chain_d(sets_zone(7))).zones == {}


@pytest.mark.parametrize(
    "rule",
    [
        [by("tap-*"), sets_zone(7)],
        [sets_zone(7)],
        [by("uplink"), sets_zone(7)],
        [by("tap-h"), match({"meta": {"key": "l4proto"}}, "tcp"), sets_zone(7)],
        [sets_zone(looked_up(IIFNAME, {"set": [["tap-*", 7]]}))],
        [sets_zone(looked_up({"meta": {"key": "mark"}}, {"set": [[1, 7]]}))],
        [sets_zone(looked_up(DADDR, {"set": [[NETWORK, 7]]}))],
    ],
)
def test_zone_that_others_may_have_entries_in_is_shared(rule: list[Any]) -> None:
    finder = Told(ruleset([by("tap-g"), end("saddr", "192.0.2.7"), sets_zone(7)], rule))
    assert finder.find("g")[0].is_shared


def test_zone_0_is_shared_with_the_host_although_no_rule_gives_it_to_another() -> None:
    finder = Told(ruleset([by("tap-g"), end("saddr", "192.0.2.7"), sets_zone(0)]))
    assert finder.find("g")[0].is_shared


def test_rules_that_disagree_about_the_zone_are_refused_by_name() -> None:
    finder = Told(ruleset([by("tap-g"), sets_zone(7)], [by("@taps"), sets_zone(8)]))
    with pytest.raises(ConfigurationError, match=r"tap-g: .*several zones \(7, 8\)"):
        finder.find("g")


# -------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "rule",
    [
        [end("daddr", "192.0.2.7"), sets_zone(7)],
        [by("uplink"), end("daddr", "192.0.2.7"), sets_zone(7)],
        [end("daddr", {"set": ["192.0.2.7"]}), sets_zone(7)],
        [sets_zone(looked_up(DADDR, {"set": [["192.0.2.7", 7]]}))],
    ],
)
def test_address_by_destination(rule: list[Any]) -> None:
    found = known(rule)
    assert (found.destinations, found.users) == ({7: addresses("192.0.2.7")}, {})


@pytest.mark.parametrize(
    "rule",
    [
        [end("daddr", "192.0.2.7", op="!="), sets_zone(7)],
        [end("daddr", {"prefix": {"addr": "192.0.2.0", "len": 24}}), sets_zone(7)],
        [end("daddr", {"range": ["192.0.2.1", "192.0.2.7"]}), sets_zone(7)],
        [end("daddr", {"set": ["192.0.2.7", {"prefix": {"addr": "192.0.2.0", "len": 28}}]}), sets_zone(7)],
        [end("daddr", "192.0.2.7"), match({"payload": {"protocol": "tcp", "field": "dport"}}, 22), sets_zone(7)],
        [sets_zone(looked_up(DADDR, {"set": [[{"prefix": {"addr": "192.0.2.0", "len": 24}}, 7]]}))],
    ],
)
def test_rule_about_more_than_single_addresses_says_none(rule: list[Any]) -> None:
    assert not any(known(rule).destinations.values())


def test_rules_against_spoofing_say_addresses() -> None:
    found = known(
        [by("tap-g"), end("saddr", {"set": ["192.0.2.7", "192.0.2.8"]}), {"accept": None}],
        [by("tap-h"), end("saddr", "2001:db8::8", op="!=", protocol="ip6"), {"drop": None}],
        [by("uplink"), end("saddr", "198.51.100.1"), {"drop": None}],
    )
    assert found.own == {"tap-g": addresses("192.0.2.7", "192.0.2.8"), "tap-h": addresses("2001:db8::8")}


# --------------------------------------------------------------------------------------------------- asking the kernel


@pytest.fixture
def nft(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(command, "SBIN", "/nonexistent")

    def write(script: str) -> None:
        (tmp_path / "nft").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nft").chmod(0o755)

    return write


def test_missing_tool_and_missing_permission_are_named(nft) -> None:
    with pytest.raises(NotAvailable, match="nft is not there; install the package nftables"):
        RoutedNftablesScopes().namespaces()
    nft("echo 'Operation not permitted (you must be root)' >&2; exit 1")
    with pytest.raises(NotPermitted, match=r"nft -j -t list ruleset: .*the agent needs CAP_NET_ADMIN"):
        RoutedNftablesScopes().namespaces()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"nftables": 7}', "[" * 100_000])
def test_output_of_no_nft_is_refused_by_name(nft, text: str, tmp_path) -> None:
    (tmp_path / "output").write_text(text)
    nft(f"cat {tmp_path / 'output'}")
    with pytest.raises(NotAvailable, match="nft -j -t list ruleset wrote no"):
        RoutedNftablesScopes().namespaces()


def test_set_that_cannot_be_listed_is_named(nft, tmp_path) -> None:
    sets = [{"map": {"family": "ip", "table": "t", "name": "of_taps"}}]
    (tmp_path / "rules").write_text(ruleset([sets_zone(looked_up(IIFNAME, "@of_taps"))], more=sets))
    nft(f"[ $2 = -t ] && exec cat {tmp_path / 'rules'}; echo 'Error: No such file or directory' >&2; exit 1")
    with pytest.raises(NotAvailable, match="nft -j list map ip t of_taps: Error: No such file"):
        RoutedNftablesScopes().namespaces()


def test_routes_that_cannot_be_read_are_named(nft, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    nft("""echo '{"nftables": []}'""")
    monkeypatch.setattr(routed_nftables, "ROUTES", (tmp_path, tmp_path))
    with pytest.raises(NotAvailable, match="the routes of this host cannot be read"):
        RoutedNftablesScopes().namespaces()


# ----------------------------------------------------------------------------------------------------- hostile input

NAMES = st.sampled_from(
    [
        "tap-g", "tap-h", "@taps", "@zones", "c", "d", "iifname", "ct", "zone", "daddr", "saddr", "ip", "==",
        "!=", "192.0.2.7", "::1", "inet", "prerouting", "forward",
    ]
)  # fmt: skip
KEYS = st.sampled_from(
    [
        "match", "op", "left", "right", "meta", "payload", "protocol", "field", "key", "mangle", "value", "map",
        "data", "set", "elem", "val", "jump", "target", "vmap", "ct", "expr",
    ]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 70000) | st.floats() | NAMES | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
SAMPLES = st.sampled_from([*(rule for rule, _ in ZONES), *NO_ZONES, *JUMPS])


@given(
    st.lists(SAMPLES, max_size=3), st.lists(st.integers(0, 2000), max_size=6), st.lists(VALUES, min_size=6, max_size=6)
)
def test_any_ruleset_is_read(rules: list[Any], places: list[int], values: list[Any]) -> None:
    """Rules with parts of them replaced by anything else."""
    whole = json.loads(ruleset(*rules))
    for place, value in zip(places, values, strict=False):
        spots = list(_spots(whole))
        container, key = spots[place % len(spots)]
        container[key] = value
    finder = Told(json.dumps(whole), IPV4_ROUTES, IPV6_ROUTES)
    try:
        found = finder.find("g")
    except (ConfigurationError, NotAvailable):
        return
    for scope in found:
        assert finder.neighbours(scope) is not None


def _spots(value: Any):
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _spots(value[key])


@given(st.lists(st.text("0123456789abcdefF \t", max_size=40) | st.text(max_size=10)).map("\n".join))
def test_any_routes_are_read(text: str) -> None:
    routes_of(text, text)
    routes_of(IPV4_ROUTES + text, IPV6_ROUTES + text)
