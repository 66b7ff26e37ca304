"""What is read of the floating IPs in a distributed router's rules, and what is said where they cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import netaddr
import pytest

from sami_plugin.errors import HasGone, NotAvailable
from sami_plugin.model.flows import Addresses
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.scopes import command, neutron_dvr
from sami_plugin.scopes.neutron_dvr import NeutronDvrScopes, floating_ips_of
from sami_plugin.scopes.open_vswitch import Interface
from tests.unit.scopes.test_ovs import BRIDGE, FIRST, FIRST_PORT, FakeIntegration

ROUTER = "qrouter-1"

# As iptables-save writes what Neutron's L3 agent sets, shortened to what is about addresses.
RULES = """\
*nat
:PREROUTING ACCEPT [0:0]
:neutron-l3-agent-float-snat - [0:0]
-A PREROUTING -j neutron-l3-agent-PREROUTING
-A POSTROUTING -j neutron-l3-agent-POSTROUTING
-A neutron-l3-agent-OUTPUT -d 198.51.100.9/32 -j DNAT --to-destination 192.0.2.9
-A neutron-l3-agent-POSTROUTING ! -o rfp-1234abcd-5 -m conntrack ! --ctstate DNAT -j ACCEPT
-A neutron-l3-agent-PREROUTING -d 169.254.169.254/32 -i qr-+ -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9697
-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1234abcd-5 -j DNAT --to-destination 192.0.2.7
-A neutron-l3-agent-float-snat -s 192.0.2.7/32 -j SNAT --to-source 198.51.100.7 --random-fully
-A neutron-l3-agent-PREROUTING -d 198.51.100.8/32 -i rfp-1234abcd-5 -j DNAT --to-destination 192.0.2.8
-A neutron-l3-agent-float-snat -s 192.0.2.8/32 -j SNAT --to-source 198.51.100.8
-A neutron-l3-agent-PREROUTING -d 198.51.100.6/32 -j DNAT --to-destination 192.0.2.6
-A neutron-l3-agent-float-snat -s 192.0.2.6/32 -j SNAT --to-source 198.51.100.6 --random-fully
COMMIT
"""


def addresses(*texts: str) -> Addresses:
    return tuple(map(netaddr.IPAddress, texts))


def test_floating_ips_are_told_by_the_ports_own_address() -> None:
    (seven, eight) = addresses("192.0.2.7", "192.0.2.8")
    assert floating_ips_of(RULES) == {seven: addresses("198.51.100.7"), eight: addresses("198.51.100.8")}


@pytest.mark.parametrize(
    "rule",
    [
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.0/24 -i rfp-1 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1 -p tcp -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1 -j DNAT --to-destination 192.0.2.7:80",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i qg-1 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING ! -d 198.51.100.7/32 -i rfp-1 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1 -j DNAT --to-destination 0.0.0.0",
        "-A neutron-l3-agent-PREROUTING",
        "",
    ],
)
def test_other_rule_says_no_floating_ip(rule: str) -> None:
    assert floating_ips_of(rule) == {}


Write = Callable[[str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the script that is iptables-save; before that there is none."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(command, "SBIN", "/nonexistent")

    def write(script: str) -> None:
        (tmp_path / "iptables-save").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "iptables-save").chmod(0o755)

    return write


@pytest.fixture
def finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NeutronDvrScopes:
    """Of a host with one router, which the test's own namespace stands for as long as its file is there."""

    def in_namespace(path: str, work: Callable[[], Any]) -> Any:
        if not Path(path).exists():
            raise HasGone(f"there is no network namespace at {path}")
        return [(2, "qr-1")] if work is neutron_dvr.socket.if_nameindex else work()

    monkeypatch.setattr(neutron_dvr.privileged, "in_namespace", in_namespace)
    namespaces = tmp_path / "netns"
    namespaces.mkdir()
    (namespaces / ROUTER).touch()
    interfaces = {**BRIDGE.interfaces, "qr-1": Interface("qr-1", "r", 9, 3, False)}
    made = NeutronDvrScopes(FakeIntegration(replace(BRIDGE, interfaces=interfaces)), namespaces=namespaces)
    made.learn("g", (GuestPort(FIRST, interface_id=FIRST_PORT),))
    return made


def test_guest_has_a_scope_in_its_router(finder: NeutronDvrScopes, tool: Write) -> None:
    tool(f"cat <<'END'\n{RULES}END")
    assert [scope.port for scope in finder.find("g")] == [FIRST, f"{FIRST}@{ROUTER}"]


def test_router_whose_rules_cannot_be_read_is_named_and_not_passed_over(finder: NeutronDvrScopes, tool: Write) -> None:
    with pytest.raises(NotAvailable, match=f"{ROUTER}: iptables-save is not there; install the package iptables"):
        finder.find("g")
    finder._known_until = 0
    tool("echo segmentation fault >&2; exit 139")
    with pytest.raises(NotAvailable, match=f"{ROUTER}: iptables-save -t nat: segmentation fault"):
        finder.find("g")


def test_router_that_does_not_answer_is_not_asked_again_at_once(
    finder: NeutronDvrScopes, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = [0.0], []

    def hang(*_: object) -> tuple[str, str]:
        asked.append(now[0])
        now[0] += 5
        raise NotAvailable("iptables-save has not ended")

    monkeypatch.setattr(neutron_dvr, "output_of", hang)
    finder._clock = lambda: now[0]
    for at in (0.0, 5.0, 9.9, 10.0):
        now[0] = at
        with pytest.raises(NotAvailable, match=rf"^{ROUTER}: iptables-save has not ended$"):
            finder.find("g")
    assert asked == [0.0, 10.0]


def test_router_that_goes_meanwhile_is_passed_over(finder: NeutronDvrScopes, tmp_path: Path) -> None:
    finder._knowledge()
    (tmp_path / "netns" / ROUTER).unlink()
    assert [scope.port for scope in finder.find("g")] == [FIRST]


def test_router_that_cannot_be_entered_is_not_passed_over(
    finder: NeutronDvrScopes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_namespace(path: str, work: Callable[[], Any]) -> Any:
        raise NotAvailable(f"the network namespace {path} cannot be opened: Too many open files")

    monkeypatch.setattr(neutron_dvr.privileged, "in_namespace", in_namespace)
    with pytest.raises(NotAvailable, match="Too many open files"):
        finder.find("g")


def test_missing_tool_is_told_at_the_start_although_there_is_no_router_yet(
    finder: NeutronDvrScopes, tmp_path: Path, tool: Write
) -> None:
    (tmp_path / "netns" / ROUTER).unlink()
    with pytest.raises(NotAvailable, match="iptables-save is not there; install the package iptables"):
        finder.namespaces()
    tool("exit 0")
    assert finder.namespaces() == (None,)
