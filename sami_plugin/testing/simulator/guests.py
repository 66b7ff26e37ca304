"""Guests, their ports, and what their connections ought to be: the truth that firewalls are compared with."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import netaddr
import numpy as np

from sami_plugin.drivers.memory import Entry, Tuple
from sami_plugin.model.flows import TEMPLATES, Addresses, Batch, FlowStatus, Template, ZoneRole, names, turned_round

KINDS = ("tcp-ipv4", "udp-ipv4", "tcp-ipv6", "udp-ipv6", "icmp-ipv4", "tcp-ipv4", "icmp-ipv6")
LIFETIMES = {"tcp": 432000, "udp": 8, "icmp": 7}
"""Seconds without a packet after which a firewall forgets a connection."""


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """What two ends say to each other, as a firewall tells it from others. The same in all runs."""

    template: Template
    row: np.void
    original: Tuple
    reply: Tuple
    name: str
    lifetime: int

    def entry(self, expires: float, mark: int) -> Entry:
        """What a firewall has of it then."""
        rows = self.template.empty(1)
        rows[0] = self.row
        rows["flowMark"] = mark
        return Entry(self.template, rows[0], 0, expires, self.original, self.reply)


@functools.lru_cache(maxsize=4096)
def conversation(kind: str, source: str, destination: str, number: int) -> Conversation:
    """The `number`-th one of this kind from one address to another."""
    template = TEMPLATES[kind]
    rows = template.empty(1)
    rows["zoneRole"] = ZoneRole.PORT
    protocol = template.protocol
    rows["protocolIdentifier"] = protocol.number
    family = "IPv6" if template.is_ipv6 else "IPv4"
    for end, address in (("source", source), ("destination", destination)):
        value = int(netaddr.IPAddress(address))
        rows[f"{end}{family}Address"] = divmod(value, 1 << 64) if template.is_ipv6 else value
    identifiers = protocol.identifiers
    if identifiers.swapped is not None:
        here, there = identifiers.swapped
        rows[here], rows[there] = 20000 + number, 443
    else:
        rows[identifiers.answered], rows["icmpIdentifier"] = protocol.answers[0][0], number
    rows["conntrackStatus"] = FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.ASSURED
    if protocol.states is not None:
        rows[protocol.state_field] = protocol.states["ESTABLISHED"]
    entry = Entry.of(template, rows[0], 0.0)
    (name,) = names(Batch(template, rows))
    return Conversation(template, rows[0], entry.original, entry.reply, name, LIFETIMES[kind.partition("-")[0]])


@functools.lru_cache(maxsize=4096)
def turned(known: Conversation) -> Conversation | None:
    """The same, as a firewall sees it that missed its first packet: the answerer begins. ICMP has no such thing."""
    if known.template.protocol.identifiers.swapped is None:
        return None
    rows = known.template.empty(1)
    rows[0] = known.row
    batch = turned_round(Batch(known.template, rows))
    (name,) = names(batch)
    return Conversation(known.template, batch.rows[0], known.reply, known.original, name, known.lifetime)


@functools.lru_cache(maxsize=256)
def addresses_of(number: int) -> tuple[str, str]:
    """The two addresses of the `number`-th port of a run."""
    return f"192.0.2.{number + 1}", f"2001:db8::{number + 1:x}"


@functools.lru_cache(maxsize=256)
def parsed(number: int) -> Addresses:
    """As `addresses_of`."""
    return tuple(netaddr.IPAddress(text) for text in addresses_of(number))


@dataclass(slots=True, eq=False)
class Port:
    """One network interface of a guest."""

    guest: Guest
    number: int
    is_shared: bool
    zones: dict[str, int] = field(default_factory=dict)
    """By host, where its tap is and its zone is known."""
    former: dict[str, int] = field(default_factory=dict)
    """By host, the zone that it has, or had when it was there last."""

    @property
    def name(self) -> str:
        return f"tap-{self.number}"


@dataclass(slots=True, eq=False)
class Flow:
    """A connection as it ought to be. Foreign ones have no owners."""

    conversation: Conversation
    owners: tuple[Port, ...]
    mark: int = 1
    is_live: bool = True
    is_renewed: bool = True
    """Packets go on; else it runs out of time one day."""
    expires_at: float = math.inf
    """When it is forgotten if nothing more is said in it."""
    changed_at: float = -math.inf
    ended_at: float = math.inf
    closes_at: float = math.inf
    """When one is forgotten that its ends have closed."""
    is_cleaned: bool = False
    """The network's own agent took it at the source, in the pause that is now."""
    is_lost_unseen: bool = False
    """In a move before the last, of which nobody was told, or where it ran out before anybody could see it."""
    was_cleaned: bool = False
    """The network's own agent took it at the source, in a pause."""

    @property
    def is_between_guests(self) -> bool:
        return len(self.owners) > 1

    @property
    def is_open(self) -> bool:
        """Whether more may be said in it."""
        return self.is_live and self.closes_at == math.inf

    def belongs_to(self, guest: str) -> bool:
        return any(port.guest.id == guest for port in self.owners)


@dataclass(slots=True, eq=False)
class Guest:
    """Where a guest is, and where its hosts think that it goes."""

    id: str
    name: str
    place: str | None
    """The host where it runs, or is paused; None: it was killed."""
    is_paused: bool = False
    is_paused_by_job: bool = False
    """The migration has paused it, and its source's agent was told."""
    ports: list[Port] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)
    """By host that it leaves, the host that it moves to, as long as the job is there."""
    visited: set[str] = field(default_factory=set)
    """Hosts that it was, or was to be, on."""
    left_at: dict[str, float] = field(default_factory=dict)
    """By host, when it ran there last."""
    moves: list[tuple[float, str, str]] = field(default_factory=list)
    """When it went from where to where."""
    gone_at: dict[str, float] = field(default_factory=dict)
    """By host, when that one's hypervisor first said that it is gone."""
    expected: set[str] = field(default_factory=set)
    """Hosts that it is about to come to, or is starting on."""
    moves_since: float = 0.0
    """When its last migration began."""
    told_at: str | None = None
    """The host whose agent was told last that it runs there."""
    died_at: str | None = None
    token: str = "0" * 64
    owner: str = ""
    """The host that its description names."""

    @property
    def runs(self) -> bool:
        return self.place is not None and not self.is_paused

    def was_on(self, host: str, since: float) -> bool:
        """Whether it was there at that time or later."""
        return self.place == host or any(source == host and when >= since for when, source, _ in self.moves)

    def round_of(self, host: str, born: float) -> tuple[float, float, float]:
        """When it came to the host, left what was made then, and came again."""
        left = next((when for when, source, _ in self.moves if source == host and when >= born), math.inf)
        came = [when for when, _, destination in self.moves if destination == host]
        before, after = (when for when in came if when < left), (when for when in came if when > left)
        return max(before, default=0.0), left, min(after, default=math.inf)
