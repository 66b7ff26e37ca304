"""libvirt's hook as it ships, under a real libvirt: when it is called, what it says, and what becomes of the guest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.deadline import wait_until
from lab.errors import CommandFailed
from lab.libvirt.guest import Guest
from lab.libvirt.host import LibvirtHost
from lab.libvirt.lab import LibvirtLab
from sami_plugin.errors import Veto
from sami_plugin.hooks.local_socket import LocalSocket
from sami_plugin.model.migration import MigrationEvent, Phase
from tests.libvirt.sequences import heeding_vetoes

pytestmark = [pytest.mark.xdist_group("libvirt"), pytest.mark.usefixtures("libvirt_here")]


@pytest.fixture(scope="module")
def bare_lab(libvirt_here: None) -> Iterator[LibvirtLab]:
    """Two hosts whose libvirtd found no hook when it started."""
    with LibvirtLab(has_hook=False) as lab:
        lab.add_guest("web", "a", is_awaited=False)
        yield lab


class Agents:
    """The sockets of both hosts' agents: what they are told, and how they answer."""

    def __init__(self, lab: LibvirtLab) -> None:
        self.told: list[tuple[str, MigrationEvent]] = []
        self.answer: Callable[[], None] = lambda: None
        self._sockets = []
        for host in lab.hosts.values():
            self._sockets.append(LocalSocket(host.path("/run/sami/agent.sock"), self._tell(host.name)))
            self._sockets[-1].start()

    def _tell(self, host: str) -> Callable[[MigrationEvent], None]:
        def tell(event: MigrationEvent) -> None:
            self.told.append((host, event))
            if event.phase is Phase.PREPARE:
                self.answer()

        return tell

    def words(self, host: LibvirtHost) -> list[str]:
        return [event.phase.value for name, event in self.told if name == host.name]

    def close(self) -> None:
        for listening in self._sockets:
            listening.stop()


@pytest.fixture
def agents(bare_lab: LibvirtLab) -> Iterator[Agents]:
    made = Agents(bare_lab)
    yield made
    made.close()


def sami(host: LibvirtHost, *arguments: str) -> str:
    return host.run([sys.executable, "-m", "sami_plugin.cmd.cli", *arguments])


def status(host: LibvirtHost) -> dict[str, Any]:
    shown = host.run(["sh", "-c", f"{sys.executable} -m sami_plugin.cmd.cli hook status -f json || true"])
    found: dict[str, Any] = json.loads(shown)
    return found


def ways(lab: LibvirtLab, guest: Guest) -> tuple[LibvirtHost, LibvirtHost]:
    source = lab.host_of(guest.name)
    (destination,) = (host for host in lab.hosts.values() if host is not source)
    return source, destination


def test_libvirt_calls_the_hook_once_it_has_looked_for_it_and_it_tells_both_agents(
    bare_lab: LibvirtLab, agents: Agents
) -> None:
    guest = bare_lab.guests["web"]
    for host in bare_lab.hosts.values():
        assert "libvirtd has to look for hooks again" in sami(host, "hook", "install")
    source, destination = ways(bare_lab, guest)
    assert bare_lab.migrate(guest, source.name, destination.name).is_ok
    assert agents.told == []  # libvirt found no hook when it started
    assert status(source)["told"] is None  # nobody here sees a reload
    for host in bare_lab.hosts.values():
        host.run(["kill", "-HUP", host.path("/run/libvirtd.pid").read_text().strip()])
    time.sleep(1)
    source, destination = destination, source
    assert bare_lab.migrate(guest, source.name, destination.name).is_ok
    assert agents.words(destination) == ["prepare", "started"]
    wait_until(lambda: agents.words(source) == ["stopped"], "the source's hook", 10)
    prepare, started = (event for name, event in agents.told if name == destination.name)
    assert prepare.role == started.role == "destination"
    assert prepare.domain is not None
    assert started.domain is not None
    assert f"<uuid>{prepare.guest}</uuid>" in prepare.domain
    assert "<target dev=" in started.domain  # where the tap's name comes from
    assert {event.guest for _, event in agents.told} == {prepare.guest}


def test_daemon_that_is_started_again_is_known_to_call_the_hook(bare_lab: LibvirtLab) -> None:
    for name in bare_lab.hosts:
        bare_lab.restart_libvirtd(name)
    for host in bare_lab.hosts.values():
        assert status(host)["told"] is True
        assert "libvirtd calls it from now on" in sami(host, "hook", "install")


def test_guest_moves_without_an_agent_and_against_one_that_hangs(bare_lab: LibvirtLab) -> None:
    guest = bare_lab.guests["web"]
    source, destination = ways(bare_lab, guest)
    assert bare_lab.migrate(guest, source.name, destination.name).is_ok
    made = Agents(bare_lab)
    made.answer = lambda: time.sleep(60)
    source, destination = destination, source
    done = bare_lab.migrate(guest, source.name, destination.name)
    assert done.is_ok
    assert 5.5 <= done.seconds < 20
    made.close()


def test_veto_fails_the_migration_with_its_reason_only_if_it_is_asked_for(bare_lab: LibvirtLab, agents: Agents) -> None:
    def refuse() -> None:
        raise Veto("4 of 6 flows have no place")

    agents.answer = refuse
    guest = bare_lab.guests["web"]
    source, destination = ways(bare_lab, guest)
    assert bare_lab.migrate(guest, source.name, destination.name).is_ok
    source, destination = destination, source
    agents.told.clear()
    with heeding_vetoes(destination):
        done = bare_lab.migrate(guest, source.name, destination.name)
    assert not done.is_ok
    assert "unexpected exit status 3: sami-agent refuses the migration: 4 of 6 flows have no place" in done.words
    assert bare_lab.state(guest, source.name).startswith("running")
    assert bare_lab.state(guest, destination.name) == ""
    assert agents.words(destination) == ["prepare"]


def test_removed_hook_is_called_no_more(bare_lab: LibvirtLab, agents: Agents) -> None:
    guest = bare_lab.guests["web"]
    for host in bare_lab.hosts.values():
        assert "removed" in sami(host, "hook", "remove")
    source, destination = ways(bare_lab, guest)
    assert bare_lab.migrate(guest, source.name, destination.name).is_ok
    assert agents.told == []
    with pytest.raises(CommandFailed):
        sami(destination, "hook", "status")
