"""Several guests leave a host at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from lab.openstack import traffic
from lab.openstack.content import MEMORY_MIB
from lab.openstack.lab import OpenStackLab
from lab.openstack.sami import Sami
from tests.nova.case import HOLD_SECONDS, Case

pytestmark = [pytest.mark.usefixtures("openstack_here"), pytest.mark.timeout(1800)]

MOST = 10
# Of a guest: its memory twice while it moves, and the two QEMUs' own.
MIB_OF_A_GUEST = 2 * (MEMORY_MIB + 100)
RESERVE_MIB = 2000


def count() -> int:
    """How many guests the machine's memory permits."""
    with open("/proc/meminfo") as file:
        free_kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return max(2, min(MOST, (free_kib // 1024 - RESERVE_MIB) // MIB_OF_A_GUEST))


def test_many_guests_leave_a_host_at_once(
    lab: OpenStackLab, sami: Sami, record_property: Callable[[str, object], None]
) -> None:
    guests = [lab.add_guest(f"many-{number}", "a", is_awaited=False) for number in range(count())]
    for guest in guests:
        guest.wait_until_ready()
    cases = [Case(lab, sami, guest, traffic.download(lab, guest)) for guest in guests]
    with lab.hosts["b"].held(HOLD_SECONDS):
        began_at = time.monotonic()
        migrations = [case.start() for case in cases]
        results = [migration.wait(900) for migration in migrations]
        ended_at = time.monotonic()
    assert [result.status for result in results] == ["completed"] * len(guests)
    for case, migration in zip(cases, migrations, strict=True):
        case.has_moved(migration)
    record_property("guests", len(guests))
    record_property("seconds", round(ended_at - began_at, 1))
    for guest in guests:
        lab.remove_guest(guest)
