"""What runs a decision, without doing anything: the order of events and actions is the session's, the rest pretends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sami_plugin.errors import IllegalMessage
from sami_plugin.migration.decision import (
    Action,
    ActionFailed,
    Done,
    End,
    Event,
    FindScope,
    GuestDid,
    HandOver,
    Negotiate,
    Negotiated,
    PeerSaid,
    Say,
    TimePassed,
    WakeAt,
)
from sami_plugin.model.migration import Answer, MigrationEvent, Phase
from sami_plugin.model.verdict import Verdict

Step = Callable[[Any, Event, float], tuple[Any, list[Action]]]

SAID = ("SayOffer", "SayAgain", "Choose", "LapsePlaces")
"""Actions of whose end nothing is told."""
MAY_GO_ON = frozenset({"ExportNext", "Resync", "FindScope"})
"""Actions that may be done in part."""


def guest(phase: Phase) -> GuestDid:
    return GuestDid(MigrationEvent("guest", phase))


class Shell:
    """One session. `choices` say of each action in turn whether it fails, and whether it was all of it."""

    def __init__(self, step: Step, session: Any, choices: Iterable[str] = ()) -> None:
        self.session = session
        self.now = 0.0
        self.wake_at: float | None = None
        self.is_over = False
        self.told: list[tuple[float, Event]] = []
        """Events that were not refused, with their times."""
        self.done: list[tuple[float, Action]] = []
        """Actions that were begun, with their times; those that failed too."""
        self._step = step
        self.choices: Iterator[str] = iter(choices)
        self._finished: deque[Event] = deque()
        self._behind: deque[Event] = deque()

    def begin(self, actions: list[Action]) -> None:
        """What is done before anything happens."""
        self.enact(actions)
        self._settle()

    def tell(self, event: Event) -> None:
        """Something happens now, and what comes of it is done."""
        if self.is_over:
            return
        self._behind.append(event)
        self._settle()

    def _settle(self) -> None:
        while not self.is_over and (self._finished or self._behind):
            self._decide(self._finished.popleft() if self._finished else self._behind.popleft())

    def wait_until(self, time: float) -> None:
        """Time passes, and the session is woken as it asked."""
        while not self.is_over and self.wake_at is not None and self.wake_at <= time:
            self.now, self.wake_at = max(self.now, self.wake_at), None
            self.tell(TimePassed())
        self.now = max(self.now, time)

    def enact(self, actions: list[Action]) -> None:
        for action in actions:
            self.done.append((self.now, action))
            assert not self.is_over, f"{action} behind End"
            match action:
                case WakeAt(when=when):
                    self.wake_at = when
                case End() | HandOver():
                    self.is_over = True
                case Say():
                    pass
                case _:
                    if not self._pretend(action):
                        break

    def kinds(self) -> list[str]:
        """What was done, less requests to be woken."""
        return [_kind(action) for _, action in self.done if not isinstance(action, WakeAt)]

    def _decide(self, event: Event) -> None:
        try:
            self.session, actions = self._step(self.session, event, self.now)
        except IllegalMessage:
            assert isinstance(event, PeerSaid)
            return
        self.told.append((self.now, event))
        if isinstance(event, GuestDid):
            again, more = self._step(self.session, event, self.now)
            assert (again, more) == (self.session, []), f"{event.event.phase} twice is not once"
        self.enact(actions)

    def _pretend(self, action: Action) -> bool:
        what, choice = type(action).__name__, next(self.choices, "all")
        if choice == "fails":
            self._finished.append(ActionFailed(what, "pretended"))
            return False
        if isinstance(action, Negotiate):
            verdict = Verdict.PROCEED if choice == "all" or not action.may_refuse else Verdict.ASK
            said = Answer(1, 600) if action.offer is not None and action.offer.version > 1 else None
            self._finished.append(Negotiated(verdict, "pretended", said))
        elif what in SAID:
            pass
        elif choice == "part" and action == FindScope(is_last=True):
            self._finished.append(Done(what, 0))
        elif choice == "part" and what in MAY_GO_ON:
            self._behind.append(Done(what, is_all=False))
        else:
            self._finished.append(Done(what, 1, refused=int(choice == "part")))
        return True


def _kind(action: Action) -> str:
    match action:
        case Say(message=message):
            return type(message).__name__
        case End(outcome=outcome):
            return f"end: {outcome.value}"
    return type(action).__name__
