"""What the host does that a guest comes to.

LOOKING      it is not known yet which host the guest leaves
ASKED        the source has been asked for the guest's flows
NEGOTIATING  the source has said what there is; what can be taken is being seen, or an operator asked
RECEIVING    flows come; they go into the device as soon as the port's scope is known here
COMPLETE     all of it is in the device, read back and journaled; the guest is not here yet
ARRIVED      the guest runs here and the source has been told; it purges now
ORPHANED     no more flows come; what there is is kept until it is known whether the guest comes
DISCARDING   the guest does not come, and not all that was put in could be removed; it is tried again
ENDED

What was put in is discarded when it is known that the guest does not come: the source has it all. That nobody has said
yet that the guest runs here does not mean that it does not.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from sami_plugin.migration import decision
from sami_plugin.migration.decision import (
    Action,
    ActionFailed,
    Ask,
    CallAgain,
    Discard,
    Done,
    End,
    Event,
    FindScope,
    Found,
    GuestDid,
    HandOver,
    Import,
    LapsePlaces,
    Negotiate,
    Negotiated,
    OperatorSaid,
    PeerLost,
    PeerSaid,
    Renew,
    Say,
    TimePassed,
    Verify,
    WakeAt,
    replace,
)
from sami_plugin.model.migration import (
    Answer,
    Arrived,
    AskAgain,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    InSync,
    Offer,
    Outcome,
    Phase,
    Purged,
    Stays,
)
from sami_plugin.model.settings import Limits
from sami_plugin.model.verdict import Verdict

NO_ANSWER = "the source did not answer; is its agent running?"
CALL_AGAIN_SECONDS = 2.0
"""After so long without an answer the source is called anew."""
ZONE_POLL_SECONDS = 0.02
REFUSED_SECONDS, REFUSED_POLL_SECONDS = 2.0, 0.2
"""So long, and so often, it is looked again where a guest's ports are after something of it was refused."""
DISCARD_TRIES, DISCARD_AGAIN_SECONDS = 3, 1.0
"""So often, and after so long, it is tried to remove what was put in for a guest that did not come."""
MOST_TIMES_ASKED = 32
"""Each new start of the source's agent takes one; more than that is no accident."""


class State(enum.StrEnum):
    """Where the destination's session is; told above."""

    LOOKING = "looking"
    ASKED = "asked"
    NEGOTIATING = "negotiating"
    RECEIVING = "receiving"
    COMPLETE = "complete"
    ARRIVED = "arrived"
    ORPHANED = "orphaned"
    DISCARDING = "discarding"
    ENDED = "ended"


_OPEN = (State.LOOKING, State.ASKED, State.NEGOTIATING, State.RECEIVING)


@dataclass(frozen=True)
class Destination:
    """All that a decision of the destination depends on."""

    limits: Limits
    deadline: float
    """While LOOKING and ASKED, until when somebody has to answer; afterwards, when the session ends at the latest."""
    session_deadline: float
    state: State = State.LOOKING
    source: str = ""
    version: int = 0
    """Of the messages; 0 before the source answered."""
    call_again_at: float = math.inf
    verdict: Verdict | None = Verdict.PROCEED
    """None as long as the migration is held up until the policy has spoken; ASK until the operator has."""
    verdict_deadline: float = math.inf
    answer: Answer | None = None
    """What the source waits for."""
    kept_until: float = math.inf
    """When the places that are kept for this session are not any more."""
    in_sync: bool = False
    has_caught_up: bool = False
    is_started: bool = False
    ports: int | None = None
    """How many the source offered; None before it answered."""
    has_scope: bool = False
    look_until: float = 0.0
    """Until then what was refused may be taken yet: a port that was found may become better known."""
    zone_deadline: float = 0.0
    renew_at: float = math.inf
    has_last: bool = False
    runs_here: bool = False
    has_come: bool = False
    """This agent was told that the guest runs here; else `runs_here` may be of a stay that is over."""
    imported: int = 0
    refused: int = 0
    reason: str = ""
    outcome: Outcome = Outcome.STAYED
    """Of the session, when what it has put in is discarded."""
    failed_discards: int = 0
    trouble: str = ""
    """Why it was not all discarded at first."""
    times_asked: int = 1
    """This session and those with which it goes on."""


Decision = tuple[Destination, list[Action]]


def new(limits: Limits, now: float, *, held_since: float | None = None) -> Destination:
    """What is known when a guest is about to come; `held_since`: the migration waits for what the policy says."""
    made = Destination(limits, now + limits.open_seconds, now + limits.session_seconds)
    if held_since is None:
        return made
    return replace(made, verdict=None, verdict_deadline=held_since + limits.verdict_seconds)


def continuing(
    limits: Limits,
    now: float,
    source: str,
    *,
    has_all: bool,
    is_started: bool,
    runs_here: bool,
    has_come: bool = False,
    has_some: bool = True,
    held_since: float | None = None,
    times_asked: int = 1,
) -> Destination:
    """What is known when this session goes on with another one.

    `has_all`: everything is in the device; `has_some`: something may be.
    """
    return replace(
        new(limits, now, held_since=held_since),
        state=State.COMPLETE if has_all else State.ASKED if source else State.LOOKING,
        deadline=now + (limits.session_seconds if has_all else limits.open_seconds),
        source=source,
        renew_at=now if has_some else math.inf,
        is_started=is_started or runs_here,
        zone_deadline=now + limits.zone_seconds,
        runs_here=runs_here,
        has_come=has_come,
        times_asked=times_asked,
    )


def begin(session: Destination, source: str, now: float) -> Decision:
    """What is done then; `source` may be empty, where nobody said which host the guest leaves."""
    if session.state is State.COMPLETE:
        asked: list[Action] = [Ask(source, has_all=True)]
        if session.runs_here:
            session, (wake, arrived) = _tell_arrival(session, now)
            return session, [wake, *asked, arrived]
        return session, [*asked, _next_wake(session, now)]
    return _ask(session, source, now) if source else (session, [_next_wake(session, now)])


def _ask(session: Destination, source: str, now: float) -> Decision:
    session = replace(
        session,
        state=State.ASKED,
        source=source,
        deadline=now + session.limits.open_seconds,
        call_again_at=now + CALL_AGAIN_SECONDS,
    )
    return session, [_next_wake(session, now), Ask(source)]


def _found(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, Found)
    return _ask(session, event.source, now)


def _found_another(session: Destination, event: Event, now: float) -> Decision:
    """One of them errs or lies, and nobody here knows which."""
    assert isinstance(event, Found)
    if event.source == session.source:
        return session, []
    reason = f"{session.source} and {event.source} both say that the guest leaves them"
    session, actions = _give_up(replace(session, renew_at=math.inf), reason, now)
    return session, actions if session.runs_here else [*actions, Discard()]


def let_go(session: Destination) -> Destination:
    """What is known from the very moment on in which nobody waits for a verdict any more; `LetGo` tells of it."""
    return _may_come(session) if session.verdict in (None, Verdict.ASK) else session


def is_open(session: Destination) -> bool:
    """Whether the flows are still on their way: what is told of a migration now may be told of this one."""
    return session.state in _OPEN and not session.runs_here


def has_caught_up(session: Destination) -> bool:
    """Whether all that the source had at first is in the device, and was looked at; or nothing more is waited for."""
    return session.has_caught_up or session.state not in _OPEN


def step(session: Destination, event: Event, now: float) -> Decision:
    """:raises IllegalMessage: the peer said what may not be said now; nothing has changed."""
    return decision.step(TABLE, session.state, session, event, now)


def _offered(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Offer)
    offer, may_refuse = event.message, session.verdict is not Verdict.PROCEED
    if session.verdict is Verdict.ASK:  # about what was not known: the policy says anew, and nobody has more time
        session = replace(session, verdict=None, reason="")
    else:
        session = replace(session, verdict_deadline=math.inf)
    session = replace(
        session,
        state=State.RECEIVING if offer.version == 1 else State.NEGOTIATING,
        version=offer.version,
        deadline=session.session_deadline,
        call_again_at=math.inf,
        renew_at=now + session.limits.hold_seconds / 3,
        ports=offer.ports,
        has_scope=offer.ports == 0,
    )
    actions: list[Action] = [_next_wake(session, now)]
    if may_refuse or offer.version > 1:
        actions.append(Negotiate(offer, may_refuse))
    if session.is_started:  # last, for where it fails nothing behind it is done
        actions.append(FindScope())
    return session, actions


def _negotiated(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, Negotiated)
    session = replace(session, answer=event.answer)
    if session.verdict is not None:  # nobody is held up by it any more
        return _go_on(session, now)
    if event.verdict is Verdict.VETO:
        return _refuse(session, event.reason)
    if event.verdict is Verdict.ASK:
        asked_until = min(session.verdict_deadline, now + session.limits.ask_seconds)
        session = replace(session, verdict=Verdict.ASK, verdict_deadline=asked_until, reason=event.reason)
        # Until then the source may be found, and answer.
        session = replace(session, deadline=max(session.deadline, asked_until))
        return session, [_next_wake(session, now)]
    return _go_on(session, now)


def _operator_said(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, OperatorSaid)
    if session.verdict not in (None, Verdict.ASK):  # None: he was asked by the session before this one
        return session, []
    why = f": {session.reason}" if session.reason else ""
    return _go_on(session, now) if event.may_come else _refuse(session, f"the operator refused{why}")


def _verdict_is_due(session: Destination, now: float) -> Decision:
    """The source has not answered in time, or the operator has not."""
    session = replace(session, verdict_deadline=math.inf)
    if session.verdict is None:
        why = "nothing says which host the guest leaves" if not session.source else "the source has not answered yet"
        return session, [Negotiate(None, why_unknown=why), _next_wake(session, now)]
    if session.limits.silence_means is Verdict.VETO:
        return _refuse(session, f"no operator answered within ask_seconds: {session.reason}")
    return _go_on(session, now)


def _may_come(session: Destination) -> Destination:
    if session.verdict is Verdict.ASK and session.state is not State.ORPHANED:
        session = replace(session, reason="")
    return replace(session, verdict=Verdict.PROCEED, verdict_deadline=math.inf)


def _was_let_go(session: Destination, event: Event, now: float) -> Decision:
    return _go_on(session, now)


def _go_on(session: Destination, now: float) -> Decision:
    """The guest may come."""
    session = _may_come(session)
    said, session = session.answer, replace(session, answer=None)
    if session.state is not State.NEGOTIATING or said is None:
        return session, [_next_wake(session, now)]
    session = replace(session, state=State.RECEIVING, kept_until=now + session.limits.reservation_seconds)
    return session, [Say(said), _next_wake(session, now)]


def _refuse(session: Destination, reason: str) -> Decision:
    """The guest may not come."""
    return _undo(replace(session, verdict=Verdict.VETO), Outcome.STAYED, reason, Say(Stays(reason)))


def _started(session: Destination, event: Event, now: float) -> Decision:
    if session.is_started:
        return session, []
    session = replace(session, is_started=True, zone_deadline=now + session.limits.zone_seconds)
    actions: list[Action] = [FindScope()] if session.ports else []
    if session.verdict in (None, Verdict.ASK):  # who was held up has gone on
        session, more = _go_on(session, now)
        actions = [*more, *actions]
    return session, actions


def _scope_asked(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, Done)
    if not event.is_all:
        return session, [_next_wake(session, now)]
    if not event.count:
        reason = "the port's zone did not appear within zone_seconds; is the network's agent running?"
        return _give_up(session, reason, now)
    session = replace(session, has_scope=True)
    return session, [Verify(), _next_wake(session, now)]


def _received(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Flows)
    return session, [Import(event.message.payload)]


def _in_sync(session: Destination, event: Event, now: float) -> Decision:
    return replace(session, in_sync=True), [Verify()] if session.has_scope else []


def _changed(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, FlowChanges)
    actions: list[Action] = [Import(event.message.payload)]
    if event.message.is_last:
        session = replace(session, has_last=True)
        if session.has_scope:
            actions.append(Verify())
    return session, actions


def _verified(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, Done)
    session = replace(
        session,
        imported=event.count,
        refused=event.refused,
        has_caught_up=session.has_caught_up or (session.in_sync and session.has_scope),
    )
    if not (session.has_last and session.has_scope):
        if session.refused and not session.look_until:
            session = replace(session, look_until=now + REFUSED_SECONDS)
        return session, [_next_wake(session, now)] if _looks_again(session, now) else []
    session = replace(session, state=State.COMPLETE)
    actions: list[Action] = [Say(Complete(session.imported, session.refused), is_durable=True)]
    if session.has_come:
        session, more = _tell_arrival(session, now)
        actions += more
    return session, actions


def _runs(session: Destination, event: Event, now: float) -> Decision:
    """Where nobody said STARTED, this says it too."""
    return _started(replace(session, runs_here=True, has_come=True), event, now)


def _runs_complete(session: Destination, event: Event, now: float) -> Decision:
    return _tell_arrival(replace(session, runs_here=True), now)


def _tell_arrival(session: Destination, now: float) -> Decision:
    wake = WakeAt(now + session.limits.arrival_seconds)
    return replace(session, state=State.ARRIVED), [wake, Say(Arrived(), is_durable=True)]


def _never_found(session: Destination, event: Event, now: float) -> Decision:
    if now >= session.verdict_deadline or (session.verdict is None and now >= session.deadline):
        return _verdict_is_due(session, now)
    if now < session.deadline:
        return session, [_next_wake(session, now)]
    reason = "nothing says which host the guest leaves; did an agent run there before, and could it mark its guests?"
    if not session.is_started:  # a veto, or a guest that moves without running: nothing more will be heard of it
        return _end(session, Outcome.FAILED, reason)
    return _give_up(session, reason, now)


def _tick(session: Destination, event: Event, now: float) -> Decision:
    """The zone is asked for until it is there, what waits is kept from running out, and nothing lasts for ever."""
    if now >= session.verdict_deadline:
        return _verdict_is_due(session, now)
    if now >= session.deadline:
        if session.state is State.ASKED:
            return _give_up(session, NO_ANSWER, now)
        if session.state is State.COMPLETE:  # the guest may run here, and then these are its flows
            return _end(session, Outcome.UNCLEAR, "nobody said whether the guest came; its flows were kept")
        return _give_up(session, "the migration took longer than session_seconds", now)
    actions: list[Action] = []
    if now >= session.call_again_at:
        session = replace(session, call_again_at=now + CALL_AGAIN_SECONDS)
        actions.append(CallAgain())
    if now >= session.kept_until:
        session = replace(session, kept_until=math.inf)
        actions.append(LapsePlaces("they were kept for reservation_seconds"))
    if _looks_for_scope(session):
        look = [FindScope(is_last=now >= session.zone_deadline)]
    else:
        look = [FindScope()] if _looks_again(session, now) else []
    if now >= session.renew_at and not session.runs_here:
        session = replace(session, renew_at=now + session.limits.hold_seconds / 3)
        actions.append(Renew())
    return session, [*actions, _next_wake(session, now), *look]  # which may fail, and nothing behind it would be done


def _looks_for_scope(session: Destination) -> bool:
    return session.is_started and session.ports is not None and not session.has_scope


def _looks_again(session: Destination, now: float) -> bool:
    return session.state is State.RECEIVING and session.has_scope and now < session.look_until


def _next_wake(session: Destination, now: float) -> WakeAt:
    if session.state is State.ORPHANED:
        return WakeAt(max(now, min(_orphaned_until(session), session.verdict_deadline, session.renew_at)))
    times = [session.deadline, session.call_again_at, session.verdict_deadline, session.kept_until]
    if _looks_for_scope(session):
        times.append(now + ZONE_POLL_SECONDS)
    elif _looks_again(session, now):
        times.append(now + REFUSED_POLL_SECONDS)
    if not session.runs_here:
        times.append(session.renew_at)
    return WakeAt(max(now, min(times)))


def _never_came(session: Destination, event: Event, now: float) -> Decision:
    if session.runs_here:  # it came, ran, and is gone again: another story than this session's
        return replace(session, state=State.ENDED), [End(Outcome.UNCLEAR, "the guest came and ended")]
    reason = "the guest did not come"
    return _undo(session, Outcome.STAYED, reason, Say(Stays(reason)))


def _moves_on(session: Destination, event: Event, now: float) -> Decision:
    """What comes from now on would be carried on by nobody, and stay behind."""
    if not session.runs_here:
        return session, []
    return _give_up(session, "the guest moved on before all of its flows had come", now)


def _source_says_it_stays(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Stays)
    if session.runs_here:
        return replace(session, state=State.ENDED), [End(Outcome.UNCLEAR, "both hosts say that the guest runs there")]
    return _undo(session, Outcome.STAYED, event.message.reason)


def _purged(session: Destination, event: Event, now: float) -> Decision:
    assert isinstance(event, PeerSaid)
    assert isinstance(event.message, Purged)
    if event.message.left:
        return _end(session, Outcome.FAILED, f"{event.message.left} flows are left at the source")
    return _end(session, Outcome.MOVED, session.reason)


def _purged_unarrived(session: Destination, event: Event, now: float) -> Decision:
    """The source knows that the guest has left it, and its flows are here alone."""
    return _end(
        session, Outcome.UNCLEAR, "the guest left the source, and nobody said that it came; its flows were kept"
    )


def _purge_unheard(session: Destination, event: Event, now: float) -> Decision:
    return _end(session, Outcome.MOVED, "the source did not say that it purged")


def _end(session: Destination, outcome: Outcome, reason: str) -> Decision:
    return replace(session, state=State.ENDED), [End(outcome, reason)]


def _undo(session: Destination, outcome: Outcome, reason: str, *said: Action) -> Decision:
    """The guest does not come."""
    session = replace(session, state=State.ENDED, outcome=outcome, reason=reason)
    return session, [*said, Discard(), End(outcome, decision.joined(reason, session.trouble))]


def _failed(session: Destination, event: Event, now: float) -> Decision:
    match event:
        case ActionFailed(what="Renew"):  # there is time for a second and a third try
            return session, [_next_wake(session, now)]
        case ActionFailed(what="FindScope") if now < session.zone_deadline:  # the network's agent may be at work
            return session, [_next_wake(session, now)]
        case ActionFailed(reason=reason) | PeerLost(reason=reason):
            return _give_up(session, reason, now)
        case PeerSaid(message=GivesUp(reason=reason)):
            session, actions = _give_up(session, f"the source gave up: {reason}", now)
            return session, [action for action in actions if not isinstance(action, Say)]  # it knows
        case _:
            raise AssertionError(event)


def _give_up(session: Destination, reason: str, now: float) -> Decision:
    if session.runs_here:
        return replace(session, state=State.ENDED), [Say(GivesUp(reason)), End(Outcome.FAILED, reason)]
    asked_until = session.verdict_deadline if session.verdict is Verdict.ASK else math.inf
    session = replace(session, state=State.ORPHANED, reason=reason, verdict_deadline=asked_until)
    # Of a guest that has not begun to come, and of which nothing came: if it comes all the same, it is asked for anew.
    is_of_nothing = session.renew_at == math.inf and not session.is_started
    session = replace(
        session, deadline=now + session.limits.open_seconds if is_of_nothing else session.session_deadline
    )
    actions: list[Action] = [Say(GivesUp(reason)), LapsePlaces(), _next_wake(session, now)]
    if session.verdict is None:
        actions.append(Negotiate(None, why_unknown=reason))
    return session, actions


def _peer_lost_after_complete(session: Destination, event: Event, now: float) -> Decision:
    """Everything is in the device: it stays there until the hypervisor says where the guest is."""
    return session, []


def _orphaned_until(session: Destination) -> float:
    return session.session_deadline if session.verdict is Verdict.ASK else session.deadline


def _started_without(session: Destination, event: Event, now: float) -> Decision:
    was_expected = session.deadline == session.session_deadline
    session = replace(session, deadline=session.session_deadline)
    if session.verdict in (None, Verdict.ASK):
        return _go_on(session, now)
    return session, [] if was_expected else [_next_wake(session, now)]


def _came_without(session: Destination, event: Event, now: float) -> Decision:
    return _end(replace(session, runs_here=True), Outcome.FAILED, session.reason)


def _stayed_without(session: Destination, event: Event, now: float) -> Decision:
    said = [Say(Stays("the guest did not come"))] if isinstance(event, GuestDid) else []
    return _undo(session, Outcome.STAYED, session.reason, *said)


def _orphan_ends(session: Destination, event: Event, now: float) -> Decision:
    if now >= session.verdict_deadline:
        return _verdict_is_due(session, now)
    if now >= _orphaned_until(session):
        return _end(session, Outcome.FAILED, f"{session.reason}; nobody said whether the guest came")
    actions: list[Action] = []
    if now >= session.renew_at:
        session = replace(session, renew_at=now + session.limits.hold_seconds / 3)
        actions.append(Renew())
    return session, [*actions, _next_wake(session, now)]


def _orphan_goes_on(session: Destination, event: Event, now: float) -> Decision:
    """What could not be renewed is tried again; what could not be discarded is, when the guest does not come."""
    return session, [_next_wake(session, now)]


def _could_not_end(session: Destination, event: Event, now: float) -> Decision:
    """The action that failed stood before `End`, which was not done therefore; or nobody goes on."""
    assert isinstance(event, ActionFailed)
    if event.what == "HandOver":
        ends = _end if session.runs_here else _undo
        return ends(session, Outcome.FAILED, f"no other session could go on with it: {event.reason}")
    if session.runs_here:
        return _end(session, Outcome.FAILED, decision.joined(session.reason, event.reason))
    failed = session.failed_discards + 1
    if failed < DISCARD_TRIES:
        if failed == 1:
            trouble = f"to discard what was put in was tried again; it failed first: {event.reason}"
            session = replace(session, trouble=trouble)
        again_at = now + DISCARD_AGAIN_SECONDS
        return replace(session, state=State.DISCARDING, failed_discards=failed), [WakeAt(again_at)]
    return _left(session, event.reason)


def _discard_again(session: Destination, event: Event, now: float) -> Decision:
    return _undo(session, session.outcome, session.reason)


def _left(session: Destination, why: str) -> Decision:
    reason = f"what this session put in could not be discarded: {why}"
    return _end(session, Outcome.FAILED, decision.joined(session.reason, reason))


def _came_undiscarded(session: Destination, event: Event, now: float) -> Decision:
    """What runs here keeps its flows."""
    return _left(replace(session, runs_here=True), "the guest runs here after all")


def _comes_undiscarded(session: Destination, event: Event, now: float) -> Decision:
    return _left(session, "another migration of the guest to here began")


def _ask_again(session: Destination, event: Event, now: float) -> Decision:
    """The source cannot go on with this session. Another one takes over what this one has."""
    if session.times_asked >= MOST_TIMES_ASKED:
        return _give_up(session, f"{session.source} has begun anew {session.times_asked} times", now)
    return replace(session, state=State.ENDED), [HandOver()]


def _superseded(session: Destination, event: Event, now: float) -> Decision:
    reason = session.reason or "another migration of the guest to here began"
    if not session.runs_here:
        return _undo(session, Outcome.UNCLEAR, reason, Say(GivesUp(reason)))
    return replace(session, state=State.ENDED), [Say(GivesUp(reason)), End(Outcome.UNCLEAR, reason)]


def _ignore(session: Destination, event: Event, now: float) -> Decision:
    return session, []


_WHEN_IT_FAILS: dict[decision.Cause, decision.Handler[Destination]] = {
    "Found": _found_another,
    "ActionFailed": _failed,
    "PeerLost": _failed,
    GivesUp: _failed,
    Stays: _source_says_it_stays,
    Phase.STOPPED: _never_came,
    "Superseded": _superseded,
    AskAgain: _ask_again,
}

_VERDICT: dict[decision.Cause, decision.Handler[Destination]] = {
    "Negotiated": _negotiated,
    "OperatorSaid": _operator_said,
    "LetGo": _was_let_go,
}

_NOT_HEARD_ANY_MORE: dict[decision.Cause, decision.Handler[Destination]] = dict.fromkeys(
    (AskAgain, Flows, InSync, FlowChanges, Purged, GivesUp, Stays), _ignore
)

TABLE: dict[State, dict[decision.Cause, decision.Handler[Destination]]] = {
    State.LOOKING: {
        "Found": _found,
        **_VERDICT,
        Phase.STARTED: _started,
        Phase.RESUMED: _runs,
        TimePassed: _never_found,
        "ActionFailed": _failed,
        Phase.STOPPED: _never_came,
        "Superseded": _superseded,
    },
    State.ASKED: {
        Offer: _offered,
        Phase.SUSPENDED: _moves_on,
        **_VERDICT,
        Phase.STARTED: _started,
        "FindScope": _scope_asked,
        Phase.RESUMED: _runs,
        TimePassed: _tick,
        **_WHEN_IT_FAILS,
    },
    State.NEGOTIATING: {
        **_VERDICT,
        Phase.SUSPENDED: _moves_on,
        Phase.STARTED: _started,
        "FindScope": _scope_asked,
        Phase.RESUMED: _runs,
        TimePassed: _tick,
        **_WHEN_IT_FAILS,
    },
    State.RECEIVING: {
        **_VERDICT,
        Flows: _received,
        InSync: _in_sync,
        FlowChanges: _changed,
        Phase.SUSPENDED: _moves_on,
        "Verify": _verified,
        Phase.STARTED: _started,
        "FindScope": _scope_asked,
        Phase.RESUMED: _runs,
        TimePassed: _tick,
        **_WHEN_IT_FAILS,
    },
    State.COMPLETE: {
        Purged: _purged_unarrived,
        Phase.RESUMED: _runs_complete,
        TimePassed: _tick,
        **_WHEN_IT_FAILS,
        "PeerLost": _peer_lost_after_complete,
        GivesUp: _peer_lost_after_complete,
    },
    State.ARRIVED: {
        AskAgain: _ask_again,
        Purged: _purged,
        TimePassed: _purge_unheard,
        "PeerLost": _purge_unheard,
        GivesUp: _purge_unheard,
        "Superseded": _purge_unheard,
    },
    State.ORPHANED: {
        **_VERDICT,
        Phase.STARTED: _started_without,
        Phase.RESUMED: _came_without,
        Phase.STOPPED: _stayed_without,
        TimePassed: _orphan_ends,
        Offer: _ignore,
        Flows: _ignore,
        InSync: _ignore,
        FlowChanges: _ignore,
        Purged: _ignore,
        GivesUp: _ignore,
        Stays: _stayed_without,
        "ActionFailed": _orphan_goes_on,
        "Superseded": _superseded,
    },
    State.DISCARDING: {
        **_NOT_HEARD_ANY_MORE,
        TimePassed: _discard_again,
        Phase.RESUMED: _came_undiscarded,
        "Superseded": _comes_undiscarded,
    },
    State.ENDED: {
        **_NOT_HEARD_ANY_MORE,
        "ActionFailed": _could_not_end,
    },
}
"""What each state answers to. What is not listed changes nothing; from the peer it is refused."""
