"""Flows that a destination is told of more than once, or that are not what they were when they are told again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import netaddr
import numpy as np
import pytest

from sami_plugin.drivers.base import FlowDriver
from sami_plugin.errors import DeviceFailed
from sami_plugin.handover import DestinationSession
from sami_plugin.handover.destination import UNTOLD
from sami_plugin.leaving import Leaving
from sami_plugin.migration.decision import FindScope, Import, Verify
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, ZoneRole
from sami_plugin.model.migration import Phase
from sami_plugin.model.protocols import TcpState
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.memory import (
    ALL,
    GUEST_ADDRESS,
    SETTINGS,
    ZONES,
    begin,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    leaving_session,
    payload,
    ports,
    report,
    session_in,
    sessions_follow,
    tcp_flows,
    until,
    until_idle,
    words,
)


def plugged(hosts: Hosts) -> str:
    guest = new_guest()
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    return guest


def coming(hosts: Hosts) -> list[DestinationSession]:
    return [one for one in hosts.agents["host-b"].sessions() if isinstance(one, DestinationSession)]


def runs(session: DestinationSession) -> None:
    session._known = replace(session._known, in_sync=True, runs_here=True)


def bring(session: DestinationSession, *batches: Batch) -> None:
    session._import(Import(payload(*batches)))
    session._settle()


def test_what_was_put_in_and_was_about_to_be_taken_out_is_named_once(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts, session_in(hosts, plugged(hosts), 1) as session:
        session._find_scope(FindScope(is_last=True))
        (port,) = session._ports
        hosts.drivers["host-b"].insert(port.scope, tcp_flows(10))
        port.former.put(tcp_flows(10))
        port.unsure.put(tcp_flows(10))
        runs(session)
        session._verify(Verify())
        assert session.report.named[UNTOLD]["count"] == 10


def test_flow_that_is_answered_after_it_was_put_in_is_not_called_present(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts, session_in(hosts, plugged(hosts), 1) as session:
        young = tcp_flows(1)
        young.rows["conntrackStatus"], young.rows["flowMark"] = FlowStatus.CONFIRMED, 5
        device = hosts.drivers["host-b"].device
        device.faults.drop_fields = frozenset({"flowMark"})
        session._find_scope(FindScope(is_last=True))
        bring(session, young)
        runs(session)
        (entry,) = device.zone((None, ZONES["host-b"])).entries.values()
        entry.row["conntrackStatus"] |= FlowStatus.SEEN_REPLY
        entry.row["flowMark"] = 9
        bring(session, young)
        counts = session._counts()
        assert (counts["imported"], counts["present"], counts["degraded"]) == (1, 0, 1)


def test_what_was_refused_and_is_taken_when_it_is_told_anew_is_not_named(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts:
        guest, faults = guest_with_flows(hosts), hosts.drivers["host-b"].device.faults
        faults.refuse = lambda batch: batch.rows["sourceTransportPort"] < 1010
        begin(hosts, guest)
        hosts.kill("host-a")
        faults.refuse = None
        hosts.start("host-a")
        words(hosts, guest, ("host-a", Phase.OUTGOING))
        until(lambda: sessions_follow(hosts))
        until(lambda: all(one._known.has_caught_up for one in coming(hosts)))
        finish(hosts, guest)
        until_idle(hosts)
        assert ports(hosts, "host-b") == ALL
        assert report(hosts, "host-b", guest)["named"] == {}


def test_what_the_guest_has_changed_stays_when_the_source_s_has_come_further(tmp_path: Path) -> None:
    with hosts_in(tmp_path) as hosts, session_in(hosts, plugged(hosts), 1) as session:
        told, before, here = tcp_flows(1), tcp_flows(1), tcp_flows(1)
        for batch in (before, here):
            batch.rows["conntrackStatus"] &= ~np.uint32(FlowStatus.ASSURED)
        here.rows["flowMark"] = 8
        session._find_scope(FindScope(is_last=True))
        (port,) = session._ports
        hosts.drivers["host-b"].insert(port.scope, here)
        port.former.put(before)
        runs(session)
        for _ in range(2):
            bring(session, told)
            assert held(hosts, "host-b") == {(1000, 8)}


def translated(source: str, destination: str, port: int, to: int, as_seen: tuple[str, str], status: int) -> Batch:
    """A connection, and how its addresses are called behind the translation."""
    template = TEMPLATES["tcp-nat-ipv4"]
    rows = template.empty(1)
    rows["zoneRole"], rows["protocolIdentifier"], rows["remainingTimeoutSeconds"] = ZoneRole.PORT, 6, 1000
    rows["sourceTransportPort"], rows["destinationTransportPort"] = port, to
    rows["postNAPTSourceTransportPort"], rows["postNAPTDestinationTransportPort"] = port, to
    for name, address in zip(
        ("sourceIPv4Address", "destinationIPv4Address", "postNATSourceIPv4Address", "postNATDestinationIPv4Address"),
        (source, destination, *as_seen),
        strict=True,
    ):
        rows[name] = int(netaddr.IPAddress(address))
    rows["conntrackStatus"], rows["tcpConnectionState"] = status, TcpState.ESTABLISHED
    return Batch(template, rows)


def test_late_packet_to_a_floating_address_takes_nothing_from_what_the_guest_has_begun(
    tmp_path: Path,
) -> None:
    floating, peer = "203.0.113.5", "198.51.100.1"
    answered = FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.SRC_NAT
    begun = translated(GUEST_ADDRESS, peer, 1000, 443, (floating, peer), answered)
    begun.rows["flowMark"] = 7
    late = translated(peer, floating, 443, 1000, (peer, GUEST_ADDRESS), FlowStatus.CONFIRMED | FlowStatus.DST_NAT)
    settings = replace(SETTINGS, translations=(netaddr.IPAddress(floating),))
    with hosts_in(tmp_path, settings) as hosts, session_in(hosts, plugged(hosts), 1) as session:
        session._find_scope(FindScope(is_last=True))
        (port,) = session._ports
        hosts.drivers["host-b"].insert(port.scope, begun)
        runs(session)
        bring(session, late)
        assert held(hosts, "host-b") == {(1000, 7)}


def test_what_was_deleted_in_the_pause_is_the_next_session_s_where_an_export_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts_in(tmp_path) as hosts, leaving_session(hosts, guest_with_flows(hosts, 0)) as session:
        (port,) = session._ports
        other = replace(port.scope, port="other")
        port.former.put(tcp_flows(10))
        session._ports = [port, Leaving(other, None)]
        session._former = session._as_former()
        session._known = replace(session._known, is_suspended=True)
        real: FlowDriver = session.host.driver

        def export(scope: object) -> object:
            if scope == other:
                raise DeviceFailed("it does not answer")
            return real_export(scope)  # type: ignore[arg-type]

        real_export = real.export
        monkeypatch.setattr(real, "export", export)
        with pytest.raises(DeviceFailed):
            session._line_up(session._export())
        assert sum(len(one.flows) for one in session._as_former().ports) == 10
