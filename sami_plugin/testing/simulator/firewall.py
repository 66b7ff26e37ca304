"""Firewalls that watch over what is done to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.memory import Entry, MemoryDevice, MemoryDriver, Place, Tuple
from sami_plugin.errors import DeviceFailed
from sami_plugin.model.flows import Batch, Omitted
from sami_plugin.model.results import Outcome, Results, came_out
from sami_plugin.model.scope import Scope
from sami_plugin.testing.simulator import checks

if TYPE_CHECKING:
    from sami_plugin.testing.simulator.world import World


class GuardedDevice(MemoryDevice):
    """A `MemoryDevice` that tells its world what sessions do to its entries."""

    def __init__(self, world: World, host: str, capacity: int | None) -> None:
        super().__init__(host, capacity=capacity, clock=lambda: world.now)
        self._world = world
        self.born: dict[int, float] = {}
        """By id, when an entry was made."""
        self.by_packets: set[int] = set()
        """Ids of entries that packets made while their guest was not here."""
        self.ran_out: dict[Tuple, list[float]] = {}
        """When entries of this tuple ran out here."""

    def create(self, place: Place, entry: Entry) -> None:
        super().create(place, entry)
        self.born[entry.flow_id] = self._world.now
        if self._world.acting is not None:
            self._world.guard.put_in(self, entry)

    def drop(self, place: Place, entry: Entry) -> None:
        super().drop(place, entry)
        if entry.expires <= self._world.now:
            self.ran_out.setdefault(entry.original, []).append(entry.expires)
        if self._world.acting is not None and entry.expires > self._world.now:
            self._world.guard.taken_out(self, place, entry)

    def find(self, zone: int, original: Tuple) -> Entry | None:
        """The entry of this tuple."""
        return self.zone((None, zone)).entries.get(original)

    def has_tuple(self, zone: int, name: Tuple) -> bool:
        """Whether a packet of this tuple finds an entry."""
        return name in self.zone((None, zone)).tuples

    def all_entries(self) -> Iterator[tuple[int, Entry]]:
        """With their zones."""
        for (_, zone), found in self._zones.items():
            for entry in found.entries.values():
                yield zone, entry


class SimulatedDriver(MemoryDriver):
    """As `MemoryDriver`; hosts crash in its midst, devices forget, and traffic goes on while it exports."""

    def __init__(self, world: World, host: str, device: GuardedDevice) -> None:
        super().__init__(device)
        self._world = world
        self._host = host
        self.guarded = device

    def _may_fail(self) -> None:
        """:raises DeviceFailed: this once."""
        world = self._world
        if world.mix.hiccups and world.random.random() < world.mix.hiccups:
            world.hinder(checks.FAILED)
            world.tell(self._host, "the firewall fails this once")
            raise DeviceFailed(f"{self._host}: no buffer space available")

    def renew(self, scope: Scope, batch: Batch) -> Results:
        self._may_fail()
        return super().renew(scope, batch)

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        self._may_fail()
        return super().read_back(scope, batch)

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        self._may_fail()
        for piece in super().export(scope):
            yield piece
            self._world.meanwhile(scope.guest)

    def insert(self, scope: Scope, batch: Batch) -> Results:
        self._world.may_crash(self._host, "before", "an insert")
        self._may_fail()
        made = super().insert(scope, batch)
        mix = self._world.mix
        if mix.forgetful_device and self._world.random.random() < mix.forgetful_device:
            self._forget(scope, batch, made)
        self._world.may_crash(self._host, "after", "an insert")
        return made

    def _forget(self, scope: Scope, batch: Batch, made: Results) -> None:
        positions = np.flatnonzero(came_out(made, Outcome.IMPORTED))
        if not len(positions):
            return
        place, entry = self._find(scope, batch, int(positions[0]))
        flow = None if entry is None else self._world.flows.get(entry.original)
        if place is not None and entry is not None and flow is not None and not flow.is_between_guests:
            self._world.tell(self._host, "the firewall forgets a flow that it took")
            self._world.hinder("a firewall forgot")
            acting, self._world.acting = self._world.acting, None
            self.device.drop(place, entry)
            self._world.acting = acting
            self._world.guard.forgive(flow)

    def remove(self, scope: Scope, identities: Batch) -> Results:
        self._world.may_crash(self._host, "before", "a removal")
        self._may_fail()
        made = super().remove(scope, identities)
        self._world.may_crash(self._host, "after", "a removal")
        return made
