"""A guest with a download that it began itself, and what has to be true of it when Nova has moved it, or has not.

No rule admits a packet of the download's, so it lives only where its entry is. A destination is held (see
`lab.openstack.compute.ComputeHost.held`) so that its rules are in force before the guest runs there.
"""

from __future__ import annotations

import time
from typing import Any

from lab.deadline import wait_until
from lab.openstack import traffic
from lab.openstack.compute import ComputeHost
from lab.openstack.guest import Guest
from lab.openstack.lab import OpenStackLab
from lab.openstack.migration import Migration
from lab.openstack.sami import Sami
from lab.traffic import Traffic
from lab.verdict import has_survived

WATCHED_SECONDS = 4.0
HOLD_SECONDS = 4.0
END_SECONDS = 60.0
LOOK_SECONDS = 0.1


class Case:
    """`source` is where the guest is when the case begins."""

    def __init__(self, lab: OpenStackLab, sami: Sami, guest: Guest, flow: Traffic) -> None:
        self.lab = lab
        self.sami = sami
        self.guest = guest
        self.flow = flow
        self.source: ComputeHost = lab.hosts[guest.host]
        (self.destination,) = (host for host in lab.hosts.values() if host is not self.source)
        self._before = {name: agent.ended(guest.uuid) for name, agent in sami.agents.items()}

    def start(self) -> Migration:
        return self.lab.start_migration(self.guest, self.destination.name)

    def move(self, hold_seconds: float = HOLD_SECONDS) -> Migration:
        """Migrates; asserts that Nova says it did."""
        with self.destination.held(hold_seconds):
            migration = self.start()
            rules_at = self.destination.wait_for_rules(self.guest.tap)
            result = migration.wait()
        assert (result.status, result.server_status, result.host) == ("completed", "ACTIVE", self.destination.name)
        assert not hold_seconds or rules_at < self.arrival(migration)
        return migration

    def arrival(self, migration: Migration) -> float:
        return migration.wait_for("RESUMED/MIGRATED", self.destination.name).time

    def goes_on(self, since: float | None = None) -> bool:
        """Whether the download goes on from then on."""
        return goes_on(self.flow, since)

    def report(self, host: ComputeHost) -> dict[str, Any]:
        """Of this migration, once its session has ended there."""
        agent = self.sami.agents[host.name]
        wait_until(
            lambda: agent.ended(self.guest.uuid) > self._before[host.name],
            f"the session on {host.name} to end; it said:\n{agent.log.read_text()[-3000:]}",
            END_SECONDS,
            poll_seconds=LOOK_SECONDS,
        )
        return agent.reports(self.guest.uuid)[0]

    def entries(self, host: ComputeHost) -> int:
        """How many TCP entries of the guest's the kernel there has, in any zone."""
        return len(host.entries(self.guest.address, "-p", "tcp"))

    def has_moved(self, migration: Migration) -> None:
        """Asserts that the guest and its connections are at the destination, and nothing of them at the source."""
        assert self.goes_on(self.arrival(migration)), self.sami.words()
        reports = self.report(self.source), self.report(self.destination)
        assert [report["outcome"] for report in reports] == ["moved", "moved"], reports
        assert self.source.entries(self.guest.address) == []
        assert self.entries(self.destination) >= 1

    def stays(self) -> None:
        """Asserts that the guest is at the source with its connections, and nothing of them at the destination."""
        server = self.guest.server()
        assert (server["status"], server["OS-EXT-SRV-ATTR:host"]) == ("ACTIVE", self.source.name)
        assert self.goes_on(), self.sami.words()
        assert self.destination.entries(self.guest.address) == []
        assert self.entries(self.source) >= 1


def goes_on(flow: Traffic, since: float | None = None) -> bool:
    begin = time.monotonic() if since is None else since
    wait_until(
        lambda: flow.samples()[-1].time > begin + WATCHED_SECONDS,
        "the time that is watched",
        WATCHED_SECONDS + 30,
        poll_seconds=LOOK_SECONDS,
    )
    return has_survived(flow.samples(), begin, WATCHED_SECONDS)


def downloading(lab: OpenStackLab, name: str, host: str) -> tuple[Guest, Traffic]:
    guest = lab.add_guest(name, host)
    return guest, traffic.download(lab, guest)
