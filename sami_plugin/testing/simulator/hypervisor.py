"""Hypervisors: what they answer, and the migrations that they carry out, with what they say of them.

The words and their order are those that libvirt was seen to say; doc/source/contributor/simulator.rst names the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sami_plugin.handover import DestinationSession
from sami_plugin.migration.destination import NO_ANSWER
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.testing.simulator.checks import LATE_ANSWER, MOVED_ON, ran_out_unseen, was_seen_by_nobody
from sami_plugin.testing.simulator.guests import Guest

if TYPE_CHECKING:
    from sami_plugin.testing.simulator.world import World

Script = Iterator[float]
"""What somebody does; in between it waits for so many seconds."""

POLL_SECONDS = 1.3
SOURCE, DESTINATION = "source", "destination"


@dataclass(slots=True)
class SimulatedHypervisor:
    """What an agent may ask."""

    world: World
    host: str

    def is_leaving(self, guest: str) -> bool:
        known = self.world.guests.get(guest)
        return known is not None and self.host in known.jobs

    def is_here(self, guest: str) -> bool:
        known = self.world.guests.get(guest)
        return known is not None and known.place == self.host and not known.is_paused_by_job

    def description(self, guest: str) -> str | None:
        known = self.world.guests.get(guest)
        if known is None or not self.world.is_described or self.host not in (known.place, *known.jobs, *known.expected):
            return None
        return describe(known)

    def mark(self, guest: str) -> None:
        known = self.world.guests.get(guest)
        if known is not None and known.place == self.host and self.world.is_described:
            self.world.give_token(known)


def describe(guest: Guest) -> str:
    """The guest's XML, as far as it matters."""
    return (
        "<domain><metadata>"
        f'<sami-origin:origin xmlns:sami-origin="urn:sami:origin:1" host="{guest.owner}" token="{guest.token}"/>'
        "</metadata></domain>"
    )


def life(world: World, guest: Guest, moves: int) -> Script:
    """One guest moves so often, now and then back at once."""
    random, mix = world.random, world.mix
    yield random.random() * (0.3 if random.random() < 0.7 else 4.0)
    former: str | None = None
    left = moves
    while left and guest.place is not None:
        source = guest.place
        if former is not None and former != source and random.random() < mix.goes_back * 3:
            destination, pause = former, random.choice((0.0, 0.01, 0.3))
        else:
            destination = random.choice([name for name in world.names if name != source])
            pause = random.choice((0.0, 0.5, 3.0, 12.0)) if former is not None else 0.0
        if pause:
            yield pause
        if guest.place != source:
            continue
        is_hasty = former is not None and random.random() < mix.haste
        if is_hasty:
            world.hinder(MOVED_ON)
        else:
            while any(one.guest == guest.id and one.role == DESTINATION for one in world.sessions_at(source)):
                yield 1.0
        if guest.place != source:
            continue
        yield from Migration(world, guest, source, destination).script()
        former = source
        left -= 1
        if not left and guest.place == destination and random.random() < mix.goes_back:
            left = 1
            mix.goes_back /= 2


class Migration:
    """One migration of one guest."""

    def __init__(self, world: World, guest: Guest, source: str, destination: str) -> None:
        self._world = world
        self._guest = guest
        self._source = source
        self._destination = destination
        self._random = world.random

    def script(self) -> Script:
        world, guest, mix, dice = self._world, self._guest, self._world.mix, self._random.random
        source, destination = self._source, self._destination
        fate = self._fate()
        for flow in guest.flows:
            flow.is_lost_unseen |= was_seen_by_nobody(world, guest) or ran_out_unseen(world, guest, flow)
        guest.moves_since = world.now
        if not world.is_asked and world.told_until(source, guest) > world.now:
            world.hinder("words of the migration before were late, and nobody could be asked")
        world.tell("", f"{guest.name} begins to move from {source} to {destination}; {fate}")
        guest.jobs[source] = destination
        guest.visited.add(destination)
        guest.expected.add(destination)
        user_paused = dice() < mix.paused
        if user_paused:
            guest.is_paused = True
        yield from self._announce()
        if self._is_refused():
            world.tell(destination, f"the hook refuses {guest.name}")
            if world.network.forged:  # a stream that breaks when its session is over is not renewed
                world.hinder("packets were forged, and the last ones could not be sent again")
            guest.jobs.pop(source, None)
            guest.expected.discard(destination)
            guest.is_paused = False
            return
        if dice() < mix.stranger:
            world.stranger.ask(guest, source)
        if mix.outage and dice() < mix.outage:
            self._lose_broker()
        self._plug()
        self._say(destination, Phase.STARTED, is_hook=dice() < 0.7, is_incoming=True)
        yield from self._until(self._has_caught_up, world.settings.started_seconds)
        yield from self._copy()
        if fate == "aborted while it is copied":
            yield from self._abort_copying()
        elif fate == "killed while it is copied":
            self._kill(source)
        elif user_paused and fate == "moves":
            yield from self._arrive(self._pause_of(False), says_pause=False)
        else:
            is_post_copy = fate == "moves in post-copy"
            guest.is_paused = True
            guest.is_paused_by_job = self._say(source, Phase.SUSPENDED, SOURCE)
            if is_post_copy:
                self._say(source, Phase.SUSPENDED, SOURCE)
            cleans = dice() < mix.cleaning
            pause = self._pause_of(cleans)
            if cleans:
                world.after(world.words_seconds + 0.2 + dice() * 0.3, partial(world.traffic.clean, guest, source))
            if fate == "aborted in the pause":
                yield pause
                yield from self._abort_in_pause(user_paused)
            elif fate == "killed in the pause":
                yield pause
                self._kill(source)
            else:
                yield from self._arrive(pause, says_pause=True, stays_paused=user_paused, is_post_copy=is_post_copy)
        guest.expected.discard(destination)

    def _fate(self) -> str:
        dice, mix = self._random.random, self._world.mix
        if dice() < mix.abort:
            return "aborted while it is copied" if dice() < 0.5 else "aborted in the pause"
        if dice() < mix.kill:
            return "killed while it is copied" if dice() < 0.5 else "killed in the pause"
        return "moves in post-copy" if dice() < mix.post_copy else "moves"

    def _announce(self) -> Script:
        """The first words, of both hosts in any order."""
        world, guest, dice = self._world, self._guest, self._random.random
        # Where a hypervisor is asked that says no token, it has to be told first where the guest goes.
        told_first = (world.is_asked and not world.is_described) or dice() < 0.7
        named = None if world.is_described else self._destination
        if told_first:
            self._say(self._source, Phase.OUTGOING, destination=named)
            yield (world.words_seconds if world.is_asked else 0.05) * (1.0 if world.is_asked else dice())
        if not told_first:
            world.after(dice() * 0.2, partial(self._say, self._source, Phase.OUTGOING, destination=named))
        if world.is_described and not guest.is_paused and dice() < world.mix.no_hook:
            world.hinder("no hook announced a migration")
            return  # STARTED will be the first word
        # A hook speaks at once, and the migration waits for it.
        self._say(
            self._destination,
            Phase.PREPARE,
            source=None if world.is_described else self._source,
            domain=describe(guest) if world.is_described else None,
            is_hook=True,
        )
        yield 0.03
        limits = world.settings.limits
        yield from self._until(self._has_verdict, limits.verdict_seconds + 0.5)
        if not self._has_verdict() and any(one.is_asking for one in self._coming()):
            if dice() < 0.7:
                self._decide(may_come=dice() < 0.5)
            yield from self._until(self._has_verdict, limits.ask_seconds + 0.5)
        for one in self._coming():
            if not one.has_verdict.is_set():
                one.let_go()
        if any(one._state() in ("looking", "asked") or one._known.reason == NO_ANSWER for one in self._coming()):
            world.hinder(LATE_ANSWER)

    def _decide(self, *, may_come: bool) -> None:
        """An operator's answer."""
        host = self._world.hosts.get(self._destination)
        if host is None:  # nobody is there to take it
            return
        self._world.tell(host.name, f"the operator says {'yes' if may_come else 'no'}")
        self._world.guarded(host.name, lambda: host.agent.decide(self._guest.id, may_come=may_come))

    def _lose_broker(self) -> None:
        world, dice = self._world, self._random.random
        host = self._random.choice((self._source, self._destination))
        seconds = self._random.choice((0.5, 2.0, 6.0, 15.0))

        def lose() -> None:
            world.network.away_until[host] = world.now + seconds
            world.tell(host, f"the broker is away for {seconds} s")
            world.hinder("the broker was away")

        world.after(dice() * 3.0, lose)

    def _copy(self) -> Script:
        mix, dice = self._world.mix, self._random.random
        seconds = mix.copy_seconds * dice() * dice()
        self._world.traffic.busy(self._guest, seconds)
        yield seconds

    def _pause_of(self, is_long: bool) -> float:
        return (0.6 if is_long else 0.0) + self._random.random() * self._random.choice((0.01, 0.1, 0.4))

    def _arrive(
        self, pause: float, *, says_pause: bool, stays_paused: bool = False, is_post_copy: bool = False
    ) -> Script:
        world, guest, dice, mix = self._world, self._guest, self._random.random, self._world.mix
        source, destination = self._source, self._destination
        yield pause
        if guest.place != source:
            return
        world.tell("", f"{guest.name} is on {destination} now")
        guest.place = destination
        for flow in guest.flows:
            flow.is_cleaned = False
        guest.left_at[source] = world.now
        guest.moves.append((world.now, source, destination))
        guest.is_paused, guest.is_paused_by_job = stays_paused or not says_pause, False
        guest.expected.discard(destination)
        if not guest.is_paused:
            world.traffic.first_packets(guest)
        # In real life the tap goes with the domain, a little before or after it is said.
        self._say(destination, Phase.RESUMED, None if dice() < 0.5 and not is_post_copy else DESTINATION)
        if is_post_copy:
            yield dice() * 2.0
            self._say(destination, Phase.RESUMED)
        if dice() < mix.late_packets:
            world.traffic.late_packets(guest, source)
        world.traffic.busy(guest, 2.0)
        yield dice() * self._random.choice((0.02, 0.2, 1.0))
        yield max(0.0, world.told_until(source, guest) - world.now)  # the tap outlives the pause's word
        guest.jobs.pop(source, None)
        if destination in world.hosts:  # an agent that is down marks its guests when it is there again
            world.give_token(guest)
        world.unplug(guest, source)
        self._say(source, Phase.STOPPED, SOURCE)
        guest.gone_at[source] = world.now
        yield dice() * 0.3

    def _abort_copying(self) -> Script:
        world, guest, dice = self._world, self._guest, self._random.random
        world.tell("", f"the migration of {guest.name} to {self._destination} is aborted")
        guest.jobs.pop(self._source, None)
        world.unplug(guest, self._destination)
        self._say(self._destination, Phase.STOPPED, DESTINATION if dice() < 0.5 else None)
        if not world.polls:
            yield dice()
            self._say(self._source, Phase.ROLLBACK, SOURCE)
        world.traffic.busy(guest, 1.0)
        yield dice()

    def _abort_in_pause(self, stays_paused: bool) -> Script:
        world, guest, dice = self._world, self._guest, self._random.random
        world.tell("", f"the migration of {guest.name} to {self._destination} is aborted in the pause")
        guest.is_paused, guest.is_paused_by_job = stays_paused, False
        for flow in guest.flows:
            flow.is_live &= not flow.is_cleaned  # where the guest stays, nobody has it
        if guest.runs:
            world.traffic.renew(guest)
        guest.jobs.pop(self._source, None)
        world.unplug(guest, self._destination)
        words = [
            partial(self._say, self._destination, Phase.STOPPED, DESTINATION),
            partial(self._say, self._source, Phase.RESUMED, SOURCE if dice() < 0.6 else None),
        ]
        self._random.shuffle(words)
        words[0]()
        if dice() < 0.5:
            yield dice() * 0.2
        words[1]()
        world.traffic.busy(guest, 1.0)
        yield dice()

    def _kill(self, host: str) -> None:
        """The guest ends, by its user's will or by accident, and its migration with it."""
        world, guest = self._world, self._guest
        world.tell("", f"{guest.name} is killed on {host}")
        guest.place, guest.died_at = None, host
        guest.jobs.clear()
        guest.gone_at[host] = world.now
        world.unplug(guest, host)
        world.unplug(guest, self._destination)
        self._say(self._destination, Phase.STOPPED, DESTINATION)
        for phase, role in ((Phase.ROLLBACK, SOURCE), (Phase.STOPPED, DESTINATION)):
            self._say(host, phase, role)

    def _plug(self) -> None:
        world, guest, mix, dice = self._world, self._guest, self._world.mix, self._random.random
        for port in guest.ports:
            if mix.lost_zone and dice() < mix.lost_zone:
                world.hinder("a zone never appeared")
                world.tell(self._destination, f"{port.name} gets no zone")
                continue
            delay = dice() * mix.zone_seconds if dice() < mix.late_zone else 0.0
            world.after(delay, partial(world.plug, port, self._destination)) if delay else world.plug(
                port, self._destination
            )

    def _say(
        self,
        host: str,
        phase: Phase,
        role: str | None = None,
        *,
        source: str | None = None,
        destination: str | None = None,
        domain: str | None = None,
        is_incoming: bool = False,
        is_hook: bool = False,
    ) -> bool:
        """Whether it is said at all."""
        event = MigrationEvent(self._guest.id, phase, source, destination, role, domain, is_incoming)
        return self._world.say(host, event, self._guest.name, is_hook=is_hook)

    def _until(self, condition: Callable[[], bool], seconds: float) -> Script:
        """As a hook waits, so many seconds at most."""
        end = self._world.now + seconds
        wait = 0.01
        while not condition() and self._world.now < end:
            yield wait
            wait = min(wait * 4, 0.3)

    def _has_verdict(self) -> bool:
        return all(one.has_verdict.is_set() for one in self._coming())

    def _is_refused(self) -> bool:
        return any(one.refusal is not None for one in self._coming())

    def _has_caught_up(self) -> bool:
        return all(one.has_caught_up.is_set() for one in self._coming())

    def _coming(self) -> list[DestinationSession]:
        """The sessions of the guest where it is to go."""
        return [
            one
            for one in self._world.sessions_of(self._destination, self._guest.id)
            if isinstance(one, DestinationSession)
        ][-1:]


def settle(world: World, host: str) -> None:
    """Tells an agent that has just started what it may have missed."""
    for name, role in world.hosts[host].agent.underway():
        guest = world.guests.get(name)
        if guest is None:
            continue
        if role == SOURCE:
            _tell_job(world, host, guest)
        elif guest.place == host:
            world.say_surely(host, MigrationEvent(guest.id, Phase.RESUMED, role=DESTINATION), f"{guest.name} (asked)")
        elif host not in guest.jobs.values():
            world.say_surely(host, MigrationEvent(guest.id, Phase.STOPPED, role=DESTINATION), f"{guest.name} (asked)")
    for guest in world.guests.values() if world.is_described else ():
        if guest.place == host and host not in guest.jobs and guest.owner != host:  # it came while nobody was told
            came = MigrationEvent(guest.id, Phase.STARTED, role=DESTINATION, domain=describe(guest), is_incoming=True)
            world.say_surely(host, came, f"{guest.name} (asked)")
            world.say_surely(host, MigrationEvent(guest.id, Phase.RESUMED, role=DESTINATION), f"{guest.name} (asked)")
            world.give_token(guest)


def _tell_job(world: World, host: str, guest: Guest) -> None:
    phases = [Phase.ROLLBACK if guest.place == host else Phase.STOPPED]
    if host in guest.jobs:
        phases = [Phase.OUTGOING, Phase.SUSPENDED] if guest.is_paused_by_job else [Phase.OUTGOING]
    elif guest.place != host:
        guest.gone_at.setdefault(host, world.now)
    for phase in phases:
        world.say_surely(host, MigrationEvent(guest.id, phase, role=SOURCE), f"{guest.name} (asked)")


def poll(world: World, host: str) -> Script:
    """Asks about guests that leave, as long as there is something to ask about."""
    while True:
        yield POLL_SECONDS
        known = world.hosts.get(host)
        if known is None:
            continue
        for name, role in known.agent.underway():
            guest = world.guests.get(name)
            if role == SOURCE and guest is not None:
                _tell_job(world, host, guest)
