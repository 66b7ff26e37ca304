"""Flows that a flowtable has taken from conntrack: what is not told of them is completed, and they go along."""

from __future__ import annotations

import time

import netaddr
import pytest

from lab import traffic
from lab.carrier import Carrier
from lab.contract import NoCarrier
from lab.deadline import wait_until
from lab.firewall import UPLINK
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.model.flows import Batch, FlowStatus, ZoneRole
from sami_plugin.model.protocols import TcpState
from sami_plugin.model.scope import Scope

pytestmark = pytest.mark.usefixtures("kernel_lab")

FLOWTABLE = """table inet fast {{
  flowtable f {{ hook ingress priority 0; devices = {{ {devices} }}; }}
  chain forward {{
    type filter hook forward priority filter + 10;
    ct state established meta l4proto {{ tcp, udp }} flow add @f;
  }}
}}
"""
WATCHED_SECONDS = 30.0
"""In this kernel all takes long."""


def is_offloaded(host: Host) -> bool:
    return "OFFLOAD" in host.run(["conntrack", "-L"])


def scope_of(host: Host, guest: Guest) -> Scope:
    own = tuple(map(netaddr.IPAddress, guest.addresses))
    return Scope(guest.port.id, guest.uuid, {ZoneRole.PORT: host.zone(guest)}, own, host.netns_path)


def moved(carrier: Carrier | NoCarrier, family: int) -> bool:
    """Whether a download that the source's flowtable forwards goes on when the guest has moved."""
    with Lab(kind="routed") as lab:
        source, destination = lab.hosts["a"], lab.hosts["b"]
        guest = lab.add_guest("g", source)
        source.namespace.run(["nft", "-f", "-"], FLOWTABLE.format(devices=f"{UPLINK}, {guest.tap}"))
        carrier.start(lab)
        try:
            download = traffic.download(lab, guest, family=family, rate=1e5)
            wait_until(lambda: is_offloaded(source), "the flow to be offloaded", 10)
            (batch,) = [one for one in LinuxConntrackDriver().export(scope_of(source, guest)) if isinstance(one, Batch)]
            assert int(batch.rows["conntrackStatus"][0]) & FlowStatus.OFFLOAD
            assert batch.rows["tcpConnectionState"].tolist() == [TcpState.ESTABLISHED]
            record = lab.migrate(guest, source, destination, carrier.tell, copy_seconds=5)
            assert record.errors == []
            time.sleep(max(0.0, record.cut_over_at + WATCHED_SECONDS - time.monotonic()))
            if isinstance(carrier, Carrier):
                assert carrier.result(guest)["flows"]["refused"] == 0
                left = [one for one in LinuxConntrackDriver().export(scope_of(source, guest)) if isinstance(one, Batch)]
                assert not sum(map(len, left)), "what moved is still at the source"
            wait_until(lambda: download.samples()[-1].time > record.cut_over_at + WATCHED_SECONDS, "samples", 10)
            samples = download.samples()
            late = [one for one in samples if one.time > record.cut_over_at + WATCHED_SECONDS / 2]
            return late[-1].total > late[0].total
        finally:
            carrier.stop()


@pytest.mark.parametrize("family", [4, 6])
def test_download_in_a_flowtable_goes_on_after_a_move_and_dies_without_sami(family: int) -> None:
    assert not moved(NoCarrier(), family), "a move without SAMI is to end it, or nothing is shown"
    assert moved(Carrier(), family)
