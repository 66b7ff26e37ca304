"""SAMI on the compute hosts, put there by the DevStack plugin's own phases. Nothing else here knows SAMI.

`HostSami` is one host's: its agent, the hook in libvirt's folder, and the notification driver in Nova's environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.agents import START_SECONDS, Agent
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import LabError
from lab.isolation import search_path
from lab.libvirt.agents import times_libvirt_was_heard
from lab.openstack import settings
from lab.openstack.compute import PLUGINS, ComputeHost
from lab.openstack.guest import Guest
from lab.openstack.lab import OpenStackLab

CLONE = Path(__file__).parents[2]
DEVSTACK = CLONE / "lab" / "devstack.sh"
SOURCE_FILES = ("LICENSE", "README.rst", "pyproject.toml", "requirements.txt", "setup.cfg", "setup.py")
SOURCE_FOLDERS = ("sami_plugin", "tempest_tests")
CONFIGURATION = "/etc/sami/sami-agent.conf"
NOVA_CONF = "nova/nova.conf"
SERVICE = "sami-agent"
END_SECONDS = 60.0


class StackedAgent(Agent):
    """The agent of one host, as DevStack runs it there."""

    def __init__(self, host: ComputeHost, devstack: Callable[..., str], folder: Path) -> None:
        """`devstack` runs phases on the host. `folder`, seen at the same path from here and there, is for its log and
        its journal: SQLite does not find what is reached through /proc."""
        super().__init__(
            host.name,
            host.path(CONFIGURATION),
            host.path("/run/sami/agent.sock"),
            folder / "journal.sqlite",
            folder / f"{SERVICE}.log",
        )
        self._host = host
        self._devstack = devstack
        self._pid = folder / f"{SERVICE}.pid"

    def start(self) -> None:
        """Blocks until the agent listens and hears its libvirt."""
        before = times_libvirt_was_heard(self.log)
        self._devstack("stack", "extra")
        self._wait_until(self.listens, "listen")
        self._wait_until(lambda: times_libvirt_was_heard(self.log) > before, "hear its libvirt")

    def stop(self, with_signal: int = signal.SIGTERM) -> None:
        """`start` may follow."""
        self._host.run(["kill", f"-{with_signal:d}", self._pid.read_text().strip()])
        wait_until(lambda: not self._runs(), f"agent {self.name} to end", END_SECONDS)

    def _runs(self) -> bool:
        return self._host.path(f"/proc/{self._pid.read_text().strip()}").exists()

    def _wait_until(self, has_begun: Callable[[], bool], what: str) -> None:
        def has_or_fails() -> bool:
            if not self._runs():
                raise LabError(f"agent {self.name} ended: {self.log.read_text()[-2000:]}")
            return has_begun()

        wait_until(has_or_fails, f"agent {self.name} to {what}", START_SECONDS)


class HostSami:
    """SAMI on one compute host, once `stack` has run; nova-compute takes notice when it is restarted."""

    def __init__(self, host: ComputeHost, broker: Broker, source: Path, migration: Mapping[str, object]) -> None:
        """`source` is what DevStack would clone, `migration` are options of the agent's group of that name."""
        folder = host.lab_folder / f"agent-{host.name}"
        self.host = host
        self.agent = StackedAgent(host, self._devstack, folder)
        self._migration = migration
        self._nova_conf = (host.etc / NOVA_CONF).read_text()
        self._local_conf = {
            "DATA_DIR": str(host.lab_folder / "devstack"),
            "DEST": str(source.parent),
            "NOVA_CONF": f"/etc/{NOVA_CONF}",
            "NOVA_PYTHON": PLUGINS,
            "PYTHON_BIN": str(Path(sys.executable).parent),
            "Q_AGENT": "linuxbridge",
            "RABBIT_URL": broker.url,
            "RUN": str(folder),
            "SAMI_DIR": str(source),
            "SAMI_HOST": host.name,
            "SAMI_STATE_DIR": str(folder),
            "SAMI_VETO": "yes",  # the agent's policy decides
            "STACK_USER": "root",
            # pip is to build what lies there, without git and without a look at the network.
            "PBR_VERSION": metadata.version("sami_plugin"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }

    def install(self) -> None:
        """What `stack` needs once."""
        self._devstack("stack", "install")

    def stack(self) -> None:
        """Blocks until the agent hears libvirt."""
        (self.host.etc / NOVA_CONF).write_text(self._nova_conf)  # devstack makes it anew each time
        self._devstack("stack", "post-config")
        options = "".join(f"{name} = {value}\n" for name, value in self._migration.items())
        with self.agent.configuration.open("a") as file:
            file.write(f"\n[migration]\n{options}")
        self.agent.start()

    def unstack(self) -> None:
        """No agent runs and no hook is installed."""
        self._devstack("unstack")

    def clean(self) -> None:
        """Undo `install` and `stack`, after `unstack`."""
        self._devstack("clean")
        (self.host.etc / NOVA_CONF).write_text(self._nova_conf)
        shutil.rmtree(self.host.path(PLUGINS))
        self.host.path(PLUGINS).mkdir()

    def report(self, what: str) -> list[dict[str, str]]:
        """What `sami report` says here of a session, a guest, an address or a request. Raises CommandFailed."""
        words = [sys.executable, "-m", "sami_plugin.cmd.cli", "report", what, "-f", "json"]
        rows: list[dict[str, str]] = json.loads(self.host.run([*words, "--config-file", CONFIGURATION], env=os.environ))
        return rows

    @contextlib.contextmanager
    def policy(self, line: str) -> Iterator[None]:
        """Within it the agent runs with this line in its group [policy]."""
        self._reconfigure(settings.with_line, line)
        try:
            yield
        finally:
            self._reconfigure(settings.without_line, line)

    def _reconfigure(self, change: Callable[[str, str, str], str], line: str) -> None:
        file = self.agent.configuration
        self.agent.stop()
        file.write_text(change(file.read_text(), "policy", line))
        self.agent.start()

    def _devstack(self, *words: str) -> str:
        return self.host.run([DEVSTACK, *words], env=os.environ | self._local_conf | {"PATH": search_path()})


class Sami:
    """A context manager: SAMI on all hosts of a lab. `hosts` and `agents` are by name."""

    def __init__(self, lab: OpenStackLab, **migration: object) -> None:
        """`migration` are options of the agents' group of that name."""
        self._lab = lab
        source = _source(lab.folder / "sami_plugin")
        self.hosts = {name: HostSami(host, lab.broker, source, migration) for name, host in lab.hosts.items()}

    def __enter__(self) -> Sami:
        with contextlib.ExitStack() as stack:
            for host in self.hosts.values():
                stack.callback(host.clean)
                host.install()
                stack.callback(host.unstack)
                host.stack()
            self._lab.restart_nova_compute()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def agents(self) -> dict[str, StackedAgent]:
        """By host."""
        return {name: host.agent for name, host in self.hosts.items()}

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within it no agent runs and no hook is installed; the notification driver finds nobody."""
        for host in self.hosts.values():
            host.unstack()
        try:
            yield
        finally:
            for host in self.hosts.values():
                host.stack()

    def reports(self, guest: Guest, count: int = 1) -> dict[str, dict[str, Any]]:
        """The newest report of each host, once each has had so many sessions of the guest and they have ended."""
        for agent in self.agents.values():
            wait_until(
                lambda agent=agent: agent.ended(guest.uuid) >= count,  # type: ignore[misc]
                f"agent {agent.name} to end its session; it said:\n{self.words()}",
                END_SECONDS,
                poll_seconds=0.1,
            )
        return {name: agent.reports(guest.uuid)[0] for name, agent in self.agents.items()}

    def words(self) -> str:
        """The end of every agent's log, for the message of a test that failed."""
        return "\n".join(agent.log.read_text()[-4000:] for agent in self.agents.values())


def _source(folder: Path) -> Path:
    """The package's source in that folder, as a clone would be there: pip builds beside it."""
    folder.mkdir()
    for file in SOURCE_FILES:
        shutil.copy(CLONE / file, folder)
    for name in SOURCE_FOLDERS:
        shutil.copytree(CLONE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
