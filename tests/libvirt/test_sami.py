"""SAMI beside real libvirt: real agents, hooks and RabbitMQ, and guests that move."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lab.broker import Broker
from lab.deadline import wait_until
from lab.libvirt import traffic
from lab.libvirt.agents import Sami
from lab.libvirt.guest import Guest
from lab.libvirt.lab import LibvirtLab
from lab.traffic import Traffic
from lab.verdict import has_survived

pytestmark = pytest.mark.usefixtures("libvirt_here")

WATCHED_SECONDS = 6.0


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def sami(lab: LibvirtLab, broker: Broker) -> Iterator[Sami]:
    with Sami(lab, broker) as running:
        yield running


def flowing_download(lab: LibvirtLab, guest: Guest) -> Traffic:
    """A download that the guest began, of which no rule admits a packet: only its entry does."""
    flow = traffic.download(lab, guest)
    guest.close_egress()
    return flow


def lives(flow: Traffic, since: float) -> bool:
    wait_until(lambda: flow.samples()[-1].time > since + WATCHED_SECONDS, "the time that is watched", 30)
    return has_survived(flow.samples(), since, WATCHED_SECONDS)


def test_a_download_lives_through_a_migration(lab: LibvirtLab, sami: Sami) -> None:
    guest = lab.add_guest("one", "a")
    flow = flowing_download(lab, guest)
    began = time.monotonic()
    result = lab.migrate(guest, "a", "b")
    assert result.is_ok, result.words
    arrived = lab.journal.wait_for("RESUMED/MIGRATED", "one", "b", began).time
    assert lives(flow, arrived), sami.words()
    reports = sami.reports(guest)
    print(reports)
    assert [reports[name]["outcome"] for name in "ab"] == ["moved", "moved"], sami.words()
