"""Who wanted what he may not have is counted, and named in the log once for each reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import JournalError, NotAuthorised
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import SETTINGS, ZONES, guest_with_flows
from tests.unit.handover.stranger import Stranger


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(MemoryDevice(name)), settings=SETTINGS) as made:
        yield made


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
    (row,) = hosts.agents["host-a"].host.journal.refusals()
    assert (row["who"], row["count"]) == ("host-x", 3)
    assert row["reason"] == f"NotAuthorised: {guest} moves to host-b, not to host-x"
    assert caplog.text.count("host-x was refused: NotAuthorised") == 1


def test_refusal_is_in_the_log_where_it_cannot_be_counted(
    hosts: Hosts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = hosts.agents["host-a"].host

    def full(who: str, reason: str) -> None:
        raise JournalError("the disk is full")

    monkeypatch.setattr(host.journal, "count_refusal", full)
    host.refuse("host-x", NotAuthorised("no"))
    assert "host-x was refused: NotAuthorised: no" in caplog.text
    assert "the disk is full" in caplog.text
