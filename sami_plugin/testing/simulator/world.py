"""One run: hosts, guests, firewalls, a network and everything that happens to them, in virtual time, from one seed."""

from __future__ import annotations

import heapq
import logging
import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, TypeVar

from sami_plugin.drivers.memory import Tuple
from sami_plugin.errors import SamiError
from sami_plugin.migration.decision import Event
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.settings import Limits, Settings
from sami_plugin.policies.base import Policy
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator, Partial, Proceed, Refuse
from sami_plugin.session import Session
from sami_plugin.testing.simulator import checks
from sami_plugin.testing.simulator.firewall import GuardedDevice
from sami_plugin.testing.simulator.guests import Flow, Guest, Port
from sami_plugin.testing.simulator.host import SimulatedHost
from sami_plugin.testing.simulator.hypervisor import Script, SimulatedHypervisor, life, poll, settle
from sami_plugin.testing.simulator.journal import MemoryJournal
from sami_plugin.testing.simulator.mix import drawn
from sami_plugin.testing.simulator.network import Network, kind_of
from sami_plugin.testing.simulator.story import Story
from sami_plugin.testing.simulator.stranger import Stranger
from sami_plugin.testing.simulator.traffic import Traffic

LIMITS = Limits(
    delta_seconds=1.0,
    resync_seconds=4.0,
    hold_seconds=6,
    open_seconds=4.0,
    zone_seconds=1.5,
    arrival_seconds=8.0,
    watch_seconds=1.0,
    session_seconds=40.0,
    verdict_seconds=2.0,
    ask_seconds=2.0,
    reservation_seconds=10.0,
)
SETTINGS = Settings(LIMITS, batch_flows=3, call_seconds=1.0, message_seconds=15.0, started_seconds=1.0)
LIFETIME_SECONDS = (
    LIMITS.open_seconds + LIMITS.session_seconds + LIMITS.arrival_seconds + LIMITS.watch_seconds + LIMITS.zone_seconds
)
"""What a session can take at the very most."""
SLACK_SECONDS = 30.0
AFTERWARDS_SECONDS = 2.0
"""What is still under way when the last session is over may arrive."""
MOST_SECONDS = 600.0
"""Of a run: what happens then is a loop."""

POLICIES: tuple[type[Policy], ...] = (Partial, Refuse, AskOperator)
HOOKED = (Phase.PREPARE, Phase.STARTED, Phase.STOPPED)

T = TypeVar("T")

LOG = logging.getLogger("sami_plugin")


class Crash(BaseException):
    """The host's agent ends in the midst of what it does."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken, and by what."""

    promise: str
    what: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.what}"


class _Errors(logging.Handler):
    """Whatever the code under test logs as an error that nobody raised on purpose."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.world: World | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if self.world is not None and error is not None and not isinstance(error, SamiError):
            self.world.violated(checks.NO_MISTAKE, f"{record.getMessage()}: {type(error).__name__}: {error}")


_ERRORS = _Errors()


@contextmanager
def attentive() -> Iterator[None]:
    """What the code under test logs goes to the world that runs, and nowhere else. May be entered again within."""
    if _ERRORS in LOG.handlers:
        yield
        return
    LOG.addHandler(_ERRORS)
    was, LOG.propagate = (LOG.propagate, LOG.level), False
    LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOG.removeHandler(_ERRORS)
        LOG.propagate = was[0]
        LOG.setLevel(was[1])


class World:
    """One run."""

    def __init__(self, seed: int, *, tells: bool = True, **fixed: Any) -> None:
        """Without `tells` there is no story, and the run takes less time.

        `fixed` fields of the mix are as they are given, whatever the seed would make of them.
        """
        self.seed = seed
        self.random = Random(seed)
        self.mix = drawn(self.random, **fixed)
        self.settings = SETTINGS
        self.now = 0.0
        self.violations: list[Violation] = []
        self.hindrances: dict[str, None] = {}
        """What happened that may keep flows from being carried."""
        self.unheard: set[tuple[str, str]] = set()
        """Hosts and guests of which something was said while the host's agent was down."""
        self.resumed: dict[tuple[str | None, str], list[float]] = {}
        """By host and guest, when it was said that the guest runs there."""
        self.stopped: dict[tuple[str, str], list[float]] = {}
        """By host and guest, when the host's agent was told that the guest is not there any more."""
        self.acting: tuple[SimulatedHost, Session] | None = None
        """Whose session does something."""
        self.names = [f"host-{letter}" for letter in "abc"[: self.mix.hosts]]
        self.away: dict[str, list[tuple[float, float]]] = {name: [] for name in self.names}
        """By host, from when to when no agent was there."""
        self.story = Story(self.names)
        self._tells = tells
        self.is_described = self.random.random() < self.mix.is_described
        self.is_asked = self.is_described or self.random.random() < 0.4 or bool(self.mix.crash)
        """Whether agents have a hypervisor to ask, as one that is started anew has to; else all is told to them."""
        self.polls = self.is_asked and self.random.random() < self.mix.polls
        self.words_seconds = self.mix.late_words
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._occurrences = 0
        self._words: dict[tuple[str, str], float] = {}
        self.secrets = {name: self.random.randbytes(8) for name in [*self.names, "host-x"]}
        self.network = Network(self)
        self.stranger = Stranger(self)
        self.traffic = Traffic(self)
        self.guests: dict[str, Guest] = {}
        self.flows: dict[Tuple, Flow] = {}
        self.devices = {name: GuardedDevice(self, name, self.mix.capacity) for name in self.names}
        self.journals = {
            name: MemoryJournal(lambda: checks.WALL + self.now, partial(self.may_crash, name)) for name in self.names
        }
        self.hosts: dict[str, SimulatedHost] = {}
        self.started: list[SimulatedHost] = []
        """Each life of an agent."""
        self.policies = {
            name: Policies(self.random.choice(POLICIES)() if self.random.random() < self.mix.policy else Proceed())
            for name in self.names
        }
        self.old = {name for name in self.names if self.random.random() < self.mix.old_version}
        """Hosts that understand version 1 alone."""
        self.sessions: list[tuple[SimulatedHost, Session]] = []
        self.ends: dict[tuple[str, str], float] = {}
        self.said: dict[tuple[str, str], list[bytes]] = {}
        self.kinds_said: dict[tuple[str, str], set[str]] = {}
        self._heard: dict[tuple[str, str], int] = {}
        self.guard = checks.Guard(self)
        self._scripts = 0
        self._may_end_at = 0.0
        self._crash_in = {
            name: self.random.randint(1, 60) if self.mix.crash and self.random.random() < self.mix.crash else 0
            for name in self.names
        }
        """By host, at how many more places it could crash before it does; 0 is never."""

    # What a run is.

    def run(self) -> list[Violation]:
        """All that happens, and what was violated by it."""
        _ERRORS.world = self
        with attentive():
            self._begin()
            self._go_on()
            checks.final(self)
        return self.violations

    def dissolve(self) -> None:
        """Lets go of all that it was made of: what holds itself in circles has to be swept up else."""
        for _, session in self.sessions:
            vars(session.line).clear()
            vars(session).clear()
        for host in self.started:
            vars(host.agent).clear()
            vars(host).clear()
        self.network.endpoints.clear()
        for guest in self.guests.values():
            guest.ports, guest.flows = [], []
        vars(self).clear()

    def _begin(self) -> None:
        mix, random = self.mix, self.random
        for name in self.names:
            self._start(name)
        number = 0
        zones = {name: 1000 * position for position, name in enumerate(self.names, 1)}
        self._next_zone = {name: zone + 1 for name, zone in zones.items()}
        self._shared_zone = {name: zone + 999 for name, zone in zones.items()}
        shared: list[tuple[str, Port]] = []
        for count in range(mix.guests + mix.residents):
            guest = Guest(self.new_uuid(), f"guest-{count + 1}", random.choice(self.names))
            self.guests[guest.id] = guest
            assert guest.place is not None
            self.give_token(guest)
            guest.visited.add(guest.place)
            is_resident = count >= mix.guests
            for _ in range(1 if is_resident else mix.ports):
                port = Port(guest, number, is_resident or random.random() < mix.is_shared)
                number += 1
                guest.ports.append(port)
                self.plug(port, guest.place)
                for _ in range(random.randint(0, mix.flows)):
                    self.traffic.begin(port, guest.place)
                for place, other in shared:
                    if port.is_shared and place == guest.place and other.guest is not guest:
                        self.traffic.between(port, other, guest.place)
                if port.is_shared:
                    shared.append((guest.place, port))
            if not is_resident:
                self.play(life(self, guest, mix.moves))
        for name in self.names:
            for _ in range(random.randint(0, mix.foreign)):
                self.traffic.foreign(name, self._shared_zone[name] if random.random() < 0.7 else 0)
            if self.polls:
                self.play(poll(self, name), is_background=True)
        self.play(self.traffic.keepalive(), is_background=True)
        if mix.failing_device or mix.lost_events or mix.full_journal:
            self.play(self._spoil(), is_background=True)

    def _start(self, name: str) -> None:
        host = self.hosts[name] = SimulatedHost(self, name, self.devices[name], self.journals[name])
        self.started.append(host)
        self.guarded(name, host.agent.start)

    def _spoil(self) -> Script:
        """Devices and disks that fail for a while."""
        random, mix = self.random, self.mix
        while True:
            yield random.random() * 2.0
            name = random.choice(self.names)
            faults, journal = self.devices[name].faults, self.journals[name]
            if mix.failing_device and random.random() < mix.failing_device:
                faults.fail_after = random.randint(0, 4)
                self.hinder(checks.FAILED)
                self.tell(name, f"the firewall fails after {faults.fail_after} more")
                yield random.random()
                faults.fail_after = None
                self.tell(name, "the firewall works again")
            if mix.lost_events and random.random() < mix.lost_events:
                faults.lose_events = True
                self.tell(name, "the firewall loses events")
                yield random.random()
                faults.lose_events = False
            if mix.full_journal and random.random() < mix.full_journal:
                journal.is_full = True
                self.hinder("a journal was full")
                self.tell(name, "the disk is full")
                yield random.random() * 3
                journal.is_full = False
                self.tell(name, "the disk has room again")

    # Time.

    def after(self, seconds: float, act: Callable[[], Any]) -> None:
        """Lets something happen in so many seconds."""
        self._occurrences += 1
        heapq.heappush(self._heap, (self.now + seconds, self._occurrences, act))

    def play(self, script: Script, *, is_background: bool = False) -> None:
        """Lets somebody act; what goes on in the background does not keep the run from ending."""
        if not is_background:
            self._scripts += 1
        self.after(0.0, partial(self._play_on, script, is_background))

    def _play_on(self, script: Script, is_background: bool) -> None:
        seconds = next(script, None)
        if seconds is not None:
            self.after(seconds, partial(self._play_on, script, is_background))
        elif not is_background:
            self._scripts -= 1

    def _go_on(self) -> None:
        heap = self._heap
        quiet_since: float | None = None
        while heap:
            when, _, act = heapq.heappop(heap)
            # What goes on for ever keeps nothing from being over.
            if self._scripts or not self.now or any(host.live for host in self.hosts.values()):
                quiet_since = None
            elif quiet_since is None:
                quiet_since = self.now
            elif when > quiet_since + AFTERWARDS_SECONDS:
                return
            self.now = max(self.now, when)
            act()
            self._pump()
            if self.now > MOST_SECONDS:
                self.violated(checks.ENDS, f"the run goes on after {MOST_SECONDS} s")
                return

    def _pump(self) -> None:
        """Lets all sessions do what there is to do for them now, or a little later where they are slow."""
        for host in tuple(self.hosts.values()):
            for session in tuple(host.live):
                while self._has_work(host, session):
                    if self.mix.slow_sessions:
                        self._step_later(host, session)
                        break
                    self._step(host, session)
                if (wake_at := session.wake_at) is not None and host.timers.get(session.id) != wake_at:
                    host.timers[session.id] = wake_at
                    self.after(max(0.0, wake_at - self.now), _nothing)

    def _has_work(self, host: SimulatedHost, session: Session) -> bool:
        if session.is_over or host.is_down:
            return False
        wake_at = session.wake_at
        return (wake_at is not None and wake_at <= self.now) or bool(session._finished) or not session._events.empty()

    def _step_later(self, host: SimulatedHost, session: Session) -> None:
        if session.id in host.busy:
            return
        host.busy.add(session.id)

        def step() -> None:
            host.busy.discard(session.id)
            if self._has_work(host, session):
                self._step(host, session)

        self.after(self.mix.slow_sessions * self.random.random(), step)

    # Sessions.

    def sessions_at(self, host: str) -> list[Session]:
        """Those under way there."""
        known = self.hosts.get(host)
        return [] if known is None else known.live

    def sessions_of(self, host: str, guest: str) -> list[Session]:
        """All that there were of the guest on the host, oldest first."""
        return [one for known, one in self.sessions if known.name == host and one.guest == guest]

    def began(self, host: SimulatedHost, session: Session) -> None:
        """An agent has a new session."""
        self.sessions.append((host, session))
        self.after(LIFETIME_SECONDS + SLACK_SECONDS, lambda: self._look_for_end(host, session))
        self._act(host, session, session.begin)

    def _look_for_end(self, host: SimulatedHost, session: Session) -> None:
        if not session.is_over and not host.is_down:
            self.violated(checks.ENDS, f"session {session.id} of {host.name} is {session._state()}")
            host.live.remove(session)

    def _step(self, host: SimulatedHost, session: Session) -> None:
        event = session.next_event(waits=False)
        if event is not None:
            self._act(host, session, session.handle, event)

    def _act(self, host: SimulatedHost, session: Session, act: Callable[..., None], *event: Event) -> None:
        """As `Session.live` does; what happens belongs to this session."""
        before, self.acting = self.acting, (host, session)
        state = session._state() if self._tells else ""
        try:
            act(*event)
        except Crash as crash:
            self._crash(host, str(crash))
        except Exception as error:  # noqa: BLE001 - of the code under test
            self.violated(checks.NO_MISTAKE, f"{type(error).__name__}: {error}")
            session.fail(f"{type(error).__name__}: {error}")
        finally:
            self.acting = before
        if host.is_down:
            return
        if self._tells and session._state() != state:
            self.tell(host.name, f"{session.role} {self._name(session.guest)}: {state} -> {session._state()}")
        self.guard.stepped()
        if session.is_over and session in host.live:
            host.live.remove(session)
            self.ends[host.name, session.id] = self.now
            self.tell(
                host.name,
                f"{session.role} {self._name(session.guest)}: {session.report.outcome} {session.report.reason}",
            )

    def guarded(self, name: str, act: Callable[[], T]) -> T | None:
        """Something that an agent does at once, when it is told something."""
        host = self.hosts.get(name)
        if host is None:
            return None
        before, self.acting = self.acting, None
        try:
            return act()
        except Crash as crash:
            self._crash(host, str(crash))
        except SamiError as error:
            self.tell(name, f"refused: {error}")
        except Exception as error:  # noqa: BLE001 - of the code under test
            self.violated(checks.NO_MISTAKE, f"{type(error).__name__}: {error}")
        finally:
            self.acting = before
        return None

    def says(self, host: str, peer: str, session: str, message: bytes) -> None:
        """A session says something to its peer."""
        kind = kind_of(message)
        self.said.setdefault((session, host), []).append(message)
        self.kinds_said.setdefault((session, host), set()).add(kind)
        self.guard.said(host, peer, session, kind)

    def hears(self, host: str, peer: str, session: str, message: bytes) -> None:
        """A session hears what is said to be its peer's."""
        number = self._heard.get((session, host), 0)
        self._heard[session, host] = number + 1
        if self._tells:
            self.tell(host, kind_of(message), peer)
        said = self.said.get((session, peer), [])
        # After a crash a line of the same session begins anew.
        if (number >= len(said) or said[number] != message) and checks.CRASHED not in self.hindrances:
            self.violated(checks.OWN_MESSAGES, f"{host} heard {kind_of(message)} of {peer}, as number {number}")

    # Words of the hypervisor.

    def told_until(self, host: str, guest: Guest) -> float:
        """When the last of the hypervisor's words of the guest has come to the agent."""
        return self._words.get((host, guest.id), 0.0)

    def say(self, host: str, event: MigrationEvent, guest: str, *, is_hook: bool = False) -> bool:
        """The hypervisor's word. Of a hook it comes at once, else it takes a moment; it may come twice or not at all.

        :returns: whether it is said at all.
        """
        mix, dice = self.mix, self.random.random
        # Of a guest that its user has paused nothing else says that it leaves.
        is_needed = event.phase is Phase.OUTGOING and self.guests[event.guest].is_paused
        if mix.mute and dice() < mix.mute and not is_needed:
            mix.mute = 0.0  # of two words that are lost nobody could make up for both
            self.tell(host, f"(the hypervisor does not say {event.phase.value} of {guest})")
            self.hinder(checks.UNSAID)
            return False
        channel = host, event.guest
        if is_hook:
            when = self.now
            self.say_surely(host, event, guest)
        else:
            when = max(self._words.get(channel, 0.0), self.now + mix.late_words * dice())
            self._words[channel] = when
            self.after(when - self.now, lambda: self.say_surely(host, event, guest))
        if dice() < mix.twice:
            # What a hook says too comes in any order; events of one host come in theirs.
            later = 0.03 * dice() if event.phase in HOOKED else 0.0
            self.after(when - self.now + later, lambda: self.say_surely(host, event, guest))
        return True

    def say_surely(self, host: str, event: MigrationEvent, guest: str) -> None:
        """The agent hears the word now."""
        known = self.hosts.get(host)
        if known is None:
            self.hinder("an agent was down")
            self.unheard.add((host, event.guest))
            return
        self.tell(host, f"hypervisor: {event.phase.value} {guest}")
        if event.phase is Phase.STOPPED:
            self.stopped.setdefault((host, event.guest), []).append(self.now)
        if event.phase is Phase.SUSPENDED and any(
            one.guest == event.guest and one._state() in ("offered", "copying") for one in known.live
        ):
            self.hinder(checks.PAUSED_EARLY)
        if event.phase is Phase.RESUMED and self.guests[event.guest].place == host:
            self.guests[event.guest].told_at = host
            self.resumed.setdefault((host, event.guest), []).append(self.now)
        self.guarded(host, lambda: known.agent.note(event))
        if host not in self.hosts:  # it crashed by it
            self.unheard.add((host, event.guest))

    # The world at large.

    def tell(self, host: str, words: str, sender: str = "") -> None:
        """A line of the story."""
        if self._tells:
            self.story.tell(self.now, host, words, sender)

    def violated(self, promise: str, what: str) -> None:
        """A promise is broken."""
        violation = Violation(promise, what)
        if violation not in self.violations:
            self.violations.append(violation)
            self.tell("VIOLATED", str(violation))

    def hinder(self, why: str) -> None:
        """From now on it may be told that flows were not carried."""
        self.hindrances[why] = None

    def plug(self, port: Port, host: str) -> None:
        """The port's tap is on the host, and its zone is known."""
        guest = port.guest
        if host not in (guest.place, *guest.jobs.values()) or host in port.zones:
            return  # aborted meanwhile, and maybe begun anew
        if port.is_shared:
            zone = self._shared_zone[host]
        else:
            zone = self._next_zone[host]
            self._next_zone[host] += 1
        port.zones[host] = port.former[host] = zone
        if self.now:
            self.tell(host, f"{port.name} of {guest.name} has zone {zone}")

    def unplug(self, guest: Guest, host: str) -> None:
        """The guest's taps are gone from the host."""
        for port in guest.ports:
            port.zones.pop(host, None)

    def give_token(self, guest: Guest) -> None:
        """The guest's host writes into its description who it is."""
        guest.owner = guest.place or ""
        guest.token = f"{self.random.getrandbits(256):064x}"

    def meanwhile(self, guest: str) -> None:
        """Between two batches of an export traffic goes on."""
        known = self.guests.get(guest)
        if known is not None and known.runs and self.random.random() < 0.1:
            before, self.acting = self.acting, None
            self.traffic.happen(known)
            self.acting = before

    def hypervisor(self, host: str) -> SimulatedHypervisor | None:
        """That of a host, where it can be asked."""
        return SimulatedHypervisor(self, host) if self.is_asked else None

    def nonce(self) -> bytes:
        """Eight octets that were not there before."""
        return self.random.randbytes(8)

    def new_uuid(self) -> str:
        """Of a guest or a session."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def _name(self, guest: str) -> str:
        known = self.guests.get(guest)
        return known.name if known is not None else guest

    # Crashes.

    def may_crash(self, host: str, when: str, what: str) -> None:
        """:raises Crash: now is the time."""
        if self._crash_in[host]:
            self._crash_in[host] -= 1
            if not self._crash_in[host]:
                raise Crash(f"{when} {what}")

    def _crash(self, host: SimulatedHost, where: str) -> None:
        self.tell(host.name, f"the agent crashes {where}")
        self.hinder(checks.CRASHED)
        host.is_down = True
        since = self.now
        if self.away[host.name] and self.away[host.name][-1][1] == since:  # it came no further than its start
            since, _ = self.away[host.name].pop()
        self.away[host.name].append((since, math.inf))
        host.live.clear()
        self.hosts.pop(host.name, None)
        self.network.endpoints.pop(host.name, None)
        self._scripts += 1  # nothing is over before it is there again
        self.after(self.random.random() * self.random.choice((0.2, 2.0, 12.0)), lambda: self._restart(host.name))

    def _restart(self, name: str) -> None:
        self._scripts -= 1
        self.tell(name, "the agent starts again")
        self.away[name][-1] = self.away[name][-1][0], self.now
        if self.random.random() < self.mix.crash_again:
            self._crash_in[name] = self.random.randint(1, 15)
        self._start(name)
        if name in self.hosts:
            settle(self, name)


def _nothing() -> None:
    """Time passes: sessions look at their clocks."""
