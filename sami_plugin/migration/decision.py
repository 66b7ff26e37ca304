"""What both roles' decisions are made of.

A decision is a plain function: what is known, what happened, what time it is; out comes what is known now and what to
do, in order. Nothing is done here, no clock is read. `session` writes the decision into the journal and then does
it. An input that a state's table does not list changes nothing: from the peer it raises `IllegalMessage`, from this
host's hypervisor or clock it means nothing in that state (hooks and events say the same thing twice).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sami_plugin.errors import IllegalMessage
from sami_plugin.model.migration import Answer, Message, MigrationEvent, Offer, Outcome, Phase
from sami_plugin.model.verdict import Verdict

# What happens to a session.


@dataclass(frozen=True, slots=True)
class GuestDid:
    """This host's hypervisor said something of the guest."""

    event: MigrationEvent


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """The other host's agent said this; messages come in their order, each once."""

    message: Message


@dataclass(frozen=True, slots=True)
class Found:
    """It is known now which host the guest leaves."""

    source: str


@dataclass(frozen=True, slots=True)
class Done:
    """An action is finished. `what` is the action's class name, `count` the flows it concerned."""

    what: str
    count: int = 0
    refused: int = 0
    is_all: bool = True
    """False: there is more of the same to do (another batch to export, a scope that is not known yet)."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """It is known what can be taken here, and what this host's policy says to it."""

    verdict: Verdict
    reason: str
    answer: Answer | None = None
    """What the source is told, where it waits for that."""


@dataclass(frozen=True, slots=True)
class OperatorSaid:
    """Whether the guest may come, as the operator wants it."""

    may_come: bool


@dataclass(frozen=True, slots=True)
class LetGo:
    """Nobody waits for a verdict any more: the guest comes, whatever is said."""


@dataclass(frozen=True, slots=True)
class ActionFailed:
    """An action could not be done; `reason` is for the operator."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The other agent does not know this session, or said what is no message."""

    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The time that an action `WakeAt` asked for has come."""


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another migration of the same guest has begun on this host, in the same role."""


@dataclass(frozen=True, slots=True)
class Continued:
    """The other host goes on with another session, because its agent was started anew."""


@dataclass(frozen=True, slots=True)
class Returns:
    """The guest that leaves this host, or has left it, is about to come here."""


Event = (
    GuestDid
    | PeerSaid
    | Found
    | Done
    | Negotiated
    | OperatorSaid
    | LetGo
    | ActionFailed
    | PeerLost
    | TimePassed
    | Superseded
    | Continued
    | Returns
)


# What a session does about it.


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this host for the guest's flows: say Open, with what can be taken here."""

    source: str
    has_all: bool = False
    """Only say that all of them are here, and were before this host's agent was started anew."""


@dataclass(frozen=True, slots=True)
class CallAgain:
    """Say anew to the source what it has taken and not answered: its agent may have ended in between."""


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the peer. Where `is_durable`, the disk has the decision first."""

    message: Message
    is_durable: bool = False


@dataclass(frozen=True, slots=True)
class StartExport:
    """Begin to watch, then to export: the scope's flows, as they are while the guest runs."""


@dataclass(frozen=True, slots=True)
class SayOffer:
    """Say Offer, with what there is: the flows of so many ports."""

    ports: int


@dataclass(frozen=True, slots=True)
class SayAgain:
    """Ask the destination, on a line of this host's own, to open another session."""


@dataclass(frozen=True, slots=True)
class Choose:
    """Of these kinds so many flows have a place at the destination. The rest of them is named, and not sent."""

    places: int
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Negotiate:
    """See what can be taken here of what is offered, and ask the policy. Becomes `Negotiated`."""

    offer: Offer | None
    """None: the source has not said what there is."""
    may_refuse: bool = True
    """Whether the migration is held up until the policy has spoken."""
    why_unknown: str = ""


@dataclass(frozen=True, slots=True)
class LapsePlaces:
    """Keep places for this session no longer."""

    reason: str = ""
    """Why, for a source that still sends flows."""


@dataclass(frozen=True, slots=True)
class ExportNext:
    """Send the next batch of the export."""


@dataclass(frozen=True, slots=True)
class ExportChanges:
    """Send what changed since the last time."""

    is_last: bool
    says_removals: bool = True
    """False: the guest has been paused since the last time, and what is deleted here after the pause says nothing."""


@dataclass(frozen=True, slots=True)
class Resync:
    """Export again and send the differences: changes may have been missed."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Note what the guest leaves, in the journal too: nobody has asked for it, or has said what is wanted."""


@dataclass(frozen=True, slots=True)
class Purge:
    """Remove at the source what was exported, by name, and prove that it is gone. Waits for the disk."""


@dataclass(frozen=True, slots=True)
class PurgeLate:
    """Remove at the source, by name, what packets of peers have made of the guest's since it was paused."""


@dataclass(frozen=True, slots=True)
class Import:
    """Put these flows in and take these out, in order, as soon as the scope is known."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class FindScope:
    """Ask where the ports' state lives here, and import what waited for the answer.

    Done's `count` is how many ports are known, and it is all of them unless `is_all` is False.
    """

    is_last: bool = False
    """There is no more time to wait: what belongs to none of the ports that are known now is refused."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Read back what was imported since the last time, and compare."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Keep what was imported from running out of time."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Remove at the destination what this session put in, by name."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """Let another session go on with what this one has. Always the last action."""


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send `TimePassed` at this time, instead of at any other asked for before."""

    when: float


@dataclass(frozen=True, slots=True)
class End:
    """The session is over: its report is written, and nothing happens to it any more. Always the last action."""

    outcome: Outcome
    reason: str = ""


Action = (
    Say
    | Ask
    | CallAgain
    | Keep
    | StartExport
    | SayOffer
    | SayAgain
    | Choose
    | Negotiate
    | LapsePlaces
    | ExportNext
    | ExportChanges
    | Resync
    | Purge
    | PurgeLate
    | Import
    | FindScope
    | Verify
    | Renew
    | Discard
    | HandOver
    | WakeAt
    | End
)


SessionT = TypeVar("SessionT")


def replace(session: SessionT, **changes: Any) -> SessionT:
    """As `dataclasses.replace`, of what a decision depends on: each decision makes some, so it has to be quick."""
    values = vars(session) | changes
    assert len(values) == len(vars(session)), f"{type(session).__name__} has none of {sorted(changes)}"
    made = object.__new__(type(session))
    object.__setattr__(made, "__dict__", values)
    return made


def joined(*reasons: str) -> str:
    """One reason of several, of which some may be empty."""
    return "; ".join(filter(None, reasons))


StateT = TypeVar("StateT")
Cause = type[Message] | Phase | str | type[TimePassed]
"""What a table lists: a kind of message, a word of the hypervisor, the name of a finished action, the clock."""

Handler = Callable[[SessionT, Event, float], tuple[SessionT, list[Action]]]
Table = Mapping[StateT, Mapping[Cause, Handler[SessionT]]]


def cause_of(event: Event) -> Cause:
    """Under which heading of a table an event stands."""
    match event:
        case GuestDid(event=told):
            return told.phase
        case PeerSaid(message=message):
            return type(message)
        case Done(what=what):
            return what
        case TimePassed():
            return TimePassed
        case (
            Found()
            | Negotiated()
            | OperatorSaid()
            | LetGo()
            | ActionFailed()
            | PeerLost()
            | Superseded()
            | Continued()
            | Returns()
        ):
            return type(event).__name__


def step(
    table: Table[StateT, SessionT], state: StateT, session: SessionT, event: Event, now: float
) -> tuple[SessionT, list[Action]]:
    """Looks the event up in the state's row and asks its handler.

    :raises IllegalMessage: the peer said what the state's row does not list.
    """
    handler = table.get(state, {}).get(cause_of(event))
    if handler is not None:
        return handler(session, event, now)
    if isinstance(event, PeerSaid):
        raise IllegalMessage(f"{type(event.message).__name__} may not be said in state {state}")
    return session, []
