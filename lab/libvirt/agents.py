"""SAMI on the lab's hosts as an operator puts it there: the agent inside of the host, its hook in libvirt's folder.

A broker of the world stands between the agents; each host reaches it on its own loopback.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from lab.agents import AGENT, START_SECONDS, AgentProcess
from lab.broker import Broker
from lab.deadline import wait_until
from lab.libvirt.guest import Guest
from lab.libvirt.host import LibvirtHost
from lab.libvirt.lab import LibvirtLab
from lab.libvirt.relay import Relay
from sami_plugin.cmd import libvirt_hook

SOCKET = "/run/sami/agent.sock"
HOOK = "50-sami"
END_SECONDS = 30.0
HEARS_LIBVIRT = "tells of migrations from now on"


def times_libvirt_was_heard(log: Path) -> int:
    """How often an agent with this log has begun to hear its libvirt."""
    return log.read_text().count(HEARS_LIBVIRT) if log.exists() else 0


class HostAgent(AgentProcess):
    """The agent of one host. Its socket, journal and log are seen at the same path from the world and in the host."""

    def __init__(
        self,
        host: LibvirtHost,
        broker: Broker,
        migration: Mapping[str, object],
        policy: Mapping[str, object],
        program: Sequence[str],
    ) -> None:
        options: dict[str, Mapping[str, object]] = {
            "DEFAULT": {"transport_url": broker.url},
            "agent": {"scopes": "bridge_iptables", "socket": SOCKET},
            "libvirt": {"uri": "qemu:///system"},
            "migration": migration,
            "policy": policy,
        }
        super().__init__(host.lab_folder, host.name, options, start=self._start_in_host, program=program)
        self._host = host
        self._words: list[str] = []
        self.socket = host.path(SOCKET)

    @property
    def pid(self) -> int:
        """Of the agent itself: what was started is the way into the host."""
        outer = super().pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def start(self) -> None:
        """Blocks until the agent listens and hears its libvirt."""
        before = times_libvirt_was_heard(self.log)
        super().start()
        wait_until(
            lambda: times_libvirt_was_heard(self.log) > before, f"agent {self.name} to hear its libvirt", START_SECONDS
        )

    @contextlib.contextmanager
    def behind(self, *words: str) -> Iterator[None]:
        """Within it the agent runs as the last argument of this command, which ends in it."""
        self.stop()
        self._words = list(words)
        try:
            self.start()
            yield
        finally:
            self.stop()
            self._words = []
            self.start()

    def _start_in_host(self, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return self._host.start([*self._words, *argv], **options)


class Sami:
    """A context manager: agents and hooks on these hosts of a lab, or on all. `agents` and `relays` are by host."""

    def __init__(
        self,
        lab: LibvirtLab,
        broker: Broker,
        hosts: Iterable[str] | None = None,
        program: Sequence[str] = AGENT,
        policy: Mapping[str, object] = MappingProxyType({}),
        **migration: object,
    ) -> None:
        """`policy` and `migration` are options of the groups of these names; `program` is what is run as the agent."""
        self._program = program
        self._policy = policy
        self._lab = lab
        self._broker = broker
        self._names = list(lab.hosts) if hosts is None else list(hosts)
        self._migration = migration
        self.agents: dict[str, HostAgent] = {}
        self.relays: dict[str, Relay] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Sami:
        with contextlib.ExitStack() as stack:
            for name in self._names:
                host = self._lab.hosts[name]
                self.relays[name] = host.relay(self._broker.port)
                stack.callback(self.relays[name].cut)
                self.agents[name] = stack.enter_context(
                    HostAgent(host, self._broker, self._migration, self._policy, self._program)
                )
                host.install_hook(libvirt_hook.__file__, HOOK)
                stack.callback(host.remove_hook, HOOK)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within it no agent runs and no hook is installed: libvirt as it is without SAMI."""
        for name, agent in self.agents.items():
            self._lab.hosts[name].remove_hook(HOOK)
            agent.stop()
        try:
            yield
        finally:
            for name, agent in self.agents.items():
                agent.start()
                self._lab.hosts[name].install_hook(libvirt_hook.__file__, HOOK)

    def reports(self, guest: Guest, count: int = 1) -> dict[str, dict[str, Any]]:
        """The newest report of each host, once each has had so many sessions of the guest and they have ended."""
        for agent in self.agents.values():
            wait_until(
                lambda agent=agent: agent.ended(guest.uuid) >= count,  # type: ignore[misc]
                f"agent {agent.name} to end its session; it said:\n{self.words()}",
                END_SECONDS,
            )
        return {name: agent.reports(guest.uuid)[0] for name, agent in self.agents.items()}

    def words(self) -> str:
        """The end of every agent's log, for the message of a test that failed."""
        return "\n".join(agent.log.read_text()[-4000:] for agent in self.agents.values())
