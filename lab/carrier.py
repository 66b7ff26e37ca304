"""SAMI as the lab's carrier: one real agent per host, in this process, joined by oslo.messaging's ``fake://``.

The firewalls are the hosts' kernels; no broker is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.linux_conntrack.driver import LinuxConntrackDriver
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.settings import Settings
from sami_plugin.testing.hosts import Hosts

REPORT_SECONDS = 30.0


class Carrier:
    """See `lab.contract.Carrier`."""

    def __init__(
        self,
        settings: Settings | None = None,
        transport_url: str = "fake://",
        driver: Callable[[], FlowDriver] = LinuxConntrackDriver,
    ) -> None:
        self._settings = settings or Settings()
        self._transport_url = transport_url
        self._driver = driver
        self.hosts: Hosts | None = None
        self._last_move: dict[str, tuple[str, str]] = {}

    def start(self, lab: Lab) -> None:
        folder = lab.folder / "sami"
        folder.mkdir()
        hosts = Hosts(
            folder,
            tuple(lab.hosts),
            lambda name: self._driver(),
            settings=self._settings,
            scope_files={name: host.scope_file for name, host in lab.hosts.items()},
            transport_url=self._transport_url,
        )
        self.hosts = hosts.__enter__()

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        """What the lab says of a guest, as the host's hypervisor would."""
        assert self.hosts is not None
        source: str | None = None
        destination: str | None = None
        if phase == Phase.OUTGOING.value:
            assert guest.moves_to is not None
            destination = guest.moves_to.name
            self._last_move[guest.uuid] = (host.name, destination)
        elif phase == Phase.PREPARE.value:
            source = self._last_move[guest.uuid][0]
        self.hosts.agents[host.name].tell(MigrationEvent(guest.uuid, Phase(phase), source, destination))

    def result(self, guest: Guest) -> dict[str, dict[str, Any]]:
        assert self.hosts is not None
        there, here = (self.report(host, guest) for host in reversed(self._last_move[guest.uuid]))
        flows = {
            **{name: here["flows"][name] for name in ("exported", "purged")},
            **{name: there["flows"][name] for name in ("imported", "degraded", "refused", "verified")},
        }
        return {
            "flows": flows,
            "milliseconds": {**here["milliseconds"], **there["milliseconds"], **_cut_over(here, there)},
        }

    def report(self, host: str, guest: Guest) -> dict[str, Any]:
        """The report of the guest's last session on that host, once it has ended."""
        assert self.hosts is not None
        hosts = self.hosts
        wait_until(
            lambda: hosts.agents[host].wait_until_idle(0.1), f"the sessions of host {host} to end", REPORT_SECONDS
        )
        return hosts.reports(host, guest.uuid)[0]

    def stop(self) -> None:
        hosts, self.hosts = self.hosts, None
        if hosts is not None:
            hosts.__exit__(None, None, None)


def _cut_over(here: dict[str, Any], there: dict[str, Any]) -> dict[str, float]:
    """The hosts of a lab share a clock, so what begins on one and ends on the other can be measured too."""
    at = {(report["role"], step["step"]): step["monotonic"] for report in (here, there) for step in report["steps"]}
    suspended, applied = at.get(("source", "suspended")), at.get(("destination", "last changes applied"))
    if suspended is None or applied is None:
        return {}
    return {"suspended to last changes applied": round((applied - suspended) * 1000, 3)}
