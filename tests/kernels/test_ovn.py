"""OVN's own firewall in the kernel's datapath: a guest's connections die when it moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import traffic
from lab.deadline import wait_until
from lab.migration import Record
from lab.ovn import OvnGuest, OvnLab
from lab.traffic import Traffic
from lab.verdict import growth_times

pytestmark = [pytest.mark.usefixtures("kernel_lab"), pytest.mark.timeout(3000)]

BYTES_PER_SECOND = 20_000.0
WATCHED_SECONDS = 20.0
"""The peer sends again at 0.2, 0.6, 1.4, 3, 6.2 and 12.6 s, whenever the guest was stopped."""


@pytest.fixture(scope="module")
def lab(kernel_lab: None) -> Iterator[OvnLab]:
    with OvnLab() as made:
        # Of each host's first guest, for one: so that others have other zones here and there.
        for name in ("a", "b"):
            made.add_guest(f"stays-{name}", name)
        yield made


def total(flow: Traffic) -> int:
    return flow.samples()[-1].total


def grows(flow: Traffic) -> None:
    start = total(flow)
    wait_until(lambda: total(flow) > start + BYTES_PER_SECOND, f"{flow.name} to go on", 3, poll_seconds=0.1)


def downloads(lab: OvnLab, guest: OvnGuest) -> list[Traffic]:
    """The guest begins them, and then the outside alone speaks."""
    found = [traffic.download(lab, guest, family=family, rate=BYTES_PER_SECOND) for family in (4, 6)]  # type: ignore[arg-type]
    for one in found:
        grows(one)
    return found


def test_download_dies_without_sami_and_the_guest_can_begin_another(lab: OvnLab) -> None:
    guest = lab.add_guest("dies", "a")
    flows = downloads(lab, guest)
    record = lab.migrate(guest, "a", "b", copy_seconds=2)
    for flow in flows:
        wait_until(
            lambda flow=flow: flow.samples()[-1].time > record.cut_over_at + WATCHED_SECONDS,  # type: ignore[misc]
            "the time that is watched",
            WATCHED_SECONDS,
            poll_seconds=0.1,
        )
        assert not growths_after(flow, record)
        flow.stop()
    for flow in downloads(lab, guest):
        flow.stop()


def growths_after(flow: Traffic, record: Record) -> list[float]:
    return [at for at in growth_times(flow.samples()) if at > record.cut_over_at]
