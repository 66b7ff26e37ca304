"""What the source decides, alone: inputs in, actions out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from sami_plugin.errors import IllegalMessage
from sami_plugin.migration import source
from sami_plugin.migration.decision import (
    ActionFailed,
    Choose,
    Done,
    End,
    Event,
    ExportChanges,
    ExportNext,
    GuestDid,
    Keep,
    PeerLost,
    PeerSaid,
    Purge,
    PurgeLate,
    Returns,
    Say,
    SayAgain,
    SayOffer,
    StartExport,
    Superseded,
    TimePassed,
    WakeAt,
)
from sami_plugin.migration.source import Source, State
from sami_plugin.model.migration import (
    Answer,
    Arrived,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    InSync,
    Message,
    Offer,
    Open,
    Outcome,
    Phase,
    Purged,
    Room,
    Stays,
)
from tests.unit.migration.sequences import LIMITS, choices, endless, lives
from tests.unit.migration.shell import Shell, guest
from tools.state_tables import MESSAGES, OPEN

OPENED, ANSWERED = PeerSaid(OPEN), PeerSaid(Answer(4, 600, ("tcp-ipv4",)))
COMPLETE, ARRIVED = PeerSaid(Complete(1, 0)), PeerSaid(Arrived())
OUTGOING, SUSPENDED, RESUMED, STOPPED = map(guest, (Phase.OUTGOING, Phase.SUSPENDED, Phase.RESUMED, Phase.STOPPED))

LAST_OF_A_PAUSED_GUEST = ExportChanges(is_last=True, says_removals=False)
AGAIN = "the guest stays on the source"
STAY = [Say(Stays(AGAIN)), End(Outcome.STAYED, AGAIN)]


def new() -> Source:
    return Source(LIMITS, LIMITS.session_seconds)


def shell(*events: Event) -> Shell:
    made = Shell(source.step, new())
    for event in events:
        made.tell(event)
    return made


IN_STATE: dict[State, tuple[Event, ...]] = {
    State.WAITING: (OPENED,),
    State.OFFERED: (OPENED, OUTGOING),
    State.FOLLOWING: (OPENED, OUTGOING, ANSWERED),
    State.DRAINED: (OPENED, OUTGOING, ANSWERED, SUSPENDED),
    State.WATCHING: (OPENED, OUTGOING, ANSWERED, SUSPENDED, COMPLETE, ARRIVED),
    State.ABANDONED: (OPENED, OUTGOING, ANSWERED, PeerLost("lost")),
    State.ENDED: (OPENED, OUTGOING, ANSWERED, SUSPENDED, RESUMED),
}
HEARD: dict[State, set[type[Message]]] = {
    State.WAITING: {Open, GivesUp, Stays},
    State.OFFERED: {Answer, GivesUp, Stays},
    State.COPYING: {Room, GivesUp, Stays},
    State.FOLLOWING: {Room, GivesUp, Stays},
    State.DRAINED: {Room, Complete, Arrived, GivesUp, Stays},
    State.PURGING: {Room, Complete, Arrived, GivesUp},
    State.WATCHING: {Room, Complete, Arrived, GivesUp},
    State.ABANDONED: {Answer, Room, Complete, Arrived, GivesUp, Stays},
    State.ENDED: {Answer, Room, Complete, Arrived, GivesUp, Stays},
}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ((OPENED,), [WakeAt(10.0)]),
        ((OUTGOING,), []),
        ((OPENED, OUTGOING), [WakeAt(100), StartExport()]),
        ((OUTGOING, OPENED), [WakeAt(100), StartExport()]),
        ((OPENED, SUSPENDED, RESUMED), STAY),
        ((OPENED, OUTGOING, Done("StartExport", 2)), [SayOffer(2)]),
        ((PeerSaid(replace(OPEN, versions=(1,))), OUTGOING, Done("StartExport", 2)), [Say(Offer(1, 2)), ExportNext()]),
        ((OPENED, OUTGOING, Done("StartExport", 2), ANSWERED), [Choose(4, ("tcp-ipv4",)), ExportNext()]),
        ((OPENED, OUTGOING, Done("StartExport", 2), PeerSaid(GivesUp("no"))), [WakeAt(100)]),
        ((OPENED, OUTGOING, Done("StartExport", 2), PeerSaid(Stays("veto"))), [End(Outcome.STAYED, "veto")]),
        ((OPENED, OUTGOING, Done("StartExport", 2), STOPPED, PeerSaid(Stays("veto"))), [WakeAt(20.0)]),
        ((OPENED, OUTGOING, Done("ExportNext", 5, is_all=False)), [ExportNext()]),
        ((OPENED, OUTGOING, Done("ExportNext", 5)), [Say(InSync(5)), WakeAt(1.0)]),
        ((OPENED, OUTGOING, SUSPENDED), [ExportChanges(is_last=False)]),
        ((OPENED, OUTGOING, SUSPENDED, Done("ExportNext", 5)), [Say(InSync(5)), LAST_OF_A_PAUSED_GUEST]),
        ((OUTGOING, SUSPENDED, OPENED, Done("ExportNext", 5)), [Say(InSync(5)), LAST_OF_A_PAUSED_GUEST]),
        ((OPENED, OUTGOING, Done("ExportNext"), TimePassed()), [WakeAt(100), ExportChanges(is_last=False)]),
        ((OPENED, OUTGOING, Done("ExportNext"), SUSPENDED), [ExportChanges(is_last=True)]),
        ((OPENED, OUTGOING, Done("ExportNext"), SUSPENDED, COMPLETE), []),
        ((OPENED, OUTGOING, Done("ExportNext"), SUSPENDED, COMPLETE, ARRIVED), [Purge()]),
        ((OPENED, OUTGOING, Done("ExportNext"), SUSPENDED, ARRIVED), []),
        ((OPENED, OUTGOING, Done("ExportNext"), SUSPENDED, ARRIVED, COMPLETE), [Purge()]),
        ((OPENED, OUTGOING, Done("ExportNext"), STOPPED), [WakeAt(20.0), LAST_OF_A_PAUSED_GUEST]),
        ((OUTGOING, SUSPENDED, STOPPED), [WakeAt(20.0), Keep()]),
        ((OPENED, OUTGOING, Done("ExportNext"), guest(Phase.ROLLBACK)), STAY),
        ((OPENED, OUTGOING, PeerSaid(GivesUp("no"))), [WakeAt(100)]),
        ((OPENED, OUTGOING, ActionFailed("StartExport", "why")), [Say(GivesUp("why")), WakeAt(100)]),
    ],
)  # fmt: skip
def test_last_of_these_inputs_has_these_actions(events: tuple[Event, ...], expected: list[object]) -> None:
    session = new()
    for event in events:
        session, actions = source.step(session, event, 0.0)
    assert actions == expected


@pytest.mark.parametrize("said", [[COMPLETE, ARRIVED], [ARRIVED, COMPLETE]])
def test_nothing_is_purged_before_both_complete_and_arrived(said: list[Event]) -> None:
    made = shell(*IN_STATE[State.DRAINED], said[0])
    made.wait_until(99)
    assert "Purge" not in made.kinds()
    made.tell(said[1])
    assert made.kinds()[-2:] == ["Purge", "Purged"]


def test_what_late_packets_made_is_looked_for_once_a_moment_after_the_purge() -> None:
    made = shell(*IN_STATE[State.WATCHING])
    made.wait_until(LIMITS.watch_seconds - 0.1)
    assert made.kinds()[-2:] == ["Purge", "Purged"]
    made.wait_until(LIMITS.watch_seconds)
    assert made.kinds()[-3:] == ["Purged", "PurgeLate", "end: moved"]


@pytest.mark.parametrize(("has_arrived", "outcome"), [(True, Outcome.MOVED), (False, Outcome.LEFT_WITHOUT_ARRIVAL)])
def test_watch_goes_on_after_a_new_start_with_the_outcome_of_the_purge_and_not_at_once(
    has_arrived: bool, outcome: Outcome
) -> None:
    session, actions = source.recovered(
        LIMITS, 0.0, State.WATCHING.value, is_suspended=True, is_gone=True, has_arrived=has_arrived, has_purged=True
    )
    assert actions == [SayAgain(), WakeAt(LIMITS.watch_seconds)]
    made = Shell(source.step, session)
    made.begin(actions)
    made.wait_until(LIMITS.watch_seconds)
    assert made.kinds() == ["SayAgain", "PurgeLate", f"end: {outcome.value}"]


def test_session_that_had_purged_and_ended_but_for_the_last_row_ends_after_a_new_start() -> None:
    """Its guest may be here again, and must not be asked for anew."""
    session, actions = source.recovered(
        LIMITS, 0.0, State.ENDED.value, is_suspended=True, is_gone=True, has_arrived=True, has_purged=True
    )
    assert (session.state, [type(one) for one in actions]) == (State.ENDED, [End])


def test_guest_on_its_way_back_ends_the_watch_and_nothing_is_removed() -> None:
    for event in (Returns(), RESUMED, guest(Phase.ROLLBACK)):
        assert shell(*IN_STATE[State.WATCHING], event).kinds()[-2:] == ["Purged", "end: moved"]


def test_a_late_look_that_fails_is_tried_again() -> None:
    made = shell(*IN_STATE[State.WATCHING])
    made.choices = iter(["fails"])
    made.wait_until(LIMITS.watch_seconds + source.PURGE_AGAIN_SECONDS)
    assert made.kinds()[-3:] == ["PurgeLate", "PurgeLate", "end: moved"]
    assert made.done[-1][1] == End(Outcome.MOVED, "")


def test_late_looks_that_fail_do_not_change_how_the_migration_went() -> None:
    made = shell(*IN_STATE[State.WATCHING])
    made.choices = iter(["fails"] * source.PURGE_TRIES)
    made.wait_until(LIMITS.watch_seconds + source.PURGE_TRIES * source.PURGE_AGAIN_SECONDS)
    assert made.done[-1][1] == End(Outcome.MOVED, "what late packets have made here was not looked for: pretended")


@pytest.mark.parametrize("state", [State.WAITING, State.COPYING, State.FOLLOWING, State.DRAINED, State.ABANDONED])
def test_guest_that_runs_again_after_its_pause_stays_with_all_flows(state: State) -> None:
    session = new()
    for event in (OPENED, OUTGOING) if state is State.COPYING else IN_STATE[state]:
        made = source.step(session, event, 0.0)
        session = made[0]
        for action in made[1] if state is not State.COPYING else ():
            if isinstance(action, StartExport | ExportNext):
                session, _ = source.step(session, Done(type(action).__name__), 0.0)
    assert session.state is state
    session, _ = source.step(session, SUSPENDED, 0.0)
    session, actions = source.step(session, RESUMED, 0.0)
    assert session.state is State.ENDED
    assert isinstance(actions[0], Say)
    assert isinstance(actions[0].message, Stays)
    assert actions[1:] == [End(Outcome.STAYED, actions[0].message.reason)]


@pytest.mark.parametrize("state", [State.DRAINED, State.ABANDONED])
@pytest.mark.parametrize("word", [RESUMED, guest(Phase.ROLLBACK)], ids=["resumed", "rollback"])
def test_guest_that_had_left_and_is_here_again_has_not_stayed(state: State, word: Event) -> None:
    made = shell(*IN_STATE[state], STOPPED, word)
    assert made.kinds()[-2:] == ["GivesUp", "end: unclear"]
    assert "Purge" not in made.kinds()


def test_guest_that_was_not_paused_for_the_move_does_not_end_it_by_running() -> None:
    made = shell(OPENED, OUTGOING, ANSWERED, RESUMED)
    assert made.session.state is State.FOLLOWING


@pytest.mark.parametrize("state", [State.FOLLOWING, State.DRAINED, State.ABANDONED])
def test_guest_that_left_without_arrival_is_purged_after_arrival_seconds(state: State) -> None:
    made = shell(*IN_STATE[state])
    made.wait_until(5)
    made.tell(STOPPED)
    made.wait_until(24.9)
    assert "Purge" not in made.kinds()
    made.wait_until(25)
    assert made.kinds()[-2:] == ["Purge", "Purged"]
    made.wait_until(25 + LIMITS.watch_seconds)
    assert made.kinds()[-1] == "end: purged without arrival"


@pytest.mark.parametrize("trouble", [PeerLost("lost"), PeerSaid(GivesUp("no"))])
def test_trouble_with_the_peer_does_not_put_off_the_purge_of_a_guest_that_left(trouble: Event) -> None:
    made = shell(*IN_STATE[State.DRAINED], STOPPED)
    made.wait_until(5)
    made.tell(trouble)
    made.wait_until(20)
    assert "Purge" in made.kinds()


def test_guest_that_is_told_gone_again_and_again_is_gone_since_the_first_time() -> None:
    made = shell(*IN_STATE[State.DRAINED])
    for time in range(20):
        made.wait_until(time)
        made.tell(STOPPED)
    made.wait_until(20)
    assert "Purge" in made.kinds()


def test_destination_has_its_time_when_the_guest_was_faster_than_its_flows() -> None:
    session = new()
    for event in (OPENED, OUTGOING, SUSPENDED, STOPPED):
        session, actions = source.step(session, event, 0.0)
        assert not any(isinstance(action, Purge) for action in actions)
    session, _ = source.step(session, Done("ExportNext"), 50.0)
    session, actions = source.step(session, Done("ExportChanges"), 50.0)
    assert actions == [WakeAt(70.0)]
    assert source.step(session, TimePassed(), 69.9)[1] == [WakeAt(70.0)]
    assert source.step(session, TimePassed(), 70.0)[1] == [Purge()]


def test_destination_that_takes_no_more_does_not_put_off_the_purge_of_a_guest_that_left() -> None:
    """Who comes late is to find nothing: what the guest left may have ended since."""
    session = new()
    for event in (OPENED, OUTGOING, SUSPENDED):
        session, _ = source.step(session, event, 0.0)
    session, actions = source.step(session, STOPPED, 0.0)
    assert actions == [WakeAt(20.0)]
    session, _ = source.step(session, Done("ExportNext", 10, is_all=False), 15.0)
    assert source.step(session, TimePassed(), 20.0) == (session, [WakeAt(35.0)])
    session, _ = source.step(session, TimePassed(), 35.0)
    assert (session.state, session.reason) == (State.ABANDONED, source.UNWANTED)
    assert source.step(session, TimePassed(), 35.0)[1] == [Purge()]


def test_destination_that_never_answers_does_not_put_off_the_purge_of_a_guest_that_left() -> None:
    session = new()
    for event in (OPENED, OUTGOING, Done("StartExport", 1), SUSPENDED):
        session, _ = source.step(session, event, 0.0)
    assert session.state is State.OFFERED
    session, actions = source.step(session, STOPPED, 5.0)
    assert actions == [WakeAt(25.0), Keep()]
    assert source.step(session, STOPPED, 6.0) == (session, [])
    assert source.step(session, TimePassed(), 25.0)[0].state is State.ABANDONED
    answered, _ = source.step(session, ANSWERED, 24.0)
    assert source.step(answered, TimePassed(), 25.0) == (answered, [WakeAt(44.0)])


def test_copy_that_hangs_ends_with_the_session_s_time() -> None:
    session, actions = source.step(source.step(new(), OPENED, 0.0)[0], OUTGOING, 0.0)
    assert WakeAt(100) in actions
    assert source.step(session, TimePassed(), 10.0) == (session, [WakeAt(100)])  # the wait for OUTGOING's time
    session, actions = source.step(session, TimePassed(), 100.0)
    assert session.state is State.ABANDONED


def test_nobody_says_where_the_guest_is_and_every_flow_is_kept() -> None:
    made = shell(*IN_STATE[State.DRAINED])
    made.wait_until(100)
    assert made.kinds()[-2:] == ["GivesUp", "end: unclear"]
    assert "Purge" not in made.kinds()


def test_destination_of_another_version_is_told_so() -> None:
    made = shell(PeerSaid(replace(OPEN, versions=(99,))))
    assert made.kinds() == ["GivesUp", "end: failed"]


def test_session_is_opened_once() -> None:
    session, _ = source.step(new(), OPENED, 0.0)
    with pytest.raises(IllegalMessage, match="opened before"):
        source.step(session, OPENED, 0.0)


PURGED_AGAIN = "the purge was tried again; it failed first: pretended"


def purge_failed(*more: str) -> Shell:
    """Once; what becomes of the next actions is told by `more`."""
    made = shell(*IN_STATE[State.DRAINED])
    made.tell(COMPLETE)
    made.choices = iter(["fails", *more])
    made.tell(ARRIVED)
    assert made.session.state is State.PURGING
    return made


def test_purge_that_fails_is_tried_again_a_second_later() -> None:
    made = purge_failed()
    made.wait_until(0.9)
    assert made.kinds()[-1:] == ["Purge"]
    assert source.step(made.session, TimePassed(), 0.9) == (made.session, [WakeAt(1.0)])
    made.wait_until(1.0)
    assert made.kinds()[-3:] == ["Purge", "Purge", "Purged"]
    made.wait_until(1.0 + LIMITS.watch_seconds)
    assert made.done[-1][1] == End(Outcome.MOVED, PURGED_AGAIN)


def test_purge_that_fails_three_times_ends_the_session_by_name() -> None:
    made = purge_failed("fails", "fails")
    made.wait_until(2.0)
    assert [time for time, action in made.done if action == Purge()] == [0.0, 1.0, 2.0]
    assert made.done[-1][1] == End(Outcome.FAILED, f"pretended; {PURGED_AGAIN}")


@pytest.mark.parametrize("event", [RESUMED, guest(Phase.ROLLBACK), Superseded()])
def test_guest_that_is_here_again_before_the_purge_is_tried_again_keeps_what_is_here(event: Event) -> None:
    made = purge_failed()
    made.tell(event)
    assert made.kinds().count("Purge") == 1
    reason = "the guest is here again; what it left here before was not all removed"
    assert made.done[-1][1] == End(Outcome.FAILED, f"{reason}; {PURGED_AGAIN}")


def test_purge_is_tried_again_at_once_when_the_guest_is_on_its_way_back() -> None:
    made = purge_failed()
    made.tell(Returns())
    assert made.kinds()[-4:] == ["Purge", "Purge", "Purged", "end: moved"]


def test_purge_that_fails_after_a_new_start_is_tried_again_and_the_destination_asked_behind_it() -> None:
    session, actions = source.recovered(
        LIMITS, 0.0, State.PURGING.value, is_suspended=True, is_gone=True, has_arrived=True, has_purged=False
    )
    made = Shell(source.step, session, ["fails"])
    made.begin(actions)
    made.wait_until(1.0)
    assert made.kinds() == ["Purge", "Purge", "SayAgain", "Purged"]


@pytest.mark.parametrize("state", State)
def test_message_that_may_not_be_said_changes_nothing(state: State) -> None:
    session = replace(new(), state=state, version=0 if state is State.WAITING else 2)
    for message in MESSAGES:
        if state is State.DRAINED and isinstance(message, Open):
            with pytest.raises(IllegalMessage, match="opened before"):
                source.step(session, PeerSaid(message), 0.0)
        elif type(message) not in HEARD[state]:
            with pytest.raises(IllegalMessage, match=f"{type(message).__name__} may not be said in state"):
                source.step(session, PeerSaid(message), 0.0)
        else:
            source.step(session, PeerSaid(message), 0.0)
    for message in (Flows(b""), InSync(0), FlowChanges(b"", is_last=True), Offer(1, 1), Purged(0, 0)):
        assert type(message) not in HEARD[state]


def told(made: Shell, wanted: object) -> float | None:
    """When it was told first: a phase or a kind of message."""
    for time, event in made.told:
        if isinstance(event, GuestDid) and event.event.phase is wanted:
            return time
        if isinstance(event, PeerSaid) and type(event.message) is wanted:
            return time
    return None


@settings(max_examples=400)
@given(lives([OUTGOING, ANSWERED, SUSPENDED, COMPLETE, ARRIVED, STOPPED]), choices)
def test_whatever_happens(life: list[tuple[float, Event]], drawn: list[str]) -> None:
    made = Shell(source.step, new(), endless(drawn))
    made.tell(OPENED)
    came_back = []
    for pause, event in life:
        made.wait_until(made.now + pause)
        if isinstance(event, Returns) and any(isinstance(action, Purge) for _, action in made.done):
            came_back.append(made.now)
        was_paused = told(made, Phase.SUSPENDED) is not None
        was_over, done_before = made.is_over, len(made.done)
        made.tell(event)
        if event == RESUMED and was_paused and not was_over:
            assert made.is_over, "the guest runs here again"
            assert not any(isinstance(action, Purge) for _, action in made.done[done_before:])
        for time, action in made.done[done_before:]:
            if isinstance(action, Purge):
                purge_is_right(made, time)
    assert made.is_over or made.wake_at is not None, "nothing will ever end this session"
    purge_seconds = source.PURGE_TRIES * source.PURGE_AGAIN_SECONDS
    made.wait_until(LIMITS.session_seconds + LIMITS.arrival_seconds + purge_seconds + LIMITS.watch_seconds)
    assert made.is_over
    for time, action in made.done:
        if isinstance(action, Purge):
            purge_is_right(made, time)
    assert sum(isinstance(action, End) for _, action in made.done) == 1
    assert sum(isinstance(action, Purge) for _, action in made.done) <= source.PURGE_TRIES
    late = [time for time, action in made.done if isinstance(action, PurgeLate)]
    assert not late or any(isinstance(action, Purge) for _, action in made.done)
    if late:
        assert not any(at < late[0] for at in came_back), "what the guest brought with it was taken for late"
    for event in (
        OUTGOING,
        SUSPENDED,
        RESUMED,
        STOPPED,
        COMPLETE,
        ARRIVED,
        PeerLost("lost"),
        Superseded(),
        TimePassed(),
    ):
        assert source.step(made.session, event, 1000.0) == (made.session, [])


def purge_is_right(made: Shell, time: float) -> None:
    gone = told(made, Phase.STOPPED)
    has_both = told(made, Complete) is not None and told(made, Arrived) is not None
    comes_here = any(at <= time and isinstance(event, Returns) for at, event in made.told)
    assert has_both or (gone is not None and (comes_here or time >= gone + LIMITS.arrival_seconds))


@pytest.mark.parametrize("state", [State.DRAINED, State.ABANDONED])
def test_guest_that_comes_back_has_left_and_nothing_is_waited_for(state: State) -> None:
    made = shell(*IN_STATE[state], Returns())
    assert "Purge" not in made.kinds(), "as far as this host's hypervisor says, it is still here"
    made.tell(STOPPED)
    made.tell(Returns())
    assert made.kinds()[-3:] == ["Purge", "Purged", "end: purged without arrival"]


def test_guest_that_comes_back_from_where_its_flows_were_has_moved() -> None:
    made = shell(*IN_STATE[State.DRAINED], COMPLETE, STOPPED, Returns())
    assert made.kinds()[-3:] == ["Purge", "Purged", "end: moved"]
