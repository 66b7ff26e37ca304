"""Who wants a veto has one: whatever else happens while a migration is held up, the policy's word is not lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sami_plugin.migration import destination
from sami_plugin.migration.decision import (
    Action,
    ActionFailed,
    Discard,
    End,
    Event,
    Found,
    LetGo,
    Negotiate,
    Negotiated,
    OperatorSaid,
    PeerLost,
    PeerSaid,
    Say,
    TimePassed,
    WakeAt,
)
from sami_plugin.migration.destination import Destination, State
from sami_plugin.model.migration import Answer, GivesUp, Offer, Outcome, Phase, Stays
from sami_plugin.model.settings import Limits
from sami_plugin.model.verdict import Verdict
from tests.unit.migration.shell import guest

LIMITS = Limits(verdict_seconds=5, ask_seconds=60, open_seconds=30, session_seconds=3600, silence_means=Verdict.VETO)
"""The defaults, but for what silence means."""
OFFER, ANSWER = Offer(2, 1, ("tcp-ipv4",), (6,)), Answer(4, 600)
STARTED = guest(Phase.STARTED)


class Held:
    """A destination's session while a hook holds the migration up; `said` is what the policy says when it is asked."""

    def __init__(self, source: str = "host-a", *, said: Verdict = Verdict.ASK, limits: Limits = LIMITS) -> None:
        self.now = 0.0
        self.said = said
        self.session: Destination = destination.new(limits, 0.0, held_since=0.0)
        self.wake_at = float("inf")
        self.done: list[Action] = []
        self._do(destination.begin(self.session, source, 0.0))

    def tell(self, event: Event, at: float | None = None) -> None:
        if at is not None:
            self.pass_until(at)
        self._do(destination.step(self.session, event, self.now))

    def pass_until(self, at: float) -> None:
        for _ in range(10_000):
            if self.wake_at > at or self.session.state is State.ENDED:
                break
            self.now, self.wake_at = max(self.now, self.wake_at), float("inf")
            self._do(destination.step(self.session, TimePassed(), self.now))
        else:
            raise AssertionError(f"never sleeps in {self.session}")
        self.now = at

    @property
    def is_refused(self) -> bool:
        return self.session.verdict is Verdict.VETO

    def _do(self, decision: tuple[Destination, list[Action]]) -> None:
        self.session, actions = decision
        self.done += actions
        for action in actions:
            if isinstance(action, WakeAt):
                self.wake_at = action.when
            elif isinstance(action, Negotiate):
                is_known = action.offer is not None and action.offer.version > 1
                verdict = self.said if action.may_refuse else Verdict.PROCEED
                self.tell(Negotiated(verdict, "risk", ANSWER if is_known else None))


def test_operator_who_was_asked_before_the_source_offered_is_not_passed_over_by_a_late_offer() -> None:
    held = Held()
    held.pass_until(6)
    assert held.session.verdict is Verdict.ASK
    held.tell(PeerSaid(OFFER), at=8)
    assert (held.session.state, held.session.verdict) == (State.NEGOTIATING, Verdict.ASK)
    held.pass_until(64)
    assert not held.is_refused
    held.pass_until(65)  # no later than it was said: the hook waits for no longer
    assert held.is_refused


@pytest.mark.parametrize(("said", "state"), [(Verdict.PROCEED, State.RECEIVING), (Verdict.VETO, State.ENDED)])
def test_late_offer_is_judged_anew(said: Verdict, state: State) -> None:
    held = Held()
    held.pass_until(6)
    held.said = said
    held.tell(PeerSaid(OFFER), at=8)
    assert (held.session.state, held.session.verdict) == (state, said)


@pytest.mark.parametrize("loss", [PeerLost("gone"), PeerSaid(GivesUp("no")), ActionFailed("Negotiate", "why")])
@pytest.mark.parametrize("silence_means", [Verdict.PROCEED, Verdict.VETO])
def test_silence_of_an_operator_counts_although_the_source_was_lost_meanwhile(
    loss: Event, silence_means: Verdict
) -> None:
    held = Held(limits=replace(LIMITS, silence_means=silence_means))
    held.tell(PeerSaid(OFFER), at=1)
    held.tell(loss, at=10)
    assert (held.session.state, held.session.verdict) == (State.ORPHANED, Verdict.ASK)
    held.pass_until(60)
    assert held.session.verdict is Verdict.ASK
    held.pass_until(61)
    assert held.session.verdict is silence_means


@pytest.mark.parametrize("source", ["host-a", ""])
@pytest.mark.parametrize("silence_means", [Verdict.PROCEED, Verdict.VETO])
def test_operator_has_ask_seconds_although_the_source_has_only_open_seconds(
    source: str, silence_means: Verdict
) -> None:
    held = Held(source, limits=replace(LIMITS, silence_means=silence_means))
    held.pass_until(64)
    assert held.session.verdict is Verdict.ASK
    held.pass_until(66)
    assert held.session.verdict is silence_means


@pytest.mark.parametrize("source", ["host-a", ""])
def test_operator_is_obeyed_until_then(source: str) -> None:
    held = Held(source)
    held.tell(OperatorSaid(may_come=False), at=50)
    assert held.is_refused
    assert held.done[-1] == End(Outcome.STAYED, held.session.reason)


def test_operator_is_obeyed_where_the_source_was_found_late_and_does_not_answer() -> None:
    held = Held("")
    held.tell(Found("host-a"), at=10)
    held.tell(OperatorSaid(may_come=False), at=50)
    assert held.is_refused


@pytest.mark.parametrize("source", ["host-a", ""])
def test_policy_is_asked_although_open_seconds_are_over_first(source: str) -> None:
    held = Held(source, said=Verdict.VETO, limits=replace(LIMITS, verdict_seconds=60))
    held.pass_until(31)
    assert held.is_refused


def test_orphan_of_which_nobody_waits_for_a_word_is_kept_until_the_session_is_over() -> None:
    held = Held(said=Verdict.PROCEED)
    held.tell(PeerSaid(OFFER), at=1)
    held.tell(PeerLost("gone"), at=2)
    held.pass_until(3599)
    assert held.session.state is State.ORPHANED
    held.pass_until(3600)
    assert held.session.state is State.ENDED


def test_guest_that_starts_is_never_refused_afterwards() -> None:
    held = Held()
    held.tell(PeerSaid(OFFER), at=1)
    held.tell(STARTED, at=10)
    held.tell(OperatorSaid(may_come=False), at=11)
    held.pass_until(70)
    assert (held.session.state, held.session.verdict) == (State.RECEIVING, Verdict.PROCEED)
    assert Say(Stays("risk")) not in held.done
    assert Discard() not in held.done


@pytest.mark.parametrize("late", [OperatorSaid(may_come=False), Negotiated(Verdict.VETO, "risk", ANSWER)])
@pytest.mark.parametrize("is_offered", [True, False])
@pytest.mark.parametrize("is_handled_first", [True, False])
def test_guest_that_was_let_go_is_never_refused_afterwards(
    late: Event, is_offered: bool, is_handled_first: bool
) -> None:
    """From the moment on in which its hook gives up, whether the session has come to it yet or not."""
    held = Held()
    if is_offered:
        held.tell(PeerSaid(OFFER), at=1)
    held.pass_until(7)
    assert held.session.verdict is Verdict.ASK
    held.session = destination.let_go(held.session)
    for event in (LetGo(), late) if is_handled_first else (late, LetGo()):
        held.tell(event)
    held.pass_until(20)
    assert held.session.verdict is Verdict.PROCEED
    assert held.session.state is (State.RECEIVING if is_offered else State.ASKED)
    assert held.done.count(Say(ANSWER)) == is_offered  # the source need not wait for who is not asked any more
    assert Discard() not in held.done


def test_verdict_of_a_session_that_holds_nobody_up_is_what_it_was() -> None:
    session = destination.new(LIMITS, 0.0)
    assert destination.let_go(session) == session
    held = Held(said=Verdict.VETO)
    held.pass_until(6)
    assert held.is_refused
    assert destination.let_go(held.session) == held.session


def test_migration_that_is_told_of_twice_is_one_while_it_is_negotiated() -> None:
    held = Held()
    held.tell(PeerSaid(OFFER), at=1)
    assert held.session.state is State.NEGOTIATING
    assert destination.is_open(held.session)
