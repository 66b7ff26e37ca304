"""Mappings of a real PCP server: a driver's promises, and a guest that is reached where it is now as it was before."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import netaddr
import numpy as np
import pytest

from lab.carrier import Carrier
from lab.contract import NoCarrier
from lab.deadline import wait_until
from lab.fabric import routes_via_far_end
from lab.firewall import UPLINK
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.namespace import Namespace
from lab.pcp import OUTER, Client, PcpServer
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.drivers.pcp import PcpDriver
from sami_plugin.drivers.pcp.kinds import IPV4, IPV6
from sami_plugin.drivers.pcp.messages import External, Internal, ResultCode, Server
from sami_plugin.drivers.several import SeveralDrivers
from sami_plugin.errors import DeviceFailed, NotPermitted
from sami_plugin.model.flows import Batch, Omitted, Template, ZoneRole
from sami_plugin.model.results import Outcome, Reason, Results
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Limits, Settings
from sami_plugin.testing.conformance import NEIGHBOUR_ADDRESSES, PORT_ADDRESSES, FlowDriverConformance, flows

_numbers = itertools.count()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[Namespace, PcpServer]]:
    place = Namespace(f"pcp{os.getpid()}-{next(_numbers)}")
    try:
        for device, address in (("outside", f"{OUTER}/24"), ("inside", "192.0.2.1/24")):
            place.ip(f"link add {device} type bridge", f"address add {address} dev {device}", f"link set {device} up")
        yield place, PcpServer(place, folder / place.name, outside="outside", inside="inside", inner="192.0.2.0/24")
    finally:
        place.close()


def driver_of(folder: Path) -> PcpDriver:
    return PcpDriver(lease_files=[f"{folder}/{{namespace}}/{name}" for name in ("leases", "leases6")])


def scope_of(place: Namespace, zone: int = 7) -> Scope:
    return Scope("port", "guest", {ZoneRole.PORT: zone}, PORT_ADDRESSES, place.path)


def mappings(template: Template, count: int, first: int = 0) -> Batch:
    made = flows(template, count, first=first)
    rows = made.rows
    if template in (IPV4, IPV6):
        rows["protocolIdentifier"] = 6
        if template == IPV4:
            rows["postNATSourceIPv4Address"] = int.from_bytes(map(int, OUTER.split(".")), "big")
            rows["postNAPTSourceTransportPort"] = 30000 + rows["sourceTransportPort"]
        else:
            rows["postNATSourceIPv6Address"] = rows["sourceIPv6Address"]
            rows["postNAPTSourceTransportPort"] = rows["sourceTransportPort"]
        rows["pcpMappingNonce"] = np.multiply.outer(rows["sourceTransportPort"].astype(np.uint32), (1, 10, 100))
    return made


class TestPromises(FlowDriverConformance):
    """All of the contract, with a server for each scope that has another zone."""

    @pytest.fixture(autouse=True)
    def places(self, tmp_path: Path) -> Iterator[None]:
        self.folder = tmp_path
        with served(tmp_path) as (self.one, _), served(tmp_path) as (self.other, _):
            yield

    def make_driver(self) -> FlowDriver:
        return driver_of(self.folder)

    def make_scope(self) -> Scope:
        return scope_of(self.one)

    def make_other_scope(self) -> Scope:
        return scope_of(self.other)

    def make_shared_scope(self) -> Scope:
        zones, path = {ZoneRole.PORT: 9}, self.one.path
        return Scope("port", "guest", zones, PORT_ADDRESSES, path, is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)

    def some_flows(self, template: Template, count: int, first: int = 0) -> Batch:
        return mappings(template, count, first)


# ------------------------------------------------------------------------------------------------- what a server does


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Namespace, PcpServer]]:
    with served(tmp_path) as made:
        yield made


GUEST, NEIGHBOUR, GUEST_V6 = (netaddr.IPAddress(one) for one in ("192.0.2.10", "192.0.2.20", "2001:db8:1::10"))
NONCE, OTHER_NONCE = b"twelve octet", b"other nonce."


def given(place: Namespace, internal: Internal, outer_port: int, nonce: bytes = NONCE, seconds: int = 600) -> None:
    """A mapping that was there before."""
    outer = internal.address if internal.address.version == 6 else netaddr.IPAddress(OUTER)
    answer = Server("127.0.0.1", place.path).map(internal, nonce, External(outer, outer_port), seconds)
    assert (answer.result, answer.external) == (ResultCode.SUCCESS, External(outer, outer_port))


def exported(driver: FlowDriver, scope: Scope) -> dict[tuple[str, int, int], tuple[int, bytes]]:
    """By kind, protocol and port of the guest, the outer port and the nonce."""
    return {
        (batch.template.name, int(row["protocolIdentifier"]), int(row["sourceTransportPort"])): (
            int(row["postNAPTSourceTransportPort"]),
            row["pcpMappingNonce"].tobytes(),
        )
        for batch in driver.export(scope)
        if isinstance(batch, Batch)
        for row in batch.rows
    }


def test_mappings_of_others_and_of_upnp_are_not_the_guest_s(place: tuple[Namespace, PcpServer], tmp_path: Path) -> None:
    there, server = place
    given(there, Internal(6, GUEST, 80), 8080)
    given(there, Internal(17, GUEST, 80), 8081)
    given(there, Internal(17, GUEST_V6, 80), 80)
    given(there, Internal(6, NEIGHBOUR, 80), 8082)
    given(there, Internal(132, GUEST, 81), 8083)
    with open(server.lease_files[0], "a", encoding="ascii") as file:
        file.write("TCP:9000:192.0.2.10:90:0:a game\nTCP:9001:192.0.2.20:90:0:a game\n")
    driver, scope = driver_of(tmp_path), scope_of(there)
    assert exported(driver, scope) == {
        ("pcp-mapping-ipv4", 6, 80): (8080, NONCE),
        ("pcp-mapping-ipv4", 17, 80): (8081, NONCE),
        ("pcp-mapping-ipv6", 17, 80): (80, NONCE),
    }
    omitted = {one.reason: one.count for one in driver.export(scope) if isinstance(one, Omitted)}
    assert sorted(omitted.values()) == [1, 1]
    assert all("UPnP" in reason or "other protocols" in reason for reason in omitted)


def test_what_cannot_be_had_is_refused_by_name_and_changes_nothing(
    place: tuple[Namespace, PcpServer], tmp_path: Path
) -> None:
    there, _ = place
    given(there, Internal(6, NEIGHBOUR, 80), 30002)  # the place that the second one wants
    given(there, Internal(6, GUEST, 3), 30099, OTHER_NONCE)
    driver, scope = driver_of(tmp_path), scope_of(there)
    wanted = mappings(IPV4, 9)
    rows = wanted.rows
    rows["postNATSourceIPv4Address"][2] += 1  # another outer address: what the guest has here stays as it is
    rows["protocolIdentifier"][3] = 132
    rows["postNAPTSourceTransportPort"][4] = 81  # below what the server's rules allow
    rows["sourceTransportPort"][5] = 0
    rows["sourceIPv4Address"][6] = int(NEIGHBOUR)
    rows["remainingTimeoutSeconds"][7] = 0
    made = driver.insert(scope, wanted)
    taken, foreign = Reason.TRANSLATION_TAKEN, Reason.FOREIGN_ADDRESS
    assert [Reason(one) for one in made["reason"]] == [
        Reason.NONE, taken, taken, Reason.NOT_SUPPORTED, taken, Reason.INVALID, foreign, Reason.EXPIRED, Reason.NONE
    ]  # fmt: skip
    assert exported(driver, scope).keys() == {("pcp-mapping-ipv4", 6, port) for port in (1, 3, 9)}
    assert exported(driver, scope)["pcp-mapping-ipv4", 6, 3] == (30099, OTHER_NONCE)


def test_place_that_the_files_do_not_tell_of_is_not_taken_for_given(
    place: tuple[Namespace, PcpServer], tmp_path: Path
) -> None:
    """The server gives another port then, though it was asked for this one or none."""
    there, server = place
    given(there, Internal(6, NEIGHBOUR, 80), 30001)
    Path(server.lease_files[0]).write_text("", encoding="ascii")
    driver, scope = driver_of(tmp_path), scope_of(there)
    made = driver.insert(scope, mappings(IPV4, 1))
    assert Reason(made["reason"][0]) == Reason.TRANSLATION_TAKEN
    assert not exported(driver, scope)
    assert "30002" not in server.rules(), "what it gave instead is left there"


def test_former_mapping_comes_back_where_the_new_one_is_refused(
    place: tuple[Namespace, PcpServer], tmp_path: Path
) -> None:
    there, _ = place
    given(there, Internal(6, GUEST, 1), 30099, OTHER_NONCE)
    driver, scope = driver_of(tmp_path), scope_of(there)
    wanted = mappings(IPV4, 1)
    wanted.rows["postNAPTSourceTransportPort"] = 81
    assert driver.insert(scope, wanted)["outcome"].tolist() == [Outcome.REFUSED]
    assert exported(driver, scope) == {("pcp-mapping-ipv4", 6, 1): (30099, OTHER_NONCE)}


def test_further_places_of_a_port_and_mappings_without_number_are_named(
    place: tuple[Namespace, PcpServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, server = place
    for outer_port in (8080, 9090):
        given(there, Internal(6, GUEST, 80), outer_port)
    given(there, Internal(17, GUEST, 81), 8181)
    driver, scope = driver_of(tmp_path), scope_of(there)
    omitted = {one.reason: one.count for one in driver.export(scope) if isinstance(one, Omitted)}
    assert omitted == {"further mappings of ports that have one already": 1}
    monkeypatch.setattr("sami_plugin.drivers.pcp.driver.MOST_MAPPINGS", 1)
    omitted = {one.reason: one.count for one in driver.export(scope) if isinstance(one, Omitted)}
    assert omitted["mappings of a guest that has more than 1"] == 1
    made = driver.insert(scope, mappings(IPV4, 2))
    assert made["reason"].tolist() == [Reason.DEVICE_FULL] * 2
    monkeypatch.undo()
    told = next(one for one in driver.export(scope) if isinstance(one, Batch))
    assert set(driver.remove(scope, told.identities)["outcome"]) == {Outcome.REMOVED}
    assert not exported(driver, scope)
    assert "dnat" not in server.rules(), "a further place is left"


def test_mapping_that_no_file_tells_of_is_given_back(place: tuple[Namespace, PcpServer], tmp_path: Path) -> None:
    there, server = place
    driver, scope = PcpDriver(lease_files=server.lease_files[:1]), scope_of(there)
    made = driver.insert(scope, mappings(IPV6, 1))
    assert (Outcome(made["outcome"][0]), Reason(made["reason"][0])) == (Outcome.REFUSED, Reason.VANISHED)
    assert " th dport" not in server.rules(), "a hole is left that nobody knows"


def test_hole_that_its_guest_has_renewed_ends_by_itself(place: tuple[Namespace, PcpServer], tmp_path: Path) -> None:
    """miniupnpd forgets the nonce of it, so nobody can close it."""
    there, _ = place
    for _ in range(2):
        given(there, Internal(6, GUEST_V6, 80), 80)
    driver, scope = driver_of(tmp_path), scope_of(there)
    told = next(one for one in driver.export(scope) if isinstance(one, Batch))
    made = driver.remove(scope, told.identities)
    assert (Outcome(made["outcome"][0]), Reason(made["reason"][0])) == (Outcome.REFUSED, Reason.NOT_AUTHORIZED)
    wait_until(lambda: not exported(driver, scope), "the hole to end", 10)


def test_server_that_is_silent_holds_nobody_up_for_long(place: tuple[Namespace, PcpServer], tmp_path: Path) -> None:
    there, _ = place
    driver, scope = driver_of(tmp_path), scope_of(there)
    there.stop_processes()
    began = time.monotonic()
    for ask in (driver.export, driver.capabilities):
        with pytest.raises(DeviceFailed, match="no PCP server answers"):
            list(ask(scope))  # type: ignore[call-overload]
    assert 1 < time.monotonic() - began < 3
    assert driver.insert(scope, Batch(IPV4, IPV4.empty()))["outcome"].tolist() == []


def test_any_values_are_taken_or_refused_and_never_raise(place: tuple[Namespace, PcpServer], tmp_path: Path) -> None:
    there, _ = place
    driver, scope = driver_of(tmp_path), scope_of(there)
    random = np.random.default_rng(7)
    for template in (IPV4, IPV6):
        octets = random.integers(0, 256, 60 * template.dtype.itemsize, dtype=np.uint8)
        rows = octets.view(template.dtype).copy()
        rows["zoneRole"] = ZoneRole.PORT
        rows[template.ends[0]][::2] = mappings(template, 1).rows[template.ends[0]][0]
        rows["protocolIdentifier"][::3] = 17
        batch = Batch(template, rows)
        made = driver.insert(scope, batch)
        assert len(made) == 60
        assert set(made["outcome"].tolist()) <= {Outcome.IMPORTED, Outcome.REFUSED}
        driver.renew(scope, batch)
        assert driver.read_back(scope, batch)[1].sum() == (made["outcome"] == Outcome.IMPORTED).sum()
        driver.remove(scope, batch.identities)
    assert not exported(driver, scope)


def test_server_that_is_silent_or_serves_no_third_parties_is_told_with_the_mend(
    place: tuple[Namespace, PcpServer], tmp_path: Path
) -> None:
    there, server = place
    driver, scope = driver_of(tmp_path), scope_of(there)
    configuration = tmp_path / there.name / "conf"
    configuration.write_text(configuration.read_text().replace("pcp_allow_thirdparty=yes", "pcp_allow_thirdparty=no"))
    server.forget()
    with pytest.raises(NotPermitted, match="pcp_allow_thirdparty=yes"):
        driver.capabilities(scope)
    server.stop()
    with pytest.raises(DeviceFailed, match=r"no PCP server answers at 127.0.0.1 port 5351 .*; start it, or correct"):
        list(driver.export(scope))


def test_without_lease_files_nothing_is_promised_and_the_note_says_how() -> None:
    can = PcpDriver().capabilities()
    assert not can.templates
    assert "name the server's lease files in [pcp] lease_files" in can.notes[0]


def test_a_server_that_has_begun_anew_is_noticed(
    place: tuple[Namespace, PcpServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, server = place
    driver, scope = driver_of(tmp_path), scope_of(there)
    wanted = mappings(IPV4, 2)
    driver.insert(scope, wanted)
    epochs = next(one for one in driver.export(scope) if isinstance(one, Batch)).rows["pcpEpochTime"]
    wait_until(lambda: Server("127.0.0.1", there.path).announce()[0] >= epochs[0] + 4, "4 s of the server's")
    driver.insert(scope, wanted)
    assert "has begun anew" not in caplog.text
    server.forget()
    assert not driver.read_back(scope, wanted)[1].any()
    assert "the PCP server at 127.0.0.1 has begun anew: what it had may be lost" in caplog.text


# ------------------------------------------------------------------------------------------------- a guest that moves

GATEWAY = "169.254.1.1"
OUTER_PORT, PORT = 8080, 80


@contextlib.contextmanager
def routers(device: str | None = None) -> Iterator[tuple[Lab, dict[str, PcpServer], Callable[[], FlowDriver]]]:
    """Hosts with a PCP server each, which gives their guests places of one outer address, the same on both."""
    with Lab(kind="routed") as lab:
        servers = {}
        for name, host in lab.hosts.items():
            host.namespace.ip(
                "link add inside type bridge", f"address add {GATEWAY}/32 dev inside", "link set inside up"
            )
            folder = lab.folder / host.namespace.name
            servers[name] = PcpServer(host.namespace, folder, outside=UPLINK, inside="inside", inner="10.92.0.0/24")
        files = [f"{lab.folder}/{{namespace}}/{name}" for name in ("leases", "leases6")]

        def driver() -> FlowDriver:
            pcp = Looking(lease_files=files, device=device)
            return SeveralDrivers((("linux_conntrack", LinuxConntrackDriver()), ("pcp", pcp)))

        yield lab, servers, driver


class Looking(PcpDriver):
    """Tells when it looks after what waits for its guest."""

    looked = threading.Event()

    def renew(self, scope: Scope, batch: Batch) -> Results:
        self.looked.set()
        return super().renew(scope, batch)


def add_guest(lab: Lab, name: str = "g") -> Guest:
    guest = lab.add_guest(name, "a")
    guest.allow("tcp", PORT)
    guest.allow("udp", PORT)
    for host in lab.hosts.values():
        # What comes to the outer address is tracked in the zone of the guest; the lab has no other guest behind it.
        host.namespace.run(
            ["nft", "-f", "-"],
            f"table inet outer {{\nchain zones {{\ntype filter hook prerouting priority raw + 5;\n"
            f"iifname {UPLINK} ip daddr {OUTER} ct zone set {host.zone(guest)}\n}}\n}}\n",
        )
    lead_to(lab, "a")
    return guest


def lead_to(lab: Lab, host: str) -> None:
    """The outer address is where the guest is: that is the network's business, as with any address of a guest's."""
    lab.fabric.namespace.ip(*routes_via_far_end(f"to-{host}", (OUTER,)))


def is_reached(lab: Lab, guest: Guest, family: int, kind: int) -> bool:
    """Whether what the outside sends to the place of the guest's, or of its own IPv6 address, comes to the guest."""
    inet = socket.AF_INET if family == 4 else socket.AF_INET6
    own = guest.addresses[0 if family == 4 else 1]
    to = (OUTER, OUTER_PORT) if family == 4 else (own, PORT)
    with guest.namespace.inside():
        here = socket.socket(inet, kind)
    with lab.outside.inside():
        there = socket.socket(inet, kind)
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        here.bind((own, PORT))
        there.settimeout(1.5)
        here.settimeout(1.5)
        with contextlib.suppress(TimeoutError):
            if kind == socket.SOCK_STREAM:
                here.listen()
                there.connect(to)
                return True
            there.sendto(b"?", to)
            return here.recv(10) == b"?"
    return False


WAYS = [(family, kind) for family in (4, 6) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]


def reached(lab: Lab, guest: Guest) -> dict[tuple[int, int], bool]:
    return {way: is_reached(lab, guest, *way) for way in WAYS}


def map_all(guest: Guest, host: Host) -> None:
    """As a guest asks: IPv4 by itself, and its holes in the IPv6 firewall as its gateway's."""
    client = Client(GATEWAY, guest.namespace, NONCE)
    for protocol in (6, 17):
        assert client.ask(protocol, PORT, OUTER_PORT).result == ResultCode.SUCCESS
        given(host.namespace, Internal(protocol, netaddr.IPAddress(guest.addresses[1]), PORT), PORT)


@pytest.mark.usefixtures("world")
def test_a_guest_is_reached_at_its_mappings_after_it_moved_and_is_not_without_sami() -> None:
    def move(carried: bool) -> dict[tuple[int, int], bool]:
        with routers() as (lab, servers, driver):
            guest = add_guest(lab)
            map_all(guest, lab.hosts["a"])
            assert set(reached(lab, guest).values()) == {True}
            carrier = Carrier(driver=driver) if carried else NoCarrier()
            carrier.start(lab)
            try:
                record = lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5)
                assert record.errors == []
                lead_to(lab, "b")
                found = reached(lab, guest)
                if isinstance(carrier, Carrier):
                    carrier.result(guest)
                    assert all(Path(file).read_text().strip() == "" for file in servers["a"].lease_files), "left behind"
                    # The guest finds another epoch, and asks again for what it has, with the nonce that it had.
                    again = Client(GATEWAY, guest.namespace, NONCE).ask(6, PORT, OUTER_PORT)
                    assert again.external == External(netaddr.IPAddress(OUTER), OUTER_PORT)
                return found
            finally:
                carrier.stop()

    with ThreadPoolExecutor(2) as both:
        ours, without = both.map(move, (True, False))
    assert set(without.values()) == {False}, "a move without SAMI is to lose the mappings, or nothing is shown"
    assert set(ours.values()) == {True}


@pytest.mark.usefixtures("world")
def test_what_a_server_loses_before_the_guest_comes_is_asked_for_again() -> None:
    settings = Settings(limits=Limits(hold_seconds=2))
    with routers() as (lab, servers, driver), ThreadPoolExecutor(1) as meanwhile:
        guest = add_guest(lab)
        map_all(guest, lab.hosts["a"])
        carrier = Carrier(settings, driver=driver)
        carrier.start(lab)
        try:
            moved = meanwhile.submit(lab.migrate, guest, "a", "b", carrier.tell, copy_seconds=7)
            wait_until(lambda: has_all(servers["b"]), "the mappings to come", 5)
            Looking.looked.clear()
            assert Looking.looked.wait(5), "what came is not looked after"
            servers["b"].forget()
            assert not has_all(servers["b"])
            wait_until(lambda: has_all(servers["b"]), "the mappings to come again", 5)
            assert not moved.done()
            assert moved.result().errors == []
            lead_to(lab, "b")
            assert set(reached(lab, guest).values()) == {True}
            assert "vanished before the guest came; put in again" in str(carrier.report("b", guest)["remarks"])
        finally:
            carrier.stop()


def has_all(server: PcpServer) -> bool:
    return all(Path(file).exists() and len(Path(file).read_text().split("\n")) == 3 for file in server.lease_files)


@pytest.mark.usefixtures("world")
def test_taken_place_is_named_before_the_cut_over_and_the_others_go_along() -> None:
    with routers() as (lab, _, driver):
        guest = add_guest(lab)
        map_all(guest, lab.hosts["a"])
        given(lab.hosts["b"].namespace, Internal(6, netaddr.IPAddress("10.92.0.99"), 443), OUTER_PORT)
        carrier = Carrier(driver=driver)
        carrier.start(lab)
        try:
            assert lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5).errors == []
            lead_to(lab, "b")
            named = carrier.report("b", guest)["named"]
            (refused,) = [told for reason, told in named.items() if "translated to" in reason]
            assert (refused["count"], refused["flows"]) == (1, ["pcp-mapping-ipv4 10.92.0.11 port 80 (protocol 6)"])
            assert reached(lab, guest) == {way: way != (4, socket.SOCK_STREAM) for way in WAYS}
        finally:
            carrier.stop()


@pytest.mark.usefixtures("world")
def test_what_a_server_of_both_hosts_has_stays_in_it_and_both_reports_say_so() -> None:
    with routers("one router") as (lab, servers, driver):
        guest = add_guest(lab)
        map_all(guest, lab.hosts["a"])
        carrier = Carrier(driver=driver)
        carrier.start(lab)
        try:
            assert lab.migrate(guest, "a", "b", carrier.tell, copy_seconds=0.5).errors == []
            for host in ("a", "b"):
                assert "both hosts have the device one router" in str(carrier.report(host, guest)["remarks"])
            assert has_all(servers["a"])
            assert not has_all(servers["b"])
        finally:
            carrier.stop()
