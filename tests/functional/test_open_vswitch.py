"""What the finders read of a real Open vSwitch, whose database and flows are as Neutron leaves them."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import netaddr
import pytest

from lab.deadline import wait_until
from lab.errors import LabUnavailable
from lab.namespace import Namespace
from lab.open_vswitch import Chassis, OpenVswitch, Ovn
from sami_plugin.errors import NotAvailable
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope
from sami_plugin.scopes import ovsdb
from sami_plugin.scopes.learned import FRESH_SECONDS, LearnedScopes
from sami_plugin.scopes.open_vswitch import Integration
from sami_plugin.scopes.ovn import OvnScopes, southbound_of
from sami_plugin.scopes.ovs import OvsScopes
from tests.unit.scopes.open_vswitch_texts import BASE_EGRESS, TRANSIENT

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.skipif(
        importlib.util.find_spec("ovsdbapp") is None,
        reason="the package ovsdbapp is not here, so no database of Open vSwitch is read: pip install '.[ovs]'",
    ),
]

FIRST, SECOND, THIRD = (
    ("tap1234abcd-5e", "1234abcd-5e00-4000-8000-000000000007", "fa:16:3e:00:00:07"),
    ("tap9876fedc-5e", "9876fedc-5e00-4000-8000-000000000008", "fa:16:3e:00:00:08"),
    ("tapaaaabbbb-5e", "aaaabbbb-5e00-4000-8000-000000000009", "fa:16:3e:00:00:09"),
)
SECONDS = 10.0


def addresses(*texts: str) -> Addresses:
    return tuple(map(netaddr.IPAddress, texts))


@pytest.fixture
def folder() -> Iterator[Path]:
    # Names of sockets have room for 107 octets, and pytest's own folders are deep.
    with tempfile.TemporaryDirectory(prefix="ovs-") as path:
        yield Path(path)


@pytest.fixture
def switch(folder: Path) -> Iterator[OpenVswitch]:
    try:
        started = OpenVswitch(folder)
    except LabUnavailable as error:
        pytest.skip(f"the finder `ovs` is not tried against a real Open vSwitch: {error}")
    with started:
        yield started


@pytest.fixture
def finder(switch: OpenVswitch) -> Iterator[OvsScopes]:
    made = OvsScopes(Integration(switch.connection, "br-int"))
    made.learn("g", (GuestPort(FIRST[0], interface_id=FIRST[1]),))
    yield made
    made.close()


def scope_of(finder: LearnedScopes) -> Scope | None:
    time.sleep(FRESH_SECONDS)
    found = finder.find("g")
    assert len(found) <= 1
    return found[0] if found else None


def wait_for_scope(finder: LearnedScopes, seconds: float = SECONDS) -> Scope:
    wait_until(lambda: scope_of(finder) is not None, "the port is found", seconds, poll_seconds=0.05)
    found = scope_of(finder)
    assert found is not None
    return found


def wire(switch: OpenVswitch, tag: int = 3) -> None:
    """Three ports of one network, and their flows, as Neutron 29.0.0 programs them."""
    for tap, port, mac in (FIRST, SECOND, THIRD):
        switch.plug(tap, port, mac)
        switch.tag(tap, tag)
    flows = (TRANSIENT + BASE_EGRESS).replace("load:0x3->NXM_NX_REG6", f"load:{tag:#x}->NXM_NX_REG6")
    switch.add_flows(flows)


def test_port_is_found_once_the_agent_has_tagged_and_programmed_it(switch: OpenVswitch, finder: OvsScopes) -> None:
    assert scope_of(finder) is None  # no such device
    number = switch.plug(*FIRST)
    assert scope_of(finder) is None  # no tag
    switch.vsctl("set", "port", FIRST[0], "tag=4095")
    assert scope_of(finder) is None  # the dead one
    switch.tag(FIRST[0], 3)
    assert scope_of(finder) is None  # no flows
    assert number == 1
    switch.add_flows(TRANSIENT)
    assert scope_of(finder) is None  # none that say an address
    switch.add_flows(BASE_EGRESS)
    scope = wait_for_scope(finder)
    assert (scope.zones, scope.is_shared, scope.barred_marks) == ({ZoneRole.PORT: 3}, True, 1)
    own = ("192.0.2.7", "192.0.2.100", "2001:db8::7", "2001:db8::100", "fe80::f816:3eff:fe00:7")
    assert set(scope.addresses) == set(addresses(*own))


def test_neighbours_are_those_that_are_there(switch: OpenVswitch, finder: OvsScopes) -> None:
    wire(switch)
    scope = wait_for_scope(finder)
    assert finder.neighbours(scope) == addresses("192.0.2.8", "fe80::f816:3eff:fe00:8")
    switch.unplug(SECOND[0])
    wait_until(lambda: finder.neighbours(scope) == (), "the neighbour is gone", SECONDS, poll_seconds=0.05)


def test_port_that_left_is_not_found_although_its_flows_stay(switch: OpenVswitch, finder: OvsScopes) -> None:
    wire(switch)
    wait_for_scope(finder)
    switch.unplug(FIRST[0])
    wait_until(lambda: scope_of(finder) is None, "the port is gone", SECONDS, poll_seconds=0.05)


def test_network_that_is_renumbered_is_not_found_before_its_flows_are(switch: OpenVswitch, finder: OvsScopes) -> None:
    wire(switch)
    wait_for_scope(finder)
    switch.tag(FIRST[0], 9)
    wait_until(lambda: scope_of(finder) is None, "the old number is no answer", SECONDS, poll_seconds=0.05)
    switch.add_flows(
        "table=60, priority=100,in_port=1 actions=load:0x1->NXM_NX_REG5[],load:0x9->NXM_NX_REG6[],resubmit(,71)"
    )
    assert wait_for_scope(finder).zones == {ZoneRole.PORT: 9}


def test_bridge_that_speaks_newer_versions_only_is_read(switch: OpenVswitch, finder: OvsScopes) -> None:
    wire(switch)
    for version in ("OpenFlow13", "OpenFlow14"):
        switch.vsctl("set", "bridge", "br-int", f"protocols={version}")
        assert wait_for_scope(finder).zones == {ZoneRole.PORT: 3}


def test_database_that_goes_away_is_said_and_is_read_again_when_it_is_back(
    switch: OpenVswitch, finder: OvsScopes
) -> None:
    wire(switch)
    wait_for_scope(finder)
    switch.stop_database()

    def is_said() -> bool:
        try:
            scope_of(finder)
        except NotAvailable as error:
            return "Open_vSwitch at unix:" in str(error)
        return False

    wait_until(is_said, "the error", SECONDS, poll_seconds=0.05)
    switch.start_database()
    wait_until(lambda: not is_said(), "the connection", 30, poll_seconds=0.2)
    assert wait_for_scope(finder).zones == {ZoneRole.PORT: 3}


def test_missing_database_is_named(folder: Path) -> None:
    finder = OvsScopes(Integration(f"unix:{folder}/db.sock", "br-int"))
    finder.learn("g", (GuestPort(FIRST[0]),))
    # The second is what the agent asks when it starts, and `sami doctor`.
    for question in (lambda: finder.find("g"), finder.namespaces):
        with pytest.raises(NotAvailable, match=r"Open_vSwitch at unix:.*cannot be read .*; is its server running\?"):
            question()


def test_eventlet_is_not_imported_with_ovsdbapp() -> None:
    code = "import sys; from sami_plugin.scopes import ovsdb; ovsdb.libraries(); sys.exit('eventlet' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_database_that_never_answers_is_not_waited_for_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovsdb, "WAIT_SECONDS", 0.3)
    finder = OvsScopes(Integration(f"unix:{folder}/db.sock", "br-int"))
    finder.learn("g", (GuestPort(FIRST[0]),))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{folder}/db.sock")
        silent.listen()
        for _ in range(2):
            with pytest.raises(NotAvailable, match=r"has not answered within 0\.3 s"):
                finder.find("g")
    # The connection ended, and now the attempt fails by itself.
    with pytest.raises(NotAvailable, match=r"has not answered|cannot be read"):
        finder.find("g")


def test_missing_bridge_is_named(switch: OpenVswitch) -> None:
    finder = OvsScopes(Integration(switch.connection, "br-other"))
    finder.learn("g", (GuestPort(FIRST[0]),))
    with pytest.raises(NotAvailable, match="no bridge br-other"):
        finder.find("g")
    finder.close()


# --------------------------------------------------------------------------------------------------------------- OVN


@pytest.fixture
def ovn(folder: Path) -> Iterator[Ovn]:
    try:
        started = Ovn(folder)
    except LabUnavailable as error:
        pytest.skip(f"the finder `ovn` is not tried against a real OVN: {error}")
    with started:
        yield started


@pytest.fixture
def ovn_finder(ovn: Ovn) -> Iterator[OvnScopes]:
    made = OvnScopes(Integration(ovn.connection, "br-int"))
    made.learn("g", (GuestPort(FIRST[0], interface_id=FIRST[1]),))
    yield made
    made.close()


@pytest.fixture
def asking_finder(ovn: Ovn) -> Iterator[OvnScopes]:
    """One that asks the southbound database too."""
    made = OvnScopes(Integration(ovn.connection, "br-int"), southbound_of(ovn.southbound))
    made.learn("g", (GuestPort(FIRST[0], interface_id=FIRST[1]),))
    yield made
    made.close()


def logical_port(ovn: Ovn, *security: str, which: tuple[str, str, str] = FIRST, host: int = 7) -> None:
    """As Neutron's server writes it: fixed addresses, and with port security the pairs that are allowed."""
    _, port, mac = which
    ovn.nbctl("--may-exist", "ls-add", "net", "--", "lsp-add", "net", port)
    ovn.nbctl("lsp-set-addresses", port, f"{mac} 192.0.2.{host} 2001:db8::{host}")
    if security:
        ovn.nbctl("lsp-set-port-security", port, *security)


def zone_in_bridge(ovn: Ovn, port: str = FIRST[1]) -> int:
    return int(ovn.vsctl("get", "bridge", "br-int", f"external_ids:ct-zone-{port}").strip().strip('"'))


PAIRS = ("fa:16:3e:00:00:07 192.0.2.7 2001:db8::7 192.0.2.100 203.0.113.0/24", "00:00:5e:00:01:01 2001:db8::100")
SECURED = {
    *addresses("192.0.2.7", "192.0.2.100", "2001:db8::7", "2001:db8::100"),
    # OVN lets a port send from the link-local addresses of its MAC addresses.
    *addresses("fe80::f816:3eff:fe00:7", "fe80::200:5eff:fe00:101"),
}


def test_logical_port_has_a_zone_of_its_own_and_the_addresses_of_its_port_security(
    ovn: Ovn, ovn_finder: OvnScopes
) -> None:
    for which, host in ((FIRST, 7), (SECOND, 8)):
        logical_port(ovn, *(PAIRS if which is FIRST else (f"{SECOND[2]} 192.0.2.8",)), which=which, host=host)
        ovn.plug(*which)
    scope = wait_for_scope(ovn_finder)
    assert (scope.zones, scope.is_shared, scope.barred_marks) == ({ZoneRole.PORT: zone_in_bridge(ovn)}, False, 1)
    assert set(scope.addresses) == SECURED
    assert zone_in_bridge(ovn) != zone_in_bridge(ovn, SECOND[1])
    assert ovn_finder.neighbours(scope) == ()


def test_port_is_found_when_ovn_has_given_it_a_zone_and_not_before(ovn: Ovn, ovn_finder: OvnScopes) -> None:
    logical_port(ovn, *PAIRS)
    ovn.stop_controller()
    ovn.plug(*FIRST)
    for _ in range(10):
        assert scope_of(ovn_finder) is None
    ovn.start_controller()
    assert wait_for_scope(ovn_finder).zones == {ZoneRole.PORT: zone_in_bridge(ovn)}


def test_port_that_left_ovn_is_not_found(ovn: Ovn, ovn_finder: OvnScopes) -> None:
    logical_port(ovn, *PAIRS)
    ovn.plug(*FIRST)
    wait_for_scope(ovn_finder)
    ovn.unplug(FIRST[0])
    wait_until(lambda: scope_of(ovn_finder) is None, "the port is gone", SECONDS, poll_seconds=0.05)


def test_zone_is_known_while_ovn_controller_is_away(ovn: Ovn, ovn_finder: OvnScopes) -> None:
    logical_port(ovn, *PAIRS)
    ovn.plug(*FIRST)
    scope = wait_for_scope(ovn_finder)
    ovn.stop_controller()
    assert scope_of(ovn_finder) == scope
    ovn.start_controller()
    time.sleep(1)
    assert scope_of(ovn_finder) == scope


def test_port_without_port_security_has_the_addresses_of_the_guests_description(
    ovn: Ovn, ovn_finder: OvnScopes
) -> None:
    logical_port(ovn)
    ovn.plug(*FIRST)
    ovn_finder.learn("g", (GuestPort(FIRST[0], claimed=addresses("192.0.2.66")),))
    assert wait_for_scope(ovn_finder).addresses == addresses("192.0.2.66")


def test_port_without_port_security_has_the_addresses_of_the_southbound_database_where_it_is_asked(
    ovn: Ovn, asking_finder: OvnScopes
) -> None:
    logical_port(ovn)
    ovn.plug(*FIRST)
    asking_finder.learn("g", (GuestPort(FIRST[0], claimed=addresses("192.0.2.66")),))

    found: list[Scope] = []

    def is_found() -> bool:
        with contextlib.suppress(NotAvailable):  # the database has not said yet what it has
            scope = scope_of(asking_finder)
            found.extend([scope] if scope is not None else [])
        return bool(found)

    wait_until(is_found, "the port is found", SECONDS, poll_seconds=0.05)
    assert found[0].addresses == addresses("192.0.2.7", "2001:db8::7")  # from the very first


def test_southbound_database_that_does_not_answer_is_warned_of_and_waited_for_by_nobody(
    ovn: Ovn, caplog: pytest.LogCaptureFixture
) -> None:
    finder = OvnScopes(Integration(ovn.connection, "br-int"), southbound_of(f"unix:{ovn.folder}/nobody.sock"))
    finder.learn("g", (GuestPort(FIRST[0]),))
    logical_port(ovn, *PAIRS)
    ovn.plug(*FIRST)
    assert set(wait_for_scope(finder).addresses) == SECURED
    wait_until(lambda: "OVN_Southbound at unix:" in caplog.text, "the warning", SECONDS)
    finder.close()


def test_port_that_is_still_bound_elsewhere_has_its_zone_here_and_may_lose_the_addresses_of_its_port_security(
    folder: Path, ovn: Ovn, ovn_finder: OvnScopes, asking_finder: OvnScopes
) -> None:
    """As Neutron asks for it while the guest migrates: bound there, and here too until the guest's RARP comes.

    ovn-controller writes what the port may send from when it hears of the port, and leaves it out when it computes all
    its flows anew, until the port is bound here.
    """
    elsewhere = Namespace("elsewhere")
    (folder / "b").mkdir()
    try:
        with Chassis(folder / "b", "host-b", ovn.southbound, address="127.0.0.8", start=elsewhere.start) as there:
            logical_port(ovn, *PAIRS)
            there.plug(*FIRST)
            wait_until(lambda: ovn.binding(FIRST[1], "chassis"), "the port to be bound", SECONDS)
            bound = ovn.binding(FIRST[1], "chassis")
            ovn.nbctl("lsp-set-options", FIRST[1], "requested-chassis=host-b,host-a", "activation-strategy=rarp")
            wait_until(lambda: ovn.binding(FIRST[1], "requested_additional_chassis"), "OVN to ask for it here", SECONDS)
            ovn.plug(*FIRST)
            wait_until(lambda: ovn.binding(FIRST[1], "additional_chassis"), "the port to be here, too", SECONDS)
            wait_for_scope(asking_finder)

            def has_no_addresses() -> bool:
                ovn.recompute()  # what OVN heard since the last time it has written again
                return scope_of(ovn_finder) is None

            wait_until(has_no_addresses, "the addresses to be gone from the bridge", SECONDS, poll_seconds=0.05)
            scope = wait_for_scope(asking_finder)
            assert scope.zones == {ZoneRole.PORT: zone_in_bridge(ovn)}
            assert set(scope.addresses) == {one for one in SECURED if not str(one).startswith("fe80:")}
            assert scope_of(ovn_finder) is None
            ovn_finder.learn("g", (GuestPort(FIRST[0], claimed=addresses("192.0.2.7")),))
            assert wait_for_scope(ovn_finder).addresses == addresses("192.0.2.7")
            assert ovn.binding(FIRST[1], "chassis") == bound

            ovn.nbctl("lsp-set-options", FIRST[1], "requested-chassis=host-a")

            def is_secured() -> bool:
                found = scope_of(ovn_finder)
                return found is not None and set(found.addresses) == SECURED

            wait_until(is_secured, "the port's addresses, now that it is bound here", SECONDS, poll_seconds=0.05)
            assert ovn.binding(FIRST[1], "chassis") != bound
            ovn.recompute()
            for _ in range(10):
                assert is_secured()
    finally:
        elsewhere.close()


# Of Neutron's network with a router that has a gateway elsewhere: who has a distributed floating IP is translated here.
FLOATING, INSIDE = "198.51.100.7", "192.0.2.7"


def router(ovn: Ovn) -> None:
    for switch, port, mac, network in (
        ("net", "in", "fa:16:3e:00:01:01", "192.0.2.1/24"),
        ("outside", "out", "fa:16:3e:00:02:01", "198.51.100.1/24"),
    ):
        ovn.nbctl("--may-exist", "ls-add", switch, "--", "--may-exist", "lr-add", "neutron-r")
        ovn.nbctl("lrp-add", "neutron-r", f"lrp-{port}", mac, network)
        ovn.nbctl(
            "lsp-add", switch, port, "--", "lsp-set-type", port, "router", "--", "lsp-set-addresses", port, "router"
        )
        ovn.nbctl("lsp-set-options", port, f"router-port=lrp-{port}")
    ovn.nbctl("lrp-set-gateway-chassis", "lrp-out", "elsewhere", "1")
    ovn.nbctl("lr-nat-add", "neutron-r", "snat", "198.51.100.1", "192.0.2.0/24")


def scopes_when(finder: OvnScopes, count: int) -> list[Scope]:
    found: list[Scope] = []

    def is_so() -> bool:
        time.sleep(FRESH_SECONDS)
        found[:] = finder.find("g")
        return len(found) == count

    wait_until(is_so, f"{count} scopes", SECONDS, poll_seconds=0.05)
    return found


def test_port_with_a_distributed_floating_ip_has_the_zones_of_its_router(ovn: Ovn, ovn_finder: OvnScopes) -> None:
    for which, host in ((FIRST, 7), (SECOND, 8)):
        logical_port(ovn, f"{which[2]} 192.0.2.{host}", which=which, host=host)
        ovn.plug(*which)
    router(ovn)
    (port,) = scopes_when(ovn_finder, 1)
    ovn.nbctl("lr-nat-add", "neutron-r", "dnat_and_snat", FLOATING, INSIDE, FIRST[1], "fa:16:3e:00:03:07")
    _, routed = scopes_when(ovn_finder, 2)
    ids = ovn.vsctl("get", "bridge", "br-int", "external_ids")
    name = routed.port.removeprefix(f"{FIRST[0]}@")
    for role in (ZoneRole.DNAT, ZoneRole.SNAT):
        assert f'ct-zone-{name}_{role.name.lower()}="{routed.zones[role]}"' in ids
    # That of the router, and not that of the switch, which has such zones too.
    where = "external_ids:name=neutron-r"
    assert name in ovn.sbctl("--bare", "--columns=_uuid,external_ids", "find", "datapath_binding", where)
    assert (routed.is_shared, routed.namespace, routed.addresses) == (True, None, port.addresses)
    assert routed.translations == addresses(FLOATING)
    neighbours = ovn_finder.neighbours(routed)
    assert addresses("192.0.2.8")[0] in neighbours
    assert not set(routed.addresses) & set(neighbours)
    assert ovn_finder.neighbours(port) == ()
    ovn.nbctl("lr-nat-del", "neutron-r", "dnat_and_snat", FLOATING)
    scopes_when(ovn_finder, 1)
    # One that its gateway translates, be it this host: it goes on with that when the guest has left.
    ovn.nbctl("lrp-set-gateway-chassis", "lrp-out", "host-a", "2")
    ovn.nbctl("lr-nat-add", "neutron-r", "dnat_and_snat", FLOATING, INSIDE)

    def is_translated() -> bool:
        flows = ovn.run("ovs-ofctl", "dump-flows", f"unix:{ovn.folder}/br-int.mgmt")
        return f"nat(dst={INSIDE})" in flows and f"nat(src={FLOATING})" in flows

    wait_until(is_translated, "OVN to translate here", SECONDS, poll_seconds=0.1)
    scopes_when(ovn_finder, 1)
