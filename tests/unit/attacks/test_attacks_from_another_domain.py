"""What another domain's authority and hosts may not do here. Each is tried without its defence too; see `trial`."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import netaddr
import numpy as np
import pytest

from sami_plugin.channel.identity import Credentials
from sami_plugin.model.address_map import AddressMap
from sami_plugin.model.domain import Domain
from sami_plugin.model.flows import Batch
from sami_plugin.model.migration import Phase
from sami_plugin.testing.hosts import Hosts
from tests.unit.attacks.trial import both
from tests.unit.handover.memory import SETTINGS, ZONES, finish, guest_with_flows, held, ports, tcp_flows, until_idle
from tests.unit.handover.regions import EAST_ADDRESS, goes_east, regions
from tests.unit.handover.stranger import Stranger, is_given_flows

SOON = replace(SETTINGS, limits=replace(SETTINGS.limits, open_seconds=1.5, verdict_seconds=0.5), call_seconds=1.0)


def test_authority_of_another_domain_that_vouches_for_a_host_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with regions(tmp_path, settings=SOON) as (hosts, west):
        guest = guest_with_flows(hosts)
        hosts.plug("host-b", guest, ZONES["host-b"], EAST_ADDRESS)
        hosts.say("host-b", Phase.OUTGOING, guest, destination="host-x")  # which is of the east, as host-b is

        def attack() -> bool:
            with Stranger(hosts, "host-x", certificates=west) as stranger:
                stranger.ask("host-b", guest)
                return is_given_flows(stranger)

        def take_out() -> None:
            real = Credentials.context

            def careless(self: Credentials, *, is_server: bool) -> ssl.SSLContext:
                context = real(self, is_server=is_server)
                context.load_verify_locations(west.folder / "ca.pem")
                context.verify_flags &= ~ssl.VERIFY_CRL_CHECK_LEAF
                return context

            monkeypatch.setattr(Credentials, "context", careless)

        both(monkeypatch, attack, take_out)


def moves_east(hosts: Hosts, flows: Batch) -> set[int]:
    """Source ports in the east once a guest that has these flows besides its own is there."""
    guest = guest_with_flows(hosts, 10)
    hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), flows)
    goes_east(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    found = ports(hosts, "host-b")
    hosts.drivers["host-b"].remove(hosts.scope("host-b", guest), renamed(flows).identities)
    hosts.drivers["host-b"].remove(hosts.scope("host-b", guest), renamed(tcp_flows(10)).identities)
    assert not held(hosts, "host-b")
    hosts.unplug("host-b", guest)
    return found


def renamed(flows: Batch) -> Batch:
    rows = flows.rows.copy()
    rows["sourceIPv4Address"] = int(netaddr.IPAddress(EAST_ADDRESS))
    return Batch(flows.template, rows)


def test_host_of_another_domain_that_gives_a_kind_which_is_not_agreed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with regions(tmp_path, settings=SOON, west={"kinds_in": ("udp-*",)}) as (hosts, _):

        def attack() -> bool:
            return 6000 in moves_east(hosts, tcp_flows(1, first_port=6000))

        both(monkeypatch, attack, lambda: monkeypatch.setattr(Domain, "takes", lambda self, kind: True))


def test_host_of_another_domain_that_calls_a_host_of_ours_by_our_own_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with regions(tmp_path, settings=SOON) as (hosts, _):
        flows = tcp_flows(1, first_port=6000)
        flows.rows["destinationIPv4Address"] = int(netaddr.IPAddress("203.0.113.50"))

        def attack() -> bool:
            return 6000 in moves_east(hosts, flows)

        def take_out() -> None:
            real = AddressMap.applied

            def applied(self: AddressMap, batch: Batch) -> tuple[Batch, Any]:
                return real(self, batch)[0], np.zeros(len(batch), bool)

            monkeypatch.setattr(AddressMap, "applied", applied)

        both(monkeypatch, attack, take_out)
