"""What is known of a session with which another one goes on: in memory, or from the journal of an agent that was ended.

What the journal has of a guest's flows are the payloads that were sent or that came, in the source's names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sami_plugin.codec import compression, ipfix
from sami_plugin.journal.journal import Journal
from sami_plugin.model.domain import Domain
from sami_plugin.model.flows import Batch
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings

WAS_HERE = "guest was here"
"""What "guest resumed" is to who reads it in the journal: while no agent was there, it may have left again."""


@dataclass(frozen=True, slots=True)
class FormerPort:
    """What a session knew of one port of its guest."""

    scope: Scope
    """Where the port has its state here."""
    flows: FlowTable = field(default_factory=FlowTable)
    """Which flows the destination was told of (of a source), or has put in (of a destination)."""
    unsure: FlowTable = field(default_factory=FlowTable)
    """Which flows a destination may have put in, or taken out: its agent ended, its device failed, or nobody looked."""


@dataclass(frozen=True, slots=True)
class Former:
    """A session that is over, and whose guest still moves."""

    session: str
    known_as: str
    """The id by which the other host knows it."""
    guest: str
    role: str
    peer: str
    state: str
    destination: str
    token: str = field(repr=False)
    payloads: int
    """The highest number of a payload that the journal has."""
    heard: frozenset[str]
    """What has happened to it so far, in the journal's words."""
    ports: tuple[FormerPort, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    """What its report says of flows that were not carried as they were sent."""
    unattended_since: float = math.inf
    """Seconds since 1970; from then on, at the latest, flows may have run out for want of an agent."""

    def has(self, *words: str) -> bool:
        """Whether any of these has happened."""
        return not self.heard.isdisjoint(words)


def read(journal: Journal, row: Mapping[str, Any], settings: Settings, domain: Domain | None) -> Former:
    """The session of a row of the journal. `domain` is the peer's, whose names a destination's payloads have.

    :raises SamiError: the journal cannot be read, or holds what is no payload.
    """
    decisions = journal.decisions(row["session"])
    heard = {*json.loads(row["heard"]), *(one["event"] for one in decisions)}
    if "guest resumed" in heard:
        heard = heard - {"guest resumed"} | {WAS_HERE}
    # Who was about to hand over, or to end as a destination, has the flows that it had before.
    is_source = row["role"] == "source"
    states = [
        one["state"] for one in decisions if one["actions"] != ["HandOver"] and (is_source or one["state"] != "ended")
    ]
    ports = tuple(FormerPort(Scope.from_dict(told)) for told in json.loads(row["ports"]))
    for number, payload in journal.payloads(row["session"]):
        is_sure = is_source or number <= row["applied"]
        for batch in _batches(payload, settings):
            _tell(ports, batch if is_source else _here(batch, domain), is_sure=is_sure, has_rest=is_source)
    return Former(
        row["session"],
        row["known_as"] or row["session"],
        row["guest"],
        row["role"],
        row["peer"],
        states[-1] if states else row["state"],
        row["destination"],
        row["token"],
        journal.payload_count(row["session"]),
        frozenset(heard),
        ports,
        json.loads(row["named"]),
        row["begun_at"],
    )


def _batches(payload: bytes, settings: Settings) -> tuple[Batch, ...]:
    octets = compression.decompress(payload, settings.bounds.unpacked_octets)
    return ipfix.decode(octets, enterprise=settings.enterprise, max_octets=settings.bounds.unpacked_octets).batches


def _here(batch: Batch, domain: Domain | None) -> Batch:
    """As this host calls the flows of the source, whose ids mean nothing here."""
    if domain is not None:
        batch, is_ambiguous = domain.address_map.applied(batch)
        batch = batch.take(~is_ambiguous)
    return batch.without_ids()


def _tell(ports: tuple[FormerPort, ...], batch: Batch, *, is_sure: bool, has_rest: bool) -> None:
    """Files flows that were told of, or taken back, with their ports.

    `has_rest`: what is no other port's is the first one's, as at a source. A destination puts in nothing of ports that
    it does not know.
    """
    for port in reversed(ports):
        is_its = port.scope.owns(batch) | (has_rest and port is ports[0])
        _file(port, batch.take(is_its), is_sure=is_sure)
        batch = batch.take(~is_its)


def _file(port: FormerPort, batch: Batch, *, is_sure: bool) -> None:
    if not batch.template.is_identity:
        (port.flows if is_sure else port.unsure).put(batch)
    elif is_sure:
        port.flows.discard(batch)
    else:
        taken_back = FlowTable()
        taken_back.put(batch)
        for known in port.flows.batches():
            port.unsure.put(known.take(taken_back.find(known)[0]))
