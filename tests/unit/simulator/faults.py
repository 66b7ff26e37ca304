"""Mistakes that somebody could make in the code, one at a time, and how soon the simulator has to find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np

from sami_plugin import former as formers
from sami_plugin import session as sessions
from sami_plugin.agent import Agent
from sami_plugin.arriving import Arriving, Findings
from sami_plugin.channel.ordering import Inbox
from sami_plugin.channel.tls import Channel
from sami_plugin.drivers.base import Changes
from sami_plugin.handover import DestinationSession, SourceSession
from sami_plugin.leaving import Leaving
from sami_plugin.migration import destination, source
from sami_plugin.migration.claims import Claims
from sami_plugin.migration.decision import Discard, Done, End, Purge, WakeAt
from sami_plugin.model.flows import Batch
from sami_plugin.model.migration import Outcome, Phase
from sami_plugin.outgoing import OutgoingGuests


@dataclass(frozen=True)
class Fault:
    """`put_in` is a context in which the mistake is there; the simulator finds it in so many runs of `mix`."""

    name: str
    within: int
    put_in: Callable[[], AbstractContextManager[object]]
    mix: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


FAULTS: list[Fault] = []


def fault(within: int, **mix: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Keeps a function that puts a mistake in."""

    def kept(put_in: Callable[[], Any]) -> Callable[[], Any]:
        FAULTS.append(Fault(put_in.__name__, within, put_in, mix))
        return put_in

    return kept


def nothing(*_: Any, **__: Any) -> None:
    return None


# --- the source


@fault(50, delay_seconds=0.1)
def source_purges_without_complete() -> Any:
    def purge_when_arrived(session: source.Source) -> source.Decision:
        if session.has_arrived:
            return replace(session, state=source.State.PURGING), [Purge()]
        return session, []

    # Both words come in their order; this is what becomes of it when ARRIVED is said first.
    def runs(session: destination.Destination, event: Any, now: float) -> destination.Decision:
        session, actions = destination._started(replace(session, runs_here=True), event, now)
        return session, [*actions, destination.Say(destination.Arrived(), is_durable=True)]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(source, "_purge_when_arrived", purge_when_arrived))
        stack.enter_context(mock.patch.dict(destination.TABLE[destination.State.RECEIVING], {Phase.RESUMED: runs}))
        return stack.pop_all()


@fault(30)
def source_purges_on_complete() -> Any:
    def purge_when_arrived(session: source.Source) -> source.Decision:
        if session.has_complete:
            return replace(session, state=source.State.PURGING), [Purge()]
        return session, []

    return mock.patch.object(source, "_purge_when_arrived", purge_when_arrived)


@fault(100)
def source_purges_as_soon_as_the_guest_is_gone() -> Any:
    def gone(session: source.Source, event: Any, now: float) -> source.Decision:
        return replace(session, state=source.State.PURGING, is_gone=True), [Purge()]

    return mock.patch.dict(source.TABLE[source.State.DRAINED], {Phase.STOPPED: gone})


@fault(50, is_shared=1.0, residents=1, guests=1, flows=3)
def source_purges_what_a_guest_that_stays_needs() -> Any:
    def none(self: SourceSession, port: Leaving, batch: Batch, stay: Any) -> Any:
        return np.zeros(len(batch), bool)

    return mock.patch.object(SourceSession, "_is_others_too", none)


@fault(50)
def changes_are_not_told() -> Any:
    return mock.patch.object(SourceSession, "_tell_differences", nothing)


@fault(300, lost_events=0.9, traffic=8, copy_seconds=2.0)
def lost_events_are_taken_for_none() -> Any:
    real = Leaving.changes

    def changes(self: Leaving) -> Changes:
        return replace(real(self), is_complete=True)

    return mock.patch.object(Leaving, "changes", changes)


@fault(400, traffic=8, flows=5)
def source_watches_only_after_it_has_exported() -> Any:
    real = SourceSession._say_offer

    def say_offer(self: SourceSession, action: Any) -> None:
        real(self, action)
        for port in self._ports:
            port.close()
            port.watch = self.host.driver.watch(port.scope)

    return mock.patch.object(SourceSession, "_say_offer", say_offer)


@fault(50, late_packets=1.0)
def late_packets_are_not_looked_for() -> Any:
    return mock.patch.object(
        SourceSession, "_purge_late", lambda self, action: self.note("watched") or Done("PurgeLate")
    )


@fault(200, goes_back=1.0, moves=2, late_packets=0.5)
def source_does_not_expect_the_guest_back() -> Any:
    @contextmanager
    def purging(self: Any, guest: str, *, has_names: bool) -> Iterator[bool]:
        yield True

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(SourceSession, "expect_return", nothing))
        stack.enter_context(mock.patch.object(sessions.Host, "purging", purging))
        return stack.pop_all()


@fault(50, old_version=0.6)
def source_does_not_speak_the_first_version() -> Any:
    return mock.patch.object(source, "VERSIONS", (2,))


# --- the destination


@fault(50, forgetful_device=0.5, flows=3)
def what_was_put_in_is_not_read_back() -> Any:
    real = Findings.settle

    class Believed:
        def __init__(self, batch: Any) -> None:
            self._batch = batch

        def result(self) -> Any:
            return self._batch, np.ones(len(self._batch), bool)

    def settle(self: Findings, part: Any) -> None:
        real(self, replace(part, look=Believed(part.batch)))

    return mock.patch.object(Findings, "settle", settle)


@fault(200, capacity=10, flows=5)
def reserved_places_are_not_released() -> Any:
    return mock.patch.object(sessions.Host, "release_places", nothing)


@fault(100, capacity=6, flows=5)
def refused_flows_are_not_named() -> Any:
    return mock.patch.object(Findings, "name_in", nothing)


@fault(50)
def removals_are_not_applied() -> Any:
    return mock.patch.object(DestinationSession, "_take_out", nothing)


@fault(300, copy_seconds=14.0, flows=5)
def held_flows_run_out_of_time() -> Any:
    return mock.patch.object(DestinationSession, "_renew", return_value=Done("Renew"))


@fault(200, copy_seconds=14.0, flows=5, traffic=8)
def closed_flows_are_given_as_much_time_as_open_ones() -> Any:
    def long(self: DestinationSession, batch: Batch) -> Batch:
        batch = batch.take(np.ones(len(batch), bool))
        batch.rows["remainingTimeoutSeconds"] = 432000
        return batch

    return mock.patch.object(DestinationSession, "_short", long)


@fault(50, abort=1.0)
def what_was_put_in_stays_after_a_roll_back() -> Any:
    return mock.patch.object(DestinationSession, "_discard", return_value=Done("Discard"))


@fault(700, failing_device=1.0, flows=5, abort=1.0, moves=3, goes_back=0.0)
def what_a_failed_insert_left_is_forgotten() -> Any:
    real = DestinationSession._discard

    def discard(self: DestinationSession, action: Any) -> Any:
        for port in self._ports:
            port.doubtful = []
        return real(self, action)

    return mock.patch.object(DestinationSession, "_discard", discard)


@fault(500, forgery=0.6, flows=5, abort=0.0, late_zone=1.0, zone_seconds=0.6, traffic=8, delay_seconds=0.05)
def destination_discards_though_the_guest_runs_there() -> Any:
    def give_up(session: destination.Destination, reason: str, now: float) -> destination.Decision:
        return replace(session, state=destination.State.ENDED), [Discard(), End(Outcome.FAILED, reason)]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(destination, "_give_up", give_up))
        stack.enter_context(mock.patch.object(sessions.Host, "discarding", return_value=nullcontext(True)))
        return stack.pop_all()


@fault(300, crash=1.0, abort=1.0, flows=4, moves=2, guests=1, residents=0, copy_seconds=1.5)
def who_goes_on_with_a_session_may_not_discard_what_that_put_in() -> Any:
    return mock.patch.object(sessions.Host, "take_over", nothing)


@fault(50, late_zone=1.0)
def a_zone_that_is_late_is_not_asked_for_again() -> Any:
    return mock.patch.object(destination, "_next_wake", lambda session, now: WakeAt(session.deadline))


@fault(300, is_shared=1.0, residents=1, abort=0.7, flows=2)
def flows_of_local_neighbours_are_replaced() -> Any:
    return mock.patch.object(DestinationSession, "_with_neighbours", lambda self, scope: scope)


@fault(400, is_shared=1.0, guests=3, flows=4, residents=0, abort=0.5, copy_seconds=0.5)
def shared_entry_goes_with_the_first_of_two_sessions() -> Any:
    def none(self: Claims, session: str, scope: Any, batch: Batch) -> Any:
        return np.zeros(len(batch), bool)

    return mock.patch.object(Claims, "claimed_by_others", none)


# --- the journal


@fault(20)
def journal_is_written_after_the_act() -> Any:
    def enact(self: sessions.Session, label: str, actions: Any) -> None:
        self._do(actions)
        self._record(label, actions)

    return mock.patch.object(sessions.Session, "_enact", enact)


@fault(30, flows=3)
def purge_does_not_wait_for_the_disk() -> Any:
    def is_never_durable(self: sessions.Session, label: str, actions: Any) -> None:
        self._decisions += 1
        names = [sessions._label(one) for one in actions]
        self.host.journal.record(self.id, self._decisions, label, self._state(), names, is_durable=False)

    return mock.patch.object(sessions.Session, "_record", is_never_durable)


@fault(20, flows=3)
def payloads_are_not_kept() -> Any:
    return mock.patch.object(sessions.Session, "keep_payload", nothing)


# --- an agent that is started anew


@fault(200, crash=1.0, loss=0.95, abort=0.0, guests=1)
def a_watch_goes_on_as_if_the_guest_had_arrived() -> Any:
    real = source.recovered

    def recovered(*known: Any, **more: Any) -> source.Decision:
        session, actions = real(*known, **more)
        return replace(session, outcome=Outcome.MOVED), actions

    return mock.patch.object(source, "recovered", recovered)


@fault(500, crash=1.0, moves=3, is_described=1.0, no_hook=1.0, flows=2, abort=0.0)
def a_new_start_forgets_who_is_on_the_way() -> Any:
    return mock.patch.object(OutgoingGuests, "read", nothing)


@fault(1000, crash=1.0)
def a_new_start_takes_for_put_in_what_it_only_has_written_down() -> Any:
    real = formers._tell
    return mock.patch.object(formers, "_tell", lambda *told, is_sure, **how: real(*told, is_sure=True, **how))


@fault(1000, crash=1.0)
def what_is_put_in_already_is_not_told_anew_to_who_goes_on() -> Any:
    return mock.patch.object(
        DestinationSession, "_untouched", lambda self, port, mine: mine.take(~is_known(port, mine))
    )


def is_known(port: Arriving, mine: Batch) -> Any:
    return port.held.find(mine)[0] | port.former.find(mine)[0] | port.unsure.find(mine)[0]


@fault(100, crash=1.0, capacity=4, flows=5, is_shared=0.0, hosts=2)
def a_new_start_forgets_what_had_no_place() -> Any:
    return mock.patch.object(SourceSession, "_note_named", nothing)


@fault(500, crash=1.0, is_shared=1.0, guests=2, residents=0, abort=0.5)
def a_new_start_forgets_who_has_come() -> Any:
    return mock.patch.object(DestinationSession, "_with_arrived", lambda self, scope: scope)


# --- the channel, and who is believed


@fault(300, forgery=0.3)
def message_counts_twice_after_a_broken_stream() -> Any:
    return mock.patch.object(Channel, "_is_new", return_value=True)


@fault(300, forgery=0.12, traffic=8)
def unacknowledged_messages_are_lost_with_their_stream() -> Any:
    real = Channel._enter

    def enter(self: Channel, stream: Any) -> None:
        if stream.number:
            self._unacknowledged.clear()
        real(self, stream)

    return mock.patch.object(Channel, "_enter", enter)


@fault(50, delay_seconds=0.1, repetition=0.5)
def packets_are_taken_in_any_order() -> Any:
    def accept(self: Inbox, number: int, payload: bytes) -> list[bytes]:
        self._next = number + 1
        return [payload]

    return mock.patch.object(Inbox, "accept", accept)


@fault(50, stranger=1.0)
def stranger_is_believed() -> Any:
    return mock.patch.object(Agent, "_refuse_who_is_not_the_destination", nothing)


@fault(50, stranger=1.0, is_described=1.0)
def any_token_counts() -> Any:
    return mock.patch.object(Agent, "_has_token", return_value=True)
