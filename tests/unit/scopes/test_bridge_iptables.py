"""What the rules of iptables say of ports."""

from __future__ import annotations

import logging
from unittest import mock

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.errors import ConfigurationError, NotAvailable, NotPermitted
from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes import bridge_iptables, command
from sami_plugin.scopes.bridge_iptables import TOOLS, BridgeIptablesScopes, begins_of, rules_of
from sami_plugin.scopes.rules import Knowledge
from tests.unit.scopes.iptables_texts import HYBRID, LINUX_BRIDGE, LINUX_BRIDGE_V6, OWN

FIRST, SECOND = "tap1234abcd-5e", "tap9876fedc-5e"
HERE = ("lo", "uplink", "brq5c0ffee0-12", FIRST, SECOND, "tap-g", "tap-h", "tap-i")


def addresses(*texts: str) -> tuple[netaddr.IPAddress, ...]:
    return tuple(map(netaddr.IPAddress, texts))


def knowledge(v4: str, v6: str = "", here: tuple[str, ...] = HERE) -> Knowledge:
    rules = [rule for tool, text in zip(TOOLS, (v4, v6), strict=True) for rule in rules_of(text, tool)]
    return Knowledge.of(rules, begins_of(TOOLS), here)


class Told(BridgeIptablesScopes):
    """A finder of a host with these rules."""

    def __init__(self, v4: str, v6: str = "", here: tuple[str, ...] = HERE, trust_guest_xml: bool = False) -> None:
        super().__init__(trust_guest_xml)
        self.texts = (v4, v6, here)

    def _look(self) -> Knowledge:
        return knowledge(*self.texts)


def raw(*rules: str) -> str:
    return "\n".join(["*raw", ":PREROUTING ACCEPT [0:0]", *rules, "COMMIT", ""])


def own(guest: str = "g", device: str = "tap-g", *claimed: str) -> tuple[str, tuple[GuestPort, ...]]:
    return guest, (GuestPort(device, claimed=addresses(*claimed)),)


# ------------------------------------------------------------------------------------------ Neutron's Linux bridge


def test_port_of_linux_bridge_has_the_networks_zone_and_the_addresses_it_may_send_from() -> None:
    finder = Told(LINUX_BRIDGE, LINUX_BRIDGE_V6)
    finder.learn(*own("g", FIRST, "192.0.2.66"))
    expected = addresses("192.0.2.7", "192.0.2.100", "2001:db8::7", "fe80::f816:3eff:fe00:7")
    assert finder.find("g") == (Scope(FIRST, "g", {ZoneRole.PORT: 4097}, expected, is_shared=True),)


def test_neighbours_on_linux_bridge_are_known_without_their_guests_being_learned() -> None:
    finder = Told(LINUX_BRIDGE, LINUX_BRIDGE_V6)
    finder.learn(*own("g", FIRST))
    assert finder.neighbours(finder.find("g")[0]) == addresses("192.0.2.8")


def test_neighbour_whose_tap_went_is_none_although_its_rules_stay() -> None:
    finder = Told(LINUX_BRIDGE, LINUX_BRIDGE_V6, here=(FIRST,))
    finder.learn(*own("g", FIRST))
    assert finder.neighbours(finder.find("g")[0]) == ()


def test_zone_of_a_network_is_shared_even_by_its_only_port() -> None:
    only = "\n".join(line for line in LINUX_BRIDGE.splitlines() if SECOND not in line)
    finder = Told(only)
    finder.learn(*own("g", FIRST))
    assert finder.find("g")[0].is_shared


# ------------------------------------------------------------------------------------------------- Neutron's hybrid


def test_port_of_hybrid_has_a_zone_of_its_own_although_its_other_end_has_it_too() -> None:
    finder = Told(HYBRID)
    finder.learn(*own("g", FIRST))
    finder.learn(*own("h", SECOND, "192.0.2.8"))
    assert finder.find("g") == (Scope(FIRST, "g", {ZoneRole.PORT: 4101}, addresses("192.0.2.7")),)
    assert finder.find("h") == (Scope(SECOND, "h", {ZoneRole.PORT: 4102}, addresses("192.0.2.8")),)


# ------------------------------------------------------------------------------------------------- anybody's rules


@pytest.mark.parametrize(("device", "zone", "address"), [("tap-g", 7, "192.0.2.7"), ("tap-h", 8, "192.0.2.8")])
def test_zone_by_device_and_address_by_destination(device: str, zone: int, address: str) -> None:
    finder = Told(OWN)
    finder.learn(*own("g", device))
    assert finder.find("g") == (Scope(device, "g", {ZoneRole.PORT: zone}, addresses(address)),)


SPOOFING = [
    "-A FORWARD -s 192.0.2.7/32 -m physdev --physdev-in tap-g --physdev-is-bridged -j ACCEPT",
    "-A FORWARD -s 192.0.2.7 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A FORWARD ! -s 192.0.2.7/32 -m physdev --physdev-in tap-g -j DROP",
    "-A FORWARD ! -s 192.0.2.7/32 -i tap-g -j REJECT --reject-with icmp-port-unreachable",
    "-A FORWARD -i tap-g -j one\n-A one -g two\n-A two -s 192.0.2.7/32 -m comment --comment \"-j DROP \\\"\" -j RETURN",
]  # fmt: skip
NO_SPOOFING = [
    "-A FORWARD -s 192.0.2.7/32 -m physdev --physdev-in tap-g -j DROP",
    "-A FORWARD ! -s 192.0.2.7/32 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A FORWARD -s 192.0.2.7/32 -m physdev ! --physdev-in tap-g -j ACCEPT",
    "-A FORWARD -s 192.0.2.7/32 -m physdev --physdev-out tap-g -j ACCEPT",
    "-A FORWARD -s 192.0.2.7/32 -m physdev --physdev-in tap+ -j ACCEPT",
    "-A FORWARD -s 192.0.2.0/24 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A FORWARD -s 192.0.2.7/32 -d 192.0.2.8/32 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A FORWARD -s 192.0.2.7/32 -p tcp -m physdev --physdev-in tap-g -m tcp --dport 25 -j ACCEPT",
    "-A FORWARD -s 0.0.0.0/32 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A FORWARD -s 192.0.2.7/32 -j ACCEPT",
    "-A INPUT -s 192.0.2.7/32 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A nobody-calls -s 192.0.2.7/32 -m physdev --physdev-in tap-g -j ACCEPT",
    "-A FORWARD -i tap-g -j both\n-A FORWARD -i tap-h -j both\n-A both -s 192.0.2.7/32 -j RETURN",
    "-A FORWARD -i tap-g -j both\n-A FORWARD -j both\n-A both -s 192.0.2.7/32 -j RETURN",
]


@pytest.mark.parametrize("rules", SPOOFING)
def test_rule_against_spoofing_says_an_address_of_the_port(rules: str) -> None:
    assert knowledge(f"*filter\n{rules}\nCOMMIT\n").own == {"tap-g": addresses("192.0.2.7")}


@pytest.mark.parametrize("rules", NO_SPOOFING)
def test_rule_that_is_about_something_else_says_none(rules: str) -> None:
    assert not any(knowledge(f"*filter\n{rules}\nCOMMIT\n").own.values())


NO_ZONE = [
    "-A PREROUTING -m physdev ! --physdev-in tap-g -j CT --zone 7",
    "-A PREROUTING -m physdev --physdev-out tap-g -j CT --zone 7",
    "-A PREROUTING -m physdev --physdev-in tap+ -j CT --zone 7",
    "-A PREROUTING -j CT --zone 7",
    "-A PREROUTING -p tcp -m physdev --physdev-in tap-g -j CT --zone 7",
    "-A PREROUTING -s 192.0.2.0/24 -m physdev --physdev-in tap-g -j CT --zone 7",
    "-A PREROUTING ! -s 192.0.2.9/32 -m physdev --physdev-in tap-g -j CT --zone 7",
    "-A PREROUTING -m physdev --physdev-in tap-g -j CT --zone-orig 7",
    "-A PREROUTING -m physdev --physdev-in tap-g -j CT --zone mark",
    "-A PREROUTING -m physdev --physdev-in tap-g -j CT --zone 65536",
    "-A PREROUTING -m physdev --physdev-in tap-g -j CT --zone \u0667",
    "-A PREROUTING -m physdev --physdev-in tap-g -j CT --zone",
    "-A PREROUTING -m physdev --physdev-in tap-g -j CT --notrack",
    "-A OUTPUT -m physdev --physdev-in tap-g -j CT --zone 7",
    "-A nobody-calls -m physdev --physdev-in tap-g -j CT --zone 7",
]


@pytest.mark.parametrize("rule", NO_ZONE)
def test_rule_that_does_not_give_all_packets_of_the_tap_a_zone_gives_none(rule: str) -> None:
    assert "tap-g" not in knowledge(raw(rule)).zones


def test_rule_in_another_table_gives_no_zone() -> None:
    text = raw("-A PREROUTING -i tap-g -j CT --zone 7").replace("*raw", "*mangle")
    assert knowledge(text).zones == {}


def test_zone_may_be_given_in_a_chain_of_the_port_or_to_its_own_addresses_only() -> None:
    rules = ("-A PREROUTING -i tap-g -j g", "-A g -j CT --zone 7", "-A PREROUTING -s 192.0.2.8 -i tap-h -j CT --zone 8")
    known = knowledge(raw(*rules))
    assert known.zones == {"tap-g": {7}, "tap-h": {8}}
    assert known.own["tap-h"] == addresses("192.0.2.8")


@pytest.mark.parametrize(
    "rule",
    [
        "-A PREROUTING -i tap-x -j CT --zone 7",  # a tap that went
        "-A PREROUTING -j CT --zone 7",
        "-A PREROUTING -i uplink -j CT --zone 7",
        "-A PREROUTING -p tcp -i tap-h -j CT --zone 7",
        "-A PREROUTING -i tap+ -j CT --zone 7",
    ],
)
def test_zone_that_others_may_have_entries_in_is_shared(rule: str) -> None:
    finder = Told(raw("-A PREROUTING -s 192.0.2.7/32 -i tap-g -j CT --zone 7", rule))
    finder.learn(*own())
    assert finder.find("g")[0].is_shared


def test_zone_0_is_shared_with_the_host_although_no_rule_gives_it_to_another() -> None:
    finder = Told(raw("-A PREROUTING -s 192.0.2.7/32 -i tap-g -j CT --zone 0"))
    finder.learn(*own())
    assert finder.find("g")[0].is_shared


def test_bridge_that_a_rule_names_beside_the_tap_is_not_the_port() -> None:
    rule = "-A PREROUTING -i brq5c0ffee0-12 -m physdev --physdev-in tap-g -j CT --zone 7"
    assert knowledge(raw(rule)).zones == {"tap-g": {7}}


def test_all_destinations_but_one_are_nobodys() -> None:
    assert not any(knowledge(raw("-A PREROUTING ! -d 192.0.2.7/32 -j CT --zone 7")).destinations.values())


def test_destinations_of_a_shared_zone_are_nobodys() -> None:
    devices = [f"-A PREROUTING -i {tap} -j CT --zone 7" for tap in ("tap-g", "tap-h")]
    text = raw(*devices, "-A PREROUTING -d 192.0.2.7 -j CT --zone 7")
    finder = Told(text)
    finder.learn(*own())
    assert finder.find("g") == ()


@pytest.mark.parametrize("device", ["vnet3", "tap-g", "t", "tap"])
def test_name_of_the_device_may_be_any(device: str) -> None:
    finder = Told(raw(f"-A PREROUTING -i {device} -j CT --zone 7"), here=(device,))
    finder.learn(*own("g", device, "192.0.2.7"))
    assert finder.find("g") == (Scope(device, "g", {ZoneRole.PORT: 7}, addresses("192.0.2.7")),)


def test_families_that_disagree_about_the_zone_are_refused_by_name() -> None:
    finder = Told(*(raw(f"-A PREROUTING -i tap-g -j CT --zone {zone}") for zone in (7, 8)))
    finder.learn(*own("g", "tap-g", "192.0.2.7"))
    with pytest.raises(ConfigurationError, match=r"tap-g: .*several zones \(7, 8\)"):
        finder.find("g")


# ---------------------------------------------------------------------------------------------------- not yet here


@pytest.mark.parametrize(
    ("text", "here"),
    [
        (OWN, ("tap-h", "uplink")),
        (raw("-A PREROUTING -i tap-h -j CT --zone 8"), HERE),
        (raw("-A PREROUTING -i brq5c0ffee0-12 -j CT --zone 8"), HERE),
        ("", HERE),
    ],
    ids=["no tap", "no rule", "no rule but the bridge's", "no rules"],
)
def test_port_is_not_here_before_tap_and_rule(text: str, here: tuple[str, ...]) -> None:
    finder = Told(text, here=here)
    finder.learn(*own("g", "tap-g", "192.0.2.7"))
    assert finder.find("g") == ()


def test_port_without_any_address_is_not_here_yet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    finder = Told(raw("-A PREROUTING -i tap-g -j CT --zone 7"))
    finder.learn(*own())
    assert [finder.find("g") for _ in range(3)] == [(), (), ()]
    assert [record.getMessage() for record in caplog.records] == [
        "g: port tap-g is not known here: its zone is 7, and nothing that counts here says an address of it"
    ]


def test_addresses_of_a_family_without_a_zone_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """What the guest says by them is in zone 0."""
    caplog.set_level(logging.INFO)
    finder = Told(OWN)
    finder.learn(*own("g", "tap-g", "192.0.2.7", "2001:db8::7"))
    assert finder.find("g")[0].addresses == addresses("192.0.2.7")
    assert "tap-g is known in part: no rule gives its IPv6 packets a zone" in caplog.text


def test_devices_that_cannot_be_listed_for_now_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = Told(OWN)
    finder.learn(*own())
    monkeypatch.setattr(finder, "_look", mock.Mock(side_effect=OSError(24, "Too many open files")))
    with pytest.raises(NotAvailable, match="Too many open files"):
        finder.find("g")


def test_guests_in_a_zone_of_all_devices_are_neighbours() -> None:
    finder = Told(raw("-A PREROUTING -i tap-g -j CT --zone 7", "-A PREROUTING -j CT --zone 7"), trust_guest_xml=True)
    finder.learn(*own("g", "tap-g", "192.0.2.7"))
    finder.learn(*own("h", "tap-h", "192.0.2.8"))
    (scope,) = finder.find("g")
    assert scope.is_shared
    assert finder.neighbours(scope) == addresses("192.0.2.8")


def test_guest_that_nobody_spoke_of_is_not_here_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_iptables, "output_of", None)
    finder = BridgeIptablesScopes()
    assert finder.find("g") == ()
    finder.learn("g", (GuestPort("", "52:54:00:00:00:01"),))
    assert finder.find("g") == ()


def test_newest_word_counts_and_none_forgets() -> None:
    finder = Told(OWN)
    finder.learn(*own("g", "tap-g"))
    finder.learn(*own("g", "tap-h"))
    assert [scope.port for scope in finder.find("g")] == ["tap-h"]
    finder.learn("g", ())
    assert finder.find("g") == ()


# ---------------------------------------------------------------------------------------------------- who is believed


def test_claims_fill_a_family_that_nothing_else_says_in_a_zone_of_ones_own() -> None:
    finder = Told(OWN, raw("-A PREROUTING -i tap-g -j CT --zone 7"))
    finder.learn(*own("g", "tap-g", "192.0.2.66", "2001:db8::7"))
    assert finder.find("g")[0].addresses == addresses("192.0.2.7", "2001:db8::7")


@pytest.mark.parametrize("is_trusted", [False, True])
def test_claims_count_in_a_shared_zone_only_where_the_operator_says_so(is_trusted: bool) -> None:
    text = raw(*(f"-A PREROUTING -i {tap} -j CT --zone 7" for tap in ("tap-g", "tap-h")))
    finder = Told(text, trust_guest_xml=is_trusted)
    finder.learn(*own("g", "tap-g", "192.0.2.7"))
    expected = (Scope("tap-g", "g", {ZoneRole.PORT: 7}, addresses("192.0.2.7"), is_shared=True),)
    assert finder.find("g") == (expected if is_trusted else ())


def test_claims_never_count_beside_this_hosts_own_word() -> None:
    finder = Told(LINUX_BRIDGE, trust_guest_xml=True)
    finder.learn(*own("g", FIRST, "192.0.2.8"))
    assert finder.find("g")[0].addresses == addresses("192.0.2.7", "192.0.2.100")


def test_claims_of_neighbours_protect_their_entries_but_never_take_the_ports_own() -> None:
    finder = Told(LINUX_BRIDGE.replace("-s 192.0.2.8/32", "-s 192.0.2.0/24"))
    finder.learn(*own("g", FIRST))
    finder.learn(*own("h", SECOND, "192.0.2.8", "192.0.2.7"))
    assert finder.neighbours(finder.find("g")[0]) == addresses("192.0.2.8")


def test_tap_that_two_guests_are_said_to_have_is_neithers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    finder = Told(OWN)
    finder.learn(*own("g", "tap-g"))
    finder.learn(*own("thief", "tap-g", "192.0.2.7"))
    assert finder.find("thief") == finder.find("g") == ()
    assert "thief: port tap-g is not known here: guest g is said to have it too" in caplog.text
    finder.learn("thief", ())
    assert len(finder.find("g")) == 1


# -------------------------------------------------------------------------------------------------- asking the kernel


def test_one_look_answers_all_for_a_short_time() -> None:
    now = [0.0]
    looks = []

    class Counted(BridgeIptablesScopes):
        def _look(self) -> Knowledge:
            looks.append(now[0])
            return knowledge(OWN)

    finder = Counted(clock=lambda: now[0])
    for guest, tap in (("g", "tap-g"), ("h", "tap-h")):
        finder.learn(*own(guest, tap))
    for at in (0.0, 0.05, 0.09, 0.1, 0.15):
        now[0] = at
        assert all(finder.neighbours(scope) == () for guest in "gh" for scope in finder.find(guest))
    assert looks == [0.0, 0.1]


def test_look_that_takes_long_answers_for_as_long_as_it_took() -> None:
    now = [0.0]
    looks = []

    class Slow(BridgeIptablesScopes):
        def _look(self) -> Knowledge:
            looks.append(now[0])
            now[0] += 3
            return knowledge(OWN)

    finder = Slow(clock=lambda: now[0])
    for at in (0.0, 5.9, 6.0):
        now[0] = at
        finder.namespaces()
    assert looks == [0.0, 6.0]


def test_look_that_fails_answers_as_long_as_one_that_does_not() -> None:
    now = [0.0]
    looks = []

    class Hung(BridgeIptablesScopes):
        def _look(self) -> Knowledge:
            looks.append(now[0])
            now[0] += 5
            if len(looks) == 1:
                raise NotAvailable("iptables-save has not ended")
            return knowledge(OWN)

    finder = Hung(clock=lambda: now[0])
    finder.learn(*own())
    raised = []
    for at in (0.0, 5.0, 9.9):
        now[0] = at
        with pytest.raises(NotAvailable, match=r"^iptables-save has not ended$") as error:
            finder.find("g")
        raised.append(error.value)
    assert looks == [0.0]
    assert len(set(map(id, raised))) == 3  # several threads raise it
    now[0] = 10.0
    assert len(finder.find("g")) == 1


@pytest.fixture
def tool(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(command, "SBIN", "/nonexistent")

    def write(script: str, name: str = "iptables-save") -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_missing_tool_is_named_with_its_package(tool) -> None:
    with pytest.raises(NotAvailable, match="iptables-save is not there; install the package iptables"):
        BridgeIptablesScopes().namespaces()


def test_missing_permission_is_named(tool) -> None:
    tool("echo 'Could not fetch rule set generation id: Permission denied (you must be root)' >&2; exit 4")
    with pytest.raises(NotPermitted, match=r"iptables-save: .*must be root.*; the agent needs CAP_NET_ADMIN"):
        BridgeIptablesScopes().namespaces()


def test_tool_that_fails_or_hangs_is_named(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("echo segmentation fault >&2; exit 139")
    with pytest.raises(NotAvailable, match="iptables-save: segmentation fault"):
        BridgeIptablesScopes().namespaces()
    monkeypatch.setattr(command, "SECONDS", 0.1)
    tool("exec sleep 10")
    with pytest.raises(NotAvailable, match="has not ended within"):
        BridgeIptablesScopes().namespaces()


def test_older_tables_beside_are_warned_of_once(tool, caplog: pytest.LogCaptureFixture) -> None:
    tool("echo '# Warning: iptables-legacy tables present, use iptables-legacy-save to see them' >&2")
    tool("exit 0", "ip6tables-save")
    finder = BridgeIptablesScopes(clock=iter(range(100)).__next__)
    assert [finder.namespaces() for _ in range(3)] == [(None,)] * 3
    assert caplog.text.count("iptables-legacy too") == 1


# ----------------------------------------------------------------------------------------------------- hostile input

WORDS = st.sampled_from(
    [
        "-A", "-j", "-g", "-s", "-d", "-i", "-m", "!", "CT", "--zone", "7", "70000", "RETURN", "DROP",
        "PREROUTING", "FORWARD", "a", "b", "tap-g", "tap-h", "physdev", "--physdev-in", "192.0.2.7/32",
        "2001:db8::7/128", "10", "::/0", "1.2.3.4/", "/32", "-p", "tcp", "comment", "--comment", "\"", "\\",
        "*raw", "*filter", "COMMIT", ":a",
    ]
)  # fmt: skip
LINES = st.lists(WORDS | st.text(max_size=6), max_size=12).map(" ".join)
RULES = st.tuples(
    st.sampled_from(["PREROUTING", "FORWARD", "a", "b"]), LINES, st.sampled_from(["a", "b", "CT --zone 7"])
)


@given(st.lists(LINES | RULES.map(lambda parts: f"-A {parts[0]} {parts[1]} -j {parts[2]}"), max_size=12))
def test_any_text_is_read(lines: list[str]) -> None:
    finder = Told("*raw\n" + "\n".join(lines))
    finder.learn(*own("g", "tap-g", "192.0.2.7"))
    try:
        found = finder.find("g")
    except ConfigurationError:
        return
    for scope in found:
        assert finder.neighbours(scope) is not None


@given(LINES)
def test_line_of_noise_changes_nothing_of_what_is_known_of_a_port_unless_it_names_the_port(line: str) -> None:
    if "tap-g" in line or "--zone" in line or " 7" in line:
        return
    finder = Told(OWN.replace("COMMIT", f"{line}\nCOMMIT"))
    finder.learn(*own())
    assert [(scope.zones, scope.addresses) for scope in finder.find("g")] == [
        ({ZoneRole.PORT: 7}, addresses("192.0.2.7"))
    ]


def test_chains_that_call_each_other_end() -> None:
    rules = [f"-A {one} -j {other}" for one in "abc" for other in "abc"]
    assert knowledge(raw("-A PREROUTING -i tap-g -j a", *rules, "-A c -j CT --zone 7")).zones == {"tap-g": {7}}
