"""What the destination decides, alone: inputs in, actions out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from sami_plugin.errors import IllegalMessage
from sami_plugin.migration import destination
from sami_plugin.migration.decision import (
    ActionFailed,
    Ask,
    CallAgain,
    Discard,
    Done,
    End,
    Event,
    FindScope,
    Found,
    HandOver,
    Import,
    LapsePlaces,
    PeerLost,
    PeerSaid,
    Renew,
    Say,
    Superseded,
    TimePassed,
    Verify,
    WakeAt,
)
from sami_plugin.migration.destination import Destination, State
from sami_plugin.model.migration import (
    Arrived,
    AskAgain,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    InSync,
    Message,
    Offer,
    Outcome,
    Phase,
    Purged,
    Stays,
)
from tests.unit.migration.sequences import LIMITS, choices, endless, lives
from tests.unit.migration.shell import Shell, guest
from tools.state_tables import MESSAGES

OFFERED = PeerSaid(Offer(1, 1))
FLOWS, IN_SYNC = PeerSaid(Flows(b"flows")), PeerSaid(InSync(1))
CHANGES, LAST = (PeerSaid(FlowChanges(b"changes", is_last=is_last)) for is_last in (False, True))
PURGED, STAYS, GIVES_UP = PeerSaid(Purged(1, 0)), PeerSaid(Stays("stays")), PeerSaid(GivesUp("no"))
STARTED, RESUMED, STOPPED = map(guest, (Phase.STARTED, Phase.RESUMED, Phase.STOPPED))
ARRIVES = [WakeAt(20.0), Say(Arrived(), is_durable=True)]

ASKS = destination.begin(destination.new(LIMITS, 0.0), "host-a", 0.0)[1]
NOT_ALL = PeerSaid(Purged(5, 2))
LEFT, NOT_COME = "2 flows are left at the source", "the guest did not come"


def new() -> Destination:
    return destination.begin(destination.new(LIMITS, 0.0), "host-a", 0.0)[0]


def shell(*events: Event) -> Shell:
    made = Shell(destination.step, new())
    made.begin(ASKS)
    for event in events:
        made.tell(event)
    return made


IN_STATE: dict[State, tuple[Event, ...]] = {
    State.LOOKING: (),
    State.ASKED: (),
    State.RECEIVING: (OFFERED, STARTED, FLOWS, IN_SYNC),
    State.COMPLETE: (OFFERED, STARTED, FLOWS, IN_SYNC, LAST),
    State.ARRIVED: (OFFERED, STARTED, FLOWS, IN_SYNC, LAST, RESUMED),
    State.ORPHANED: (OFFERED, STARTED, FLOWS, GIVES_UP),
    State.ENDED: (OFFERED, STARTED, FLOWS, STAYS),
}
HEARD: dict[State, set[type[Message]]] = {
    State.LOOKING: set(),
    State.ASKED: {AskAgain, Offer, GivesUp, Stays},
    State.NEGOTIATING: {AskAgain, GivesUp, Stays},
    State.RECEIVING: {AskAgain, Flows, InSync, FlowChanges, GivesUp, Stays},
    State.COMPLETE: {AskAgain, GivesUp, Purged, Stays},
    State.ARRIVED: {AskAgain, Purged, GivesUp},
    State.ORPHANED: {Offer, Flows, InSync, FlowChanges, Purged, GivesUp, Stays},
    State.DISCARDING: {AskAgain, Flows, InSync, FlowChanges, Purged, GivesUp, Stays},
    State.ENDED: {AskAgain, Flows, InSync, FlowChanges, Purged, GivesUp, Stays},
}
BEFORE_THE_GUEST = [State.ASKED, State.RECEIVING, State.COMPLETE]
SCOPE_FOUND = Done("FindScope", 1)
READ_BACK = Done("Verify", 7, refused=2)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ((OFFERED,), [WakeAt(3.0)]),
        ((OFFERED, STARTED), [FindScope()]),
        ((OFFERED, STARTED, Done("FindScope", is_all=False)), [WakeAt(destination.ZONE_POLL_SECONDS)]),
        ((OFFERED, STARTED, SCOPE_FOUND), [Verify(), WakeAt(3.0)]),
        ((OFFERED, FLOWS), [Import(b"flows")]),
        ((OFFERED, FLOWS, IN_SYNC), []),
        ((OFFERED, STARTED, SCOPE_FOUND, FLOWS, IN_SYNC), [Verify()]),
        ((OFFERED, STARTED, SCOPE_FOUND, CHANGES), [Import(b"changes")]),
        ((OFFERED, STARTED, SCOPE_FOUND, LAST), [Import(b"changes"), Verify()]),
        ((OFFERED, LAST), [Import(b"changes")]),
        ((OFFERED, LAST, STARTED, SCOPE_FOUND), [Verify(), WakeAt(3.0)]),
        ((OFFERED, STARTED, SCOPE_FOUND, READ_BACK), [WakeAt(destination.REFUSED_POLL_SECONDS)]),
        ((OFFERED, STARTED, SCOPE_FOUND, Done("Verify", 7)), []),
        ((STARTED, OFFERED), [WakeAt(destination.ZONE_POLL_SECONDS), FindScope()]),
        ((OFFERED, STARTED, SCOPE_FOUND, LAST, READ_BACK), [Say(Complete(7, 2), is_durable=True)]),
        ((PeerSaid(Offer(1, 0)), LAST), [Import(b"changes"), Verify()]),
        ((OFFERED, STARTED, SCOPE_FOUND, LAST, READ_BACK, RESUMED), ARRIVES),
        ((OFFERED, STARTED, SCOPE_FOUND, RESUMED, LAST, READ_BACK), [Say(Complete(7, 2), is_durable=True), *ARRIVES]),
        ((OFFERED, STARTED, SCOPE_FOUND, LAST, READ_BACK, RESUMED, PURGED), [End(Outcome.MOVED)]),
        ((OFFERED, STARTED, SCOPE_FOUND, LAST, READ_BACK, RESUMED, NOT_ALL), [End(Outcome.FAILED, LEFT)]),
        ((OFFERED, FLOWS, STOPPED), [Say(Stays(NOT_COME)), Discard(), End(Outcome.STAYED, NOT_COME)]),
        ((OFFERED, FLOWS, STAYS), [Discard(), End(Outcome.STAYED, "stays")]),
        ((OFFERED, FLOWS, GIVES_UP), [LapsePlaces(), WakeAt(3.0)]),
        ((OFFERED, FLOWS, GIVES_UP, RESUMED), [End(Outcome.FAILED, "the source gave up: no")]),
        ((OFFERED, FLOWS, ActionFailed("Import", "why")), [Say(GivesUp("why")), LapsePlaces(), WakeAt(3.0)]),
        ((OFFERED, FLOWS, RESUMED, ActionFailed("Import", "why")), [Say(GivesUp("why")), End(Outcome.FAILED, "why")]),
        ((OFFERED, FLOWS, RESUMED, STAYS), [End(Outcome.UNCLEAR, "both hosts say that the guest runs there")]),
        ((OFFERED, FLOWS, RESUMED, STOPPED), [End(Outcome.UNCLEAR, "the guest came and ended")]),
    ],
)  # fmt: skip
def test_last_of_these_inputs_has_these_actions(events: tuple[Event, ...], expected: list[object]) -> None:
    session = new()
    for event in events:
        session, actions = destination.step(session, event, 0.0)
    assert actions == expected


def test_source_that_is_known_is_asked_at_once() -> None:
    assert destination.begin(destination.new(LIMITS, 5.0), "host-a", 5.0)[1] == [WakeAt(7.0), Ask("host-a")]


def test_source_is_called_anew_until_it_answers() -> None:
    made = Shell(destination.step, destination.new(LIMITS, 0.0))
    made.session, actions = destination.begin(made.session, "host-a", 0.0)
    made.begin(actions)
    made.wait_until(5.0)
    made.tell(OFFERED)
    made.wait_until(30.0)
    assert [when for when, action in made.done if action == CallAgain()] == [2.0, 4.0]


def looking() -> Shell:
    made = Shell(destination.step, destination.new(LIMITS, 0.0))
    made.session, actions = destination.begin(made.session, "", 0.0)
    made.begin(actions)
    return made


def test_source_that_is_not_known_is_asked_when_it_is() -> None:
    made = looking()
    made.wait_until(2.5)
    made.tell(Found("host-a"))
    assert made.done[-1][1] == Ask("host-a")
    assert made.session.state is State.ASKED
    made.tell(Found("host-a"))  # Nova and the hook both say it
    assert made.kinds().count("Ask") == 1


def test_guest_that_never_starts_is_not_waited_for() -> None:
    made = looking()
    made.wait_until(10)
    assert made.kinds()[-1] == "end: failed"


def test_source_that_nobody_names_is_given_up_after_open_seconds() -> None:
    made = looking()
    made.tell(STARTED)
    made.wait_until(10)
    assert made.session.state is State.ORPHANED
    assert "nothing says which host" in made.session.reason


@pytest.mark.parametrize("state", [State.ASKED, State.RECEIVING, State.COMPLETE])
def test_of_two_hosts_that_both_say_that_the_guest_leaves_them_none_is_believed(state: State) -> None:
    made = shell(*IN_STATE[state])
    made.tell(Found("host-x"))
    assert made.kinds()[-3:] == ["GivesUp", "LapsePlaces", "Discard"]
    assert made.session.reason == "host-a and host-x both say that the guest leaves them"


def test_what_a_guest_that_runs_here_has_stays_when_a_second_host_says_that_it_leaves_it() -> None:
    made = shell(OFFERED, FLOWS, RESUMED, Found("host-x"))
    assert made.kinds()[-2:] == ["GivesUp", "end: failed"]
    assert "Discard" not in made.kinds()


def test_guest_that_runs_while_its_source_is_looked_for_gets_its_flows_when_it_is_found() -> None:
    made = looking()
    for event in (STARTED, RESUMED, Found("host-a"), OFFERED, FLOWS, IN_SYNC, LAST):
        made.tell(event)
    assert made.kinds()[-2:] == ["Complete", "Arrived"]


@pytest.mark.parametrize("state", BEFORE_THE_GUEST)
@pytest.mark.parametrize("cause", [STOPPED, STAYS, Superseded()])
def test_what_ends_the_session_before_the_guest_runs_discards(state: State, cause: Event) -> None:
    made = shell(*IN_STATE[state])
    assert made.session.state is state
    made.tell(cause)
    assert "Discard" in made.kinds()
    assert made.is_over


def test_guest_that_runs_before_its_flows_are_complete_keeps_what_there_is() -> None:
    made = shell(OFFERED, STARTED, FLOWS, RESUMED, PeerLost("lost"))
    assert made.is_over
    assert "Discard" not in made.kinds()


@pytest.mark.parametrize(("found", "reason"), [("part", "zone_seconds"), ("fails", "pretended")])
def test_guest_without_zone_is_given_up_after_zone_seconds(found: str, reason: str) -> None:
    """Whether the scope finder knows of none, or cannot say."""
    made = Shell(destination.step, new(), [found] * 1000)
    for event in (OFFERED, STARTED):
        made.tell(event)
    made.wait_until(1.9)
    assert made.session.state is State.RECEIVING
    made.wait_until(2.1)
    assert made.session.state is State.ORPHANED
    assert reason in made.session.reason
    assert made.kinds()[-2:] == ["GivesUp", "LapsePlaces"]


def test_guest_that_moves_on_before_all_of_its_flows_came_leaves_a_session_that_failed() -> None:
    reason = "the guest moved on before all of its flows had come"
    session = destination.begin(destination.new(LIMITS, 0.0), "host-a", 0.0)[0]
    for event in (OFFERED, STARTED, FLOWS):
        session = destination.step(session, event, 0.0)[0]
    assert destination.step(session, guest(Phase.SUSPENDED), 0.0) == (session, [])  # it does not run here yet
    session = destination.step(session, RESUMED, 0.0)[0]
    session, actions = destination.step(session, guest(Phase.SUSPENDED), 0.0)
    assert session.state is State.ENDED
    assert actions == [Say(GivesUp(reason)), End(Outcome.FAILED, reason)]


def test_what_is_held_is_renewed_at_a_third_of_its_time_until_the_guest_runs() -> None:
    made = shell(OFFERED, STARTED, FLOWS)
    made.wait_until(10)
    made.tell(RESUMED)
    made.wait_until(50)
    assert [time for time, action in made.done if isinstance(action, Renew)] == [3.0, 6.0, 9.0]


def test_source_that_does_not_answer_is_given_up_after_open_seconds() -> None:
    made = shell(STARTED)
    made.wait_until(10)
    assert made.session.state is State.ORPHANED
    made.wait_until(100)
    reason = "the source did not answer; is its agent running?; nobody said whether the guest came"
    assert made.done[-1][1] == End(Outcome.FAILED, reason)


@pytest.mark.parametrize("is_late", [False, True])
def test_guest_that_never_began_to_come_is_not_waited_for_as_long_as_one_that_did(is_late: bool) -> None:
    made = shell()
    made.wait_until(10)
    assert made.session.state is State.ORPHANED
    if is_late:
        made.tell(STARTED)
    made.wait_until(2 * LIMITS.open_seconds)
    assert made.session.state is (State.ORPHANED if is_late else State.ENDED)
    made.wait_until(100)
    assert made.session.state is State.ENDED


@pytest.mark.parametrize("has_some", [False, True])
def test_session_that_goes_on_with_one_that_had_nothing_is_of_nothing_too(has_some: bool) -> None:
    times = {"has_all": False, "is_started": False, "runs_here": False}
    session = destination.continuing(LIMITS, 0.0, "host-a", has_some=has_some, **times)
    session, _ = destination.step(session, GIVES_UP, 0.0)
    session, _ = destination.step(session, TimePassed(), LIMITS.open_seconds)
    assert session.state is (State.ORPHANED if has_some else State.ENDED)


def test_source_that_is_lost_after_complete_costs_the_guest_no_flow() -> None:
    made = shell(*IN_STATE[State.COMPLETE], PeerLost("lost"), GIVES_UP)
    assert made.session.state is State.COMPLETE
    made.tell(RESUMED)
    assert made.kinds()[-1] == "Arrived"


def test_source_that_begins_anew_for_ever_is_given_up() -> None:
    times = {"has_all": False, "is_started": True, "runs_here": False}
    for count, kind in ((destination.MOST_TIMES_ASKED - 1, HandOver), (destination.MOST_TIMES_ASKED, LapsePlaces)):
        session = destination.continuing(LIMITS, 0.0, "host-a", times_asked=count, **times)
        session, actions = destination.step(session, PeerSaid(AskAgain("any")), 0.0)
        assert any(isinstance(action, kind) for action in actions)
        assert session.state is (State.ENDED if kind is HandOver else State.ORPHANED)


def test_purge_that_nobody_told_of_is_said_so() -> None:
    made = shell(*IN_STATE[State.ARRIVED])
    made.wait_until(20)
    assert made.done[-1][1] == End(Outcome.MOVED, "the source did not say that it purged")


def shell_that_cannot_discard(cause: Event, times: int) -> Shell:
    made = shell(*IN_STATE[State.RECEIVING])
    made.choices = iter(["fails"] * times)
    made.tell(cause)
    assert made.session.state is State.DISCARDING
    return made


@pytest.mark.parametrize("times", range(1, destination.DISCARD_TRIES + 1))
@pytest.mark.parametrize("cause", [STOPPED, STAYS, Superseded()])
def test_what_could_not_be_discarded_is_tried_again_and_else_said(cause: Event, times: int) -> None:
    made = shell_that_cannot_discard(cause, times)
    made.wait_until(20)
    end = made.done[-1][1]
    assert isinstance(end, End)
    assert made.kinds().count("Discard") == min(times + 1, destination.DISCARD_TRIES)
    outcome = Outcome.UNCLEAR if cause == Superseded() else Outcome.STAYED
    is_left = times == destination.DISCARD_TRIES
    assert ("could not be discarded: pretended" if is_left else "it failed first: pretended") in end.reason
    assert end.outcome is (Outcome.FAILED if is_left else outcome)
    assert made.kinds().count("Stays") == (cause == STOPPED)


def test_nothing_is_discarded_where_the_guest_runs_whatever_fails() -> None:
    session = replace(new(), state=State.ENDED, runs_here=True, reason="it ended")
    assert destination.step(session, ActionFailed("Say", "pretended"), 0.0) == (
        session,
        [End(Outcome.FAILED, "it ended; pretended")],
    )


@pytest.mark.parametrize("word", [RESUMED, Superseded()])
def test_what_could_not_be_discarded_is_left_to_who_comes(word: Event) -> None:
    made = shell_that_cannot_discard(STOPPED, 1)
    made.tell(word)
    made.wait_until(20)
    assert made.kinds().count("Discard") == 1
    assert made.kinds()[-1] == "end: failed"


LOST = [PeerLost("lost"), GIVES_UP, ActionFailed("Import", "pretended")]


@pytest.mark.parametrize("loss", LOST)
@pytest.mark.parametrize("word", ["resumed", "no word"])
def test_what_is_here_is_kept_and_renewed_until_it_is_known_that_the_guest_does_not_come(
    loss: Event, word: str
) -> None:
    """It may run here, and its hypervisor's word be on its way."""
    made = shell(*IN_STATE[State.RECEIVING], loss)
    assert made.session.state is State.ORPHANED
    made.wait_until(7)
    assert [time for time, action in made.done if isinstance(action, Renew)] == [3.0, 6.0]
    if word == "resumed":
        made.tell(RESUMED)
    made.wait_until(100)
    assert made.kinds()[-1] == "end: failed"
    assert "Discard" not in made.kinds()


@pytest.mark.parametrize("loss", LOST)
@pytest.mark.parametrize("end", [STOPPED, STAYS, Superseded()])
def test_what_is_here_of_a_guest_that_does_not_come_is_discarded_though_no_more_flows_come(
    loss: Event, end: Event
) -> None:
    made = shell(*IN_STATE[State.RECEIVING], loss, end)
    assert "Discard" in made.kinds()
    assert made.is_over


def test_renewal_that_fails_is_tried_again_though_no_more_flows_come() -> None:
    made = shell(*IN_STATE[State.RECEIVING], PeerLost("lost"))
    made.choices = iter(["fails"])
    made.wait_until(7)
    assert [time for time, action in made.done if isinstance(action, Renew)] == [3.0, 6.0]


@pytest.mark.parametrize("state", State)
def test_message_that_may_not_be_said_changes_nothing(state: State) -> None:
    session = replace(new(), state=state)
    for message in MESSAGES:
        if type(message) not in HEARD[state]:
            with pytest.raises(IllegalMessage, match=f"{type(message).__name__} may not be said in state"):
                destination.step(session, PeerSaid(message), 0.0)
        else:
            destination.step(session, PeerSaid(message), 0.0)
    assert session == replace(new(), state=state)


USUAL = [OFFERED, STARTED, FLOWS, IN_SYNC, CHANGES, LAST, RESUMED, PURGED]


@settings(max_examples=400)
@given(lives(USUAL), choices)
def test_whatever_happens(life: list[tuple[float, Event]], drawn: list[str]) -> None:
    made = Shell(destination.step, new(), endless(drawn))
    made.begin(ASKS)
    ran = None
    for pause, event in life:
        made.wait_until(made.now + pause)
        if event == RESUMED and not made.is_over and ran is None:
            ran = len(made.done)
        made.tell(event)
    assert made.is_over or made.wake_at is not None, "nothing will ever end this session"
    made.wait_until(LIMITS.session_seconds + LIMITS.arrival_seconds)
    assert made.is_over
    actions = [action for _, action in made.done]
    assert sum(isinstance(action, End | HandOver) for action in actions) == 1
    discards = [number for number, action in enumerate(actions) if isinstance(action, Discard)]
    said = [type(action.message) for action in actions if isinstance(action, Say)]
    if ran is not None:
        assert all(number < ran for number in discards)
    elif isinstance(last := actions[-1], End) and last.outcome is Outcome.STAYED:
        assert discards
    if discards:
        assert not any(isinstance(action, Import | Renew) for action in actions[discards[0] :])
    if Arrived in said:
        assert ran is not None
        assert said.count(Arrived) == said.count(Complete) == 1
        assert said.index(Complete) < said.index(Arrived)
    for event in (STARTED, RESUMED, STOPPED, GIVES_UP, STAYS, PURGED, PeerLost("lost"), Superseded(), TimePassed()):
        assert destination.step(made.session, event, 1000.0) == (made.session, [])


@pytest.mark.parametrize("end", [PURGED, TimePassed()])
def test_flows_that_may_be_the_only_ones_are_kept_when_nobody_says_where_the_guest_is(end: Event) -> None:
    made = shell(*IN_STATE[State.COMPLETE])
    made.now = LIMITS.session_seconds
    made.tell(end)
    assert made.kinds()[-1] == "end: unclear"
    assert "Discard" not in made.kinds()
