"""What SAMI promises, looked at while a run goes on (`Guard`) and when it is over (`final`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sami_plugin.handover import DestinationSession
from sami_plugin.handover.destination import NOT_DISCARDED
from sami_plugin.leaving import KEPT
from sami_plugin.model.migration import Outcome
from sami_plugin.model.scope import Scope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from sami_plugin.drivers.memory import Entry, Place
    from sami_plugin.session import Session
    from sami_plugin.testing.simulator.firewall import GuardedDevice
    from sami_plugin.testing.simulator.guests import Flow, Guest
    from sami_plugin.testing.simulator.host import SimulatedHost
    from sami_plugin.testing.simulator.world import World

WHERE_THE_GUEST_IS = "each flow is where its guest is, or named as not carried"
NOWHERE_ELSE = "each flow is nowhere else, or the report says so"
NO_LONGER = "a firewall keeps what was closed no longer than it would have without"
NOTHING_FOREIGN = "no foreign flow is touched"
NOT_WHILE_IT_MAY_RUN = "nothing is purged at the source while the guest may run there"
NOT_BEFORE_ARRIVED = "nothing is purged before COMPLETE and ARRIVED, but after the arrival limit, which is reported"
NOT_WHERE_IT_RUNS = "nothing is taken from a guest where it runs"
RECORDED_FIRST = "what is done was recorded before"
ENDS = "no session outlives its time"
OWN_MESSAGES = "no session hears but its own peer, each message once and in order"
RIGHT_PEER = "flows are given to the guest's destination alone"
NO_MISTAKE = "nothing is raised but what is ours to raise"
PLACES_ARE_GIVEN_BACK = "what was reserved is free again when the session is over"
ENDS_WELL = "where nothing is in the way, the guest has moved or stayed, and the reports say so"

LONG_SECONDS = 60
"""A flow that lives longer without a packet does not run out in a run."""
WALL = 1.8e9
"""Seconds since 1970 when a run begins."""
CRASHED = "an agent crashed"
FAILED = "a firewall failed"
UNSAID = "a word was not said"
PAUSED_EARLY = "the guest was paused before its flows were sent"
MOVED_ON = "a guest moved on, maybe before its flows had come"
LATE_ANSWER = "the source did not answer in time"
MOVED = Outcome.MOVED.value
CARRIED = (MOVED, Outcome.STAYED.value)


UNARRIVED = (Outcome.LEFT_WITHOUT_ARRIVAL.value, Outcome.FAILED.value, Outcome.CONTINUED.value)
"""The second one where the firewall failed in the midst of it, the third of a session that another went on with."""


@dataclass(slots=True)
class _Taken:
    device: GuardedDevice
    place: Place
    flow: Flow
    guest: Guest


class Guard:
    """Looks at what sessions do, when they do it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._taken: list[_Taken] = []
        self.unarrived: set[tuple[str, str]] = set()
        """Sessions, by host and first id, that purged though nobody had said that the guest arrived."""
        self.made: set[tuple[str, int]] = set()
        """By host and id, the entries that sessions made."""

    def put_in(self, device: GuardedDevice, entry: Entry) -> None:
        """A session made an entry."""
        host, session = self._actor()
        self.made.add((host.name, entry.flow_id))
        flow = self._world.flows.get(entry.original)
        if flow is None or not flow.belongs_to(session.guest):
            self._world.violated(NOTHING_FOREIGN, f"{host.name} puts in a flow that is not of {session.guest}")
        elif host.name not in self._world.guests[session.guest].visited:
            self._world.violated(
                NOTHING_FOREIGN, f"{host.name} puts in {flow.conversation.name} of no guest of its own"
            )
        if session._journal_works and not host.memory.is_full and not host.memory.has_payloads(session.id):
            self._world.violated(RECORDED_FIRST, f"{host.name} puts in flows that are not in its journal")

    def taken_out(self, device: GuardedDevice, place: Place, entry: Entry) -> None:
        """A session removed an entry, or replaces it."""
        host, session = self._actor()
        world = self._world
        flow = world.flows.get(entry.original)
        guest = world.guests[session.guest]
        if flow is None or not flow.belongs_to(guest.id):
            named = "an unknown one" if flow is None else flow.conversation.name
            world.violated(NOTHING_FOREIGN, f"{host.name} removes {named} for {guest.name}")
            return
        for port in flow.owners:
            is_known = not port.guest.left_at or port.guest.told_at == host.name  # that it is there
            if port.guest is not guest and port.guest.place == host.name and is_known and host.name in port.zones:
                self._taken.append(_Taken(device, place, flow, port.guest))
        if session.role == "source":
            self._purged(host, session, guest, device, entry, flow)
            return
        speaks_there = any(port.guest is guest and (None, port.zones.get(host.name)) == place for port in flow.owners)
        if speaks_there and guest.told_at == guest.place == host.name and self._is_decided(host, session, "Discard"):
            world.violated(
                NOT_WHERE_IT_RUNS, f"{host.name} discards {flow.conversation.name}, and {guest.name} runs there"
            )

    @staticmethod
    def _is_decided(host: SimulatedHost, session: Session, action: str) -> bool:
        decisions = host.memory.decisions(session.id)
        return bool(decisions) and action in decisions[-1]["actions"]

    def _purged(
        self, host: SimulatedHost, session: Session, guest: Guest, device: GuardedDevice, entry: Entry, flow: Flow
    ) -> None:
        world, name = self._world, flow.conversation.name
        decisions = host.memory.decisions(session.id)
        if not decisions or not any(action.startswith("Purge") for action in decisions[-1]["actions"]):
            world.violated(RECORDED_FIRST, f"{host.name} purges {name}, and its journal does not say so")
        elif "Purge" in decisions[-1]["actions"] and not decisions[-1]["is_durable"]:
            world.violated(RECORDED_FIRST, f"{host.name} purges {name}, and the disk does not have it")
        if guest.place == host.name:
            if device.born[entry.flow_id] >= guest.left_at.get(host.name, -1.0):
                world.violated(NOT_WHILE_IT_MAY_RUN, f"{host.name} purges {name}, and {guest.name} is there")
            return
        if guest.place is None or host.name in guest.expected:
            return
        is_coming = any(isinstance(one, DestinationSession) and one.guest == guest.id for one in host.live)
        # Another session may go on with one; what was said to any of them counts.
        same = {one.id for one in _same(world, session)} | {session.known_as}
        if is_coming or any(known["event"] == "Returns" for one in same for known in host.memory.decisions(one)):
            return  # it comes back, or came back, as far as anybody here knows, so it has left
        said = set().union(*(world.kinds_said.get((one, session.peer), set()) for one in same))
        if {"Complete", "Arrived"} <= said:
            return
        if CRASHED in world.hindrances and {"Open", "Arrived"} <= said:
            return  # who goes on with a session says in Open that it has all
        limit = world.settings.limits.arrival_seconds
        gone_at = guest.gone_at.get(host.name)
        if CRASHED in world.hindrances:  # it may have come and left again while nobody was there to be told
            gone_at = min(world.stopped.get((host.name, guest.id), []), default=gone_at)
        if gone_at is None or world.now < gone_at + limit - 0.001:
            world.violated(NOT_BEFORE_ARRIVED, f"{host.name} purges {name}, and its peer has said {sorted(said)}")
        self.unarrived.add((host.name, session.known_as))

    def stepped(self) -> None:
        """A session has done what there was to do for now: what it only replaced is there again."""
        if not self._taken:
            return
        taken, self._taken = self._taken, []
        for one in taken:
            if one.flow.is_live and one.device.zone(one.place).entries.get(one.flow.conversation.original) is None:
                self._world.violated(
                    NOT_WHERE_IT_RUNS,
                    f"{one.device.name} takes {one.flow.conversation.name} from {one.guest.name}, which is there",
                )

    def forgive(self, flow: Flow) -> None:
        """It is not the session that takes the flow."""
        self._taken = [one for one in self._taken if one.flow is not flow]

    def said(self, host: str, peer: str, session: str, kind: str) -> None:
        """A session says something."""
        if kind not in ("Flows", "FlowChanges"):
            return
        (guest,) = {one.guest for _, one in self._world.sessions if one.id == session} or {""}
        known = self._world.guests.get(guest)
        # Where nobody can be asked, and OUTGOING was not said, or a late word of the migration before took it back,
        # the first who asks is believed.
        if not self._world.is_asked and {UNSAID, CRASHED, MOVED_ON} & self._world.hindrances.keys():
            return
        if known is None or peer not in known.visited:
            self._world.violated(RIGHT_PEER, f"{host} sends flows of {guest} to {peer}")

    def _actor(self) -> tuple[SimulatedHost, Session]:
        assert self._world.acting is not None
        return self._world.acting


def final(world: World) -> None:
    """Looks at all firewalls and reports when all is over."""
    for host in world.hosts.values():
        host.device.expire()
    for host, session in world.sessions:
        if session.is_over:
            _check_outcome(world, host, session)
    for guest in world.guests.values():
        for flow in guest.flows:
            _check_presence(world, guest, flow)
    for name, device in world.devices.items():
        for zone, entry in device.all_entries():
            _check_leftover(world, name, device, zone, entry)
    _check_places(world)


def _check_outcome(world: World, host: SimulatedHost, session: Session) -> None:
    outcome = session.report.outcome
    if (host.name, session.known_as) in world.guard.unarrived and outcome not in UNARRIVED:
        world.violated(NOT_BEFORE_ARRIVED, f"{host.name} purged without arrival and reports {outcome}")
    guest = world.guests[session.guest]
    if (
        outcome not in CARRIED
        and not world.hindrances
        and guest.died_at is None
        and not _was_interrupted(world, session)
    ):
        world.violated(ENDS_WELL, f"{host.name}: {session.role} of {guest.name}: {outcome} {session.report.reason}")


def _was_interrupted(world: World, session: Session) -> bool:
    """Whether another migration of the guest began before this session was over."""
    others = [one for _, one in world.sessions if one.guest == session.guest and one.id != session.id]
    return bool(others)


def _check_presence(world: World, guest: Guest, flow: Flow) -> None:
    place = guest.place
    # The destination cannot know when a silent one was renewed for the last time.
    is_silent = not flow.is_renewed or (guest.is_paused and flow.conversation.lifetime < LONG_SECONDS)
    if place is None or not flow.is_live or is_silent or flow.expires_at <= world.now + 1.0:
        return
    port = next(port for port in flow.owners if port.guest is guest)
    zone = port.zones.get(place)
    entry = None if zone is None else world.devices[place].find(zone, flow.conversation.original)
    if entry is not None and entry.row["flowMark"] == flow.mark:
        return
    what = "is not there" if entry is None else f"has mark {entry.row['flowMark']} and not {flow.mark}"
    is_early = _is_before_it_is_said_that_it_runs(world, guest, flow.changed_at)
    if is_early and entry is not None and CRASHED in world.hindrances and 0 < entry.row["flowMark"] < flow.mark:
        return  # and was put in again, as it was before
    told = list(_tellers(world, guest, flow))
    if flow.was_cleaned and (told or world.hindrances):
        return  # it was gone before anybody at the source could see what it was
    if not told and (flow.is_lost_unseen or was_seen_by_nobody(world, guest) or ran_out_unseen(world, guest, flow)):
        return
    if not told:
        world.violated(
            WHERE_THE_GUEST_IS, f"{flow.conversation.name} of {guest.name} on {place} {what}; nobody says so"
        )
    elif not world.hindrances and not _may_be_refused(world):
        world.violated(
            WHERE_THE_GUEST_IS, f"{flow.conversation.name} of {guest.name} on {place} {what}; nothing was in the way"
        )


def _is_before_it_is_said_that_it_runs(world: World, guest: Guest, when: float) -> bool:
    """Whether the guest ran where it is by then, and its agent had not been told."""
    came = max((at for at, _, destination in guest.moves if destination == guest.place), default=math.inf)
    said = next((at for at in world.resumed.get((guest.place, guest.id), ()) if at >= came), -math.inf)
    return came <= when <= said


def ran_out_unseen(world: World, guest: Guest, flow: Flow) -> bool:
    """Whether it ran out where the guest came from, and nobody could see it: the guest renewed it elsewhere.

    The agent there was down meanwhile, or its session had given up; or it was not told that the guest had left, and
    there was none to ask it.
    """
    for name, device in world.devices.items():
        for at in device.ran_out.get(flow.conversation.original, ()) if name != guest.place else ():
            is_told = any(guest.moves_since <= said <= at for said in world.stopped.get((name, guest.id), ()))
            is_asked = not any(since <= at <= until for since, until in world.away.get(guest.place or "", ()))
            was_down = any(guest.moves_since <= until and since <= at for since, until in world.away[name])
            since = WALL + guest.moves_since
            moves = [one for one in world.sessions_of(name, guest.id) if one.report.began_at >= since]
            has_given_up = any(_was_given_up(one) for one in moves)
            if was_down or (guest.moves_since <= at and (has_given_up or not (is_told or is_asked))):
                return True
    return False


def _was_given_up(session: Session) -> bool:
    """Whether another one goes on with it that had given up, as its report says."""
    return session.is_over and "which was given up" in session.report.reason


def was_seen_by_nobody(world: World, guest: Guest) -> bool:
    """Whether the destination's agent was not told that the guest came last, and the source's was down when it left."""
    missed = {host for host, one in world.unheard if one == guest.id}
    since = WALL + guest.moves_since
    has_session = any(
        one.guest == guest.id
        and (one.role == "destination") == (host.name == guest.place)  # else of the migration before, gone on with
        and since <= one.report.began_at < math.inf
        for host, one in world.sessions
    )
    is_missed = guest.place in missed or UNSAID in world.hindrances
    return not has_session and is_missed and CRASHED in world.hindrances


def _may_be_refused(world: World) -> bool:
    return world.mix.capacity is not None or world.mix.is_shared > 0 or any(g.died_at for g in world.guests.values())


def _tellers(world: World, guest: Guest, flow: Flow) -> Iterator[str]:
    """The sessions whose reports say that the flow was not carried, or that the session failed."""
    for host, session in world.sessions:
        if session.guest != guest.id and not flow.belongs_to(session.guest):
            continue
        if _says_that_it_failed(world, host, session):
            yield session.id
        if any(_is_named(told, flow) for told in session.report.named.values()):
            yield session.id


def _says_that_it_failed(world: World, host: SimulatedHost, session: Session) -> bool:
    """One that a crash has ended says nothing, nor does one that another went on with.

    But where the guest has moved on since, maybe with nobody there to be told, nobody could say more.
    """
    outcome = _outcome(world, host, session)
    if outcome in ("", Outcome.CONTINUED.value):
        has_moved_on = session.report.began_at < WALL + world.guests[session.guest].moves_since
        return (not session.is_over and has_moved_on) or _knew_no_port(session)
    return outcome not in CARRIED or _knew_no_port(session)


def _outcome(world: World, host: SimulatedHost, session: Session) -> str:
    """How it ended, as far as that was told or written down; empty where it was not."""
    return session.report.outcome if session.is_over else world.journals[host.name].outcome_of(session.id)


def _is_named(told: Mapping[str, Any] | None, flow: Flow) -> bool:
    """Whether a report names the flow for this reason, or no more flows than the first."""
    return told is not None and (flow.conversation.name in told["flows"] or told["count"] > len(told["flows"]))


def _knew_no_port(session: Session) -> bool:
    """Whether the report says that nothing was carried, for the ports were gone, or were never there."""
    return any("knows no port" in remark for remark in session.report.remarks)


def _check_leftover(world: World, name: str, device: GuardedDevice, zone: int, entry: Entry) -> None:
    flow = world.flows.get(entry.original)
    assert flow is not None
    if not flow.owners:
        return
    if any(port.guest.place == name and port.zones.get(name) == zone for port in flow.owners):
        owner = next(port.guest for port in flow.owners if port.guest.place == name)
        if entry.expires > flow.closes_at + LONG_SECONDS and not list(_tellers(world, owner, flow)):
            world.violated(NO_LONGER, f"{flow.conversation.name} was closed, and stays until {entry.expires:.0f} s")
        if flow.is_live or not entry.row["flowMark"]:
            return  # nobody but a late packet makes an entry without a mark
        if _is_before_it_is_said_that_it_runs(world, owner, flow.ended_at):
            return  # and was put in again
        # Where nobody says that the guest is paused, what ends just before is not told from what ends in the pause.
        if not {UNSAID, PAUSED_EARLY} & world.hindrances.keys() and not list(_tellers(world, owner, flow)):
            world.violated(NOWHERE_ELSE, f"{flow.conversation.name} has ended, and is on {name} still")
        return
    if any(port.guest.died_at == name for port in flow.owners):
        return
    guests = [port.guest for port in flow.owners]
    sessions = [
        (host, one) for host, one in world.sessions if host.name == name and any(one.guest == g.id for g in guests)
    ]
    if entry.flow_id in device.by_packets and _nobody_looks_any_more(world, device, entry, sessions):
        return
    is_unheard = any((name, guest.id) in world.unheard for guest in guests)
    born = device.born[entry.flow_id]
    was_told = any(_is_told_of(world, name, one, born, sessions) for one in guests)
    if is_unheard and not was_told:
        return  # the agent was down when the guest left
    is_hindered = bool(world.hindrances) or any(guest.died_at for guest in guests)
    if is_hindered and not sessions:
        return
    was_unsaid = bool({UNSAID, CRASHED} & world.hindrances.keys())
    if was_unsaid and not was_told and all(_was_over_when_it_left(world, name, born, one) for _, one in sessions):
        return  # and nobody asked
    came = all(one.role == "destination" and one.report.outcome == MOVED for _, one in sessions)
    if came and was_unsaid:
        return  # nobody here knew that it left again
    if (name, entry.flow_id) in world.guard.made and not any(guest.was_on(name, born) for guest in guests):
        # It was put in for a guest that did not come. A crash is no excuse for that, nor that something else failed.
        words = ["nobody said whether the guest came"]
        words += ["could not be discarded"] if FAILED in world.hindrances else []
        says_so = any(word in one.report.reason for word in words for _, one in sessions)
    else:
        says_so = any(_says_that_it_failed(world, host, one) for host, one in sessions)
    newest = {one.role: one for _, one in sessions}.values()
    says_so |= any(not one._journal_works for one in newest)  # the log does, from that moment on
    if entry.flow_id in device.by_packets:
        says_so |= any("was not looked for" in one.report.reason for _, one in sessions)
    if says_so and (is_hindered or len(sessions) > 1):
        return
    if any(one.report.flows.get("left_behind") for _, one in sessions):
        return
    if any(_is_named(one.report.named.get(reason), flow) for _, one in sessions for reason in (KEPT, NOT_DISCARDED)):
        return
    world.violated(NOWHERE_ELSE, f"{flow.conversation.name} of {guests[0].name} is on {name} still, in zone {zone}")


def _same(world: World, session: Session) -> list[Session]:
    """It, those that it goes on with, and those that went on with it."""
    return [one for _, one in world.sessions if (one.role, one.known_as) == (session.role, session.known_as)]


def _was_over_when_it_left(world: World, name: str, born: float, session: Session) -> bool:
    """Whether its guest ran on the host when this was made, and left it when this session of the host was over."""
    came, left, _ = world.guests[session.guest].round_of(name, born)
    return came <= born and world.ends.get((name, session.id), math.inf) < left < math.inf


def _is_told_of(
    world: World, name: str, guest: Guest, born: float, sessions: list[tuple[SimulatedHost, Session]]
) -> bool:
    """Whether the host's agent could know that the guest left, when it first did so after that time.

    Its journal said that it leaves, and it lived on to hear that it is gone before it was back; or a session says so.
    """
    came, left, back = guest.round_of(name, born)
    is_noted = world.journals[name].had_noted(guest.id, left + WALL, back + WALL)
    for said in world.stopped.get((name, guest.id), []):
        is_late = any(since <= said and back <= until for since, until in world.away[name])
        if is_noted and left <= said < back and not is_late:
            return True
    for host, one in sessions:
        began = min((same.report.began_at - WALL for same in _same(world, one) if same.report.steps), default=0.0)
        outcome = _outcome(world, host, one)
        has_left = one.role == "source" and outcome not in ("", Outcome.STAYED.value, Outcome.CONTINUED.value)
        if one.guest == guest.id and has_left and came <= began <= back:
            return True
    return False


def _nobody_looks_any_more(
    world: World, device: GuardedDevice, entry: Entry, sessions: list[tuple[SimulatedHost, Session]]
) -> bool:
    """Whether a packet made the entry where no source watches for such, or not any more."""
    born = device.born[entry.flow_id] + WALL
    before = [one for _, one in sessions if one.role == "source" and one.report.began_at <= born]
    if not before:
        return True
    looked = before[-1].report.steps.get("watched")
    return looked is None or looked[0] <= born


def _check_places(world: World) -> None:
    """Asks for more than there are: what is given has to be all that is free."""
    for host in world.hosts.values():
        capacity = host.device.capacity
        if capacity is None or host.live:
            continue
        free = max(0, int(capacity * (1 - world.settings.headroom_percent / 100)) - host.device.held)
        scope = Scope("any", "any", {}, ())
        given = host.take_places("of the check", scope, capacity)
        if given != free:
            world.violated(PLACES_ARE_GIVEN_BACK, f"{host.name} has {free} free places and gives {given}")
