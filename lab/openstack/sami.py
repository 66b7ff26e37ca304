"""SAMI on the compute hosts, as an operator puts it there (doc/source/user/nova.rst). Nothing else here knows SAMI.

`HostSami` is one host's: its agent, the hook in libvirt's folder, and the notification driver in Nova's environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.agents import AGENT
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import CommandFailed
from lab.libvirt.agents import HOOK, HostAgent
from lab.openstack import settings
from lab.openstack.compute import PLUGINS, ComputeHost
from lab.openstack.guest import Guest
from lab.openstack.lab import OpenStackLab
from sami_plugin.cmd import libvirt_hook

CLONE = Path(__file__).parents[2]
PACKAGE_FILES = ("LICENSE", "README.rst", "pyproject.toml", "requirements.txt", "setup.cfg", "setup.py")
END_SECONDS = 60.0
DRIVER = ("oslo_messaging_notifications", "driver = sami")
HOOK_SETTINGS = "sami/libvirt-hook.conf"


class HostSami:
    """SAMI on one compute host, once `install` has run; nova-compute takes notice when it is restarted."""

    def __init__(self, host: ComputeHost, broker: Broker, migration: Mapping[str, object]) -> None:
        """`migration` are options of the agent's group of that name."""
        self.host = host
        self.agent = HostAgent(host, broker, migration, policy={}, program=AGENT)

    def install(self, package: Path) -> None:
        """Blocks until the agent hears libvirt. `package` is of `build`."""
        shutil.copytree(package, self.host.path(PLUGINS), dirs_exist_ok=True)
        self._change_nova_conf(lambda words: settings.with_line(words, *DRIVER))
        hook_settings = self.host.etc / HOOK_SETTINGS
        hook_settings.parent.mkdir(exist_ok=True)
        hook_settings.write_text("veto = yes\n")  # the agent's policy decides
        self.agent.start()
        self.host.install_hook(libvirt_hook.__file__, HOOK)

    def remove(self) -> None:
        """Undo `install`."""
        self.host.remove_hook(HOOK)
        self.agent.stop()
        self._change_nova_conf(lambda words: settings.without_line(words, *DRIVER))
        shutil.rmtree(self.host.path(PLUGINS))
        self.host.path(PLUGINS).mkdir()

    def report(self, what: str) -> list[dict[str, str]]:
        """What `sami report` says here of a session, a guest, an address or a request. Raises CommandFailed."""
        words = [sys.executable, "-m", "sami_plugin.cmd.cli", "report", what, "-f", "json"]
        rows: list[dict[str, str]] = json.loads(
            self.host.run([*words, "--config-file", str(self.agent.configuration)], env=os.environ)
        )
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

    def _change_nova_conf(self, change: Callable[[str], str]) -> None:
        file = self.host.etc / "nova/nova.conf"
        file.write_text(change(file.read_text()))


class Sami:
    """A context manager: SAMI on all hosts of a lab. `hosts` and `agents` are by name."""

    def __init__(self, lab: OpenStackLab, **migration: object) -> None:
        """`migration` are options of the agents' group of that name."""
        self._lab = lab
        self.hosts = {name: HostSami(host, lab.broker, migration) for name, host in lab.hosts.items()}

    def __enter__(self) -> Sami:
        package = self._lab.folder / "sami-package"
        if not package.exists():
            build(package, self._lab.folder / "sami-source")
        with contextlib.ExitStack() as stack:
            for host in self.hosts.values():
                host.install(package)
                stack.callback(host.remove)
            self._lab.restart_nova_compute()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def agents(self) -> dict[str, HostAgent]:
        """By host."""
        return {name: host.agent for name, host in self.hosts.items()}

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within it no agent runs and no hook is installed; the notification driver finds nobody."""
        for host in self.hosts.values():
            host.host.remove_hook(HOOK)
            host.agent.stop()
        try:
            yield
        finally:
            for host in self.hosts.values():
                host.agent.start()
                host.host.install_hook(libvirt_hook.__file__, HOOK)

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


def build(target: Path, source: Path) -> None:
    """Install this clone's package into a folder, for Nova's Python, which has all that it needs there. `source` is a
    folder to build in. Raises CommandFailed."""
    source.mkdir()
    for file in PACKAGE_FILES:
        shutil.copy(CLONE / file, source)
    for folder in ("sami_plugin", "tempest_tests"):
        shutil.copytree(CLONE / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = os.environ | {"PBR_VERSION": metadata.version("sami_plugin"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment |= {"PIP_ROOT_USER_ACTION": "ignore"}
    done = subprocess.run(
        [*words, "--target", target, source], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CommandFailed([*words, "..."], done.returncode, done.stderr)
