"""What is said about a migration: by this host's hypervisor, and between the two hosts' agents."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NewType

SessionId = NewType("SessionId", str)
"""A UUID, made by the destination: one guest, one move."""

VERSIONS = (2, 1)
"""Of the messages below, those that are understood here, the best first. A change of their meaning begins a new one and
comes with a decision record. In version 1 the source says no counts and waits for no Answer."""
PROTOCOL_VERSION = VERSIONS[0]


class Phase(enum.Enum):
    """What this host's hypervisor says of a guest, in libvirt's words."""

    OUTGOING = "outgoing"
    """Source: a job has begun that moves the guest away."""
    PREPARE = "prepare"
    """Destination: the guest is about to come."""
    STARTED = "started"
    """Destination: its empty shell runs; the tap is there or will be soon."""
    SUSPENDED = "suspended"
    """Source: the guest is paused for the last time."""
    RESUMED = "resumed"
    """The guest runs on this host: on the destination it has come, on the source it stays."""
    STOPPED = "stopped"
    """The guest is gone from this host: on the source it has left, on the destination it never came."""
    ROLLBACK = "rollback"
    """Source: the job that moved the guest is over, and the guest has not left. Said where nothing else says it."""


@dataclass(frozen=True, slots=True)
class MigrationEvent:
    """One such word about one guest. The same word may be said twice, by a hook and by an event."""

    guest: str
    phase: Phase
    source: str | None = None
    """Host name of the source, where the teller knows it."""
    destination: str | None = None
    role: str | None = None
    """`source` or `destination`: what this host is in the move, where the teller knows it."""
    domain: str | None = field(default=None, repr=False)
    """The domain's XML as the teller was given it. It may hold passwords, so it is not for logs."""
    is_incoming: bool = False
    """With STARTED: the teller knows that the guest comes from another host, and does not merely start here."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a host writes into the description of each guest that runs on it, and what travels with the guest."""

    host: str
    """The host's name among the agents."""
    token: str = field(repr=False)
    """Made anew for each guest. Who knows it was given the guest's description, or may read it on one of both hosts."""


class Outcome(enum.Enum):
    """How a session ended."""

    MOVED = "moved"
    STAYED = "stayed"
    """The guest stays on the source, or so it must be taken: the source has kept every flow."""
    LEFT_WITHOUT_ARRIVAL = "purged without arrival"
    """The guest has left the source, and nobody said that it arrived."""
    FAILED = "failed"
    """The guest moved and its flows, or some of them, did not."""
    CONTINUED = "continued"
    """An agent was started anew; another session goes on with this one."""
    UNCLEAR = "unclear"
    """Nobody said where the guest is: every flow was kept. The operator decides."""


# What the agents tell each other. Each is one numbered message of a session.


@dataclass(frozen=True, slots=True)
class Open:
    """Destination to source, first of all: this guest is coming here; what I can take."""

    guest: str
    destination: str
    versions: tuple[int, ...]
    templates: tuple[str, ...]
    compressions: tuple[str, ...]
    free: int | None
    token: str = field(default="", repr=False)
    """What the guest's description says (`Origin`), as proof that it came with the guest; empty: it says nothing."""
    continues: str = ""
    """The session with which this one goes on: an agent was started anew meanwhile."""
    has_all: bool = False
    """Nothing more is asked for: all that there was is in the kernel here, and was before."""
    request_id: str = ""
    """The request that moves the guest, where the manager has told of it."""
    after: tuple[str, ...] = ()
    """The destination's former sessions with the guest, newest last: what comes of them later is not heard."""
    devices: tuple[str, ...] = ()
    """Identities of its devices that serve several hosts: what these keep need not move if the source has them too."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Source to destination: agreed on this version; the flows of so many ports follow, and so many of each kind."""

    version: int
    ports: int
    kinds: tuple[str, ...] = ()
    """Names of templates, and in the same order how many flows there are of each."""
    counts: tuple[int, ...] = ()
    functions: tuple[str, ...] = ()
    """What of a firewall's abilities they use (`model.risk`)."""
    reasons: tuple[str, ...] = ()
    """Why the source leaves some out, which are not among the counts; and in the same order how many each concerns."""
    left_out: tuple[int, ...] = ()
    shared: tuple[str, ...] = ()
    """Identities of devices that both have."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Destination to source: so many of them have a place here, kept for a while; why the others do not."""

    places: int
    kept_seconds: int
    kinds: tuple[str, ...] = ()
    """Those for which the places are. Others may be sent too, and are refused by name."""
    reasons: tuple[str, ...] = ()
    """Why some are not carried as they are, and in the same order how many each concerns."""
    counts: tuple[int, ...] = ()
    verdict: str = ""
    """What this host's policy says to it (`model.risk.Verdict`)."""


@dataclass(frozen=True, slots=True)
class Room:
    """Destination to source: it has become so many places; traffic took the others, or their time is over."""

    places: int
    reason: str


@dataclass(frozen=True, slots=True)
class Check:
    """From the host that a guest is on, to any other: what would become of these flows, if it went there?"""

    guest: str
    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    functions: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Flows:
    """Source to destination: some of what is there, an IPFIX payload."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class InSync:
    """Source to destination: that was all there is; from here on only what changes."""

    count: int


@dataclass(frozen=True, slots=True)
class FlowChanges:
    """Source to destination: what changed, an IPFIX payload, removals first. The last one names the guest's pause."""

    payload: bytes
    is_last: bool


@dataclass(frozen=True, slots=True)
class Complete:
    """Destination to source: all of it is in the kernel here, read back and in the journal."""

    imported: int
    refused: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """Destination to source: the guest runs here."""


@dataclass(frozen=True, slots=True)
class Purged:
    """Source to destination: what moved is gone here, proved by looking."""

    removed: int
    left: int


@dataclass(frozen=True, slots=True)
class Stays:
    """Either way: the guest stays on the source. What the destination has is discarded, the source keeps all."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Source to destination: my agent was started anew and cannot go on with this session. Open another one."""

    session: str


@dataclass(frozen=True, slots=True)
class GivesUp:
    """Either way: I cannot go on carrying flows. Where the guest goes is another matter."""

    reason: str


Message = (
    Open
    | Offer
    | Answer
    | Room
    | Check
    | Flows
    | InSync
    | FlowChanges
    | Complete
    | Arrived
    | Purged
    | Stays
    | GivesUp
    | AskAgain
)
