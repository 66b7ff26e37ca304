"""What the host does that a guest leaves.

WAITING     the destination asked; this host's hypervisor has not said yet that the guest leaves
OFFERED     the destination has been told what there is; it has not said yet what it takes
COPYING     the guest runs here; what there is is being sent
FOLLOWING   the guest runs here; only what changes is being sent
DRAINED     the guest is paused and the last change is sent; nothing may be purged yet
PURGING     the destination has it all and the guest runs there, or the guest has left and nobody spoke
WATCHING    all is purged; packets of peers that were on their way here may have made new entries since
ABANDONED   nothing is carried, or not any more; still to be seen is whether the guest leaves
ENDED

Nothing is removed here before the destination has said both COMPLETE and ARRIVED and this host's hypervisor has not
taken the guest back; or the guest has been gone for `arrival_seconds` by the hypervisor's own word.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from sami_plugin.errors import IllegalMessage
from sami_plugin.migration import decision
from sami_plugin.migration.decision import (
    Action,
    ActionFailed,
    Choose,
    Done,
    End,
    Event,
    ExportChanges,
    ExportNext,
    HandOver,
    Keep,
    PeerLost,
    PeerSaid,
    Purge,
    PurgeLate,
    Resync,
    Say,
    SayAgain,
    SayOffer,
    StartExport,
    TimePassed,
    WakeAt,
    replace,
)
from sami_plugin.model.migration import (
    PROTOCOL_VERSION,
    VERSIONS,
    Answer,
    Arrived,
    Complete,
    GivesUp,
    InSync,
    Offer,
    Open,
    Outcome,
    Phase,
    Purged,
    Room,
    Stays,
)
from sami_plugin.model.settings import Limits

TOO_LONG = "the migration took longer than session_seconds"
PURGE_TRIES = 3
"""In all; what is left behind in the last of them stays."""
PURGE_AGAIN_SECONDS = 1.0
STARTED_ANEW = "this host's agent was started anew"
UNWANTED = "the guest has left, and the destination took no more of its flows within arrival_limit"


class State(enum.StrEnum):
    """Where the source's session is; told above."""

    WAITING = "waiting"
    OFFERED = "offered"
    COPYING = "copying"
    FOLLOWING = "following"
    DRAINED = "drained"
    PURGING = "purging"
    WATCHING = "watching"
    ABANDONED = "abandoned"
    ENDED = "ended"


@dataclass(frozen=True)
class Source:
    """All that a decision of the source depends on."""

    limits: Limits
    deadline: float
    state: State = State.WAITING
    version: int = 0
    """Of the messages, as agreed; 0 before anybody asked."""
    is_outgoing: bool = False
    is_suspended: bool = False
    is_paused_early: bool = False
    """The guest was paused while the copy was under way: what is deleted here since then says nothing."""
    has_complete: bool = False
    has_arrived: bool = False
    is_gone: bool = False
    purge_at: float = math.inf
    """When the guest has been gone for so long that its flows go, whoever speaks or does not."""
    comes_back: bool = False
    """The guest is on its way here again."""
    failed_purges: int = 0
    """In a row: of what was exported, then of what late packets have made."""
    asks_again: bool = False
    """The destination is asked to ask again, behind the purge."""
    outcome: Outcome = Outcome.MOVED
    """How the purge went."""
    exported: int = 0
    resync_at: float = 0.0
    reason: str = ""


Decision = tuple[Source, list[Action]]


def recovered(
    limits: Limits, now: float, state: str, *, is_suspended: bool, is_gone: bool, has_arrived: bool, has_purged: bool
) -> tuple[Source, list[Action]]:
    """What is known after this host's agent was started anew, and what is done then.

    `state` is the one in which the journal has the session. What was being purged is purged, which may be repeated; as
    for all else, the destination is asked to ask again. Only what was purged, and had ended but for the journal's last
    row, ends now: the guest may be here again.
    """
    session = Source(
        limits,
        now + limits.session_seconds,
        is_outgoing=True,
        is_suspended=is_suspended,
        is_gone=is_gone,
        purge_at=now + limits.arrival_seconds if is_gone else math.inf,
        has_arrived=has_arrived,
        reason=STARTED_ANEW,
    )
    if state == State.PURGING.value:
        session = replace(session, state=State.PURGING, asks_again=True)
        return session, _purges(session)
    outcome = Outcome.MOVED if has_arrived else Outcome.LEFT_WITHOUT_ARRIVAL
    if state == State.ENDED.value and has_purged:
        return replace(session, state=State.ENDED), [End(outcome, session.reason)]
    if state == State.WATCHING.value:
        # The guest may have come back meanwhile, which is told first.
        look = WakeAt(now + limits.watch_seconds)
        return replace(session, state=State.WATCHING, outcome=outcome), [SayAgain(), look]
    session = replace(session, state=State.ABANDONED)
    return session, [SayAgain(), _next_wake(session)]


def continuing(limits: Limits, now: float, *, has_all: bool, is_suspended: bool, is_gone: bool) -> Source:
    """What is known when the destination goes on with another session; `has_all`: it needs nothing more."""
    return Source(
        limits,
        now + limits.session_seconds,
        state=State.DRAINED if has_all else State.WAITING,
        is_outgoing=True,
        is_suspended=is_suspended or is_gone,
        has_complete=has_all,
        is_gone=is_gone,
        purge_at=now + limits.arrival_seconds if is_gone else math.inf,
    )


def may_be_continued(session: Source) -> bool:
    """Whether all of the guest's flows are still here, or were purged a moment ago, and nobody has had them."""
    if session.state is State.WATCHING:
        return session.outcome is Outcome.LEFT_WITHOUT_ARRIVAL
    return session.state not in (State.PURGING, State.ENDED)


def step(session: Source, event: Event, now: float) -> Decision:
    """:raises IllegalMessage: the peer said what may not be said now; nothing has changed."""
    return decision.step(TABLE, session.state, session, event, now)


def _asked(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Open)
    if session.version:
        raise IllegalMessage("this session was opened before")
    version = next((one for one in VERSIONS if one in event.message.versions), None)
    if version is None:
        reason = f"this host speaks versions {VERSIONS}, the destination {event.message.versions}; upgrade one"
        return replace(session, state=State.ENDED), [Say(GivesUp(reason)), End(Outcome.FAILED, reason)]
    session = replace(session, version=version)
    return _begin(session) if session.is_outgoing else (session, [WakeAt(now + session.limits.open_seconds)])


def _leaves(session: Source, event: Event, now: float) -> Decision:
    session = replace(session, is_outgoing=True)
    return _begin(session) if session.version else (session, [])


def _begin(session: Source) -> Decision:
    session = replace(session, state=State.COPYING, is_paused_early=session.is_suspended)
    return session, [_copy_ends(session), StartExport()]


def _never_left(session: Source, event: Event, now: float) -> Decision:
    reason = "this host's hypervisor does not say that the guest leaves"
    return replace(session, state=State.ENDED), [Say(GivesUp(reason)), End(Outcome.STAYED, reason)]


def _nothing_sent_yet(session: Source, event: Event, now: float) -> Decision:
    reason = event.message.reason if isinstance(event, PeerSaid) else event.reason  # type: ignore[union-attr]
    return replace(session, state=State.ENDED), [End(Outcome.FAILED, reason)]


def _started(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, Done)
    if session.version == 1:
        return session, [Say(Offer(1, event.count)), ExportNext()]
    return replace(session, state=State.OFFERED), [SayOffer(event.count)]


def _answered(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Answer)
    session = replace(_still_wanted(session, now), state=State.COPYING)
    return session, [Choose(event.message.places, event.message.kinds), ExportNext()]


def _paused_while_offered(session: Source, event: Event, now: float) -> Decision:
    """What changed up to here changed while the guest ran; what is deleted from here on says nothing."""
    if session.is_suspended:
        return session, []
    return replace(session, is_suspended=True, is_paused_early=True), [ExportChanges(is_last=False)]


def _copied(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, Done)
    session = replace(_still_wanted(session, now), exported=session.exported + event.count)
    if not event.is_all:
        return session, [ExportNext()]
    in_sync = Say(InSync(session.exported))
    if session.is_suspended:
        return replace(session, state=State.DRAINED), [
            in_sync,
            ExportChanges(is_last=True, says_removals=not session.is_paused_early),
        ]
    session = replace(session, state=State.FOLLOWING, resync_at=now + session.limits.resync_seconds)
    return session, [in_sync, WakeAt(now + session.limits.delta_seconds)]


def _copy_ends(session: Source) -> WakeAt:
    return WakeAt(min(session.deadline, session.purge_at))


def _still_wanted(session: Source, now: float) -> Source:
    """The destination takes the flows of a guest that has left already: it gets its time for each step of it."""
    return replace(session, purge_at=now + session.limits.arrival_seconds) if session.is_gone else session


def _copies_too_long(session: Source, event: Event, now: float) -> Decision:
    if now >= session.deadline:
        return _abandon(session, TOO_LONG)
    if now >= session.purge_at:
        return _abandon(session, UNWANTED)
    return session, [_copy_ends(session)]


def _paused_before_copying(session: Source, event: Event, now: float) -> Decision:
    return replace(session, is_suspended=True), []


def _paused_while_copying(session: Source, event: Event, now: float) -> Decision:
    """What was deleted up to here was deleted while the guest ran, and travels; what is deleted later does not."""
    if session.is_suspended:
        return session, []
    return replace(session, is_suspended=True, is_paused_early=True), [ExportChanges(is_last=False)]


def _follow(session: Source, event: Event, now: float) -> Decision:
    if now >= session.deadline:
        return _abandon(session, TOO_LONG)
    is_due = WakeAt(session.deadline)  # for what the line has no room for may wait until nobody wants it
    if now >= session.resync_at:
        return replace(session, resync_at=now + session.limits.resync_seconds), [is_due, Resync()]
    return session, [is_due, ExportChanges(is_last=False)]


def _followed(session: Source, event: Event, now: float) -> Decision:
    return session, [WakeAt(now + session.limits.delta_seconds)]


def _resynced(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, Done)
    if event.is_all:
        return replace(session, resync_at=now + session.limits.resync_seconds), [ExportChanges(is_last=False)]
    return session, [Resync()]


def _paused(session: Source, event: Event, now: float) -> Decision:
    return replace(session, state=State.DRAINED, is_suspended=True), [ExportChanges(is_last=True)]


def _drained(session: Source, event: Event, now: float) -> Decision:
    session = _still_wanted(session, now)
    return session, [_next_wake(session)]


def _complete(session: Source, event: Event, now: float) -> Decision:
    return _purge_when_arrived(replace(session, has_complete=True))


def _arrived(session: Source, event: Event, now: float) -> Decision:
    return _purge_when_arrived(replace(session, has_arrived=True))


def _purge_when_arrived(session: Source) -> Decision:
    if session.has_complete and session.has_arrived:
        return replace(session, state=State.PURGING), [Purge()]
    return session, []


def _comes_back(session: Source, event: Event, now: float) -> Decision:
    if session.is_gone:  # it came again, or was started anew, and nobody had said that it would
        reason = "the guest had left, and is here again; what it left here before was kept"
        return replace(session, state=State.ENDED), [Say(GivesUp(reason)), End(Outcome.UNCLEAR, reason)]
    reason = "the guest stays on the source"
    return replace(session, state=State.ENDED), [Say(Stays(reason)), End(Outcome.STAYED, reason)]


def _resumed(session: Source, event: Event, now: float) -> Decision:
    """Before the last changes are sent, RESUMED means something only after the guest was paused for the move."""
    return _comes_back(session, event, now) if session.is_suspended else (session, [])


def _peer_says_it_stays(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Stays)
    if session.is_gone:  # said too late to be true: who was to be stopped has left, or left in a later migration
        reason = session.reason or f"the guest has left, and the destination says: {event.message.reason}"
        return replace(session, state=State.ABANDONED, reason=reason), [_next_wake(session)]
    return replace(session, state=State.ENDED), [End(Outcome.STAYED, event.message.reason)]


def _gone(session: Source, event: Event, now: float) -> Decision:
    if session.is_gone:  # said before, by the hook or by the event
        return session, []
    session = _noted_gone(session, now)
    return session, [_next_wake(session)]


def _noted_gone(session: Source, now: float) -> Source:
    return session if session.is_gone else replace(session, is_gone=True, purge_at=now + session.limits.arrival_seconds)


def _gone_while_copying(session: Source, event: Event, now: float) -> Decision:
    """The guest was faster than its flows: they are still here, and go on their way."""
    if session.is_gone:
        return session, []
    session = replace(_noted_gone(session, now), is_suspended=True, is_paused_early=True)
    return session, [_copy_ends(session)]


def _gone_while_offered(session: Source, event: Event, now: float) -> Decision:
    """It may take long until the destination answers: what runs out meanwhile is still to be had after a new start."""
    is_news = not session.is_gone
    session, actions = _gone_while_copying(session, event, now)
    return session, [*actions, Keep()] if is_news else actions


def _gone_unasked(session: Source, event: Event, now: float) -> Decision:
    """Nobody will take what it leaves: it is noted, and removed when nobody has come for it."""
    if session.version:
        return _abandon(_noted_gone(session, now), "the guest was gone before its flows were sent")
    session = replace(_noted_gone(session, now), state=State.ABANDONED, reason="no agent at the destination asked")
    return session, [_next_wake(session), Keep()]


def _gone_unpaused(session: Source, event: Event, now: float) -> Decision:
    """Nobody said that it was paused for the move, as of a guest that its user had paused: its flows are still here."""
    session = replace(_noted_gone(session, now), state=State.DRAINED, is_suspended=True)
    return session, [_next_wake(session), ExportChanges(is_last=True, says_removals=False)]


def _next_wake(session: Source) -> WakeAt:
    return WakeAt(session.purge_at if session.is_gone else session.deadline)


def _nobody_spoke(session: Source, event: Event, now: float) -> Decision:
    if now < (session.purge_at if session.is_gone else session.deadline):
        return session, [_next_wake(session)]
    if session.is_gone:
        return replace(session, state=State.PURGING), [Purge()]
    reason = session.reason or "nobody said where the guest is"
    return replace(session, state=State.ENDED), [Say(GivesUp(reason)), End(Outcome.UNCLEAR, reason)]


def _purges(session: Source) -> list[Action]:
    return [Purge(), SayAgain()] if session.asks_again else [Purge()]


def _purged(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, Done)
    if not session.has_arrived:
        outcome = Outcome.LEFT_WITHOUT_ARRIVAL
    elif event.refused:
        outcome = Outcome.FAILED
    else:
        outcome = Outcome.MOVED
    said = Say(Purged(event.count, event.refused), is_durable=True)
    if session.comes_back:  # what comes with it must not be taken for late
        return replace(session, state=State.ENDED), [said, End(outcome, session.reason)]
    session = replace(session, state=State.WATCHING, outcome=outcome, failed_purges=0)
    return session, [said, WakeAt(now + session.limits.watch_seconds)]


def _look_for_late(session: Source, event: Event, now: float) -> Decision:
    return session, [PurgeLate()]


def _watched(session: Source, event: Event, now: float) -> Decision:
    return replace(session, state=State.ENDED), [End(session.outcome, session.reason)]


def _watched_in_vain(session: Source, event: Event, now: float) -> Decision:
    """All that was exported is gone: how the migration went does not change by it."""
    assert isinstance(event, ActionFailed)
    failed = session.failed_purges + 1
    if failed < PURGE_TRIES:
        return replace(session, failed_purges=failed), [WakeAt(now + PURGE_AGAIN_SECONDS)]
    reason = decision.joined(f"what late packets have made here was not looked for: {event.reason}", session.reason)
    return replace(session, state=State.ENDED), [End(session.outcome, reason)]


def _purge_failed(session: Source, event: Event, now: float) -> Decision:
    """A device may be in trouble for a moment, and nothing else removes what is left here."""
    assert isinstance(event, ActionFailed)
    failed = session.failed_purges + 1
    if failed == PURGE_TRIES:
        return replace(session, state=State.ENDED), [End(Outcome.FAILED, decision.joined(event.reason, session.reason))]
    if failed == 1:
        reason = decision.joined(session.reason, f"the purge was tried again; it failed first: {event.reason}")
        session = replace(session, reason=reason)
    again_at = now + PURGE_AGAIN_SECONDS
    return replace(session, failed_purges=failed, purge_at=again_at), [WakeAt(again_at)]


def _purge_again(session: Source, event: Event, now: float) -> Decision:
    if not session.failed_purges:
        return session, []
    if now < session.purge_at:
        return session, [WakeAt(session.purge_at)]
    return session, _purges(session)


def _comes_here_unpurged(session: Source, event: Event, now: float) -> Decision:
    """What is left here goes before anything is put in, if it can."""
    return replace(session, comes_back=True), _purges(session) if session.failed_purges else []


def _is_here_unpurged(session: Source, event: Event, now: float) -> Decision:
    reason = decision.joined("the guest is here again; what it left here before was not all removed", session.reason)
    return replace(session, state=State.ENDED), [End(Outcome.FAILED, reason)]


def _failed(session: Source, event: Event, now: float) -> Decision:
    match event:
        case PeerSaid(message=GivesUp(reason=reason)):
            session, actions = _abandon(session, f"the destination gave up: {reason}")
            actions = actions[1:]  # it knows
        case ActionFailed(reason=reason) | PeerLost(reason=reason):
            session, actions = _abandon(session, reason)
        case _:
            raise AssertionError(event)
    return session, actions


def _abandon(session: Source, reason: str) -> Decision:
    return replace(session, state=State.ABANDONED, reason=reason), [Say(GivesUp(reason)), _next_wake(session)]


def _superseded(session: Source, event: Event, now: float) -> Decision:
    """The guest can only move away from here because it stayed."""
    reason = session.reason or "another migration of the guest from here began"
    return replace(session, state=State.ENDED), [Say(Stays(reason)), End(Outcome.STAYED, reason)]


def _comes_back_early(session: Source, event: Event, now: float) -> Decision:
    """Where it went its flows may still be wanted; what it has here from now on is no late packet's."""
    return replace(session, comes_back=session.is_gone), []


def _comes_here(session: Source, event: Event, now: float) -> Decision:
    """A guest can only come here because it has left: nothing has to be waited for."""
    if not session.is_gone:
        return session, []
    # Who said COMPLETE has had the flows, and the guest comes from there. Else they were nowhere but here.
    is_moved = session.has_arrived or session.has_complete
    return replace(session, state=State.PURGING, has_arrived=is_moved, comes_back=True), [Purge()]


def _opened_complete(session: Source, event: Event, now: float) -> Decision:
    """By a destination that had all of it before its agent was started anew."""
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Open)
    if session.version or not event.message.has_all:
        raise IllegalMessage("this session was opened before")
    return replace(session, version=PROTOCOL_VERSION), [_next_wake(session)]


def _continued(session: Source, event: Event, now: float) -> Decision:
    return replace(session, state=State.ENDED), [HandOver()]


def _nobody_goes_on(session: Source, event: Event, now: float) -> Decision:
    assert isinstance(event, ActionFailed)
    return session, [End(Outcome.FAILED, f"no other session could go on with it: {event.reason}")]


def _ignore(session: Source, event: Event, now: float) -> Decision:
    return session, []


_WHEN_IT_FAILS: dict[decision.Cause, decision.Handler[Source]] = {
    "ActionFailed": _failed,
    "PeerLost": _failed,
    GivesUp: _failed,
    Stays: _peer_says_it_stays,
    "Superseded": _superseded,
    "Continued": _continued,
}

TABLE: dict[State, dict[decision.Cause, decision.Handler[Source]]] = {
    State.WAITING: {
        Open: _asked,
        Phase.OUTGOING: _leaves,
        Phase.SUSPENDED: _paused_before_copying,
        Phase.RESUMED: _resumed,
        Phase.STOPPED: _gone_unasked,
        TimePassed: _never_left,
        "ActionFailed": _nothing_sent_yet,
        "PeerLost": _nothing_sent_yet,
        GivesUp: _nothing_sent_yet,
        Stays: _peer_says_it_stays,
        "Superseded": _superseded,
        "Continued": _continued,
    },
    State.OFFERED: {
        Answer: _answered,
        Phase.SUSPENDED: _paused_while_offered,
        Phase.RESUMED: _resumed,
        Phase.ROLLBACK: _comes_back,
        Phase.STOPPED: _gone_while_offered,
        TimePassed: _copies_too_long,
        "Returns": _comes_back_early,
        **_WHEN_IT_FAILS,
    },
    State.COPYING: {
        "StartExport": _started,
        Room: _ignore,
        "ExportNext": _copied,
        Phase.SUSPENDED: _paused_while_copying,
        Phase.RESUMED: _resumed,
        Phase.ROLLBACK: _comes_back,
        Phase.STOPPED: _gone_while_copying,
        TimePassed: _copies_too_long,
        "Returns": _comes_back_early,
        **_WHEN_IT_FAILS,
    },
    State.FOLLOWING: {
        Room: _ignore,
        TimePassed: _follow,
        "ExportChanges": _followed,
        "Resync": _resynced,
        Phase.SUSPENDED: _paused,
        Phase.ROLLBACK: _comes_back,
        Phase.STOPPED: _gone_unpaused,
        **_WHEN_IT_FAILS,
    },
    State.DRAINED: {
        Open: _opened_complete,
        Room: _ignore,
        "ExportChanges": _drained,
        Complete: _complete,
        Arrived: _arrived,
        Phase.RESUMED: _comes_back,
        Phase.ROLLBACK: _comes_back,
        Phase.STOPPED: _gone,
        TimePassed: _nobody_spoke,
        "Returns": _comes_here,
        **_WHEN_IT_FAILS,
    },
    State.PURGING: {
        Room: _ignore,
        "Purge": _purged,
        "ActionFailed": _purge_failed,
        TimePassed: _purge_again,
        Phase.RESUMED: _is_here_unpurged,
        Phase.ROLLBACK: _is_here_unpurged,
        "Returns": _comes_here_unpurged,
        "Superseded": _is_here_unpurged,
        Complete: _ignore,
        Arrived: _ignore,
        GivesUp: _ignore,
    },
    State.WATCHING: {
        Room: _ignore,
        TimePassed: _look_for_late,
        Phase.RESUMED: _watched,
        Phase.ROLLBACK: _watched,
        "Continued": _continued,
        "PurgeLate": _watched,
        "ActionFailed": _watched_in_vain,
        "Returns": _watched,
        "Superseded": _watched,
        "PeerLost": _ignore,
        Complete: _ignore,
        Arrived: _ignore,
        GivesUp: _ignore,
    },
    State.ABANDONED: {
        Phase.RESUMED: _comes_back,
        Phase.ROLLBACK: _comes_back,
        Phase.STOPPED: _gone,
        TimePassed: _nobody_spoke,
        "Returns": _comes_here,
        Answer: _ignore,
        Room: _ignore,
        Complete: _ignore,
        Arrived: _ignore,
        GivesUp: _ignore,
        Stays: _peer_says_it_stays,
        "Superseded": _superseded,
        "Continued": _continued,
    },
    State.ENDED: {
        Answer: _ignore,
        Room: _ignore,
        Complete: _ignore,
        Arrived: _ignore,
        GivesUp: _ignore,
        Stays: _ignore,
        "ActionFailed": _nobody_goes_on,
    },
}
"""What each state answers to. What is not listed changes nothing; from the peer it is refused."""
