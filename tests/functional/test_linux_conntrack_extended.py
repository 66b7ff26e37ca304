"""What few flows have, through a firewall for which it decides: helpers, masters, labels.

As in `test_linux_conntrack_traffic`: what is tracked is taken away and put in again, once without what few flows have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import netaddr
import numpy as np
import pytest

from lab.deadline import STRETCHED
from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, keep_events_on
from sami_plugin.model.flows import Batch, FlowStatus, ZoneRole, helper_octets
from sami_plugin.model.results import Outcome, Reason, lost_fields
from sami_plugin.model.scope import Scope
from tests.two_sides import HERE, HERE6, SECONDS, THERE, THERE6, scope_of, two_sides

MASQUERADE = "10.9.0.100"
NAT = f"""table ip nat {{
  chain post {{ type nat hook postrouting priority srcnat; ip saddr {HERE} tcp dport 21 snat to {MASQUERADE}; }}
}}
"""
PROXY = """table inet proxy {
  chain pre {
    type filter hook prerouting priority raw;
    iifname eth0 tcp dport 7000 tcp flags & (fin | syn | rst | ack) == syn notrack;
  }
  chain guard {
    type filter hook input priority filter; policy drop;
    tcp dport 7000 ct state { invalid, untracked } synproxy mss 1460 wscale 7 timestamp sack-perm;
    ct state established accept; iifname lo accept; meta l4proto { icmp, icmpv6 } accept;
  }
}
"""
RULES = """table inet more {
  ct helper files { type "ftp" protocol tcp; }
  ct helper boot { type "tftp" protocol udp; }
  ct helper calls { type "sip" protocol udp; }
  chain out {
    type filter hook output priority filter;
    tcp dport 21 ct helper set "files"; udp dport 69 ct helper set "boot"; udp dport 5060 ct helper set "calls";
    udp dport 5000 ct label set 5;
  }
  chain guard {
    type filter hook input priority filter + 1; policy accept;
    udp sport 5000 ct label != 5 drop;
  }
}
add rule inet firewall guard ct state related accept
"""


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    with two_sides() as made, keep_events_on(made[0].path):  # as the agent does: else the watch may be told nothing
        made[0].run(["nft", "-f", "-"], RULES)
        yield made


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver()
    yield made
    made.close()


@pytest.fixture
def scope(sides: tuple[Namespace, Namespace]) -> Scope:
    return scope_of(sides[0])


def taken_away(driver: LinuxConntrackDriver, scope: Scope) -> list[Batch]:
    """All flows of the scope, as they were before they were removed by name."""
    flows = [part for part in driver.export(scope) if isinstance(part, Batch) and "icmp" not in part.template.name]
    for batch in reversed(flows):  # what is expected goes with its master
        assert set(driver.remove(scope, batch.identities)["outcome"]) == {Outcome.REMOVED}
    return flows


def put_in(driver: LinuxConntrackDriver, scope: Scope, flows: list[Batch]) -> None:
    """With all that they have; checked field by field."""
    for batch in flows:
        assert set(driver.insert(scope, batch)["outcome"]) == {Outcome.IMPORTED}
        kept, is_there = driver.read_back(scope, batch)
        assert is_there.all()
        assert not lost_fields(batch, kept.rows).any()


def usual(flows: list[Batch]) -> list[Batch]:
    """The same flows without what few have."""
    return [batch.under(batch.template.plain) for batch in flows]


def is_masters(name: str, batch: Batch) -> bool:
    """Whether the field tells of the flows' master."""
    return name.startswith("master") and bool(batch.rows[name].any())


class Transfer:
    """The control connection of a transfer (RFC 959) that `HERE` has begun, and data connections to it."""

    def __init__(self, sides: tuple[Namespace, Namespace], is_ipv6: bool, undo: contextlib.ExitStack) -> None:
        self._sides, self._undo = sides, undo
        self._here, self._there = (HERE6, THERE6) if is_ipv6 else (HERE, THERE)
        self._family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
        with self._socket(1) as waiting:
            waiting.bind((self._there, 21))
            waiting.listen()
            self._client = undo.enter_context(self._socket(0))
            self._client.connect((self._there, 21))
            self._server = undo.enter_context(waiting.accept()[0])
        self._server.settimeout(SECONDS)
        assert self.says("USER guest\r\n")  # the helper looks for a line behind one that it has seen the end of

    def says(self, line: str) -> bool:
        """Whether what the client says comes to the server."""
        self._client.sendall(line.encode())
        with contextlib.suppress(TimeoutError):
            return self._server.recv(100) == line.encode()
        return False

    def _socket(self, side: int) -> socket.socket:
        with self._sides[side].inside():
            made = socket.socket(self._family, socket.SOCK_STREAM)
        made.settimeout(SECONDS)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made

    def ask(self, port: int, sees: str | None = None) -> None:
        """Says where the server's data connection is to come to (RFC 959, RFC 2428), and what the server `sees`."""
        self._client.sendall(self._asking(self._here, port))
        assert self._server.recv(100) == self._asking(sees or self._here, port)

    def _asking(self, address: str, port: int) -> bytes:
        if self._family == socket.AF_INET6:
            return f"EPRT |2|{address}|{port}|\r\n".encode()
        return f"PORT {address.replace('.', ',')},{port >> 8},{port & 0xFF}\r\n".encode()

    def data_comes(self, port: int) -> bool:
        """Whether the server's connection to that port is let in."""
        with self._socket(0) as waiting, contextlib.suppress(TimeoutError):
            waiting.bind((self._here, port))
            waiting.listen()
            data = self._undo.enter_context(self._socket(1))
            data.connect((self._here, port))
            return True
        return False


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def transfer(request: pytest.FixtureRequest, sides: tuple[Namespace, Namespace]) -> Iterator[Transfer]:
    with contextlib.ExitStack() as undo:
        yield Transfer(sides, request.param, undo)


def test_helper_goes_along_and_admits_what_the_guest_asks_for(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    transfer.ask(5001)
    assert transfer.data_comes(5001), "the firewall does not admit what its helper expects"
    flows = taken_away(driver, scope)
    # Some kernels give the data connection the helper as well.
    of_control = [batch.take(batch.rows["destinationTransportPort"] == 21) for batch in flows]
    (control,) = [batch for batch in of_control if len(batch)]
    assert control.rows["conntrackHelper"].tolist() == [list(helper_octets("ftp"))]
    put_in(driver, scope, usual([control]))
    transfer.ask(5002)
    assert not transfer.data_comes(5002), "without its helper"
    taken_away(driver, scope)
    put_in(driver, scope, [control])
    transfer.ask(5003)
    assert transfer.data_comes(5003)


def test_what_was_asked_for_before_the_move_is_let_in_after_it(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    with driver.watch(scope) as watch:
        transfer.ask(5001)
        told = watch.collect()
    (asked,) = [batch for batch in told.upserts if batch.template.is_expectation]
    assert len(asked) == 1
    control, expected = taken_away(driver, scope)
    assert expected.template.is_expectation
    assert not lost_fields(asked, expected.rows).any(), "export and watch tell different things"
    assert expected.rows["flowId"] == asked.rows["flowId"]
    put_in(driver, scope, [control])
    assert not transfer.data_comes(5001), "without what was expected"
    put_in(driver, scope, [expected])
    # It has the time that it had, not all that the helper gives.
    short = Batch(expected.template, expected.rows.copy())
    short.rows["remainingTimeoutSeconds"] = 30
    assert driver.renew(scope, short)["outcome"].tolist() == [Outcome.IMPORTED]
    assert driver.read_back(scope, expected)[0].rows["remainingTimeoutSeconds"] <= 30
    with driver.watch(scope) as watch:
        assert transfer.data_comes(5001)
        told = watch.collect()
    (gone,) = [batch for batch in told.removals if batch.template.is_expectation]
    assert gone.rows["destinationTransportPort"].tolist() == [5001]
    assert driver.remove(scope, expected)["outcome"].tolist() == [Outcome.ABSENT]


def test_what_is_expected_goes_by_name_alone(transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver) -> None:
    transfer.ask(5001)
    (expected,) = [one for one in driver.export(scope) if isinstance(one, Batch) and one.template.is_expectation]
    for change in (
        {"flowId": int(expected.rows["flowId"][0]) + 1},
        {"masterSourceTransportPort": 9, "flowId": 0},
        {"destinationTransportPort": 5002, "flowId": 0},
    ):
        other = Batch(expected.template, expected.rows.copy())
        for name, value in change.items():
            other.rows[name] = value
        assert driver.remove(scope, other.identities)["outcome"].tolist() == [Outcome.ABSENT]
    nameless = expected.identities
    nameless.rows["flowId"] = 0
    assert driver.remove(scope, nameless)["outcome"].tolist() == [Outcome.REMOVED]
    assert not transfer.data_comes(5001)


def test_what_is_expected_of_a_flow_with_another_local_port_is_left_alone(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    transfer.ask(5001)
    (expected,) = [one for one in driver.export(scope) if isinstance(one, Batch) and one.template.is_expectation]
    neighbours = tuple(map(netaddr.IPAddress, (THERE, THERE6)))
    shared = dataclasses.replace(scope, is_shared=True, neighbours=neighbours)
    for did in (
        driver.remove(shared, expected.identities),
        driver.renew(shared, expected),
        driver.insert(shared, expected),
    ):
        assert did["outcome"].tolist() == [Outcome.PRESENT]
    assert driver.read_back(scope, expected)[0].rows["flowId"] == expected.rows["flowId"]
    assert driver.remove(scope, expected.identities)["outcome"].tolist() == [Outcome.REMOVED]
    (made,) = driver.insert(shared, expected)
    assert (made["outcome"], made["reason"]) == (Outcome.REFUSED, Reason.LOCAL_PORTS_OWN)
    assert driver.remove(shared, expected.identities)["outcome"].tolist() == [Outcome.ABSENT]


def only_expected(driver: LinuxConntrackDriver, scope: Scope) -> Batch:
    (found,) = [one for one in driver.export(scope) if isinstance(one, Batch) and one.template.is_expectation]
    return found


def test_whoever_asks_for_a_zone_is_told_all_that_is_expected_there(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    """As `sami flow list` does, which knows no addresses."""
    transfer.ask(5001)
    assert len(only_expected(driver, dataclasses.replace(scope, addresses=()))) == 1
    told = list(driver.export(dataclasses.replace(scope, addresses=(), is_shared=True)))
    assert not any(isinstance(one, Batch) for one in told), "of a shared zone only what is one's own"


def test_what_is_expected_outlives_a_change_of_its_master(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    """What has to make way for the master as it is now takes with it what was expected of it."""
    transfer.ask(5001)
    before = only_expected(driver, scope)
    (control,) = [one for one in driver.export(scope) if isinstance(one, Batch) and one.template.is_extended]
    control.rows["flowMark"] = 9
    put_in(driver, scope, [control])
    assert not lost_fields(before, only_expected(driver, scope).rows).any()
    assert transfer.data_comes(5001)


def test_what_is_expected_of_one_master_is_not_given_time_by_another(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    transfer.ask(5001)
    (control,) = [one for one in driver.export(scope) if isinstance(one, Batch) and one.template.is_extended]
    control.rows["sourceTransportPort"] = 9
    put_in(driver, scope, [control])
    expected = only_expected(driver, scope)
    others = Batch(expected.template, expected.rows.copy())
    others.rows["masterSourceTransportPort"], others.rows["remainingTimeoutSeconds"] = 9, 3
    (made,) = driver.insert(scope, others)
    assert (made["outcome"], made["reason"]) == (Outcome.REFUSED, Reason.EXISTS)
    assert driver.renew(scope, others)["outcome"].tolist() == [Outcome.ABSENT]
    expected.rows["remainingTimeoutSeconds"] = 0
    assert driver.renew(scope, expected)["outcome"].tolist() == [Outcome.REFUSED]
    assert only_expected(driver, scope).rows["remainingTimeoutSeconds"] > 3


def test_expectations_are_exported_where_another_zone_has_the_same_flow_without_a_helper(
    transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    transfer.ask(5001)
    both = dataclasses.replace(scope, zones={**scope.zones, ZoneRole.SNAT: 99})
    (control,) = [one for one in driver.export(scope) if isinstance(one, Batch) and one.template.is_extended]
    other = control.under(control.template.plain)
    other.rows["zoneRole"] = ZoneRole.SNAT
    put_in(driver, both, [other])
    assert only_expected(driver, both).rows["zoneRole"].tolist() == [ZoneRole.PORT]


REGISTER = """REGISTER sip:{there} SIP/2.0
Via: SIP/2.0/UDP {here}:5060
From: <sip:guest@{there}>;tag=1
To: <sip:guest@{there}>
Call-ID: 1@guest
CSeq: 1 REGISTER
Contact: <sip:guest@{here}:5070>
Expires: 300
Content-Length: 0

"""
"""RFC 3261 section 10."""


@pytest.mark.parametrize(("here", "there"), [(HERE, THERE), (HERE6, THERE6)], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("helper", ["tftp", "sip"])
def test_datagrams_that_a_helper_expects_are_let_in_after_the_move(
    sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver, helper: str, here: str, there: str
) -> None:
    """TFTP: the file comes from another port (RFC 1350). SIP: calls come to where the guest has said."""
    with contextlib.ExitStack() as undo:

        def end(side: int, port: int) -> socket.socket:
            family = socket.AF_INET6 if ":" in here else socket.AF_INET
            with sides[side].inside():
                made = undo.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            made.bind(((here, there)[side], port))
            made.settimeout(SECONDS)
            return made

        asks, asked = end(0, 4000 if helper == "tftp" else 5060), end(1, 69 if helper == "tftp" else 5060)
        awaits = asks if helper == "tftp" else end(0, 5070)
        comes_from = end(1, 6000 if helper == "tftp" else 5061)

        def comes() -> bool:
            comes_from.sendto(b"data", awaits.getsockname()[:2])
            with contextlib.suppress(TimeoutError):
                return awaits.recv(2000) == b"data"
            return False

        if helper == "tftp":
            asks.sendto(struct.pack("!H", 1) + b"file\0octet\0", asked.getsockname()[:2])
            asked.recv(2000)
        else:
            ends = {"here": f"[{here}]" if ":" in here else here, "there": f"[{there}]" if ":" in there else there}
            register = REGISTER.format(**ends).replace("\n", "\r\n")
            asks.sendto(register.encode(), asked.getsockname()[:2])
            asked.recv(2000)
            asked.sendto(
                register.replace(register.partition("\r")[0], "SIP/2.0 200 OK").encode(), asks.getsockname()[:2]
            )
            asks.recv(2000)
        flow, expected = taken_away(driver, scope)
        assert expected.template.is_expectation
        put_in(driver, scope, [flow])
        assert not comes(), "without what was expected"
        put_in(driver, scope, [expected])
        assert comes()


def test_what_was_expected_keeps_its_master(transfer: Transfer, scope: Scope, driver: LinuxConntrackDriver) -> None:
    transfer.ask(5001)
    assert transfer.data_comes(5001)
    parts = taken_away(driver, scope)
    flows = Batch.joined(parts[0].template, [part.rows for part in parts])
    is_expected = flows.rows["conntrackStatus"] & int(FlowStatus.EXPECTED) != 0
    assert is_expected.tolist().count(True) == 1
    assert flows.rows["masterDestinationTransportPort"][is_expected].tolist() == [21]
    last_first = flows.take(np.argsort(~is_expected, kind="stable"))
    put_in(driver, scope, [last_first])
    # Without its master the flow comes in, and says so.
    taken_away(driver, scope)
    alone = flows.take(is_expected)
    assert driver.insert(scope, alone)["outcome"].tolist() == [Outcome.IMPORTED]
    kept, is_there = driver.read_back(scope, alone)
    assert is_there.all()
    (lost,) = lost_fields(alone, kept.rows)
    names = {name for bit, (name, *_) in enumerate(alone.template.state) if lost >> bit & 1}
    assert names == {"conntrackStatus", *(name for name in alone.rows.dtype.names or () if is_masters(name, alone))}


def test_sequence_numbers_that_a_nat_has_moved_stay_moved(
    sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver
) -> None:
    """The NAT's address is longer than the guest's, so all that follows it in the stream is two octets further on."""
    near, _ = sides
    if STRETCHED in os.environ:  # no rule loads it, and this machine's own kernel has it built in
        subprocess.run(["modprobe", "nf_nat_ftp"], check=True)
    near.ip(f"address add {MASQUERADE}/24 dev eth0")
    near.run(["nft", "-f", "-"], NAT)
    with contextlib.ExitStack() as undo:
        transfer = Transfer(sides, False, undo)
        transfer.ask(5001, sees=MASQUERADE)
        assert transfer.says("NOOP\r\n")
        (control,) = [
            batch for batch in taken_away(driver, scope) if "tcpOffsetAfter" in (batch.rows.dtype.names or ())
        ]
        assert control.template.name == "tcp-nat-extended-ipv4"
        assert control.rows["tcpOffsetAfter"].tolist() == [len(MASQUERADE) - len(HERE)]
        put_in(driver, scope, [control])
        assert transfer.says("NOOP\r\n")
        without = Batch(control.template, control.rows.copy())
        for name in ("tcpCorrectionPosition", "tcpOffsetBefore", "tcpOffsetAfter"):
            without.rows[name] = 0
        without.rows["conntrackStatus"] &= np.uint32(~FlowStatus.SEQ_ADJUST & 0xFFFF)
        taken_away(driver, scope)
        put_in(driver, scope, [without])
        assert not transfer.says("NOOP\r\n"), "without what the NAT knows of the stream"


@pytest.mark.parametrize(("here", "there"), [(HERE, THERE), (HERE6, THERE6)], ids=["ipv4", "ipv6"])
def test_connection_behind_a_syn_proxy_goes_on(
    sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver, here: str, there: str
) -> None:
    """The firewall has chosen its own sequence number for the server, so it moves all that the server sends."""
    near, far = sides
    near.run(["nft", "flush", "ruleset"])
    near.run(["nft", "-f", "-"], PROXY)
    near.sysctl("nf_conntrack_tcp_loose", 0)
    scope = dataclasses.replace(scope, zones={ZoneRole.PORT: 0})
    family = socket.AF_INET6 if ":" in here else socket.AF_INET
    with contextlib.ExitStack() as undo:
        with near.inside():
            waiting = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        with far.inside():
            client = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        for end in (waiting, client):
            end.settimeout(5 * SECONDS)
        waiting.bind((here, 7000))
        waiting.listen()
        client.connect((here, 7000))
        server = undo.enter_context(waiting.accept()[0])

        def answers(word: bytes) -> bool:
            client.sendall(word)
            server.settimeout(SECONDS)
            client.settimeout(SECONDS)
            with contextlib.suppress(TimeoutError):
                server.sendall(server.recv(100))
                return client.recv(100) == word
            return False

        assert answers(b"before")
        (flow,) = taken_away(driver, scope)
        assert flow.rows["synproxySequenceNumber"].all()
        assert flow.rows["reverseTcpOffsetAfter"].all()
        put_in(driver, scope, [flow])
        assert answers(b"after")
        without = usual(taken_away(driver, scope))
        without[0].rows["conntrackStatus"] &= np.uint32(~FlowStatus.SEQ_ADJUST & 0xFFFF)
        put_in(driver, scope, without)
        assert not answers(b"without what the proxy knows")


def test_labels_go_along(sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver) -> None:
    with contextlib.ExitStack() as undo:
        ends = []
        for namespace, address, port in zip(sides, (HERE, THERE), (4000, 5000), strict=True):
            with namespace.inside():
                end = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            end.bind((address, port))
            end.settimeout(SECONDS)
            ends.append(end)
        here, there = ends

        def comes() -> bool:
            there.sendto(b"back", (HERE, 4000))
            with contextlib.suppress(TimeoutError):
                return here.recv(100) == b"back"
            return False

        here.sendto(b"forth", (THERE, 5000))
        assert there.recv(100) == b"forth"
        assert comes()
        flows = taken_away(driver, scope)
        assert [batch.rows["conntrackLabels"].tolist() for batch in flows] == [[[1 << 5, 0]]]
        put_in(driver, scope, usual(flows))
        assert not comes(), "without its label"
        taken_away(driver, scope)
        put_in(driver, scope, flows)
        assert comes()
