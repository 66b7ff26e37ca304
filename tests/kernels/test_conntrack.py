"""The conntrack driver where the kernel does not filter by zone, and with protocols that the machine has not."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.floor import namespaces
from lab.deadline import STRETCHED
from lab.errors import CommandFailed
from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, probe
from sami_plugin.drivers.linux_conntrack.encode import dump_request
from sami_plugin.drivers.linux_conntrack.netlink import Connection
from sami_plugin.model.flows import TEMPLATES, Batch, ZoneRole, names
from sami_plugin.model.protocols import SctpState
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import PORT_ADDRESSES, flows
from tests.two_sides import HERE, THERE, two_sides
from tests.two_sides import scope_of as two_sides_scope

pytestmark = pytest.mark.usefixtures("kernel_lab")

OLD = "bookworm"
"""Linux 6.1 of this suite takes CTA_ZONE for nothing, in a dump and in a flush."""


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver()
    yield made
    made.close()


def scope_of(namespace: str, zone: int) -> Scope:
    return Scope("port", "guest", {ZoneRole.PORT: zone}, PORT_ADDRESSES, namespace)


def ports(driver: LinuxConntrackDriver, scope: Scope) -> list[int]:
    """Source ports of the scope's TCP flows."""
    parts = list(driver.export(scope))
    assert all(isinstance(part, Batch) for part in parts)
    return sorted(int(port) for part in parts for port in part.rows["sourceTransportPort"])


def test_probe_knows_whether_this_kernel_filters_by_zone() -> None:
    assert probe.features().filters_dump_by_zone == (os.environ[STRETCHED] != OLD)


def test_neighbours_zones_are_neither_told_nor_touched_whether_the_kernel_filters_or_not(
    driver: LinuxConntrackDriver,
) -> None:
    with namespaces() as places:
        mine, theirs, empty = (scope_of(places[0], zone) for zone in (5, 6, 7))
        sent = flows(TEMPLATES["tcp-ipv4"], 4)
        # Of the zone numbers alone they differ.
        for scope in (mine, theirs):
            assert (driver.insert(scope, sent)["outcome"] == Outcome.IMPORTED).all()
        connection = Connection(places[0])
        came = sum(len(messages) for messages in connection.dump(dump_request(5)))
        connection.close()
        assert came == (8 if os.environ[STRETCHED] == OLD else 4)

        assert ports(driver, mine) == ports(driver, theirs) == sorted(sent.rows["sourceTransportPort"].tolist())
        assert ports(driver, empty) == []
        several = dataclasses.replace(mine, zones={ZoneRole.PORT: 5, ZoneRole.DNAT: 7})
        assert ports(driver, several) == ports(driver, mine)

        (exported,) = driver.export(mine)
        assert isinstance(exported, Batch)
        # Nothing names nothing: to the kernel a removal that names nothing would be a flush, of all zones.
        driver.remove(mine, exported.take(np.zeros(len(exported), bool)).identities)
        driver.remove(empty, exported.identities)
        assert ports(driver, mine) == ports(driver, theirs)
        with driver.watch(mine) as watch:
            assert (driver.remove(mine, exported.identities)["outcome"] == Outcome.REMOVED).all()
            driver.insert(theirs, flows(TEMPLATES["tcp-ipv4"], 1, first=500))
            changes = watch.collect()
        assert not changes.upserts
        assert sum(map(len, changes.removals)) <= len(sent)  # entries that nobody listened to may end untold
        assert ports(driver, mine) == []
        assert len(ports(driver, theirs)) == 5


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    with two_sides() as made:
        yield made


def test_sctp_association_goes_on_when_its_entry_was_put_in_again(
    driver: LinuxConntrackDriver, sides: tuple[Namespace, Namespace]
) -> None:
    client, server = associated(*sides)
    with client, server:
        scope = two_sides_scope(sides[0])
        told = {batch.template.name: batch for batch in driver.export(scope) if isinstance(batch, Batch)}
        association = told["sctp-ipv4"]
        assert names(association) == (f"sctp {HERE}:{client.getsockname()[1]} > {THERE}:5000",)
        (row,) = association.rows
        assert row["sctpAssociationState"] == SctpState.ESTABLISHED
        assert row["sctpVerificationTag"] != 0
        assert row["reverseSctpVerificationTag"] != 0

        assert driver.remove(scope, association.identities)["outcome"].tolist() == [Outcome.REMOVED]
        server.send(b"kept out")
        client.settimeout(3)
        with pytest.raises(TimeoutError):
            client.recv(100)
        assert driver.insert(scope, association)["outcome"].tolist() == [Outcome.IMPORTED]
        kept, present = driver.read_back(scope, association)
        assert present.all()
        assert not lost_fields(association, kept.rows).any()
        client.settimeout(60)
        assert client.recv(100) == b"kept out", "what was not let in is sent again"
        for sender, receiver in ((client, server), (server, client)):
            sender.send(b"goes on")
            assert receiver.recv(100) == b"goes on"
        assert "ESTABLISHED" in sides[0].run(["conntrack", "-L", "-p", "sctp"])


def test_gre_tunnel_goes_on_when_its_entry_was_put_in_again(
    driver: LinuxConntrackDriver, sides: tuple[Namespace, Namespace]
) -> None:
    ends = (HERE, THERE, "10.8.0.1"), (THERE, HERE, "10.8.0.2")
    for namespace, (local, remote, inner) in zip(sides, ends, strict=True):
        namespace.sysctl("net.ipv6.conf.default.disable_ipv6", 1)  # it would speak in the tunnel unasked
        namespace.ip(
            f"link add tunnel type gre local {local} remote {remote} key 77 ttl 64",
            f"address add {inner}/24 dev tunnel",
            "link set tunnel up",
        )
    near, far = sides

    def peer_hears(count: int) -> bool:
        """Whether all that the peer says through the tunnel is answered."""
        try:
            far.run(["ping", "-q", "-c", str(count), "-i", "0.5", "-W", "3", "10.8.0.1"])
        except CommandFailed:
            return False
        return True

    near.run(["ping", "-q", "-c", "2", "-W", "10", "10.8.0.2"])
    scope = two_sides_scope(near)
    tunnel = {batch.template.name: batch for batch in driver.export(scope) if isinstance(batch, Batch)}["gre-ipv4"]
    assert names(tunnel) == (f"gre {HERE} > {THERE} key 0 reverse key 0",)  # netfilter looks at the keys of PPTP alone
    assert driver.remove(scope, tunnel.identities)["outcome"].tolist() == [Outcome.REMOVED]
    assert not peer_hears(1)
    assert driver.insert(scope, tunnel)["outcome"].tolist() == [Outcome.IMPORTED]
    assert peer_hears(4)


def associated(near: Namespace, far: Namespace) -> tuple[socket.socket, socket.socket]:
    """Both ends of an SCTP association that `near` has begun."""
    with far.inside():
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    listener.settimeout(60)
    listener.bind((THERE, 5000))
    listener.listen()
    accepted: list[socket.socket] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept()[0]))
    thread.start()
    with near.inside():
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    client.settimeout(60)
    client.connect((THERE, 5000))
    thread.join()
    listener.close()
    accepted[0].settimeout(60)
    return client, accepted[0]
