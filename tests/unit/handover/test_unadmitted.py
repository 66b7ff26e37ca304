"""A guest runs at the destination before its port has a zone: what peers begin then, nobody has admitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import netaddr
import pytest

from sami_plugin.handover.destination import UNADMITTED, UNADMITTED_REMOVED
from sami_plugin.model.flows import Batch
from sami_plugin.model.migration import Phase
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    SETTINGS,
    ZONES,
    finish,
    guest_with_flows,
    hosts_in,
    ports,
    prepare,
    tcp_flows,
    until_idle,
    wait_for_step,
    zone_scope,
)

NEW, CARRIED = 5000, 1000
"""The peer's port of a connection that the source knows nothing of, and the guest's of one that is carried."""
BY_THE_GUEST = 7000


def begun_by_the_peer(peer_port: int, guest_port: int) -> Batch:
    batch = tcp_flows(1)
    rows = batch.rows
    for one, other in (
        ("sourceIPv4Address", "destinationIPv4Address"),
        ("sourceTransportPort", "destinationTransportPort"),
    ):
        rows[one], rows[other] = rows[other].copy(), rows[one].copy()
    rows["sourceTransportPort"], rows["destinationTransportPort"] = peer_port, guest_port
    return batch


def comes_before_its_zone(hosts: Hosts) -> str:
    """Its flows are on their way, it runs on host-b, and packets have made entries where its zone is going to be."""
    guest = guest_with_flows(hosts)
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    wait_for_step(hosts, "host-b", guest, "resumed")
    scope = replace(zone_scope("host-b"), addresses=(netaddr.IPAddress(GUEST_ADDRESS),))
    for batch in (begun_by_the_peer(NEW, 22), begun_by_the_peer(443, CARRIED), tcp_flows(1, first_port=BY_THE_GUEST)):
        hosts.drivers["host-b"].insert(scope, batch)
    return guest


@pytest.mark.parametrize("is_removing", [False, True])
def test_what_a_peer_began_before_the_zone_was_known_is_named_and_goes_where_the_operator_wants_it(
    tmp_path: Path, is_removing: bool
) -> None:
    with hosts_in(tmp_path, replace(SETTINGS, remove_unadmitted=is_removing)) as hosts:
        guest = comes_before_its_zone(hosts)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL | {BY_THE_GUEST} | ({NEW} if not is_removing else set())
        named = hosts.reports("host-b", guest)[0]["named"]
        reason, other = (UNADMITTED_REMOVED, UNADMITTED) if is_removing else (UNADMITTED, UNADMITTED_REMOVED)
        assert other not in named
        assert named[reason]["count"] == 1
        assert f":{NEW} " in named[reason]["flows"][0]


def test_what_is_there_when_the_zone_is_known_before_the_guest_runs_is_not_looked_at(tmp_path: Path) -> None:
    with hosts_in(tmp_path, replace(SETTINGS, remove_unadmitted=True)) as hosts:
        guest = guest_with_flows(hosts)
        prepare(hosts, guest)
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.drivers["host-b"].insert(hosts.scope("host-b", guest), begun_by_the_peer(NEW, 22))
        hosts.say("host-b", Phase.STARTED, guest)
        wait_for_step(hosts, "host-b", guest, "in sync")
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL | {NEW}
        assert hosts.reports("host-b", guest)[0]["named"] == {}
