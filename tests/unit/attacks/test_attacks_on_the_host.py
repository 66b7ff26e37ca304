"""Who is on the host, or has written what came with a guest. Each is tried without its defence too; see `trial`."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import netaddr
import pytest

from sami_plugin.errors import Malformed
from sami_plugin.hooks import domain_xml, local_socket
from sami_plugin.hooks.local_socket import LocalSocket
from sami_plugin.journal.journal import Journal
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


def as_nobody(act: Callable[[], object]) -> bool:
    """Whether this works for a user of the host who is nobody in particular."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(Exception):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            act()
            code = 0
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def says_that_a_guest_stopped(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        line.sendall(b'{"guest": "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4", "phase": "stopped"}\n')
        line.recv(100)


@pytest.mark.usefixtures("machine_root")
def test_user_of_the_host_who_tells_of_migrations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[MigrationEvent] = []
    mode = 0o600

    def attack() -> bool:
        told.clear()
        agent = LocalSocket(folder / "agent.sock", told.append, mode=mode)
        agent.start()
        as_nobody(lambda: says_that_a_guest_stopped(folder / "agent.sock"))
        agent.stop()
        return bool(told)

    def take_out() -> None:
        nonlocal mode
        mode = 0o666

    both(monkeypatch, attack, take_out)


@pytest.mark.usefixtures("machine_root")
def test_user_of_the_socket_s_group_who_is_not_meant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[MigrationEvent] = []

    def attack() -> bool:
        told.clear()
        agent = LocalSocket(folder / "agent.sock", told.append, mode=0o660, group=str(NOBODY), users=["daemon"])
        agent.start()
        as_nobody(lambda: says_that_a_guest_stopped(folder / "agent.sock"))
        agent.stop()
        return bool(told)

    both(monkeypatch, attack, lambda: monkeypatch.setattr(local_socket, "_user_of", lambda connection: 0))


@pytest.mark.usefixtures("machine_root")
def test_user_of_the_host_who_writes_into_the_journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "journal.sqlite"

    def write() -> None:
        with contextlib.closing(sqlite3.connect(path)) as journal, journal:
            journal.execute("UPDATE sessions SET outcome = 'moved'")

    def attack() -> bool:
        path.unlink(missing_ok=True)
        path.touch(0o666)  # as somebody else may have left it
        path.chmod(0o666)
        folder.chmod(0o777)
        journal = Journal(path)
        journal.begin("s", "g", "source", "host-b", "copying")
        done = as_nobody(write)
        journal.close()
        return done

    def take_out() -> None:
        def leave_it_open(file: int, mode: int) -> None:
            """As if nobody had looked."""

        monkeypatch.setattr(os, "fchmod", leave_it_open)

    both(monkeypatch, attack, take_out)
