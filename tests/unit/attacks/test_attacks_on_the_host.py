"""Who is on the host, or has written what came with a guest. Each is tried without its defence too; see `trial`."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import netaddr
import pytest

from sami_plugin.errors import Malformed
from sami_plugin.hooks import domain_xml, local_socket
from sami_plugin.hooks.local_socket import LocalSocket
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.migration import MigrationEvent
from sami_plugin.scopes.learned import LearnedScopes
from sami_plugin.scopes.rules import Knowledge
from sami_plugin.testing.hosts import new_guest
from tests.unit.attacks.trial import both

NOBODY = 65534


class SharedZone(LearnedScopes):
    """Two devices of one zone, of which this host knows no address."""

    def _look(self) -> Knowledge:
        both_devices = frozenset({"tap-x", "tap-y"})
        zones = dict.fromkeys(both_devices, frozenset({7}))
        return Knowledge(zones=zones, users={7: both_devices}, present=both_devices)


def test_address_that_only_the_guest_s_description_names(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = netaddr.IPAddress("192.0.2.99")

    def attack() -> bool:
        scopes = SharedZone()
        guest = new_guest()
        scopes.learn(guest, (GuestPort("tap-x", claimed=(foreign,)),))
        return any(foreign in scope.addresses for scope in scopes.find(guest))

    def take_out() -> None:
        real = SharedZone.__init__
        monkeypatch.setattr(SharedZone, "__init__", lambda self: real(self, trust_guest_xml=True))

    both(monkeypatch, attack, take_out)


HOSTILE = (
    "<!DOCTYPE domain [<!ENTITY a 'aaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]>"
    "<domain><uuid>6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4</uuid><name>&b;</name></domain>"
)


def test_description_whose_entities_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    def attack() -> bool:
        try:
            return len(domain_xml._domain(HOSTILE).findtext("name", "")) > 60
        except Malformed:
            return False

    both(monkeypatch, attack, lambda: monkeypatch.setattr(domain_xml, "_domain", ElementTree.fromstring))


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that others may enter."""
    with tempfile.TemporaryDirectory(dir="/run") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.usefixtures("machine_root")
def test_user_of_the_host_who_tells_of_migrations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[MigrationEvent] = []

    def attack() -> bool:
        told.clear()
        path = folder / "agent.sock"
        agent = LocalSocket(path, told.append)
        agent.start()
        child = os.fork()
        if not child:
            with contextlib.suppress(OSError):
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                with socket.socket(socket.AF_UNIX) as line:
                    line.connect(str(path))
                    line.sendall(b'{"guest": "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4", "phase": "stopped"}\n')
                    line.recv(100)
            os._exit(0)
        os.waitpid(child, 0)
        agent.stop()
        return bool(told)

    def take_out() -> None:
        real = local_socket.LocalSocket.__init__
        monkeypatch.setattr(
            local_socket.LocalSocket, "__init__", lambda self, path, tell: real(self, path, tell, mode=0o666)
        )

    both(monkeypatch, attack, take_out)
