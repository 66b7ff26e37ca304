"""Hosts in memory: real agents, decisions, codec and journal; firewalls and hypervisors that only pretend.

The agents talk through oslo.messaging's ``fake://`` transport, which delivers within the process.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from oslo_config import cfg

from sami_plugin.agent import Agent, Hypervisor
from sami_plugin.channel.identity import Credentials
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.journal.journal import Journal
from sami_plugin.model.domain import Domain
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings
from sami_plugin.scopes.static import StaticScopes
from sami_plugin.service import host_of
from sami_plugin.testing.certificates import Certificates


class Hosts:
    """Agents of some hosts in this process. A context manager: its threads end with it."""

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...],
        make_driver: Callable[[str], FlowDriver],
        *,
        settings: Settings | None = None,
        scope_files: dict[str, Path] | None = None,
        transport_url: str = "fake://",
        hypervisors: Mapping[str, Hypervisor] | None = None,
        domains: Mapping[str, Sequence[Domain]] | None = None,
        certificates: Mapping[str, Certificates] | None = None,
    ) -> None:
        """Without `hypervisors`, by host, the agents have nobody to ask and are told everything. `domains` are those
        that a host knows besides its own; `certificates` the authorities of hosts that are of others."""
        self._ports: dict[str, list[dict[str, object]]] = {name: [] for name in names}
        self._scope_files = scope_files or {name: folder / f"{name}-ports.json" for name in names}
        self.drivers = {name: make_driver(name) for name in names}
        self.agents: dict[str, Agent] = {}
        self.certificates = Certificates(folder / "certificates")

        def make(name: str) -> Agent:
            host = host_of(
                cfg.ConfigOpts(),
                name=name,
                driver=self.drivers[name],
                scopes=StaticScopes(self._scope_files[name]),
                journal=Journal(folder / f"{name}-journal.sqlite"),
                settings=settings or Settings(),
                credentials=Credentials(name, (certificates or {}).get(name, self.certificates).files(name)),
                transport_url=transport_url,
                domains=(domains or {}).get(name, ()),
            )
            return Agent(host, (hypervisors or {}).get(name))

        self._make = make
        for name in names:
            if scope_files is None:
                self._write(name)
            self.agents[name] = make(name)

    def kill(self, host: str) -> None:
        """The host's agent ends in the middle of whatever it does, and says nothing to anybody."""
        self.agents[host].stop()
        self.agents[host].host.journal.close()

    def start(self, host: str) -> None:
        """A new agent runs on the host, with the journal and the firewall that are there."""
        self.agents[host] = self._make(host)
        self.agents[host].start()

    def __enter__(self) -> Hosts:
        for agent in self.agents.values():
            agent.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with ThreadPoolExecutor() as pool:  # each takes half a second
            list(pool.map(Agent.stop, self.agents.values()))
        for agent in self.agents.values():
            agent.host.journal.close()

    def plug(self, host: str, guest: str, zone: int, *addresses: str, shared: bool = False, role: str = "port") -> None:
        """The guest's port is on the host from now on, or a router that tracks what is the port's."""
        self._ports[host].append(
            {
                "port": f"tap-{guest[:8]}-{zone}",
                "guest": guest,
                "zone": zone,
                "role": role,
                "shared": shared,
                "addresses": addresses,
            }
        )
        self._write(host)

    def unplug(self, host: str, guest: str) -> None:
        self._ports[host] = [port for port in self._ports[host] if port["guest"] != guest]
        self._write(host)

    def say(
        self, host: str, phase: Phase, guest: str, source: str | None = None, destination: str | None = None
    ) -> None:
        """The host's hypervisor says something of the guest. Of OUTGOING the destination is said by default, too: the
        next of the hosts."""
        if phase is Phase.OUTGOING and destination is None:
            names = [*self.agents, *self.agents]
            destination = names[names.index(host) + 1]
        self.agents[host].tell(MigrationEvent(guest, phase, source, destination))

    def scope(self, host: str, guest: str) -> Scope:
        """Where the guest's one port has its state on the host."""
        (found,) = self.agents[host].host.scopes.find(guest)
        return found

    def has_step(self, host: str, guest: str, step: str) -> bool:
        """Whether the newest session of the guest on the host has come to this step of its report."""
        sessions = [one for one in self.agents[host].sessions() if one.guest == guest]
        if sessions:
            return step in sessions[-1].report.steps
        reports = self.reports(host, guest)
        return bool(reports) and any(known["step"] == step for known in reports[0]["steps"])

    def reports(self, host: str, guest: str) -> list[dict[str, Any]]:
        """Reports of the ended sessions of a guest on a host, newest first."""
        journal = self.agents[host].host.journal
        rows = [row for row in journal.sessions() if row["guest"] == guest and row["report"]]
        return [json.loads(row["report"]) for row in rows]

    def _write(self, host: str) -> None:
        path = self._scope_files[host]
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"ports": self._ports[host]}))
        new.rename(path)


def new_guest() -> str:
    """A guest's UUID."""
    return str(uuid.uuid4())
