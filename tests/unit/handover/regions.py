"""Two domains in memory: guests of host-a in the west come to host-b in the east, and have other addresses there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.model.address_map import AddressMap
from sami_plugin.model.domain import Domain
from sami_plugin.model.migration import Phase
from sami_plugin.model.settings import Settings
from sami_plugin.testing.certificates import Certificates
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import SETTINGS, ZONES, wait_for_step

WEST_ADDRESS, EAST_ADDRESS = "192.0.2.7", "203.0.113.7"
WEST, EAST = "192.0.2.0/24", "203.0.113.0/24"


@contextmanager
def regions(
    folder: Path,
    *,
    west: dict[str, Any] | None = None,
    east: dict[str, Any] | None = None,
    settings: Settings = SETTINGS,
) -> Iterator[tuple[Hosts, Certificates]]:
    """The hosts, and the authority of the west. `west` is what the east says of the west besides, `east` the other."""
    authority = Certificates(folder / "west")
    own = Certificates(folder / "certificates")  # those of Hosts, which are of the east here
    a, b = authority.files("host-a"), own.files("host-b")
    of_west = Domain(
        name="west",
        hosts=("host-a", "*.west.example"),
        credentials=replace(b, authorities=a.authorities, revoked=a.revoked),
        address_map=AddressMap.parse([f"{WEST}={EAST}"]),
        peers_follow=True,
    )
    of_east = Domain(
        name="east",
        hosts=("host-b", "host-c"),
        credentials=replace(a, authorities=b.authorities, revoked=b.revoked),
        address_map=AddressMap.parse([f"{EAST}={WEST}"]),
        peers_follow=True,
    )
    with Hosts(
        folder,
        tuple(ZONES),
        lambda name: MemoryDriver(MemoryDevice(name)),
        settings=settings,
        domains={"host-a": [replace(of_east, **east or {})], "host-b": [replace(of_west, **west or {})]},
        certificates={"host-a": authority},
    ) as made:
        yield made, authority


def goes_east(hosts: Hosts, guest: str, *addresses: str) -> None:
    """Until all that the west has is in the east, where the guest has these addresses, or just its own."""
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], *(addresses or [EAST_ADDRESS]))
    hosts.say("host-b", Phase.STARTED, guest)
    wait_for_step(hosts, "host-b", guest, "in sync")
