"""Who wanted what he may not have is counted, and named in the log once for each reason."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sami_plugin.channel import tls
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import SamiError
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.packet import Packet
from sami_plugin.model.settings import Bounds
from sami_plugin.refusals import STRANGER
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import SETTINGS, ZONES, guest_with_flows, until
from tests.unit.handover.stranger import Stranger


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(MemoryDevice(name)), settings=SETTINGS) as made:
        yield made


class Asked:
    """A hypervisor whose guests are all on their way, and that describes none."""

    def is_leaving(self, guest: str) -> bool:
        return True

    def is_here(self, guest: str) -> bool:
        return False

    def description(self, guest: str) -> str | None:
        return None

    def mark(self, guest: str) -> None:
        pass


def test_host_that_asks_for_another_s_guest_does_not_end_what_is_known_of_its_job(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    hosts.agents["host-a"]._hypervisor = Asked()
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING, None, "host-b"))
    with Stranger(hosts, "host-x") as stranger:
        stranger.ask("host-a", guest)
        assert stranger.is_refused() == f"{guest} moves to host-b, not to host-x"


def test_host_that_asks_for_another_s_guest_is_counted_and_named_once(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    guest = guest_with_flows(hosts)
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING, None, "host-b"))
    with Stranger(hosts, "host-x") as stranger:
        for _ in range(3):
            stranger.ask("host-a", guest)
            stranger.is_refused()
            stranger.heard.clear()
    hosts.agents["host-a"].host.refusals.write()
    (row,) = hosts.agents["host-a"].host.journal.refusals()
    assert (row["who"], row["count"]) == ("host-x", 3)
    assert row["reason"] == f"NotAuthorised: {guest} moves to host-b, not to host-x"
    assert caplog.text.count("host-x was refused: NotAuthorised") == 1


def test_who_has_not_shown_who_he_is_is_counted_as_nobody_whatever_he_calls_himself(hosts: Hosts) -> None:
    agent = hosts.agents["host-a"]
    for number in range(50):
        for session in ("no UUID", str(uuid.uuid4())):
            with contextlib.suppress(SamiError):
                agent.deliver(f"host-{number}", session, Packet(0, 0, b"no TLS"))
    agent.host.refusals.write()
    (row,) = agent.host.journal.refusals()
    assert (row["who"], row["reason"], row["count"]) == (STRANGER, "IllegalMessage: a session is a UUID", 50)


def test_one_call_has_no_more_handshakes_than_streams(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = tls._Stream.__init__

    def init(self: Any, number: int, *more: Any) -> None:
        made.append(number)
        real(self, number, *more)

    monkeypatch.setattr(tls._Stream, "__init__", init)
    session = str(uuid.uuid4())
    for number in range(200):
        with contextlib.suppress(SamiError):
            hosts.agents["host-a"].deliver("host-b", session, Packet(number % 5, 0, b"no TLS"))
    assert len(made) <= Bounds().streams


def test_forged_packet_does_not_make_two_hosts_refuse_each_other_without_end(hosts: Hosts) -> None:
    calls: list[Packet] = []
    for host in ("host-a", "host-b"):
        transport = hosts.agents[host].host.peers.way_to("host-b").transport
        real = transport.call

        def call(peer: str, session: str, packet: Packet, seconds: float, real: Any = real) -> str:
            calls.append(packet)
            return str(real(peer, session, packet, seconds))

        transport.call = call  # type: ignore[method-assign]
    with contextlib.suppress(SamiError):
        hosts.agents["host-a"].deliver("host-b", str(uuid.uuid4()), Packet(0, 0, b"no TLS"))
    until(lambda: calls)
    time.sleep(0.5)  # in which there were hundreds
    assert len(calls) < 10
