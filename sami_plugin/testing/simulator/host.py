"""A simulated host: the shipped one with another clock, other threads and another network."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sami_plugin.agent import Agent
from sami_plugin.errors import SamiError
from sami_plugin.line import Line
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.refusals import Refusals
from sami_plugin.scopes.base import ScopeFinder
from sami_plugin.session import Host, Session
from sami_plugin.testing.simulator.checks import WALL
from sami_plugin.testing.simulator.firewall import GuardedDevice, SimulatedDriver
from sami_plugin.testing.simulator.guests import parsed
from sami_plugin.testing.simulator.journal import MemoryJournal
from sami_plugin.testing.simulator.network import Identity, SimulatedLine, SimulatedPeers

if TYPE_CHECKING:
    from sami_plugin.testing.simulator.world import World


class WorldsScopes(ScopeFinder):
    """Knows what the world knows of the ports of one host."""

    def __init__(self, world: World, host: str) -> None:
        self._world = world
        self._host = host

    def find(self, guest: str) -> tuple[Scope, ...]:
        known = self._world.guests.get(guest)
        if known is None:
            return ()
        return tuple(
            _scope(port.name, port.guest.id, port.zones[self._host], port.number, port.is_shared)
            for port in known.ports
            if self._host in port.zones
        )

    def neighbours(self, scope: Scope) -> Addresses:
        zone = scope.zones[ZoneRole.PORT]
        return tuple(
            address
            for guest in self._world.guests.values()
            for port in guest.ports
            if port.zones.get(self._host) == zone and port.name != scope.port
            for address in parsed(port.number)
        )

    def namespaces(self) -> tuple[str | None, ...]:
        return (None,)


@lru_cache(maxsize=64)  # asked for again and again
def _scope(port: str, guest: str, zone: int, number: int, is_shared: bool) -> Scope:
    return Scope(port, guest, {ZoneRole.PORT: zone}, parsed(number), is_shared=is_shared)


class QuietRefusals(Refusals):
    """Writes nothing."""

    def _write_soon(self) -> bool:
        return True


class _Seen(Future[Any]):
    """A look that was taken at once, or is taken when its answer is asked for."""

    def __init__(self, look: Callable[[], Any], *, at_once: bool) -> None:
        self._look: Callable[[], Any] | None = look
        self._answer: Any = None
        self._error: SamiError | None = None
        if at_once:
            self._take()

    def _take(self) -> None:
        if self._look is not None:
            look, self._look = self._look, None
            try:
                self._answer = look()
            except SamiError as error:
                self._error = error

    def done(self) -> bool:
        return self._look is None

    def result(self, timeout: float | None = None) -> Any:
        self._take()
        if self._error is not None:
            raise self._error
        return self._answer


class _Looker(Executor):
    def __init__(self, world: World) -> None:
        self._world = world

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return _Seen(lambda: fn(*args, **kwargs), at_once=self._world.random.random() < 0.7)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class SimulatedHost(Host):
    """One life of a host's agent: after a crash another one has the same device and journal."""

    def __init__(self, world: World, name: str, device: GuardedDevice, journal: MemoryJournal) -> None:
        super().__init__(
            name,
            world.settings,
            SimulatedDriver(world, name, device),
            WorldsScopes(world, name),
            journal,
            SimulatedPeers(name, world.network),
            QuietRefusals(name, journal),
            world.policies[name],
        )
        self.world = world
        self.device = device
        self.memory = journal
        self.identity = Identity(name, world.secrets[name], world.secrets, world.nonce)
        self.is_down = False
        self.live: list[Session] = []
        self.timers: dict[str, float] = {}
        self.busy: set[str] = set()
        """Sessions that are about to do something, a little later."""
        self.agent = Agent(self, world.hypervisor(name))

    def monotonic(self) -> float:
        return self.world.now

    def wall(self) -> float:
        return WALL + self.world.now

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.world.random.getrandbits(128), version=4))

    def run(self, session: Session) -> None:
        self.live.append(session)
        self.world.began(self, session)

    def looker(self, session: str) -> Executor:
        return _Looker(self.world)

    def line(self, session: str, *, caller: str = "") -> Line:
        return SimulatedLine(self, session, caller=caller)
