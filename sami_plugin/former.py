"""What is known of a session with which another one goes on: in memory, or from the journal of an agent that was ended.

What the journal has of a guest's flows are the payloads that were sent or that came, in the source's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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

FlowsByPort = tuple[tuple[Scope, FlowTable], ...]
"""Where the guest's ports have their state here; and which flows the destination was told of (of a source), or may have
put in (of a destination)."""


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
    ports: FlowsByPort = ()

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
    # Who was about to hand over has the flows that it had before.
    states = [one["state"] for one in decisions if one["actions"] != ["HandOver"]]
    scopes = [Scope.from_dict(told) for told in json.loads(row["ports"])]
    batches = _batches(journal.payloads(row["session"]), settings)
    if row["role"] == "destination":
        batches = (_here(batch, domain) for batch in batches)
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
        tuple(zip(scopes, _tables(batches, scopes), strict=True)),
    )


def _batches(payloads: Iterable[bytes], settings: Settings) -> Iterator[Batch]:
    for payload in payloads:
        octets = compression.decompress(payload, settings.bounds.unpacked_octets)
        yield from ipfix.decode(octets, enterprise=settings.enterprise).batches


def _here(batch: Batch, domain: Domain | None) -> Batch:
    """As this host calls the flows of the source, whose ids mean nothing here."""
    if domain is not None:
        batch, is_ambiguous = domain.address_map.applied(batch)
        batch = batch.take(~is_ambiguous)
    rows = batch.rows.copy()
    rows["flowId"] = 0
    return Batch(batch.template, rows)


def _tables(batches: Iterable[Batch], scopes: list[Scope]) -> list[FlowTable]:
    """Per port, the flows that were told and not taken back. What is no other port's is the first one's."""
    tables = [FlowTable() for _ in scopes]
    for batch in batches if scopes else ():
        for scope, table in zip(scopes[1:], tables[1:], strict=True):
            is_its = scope.owns(batch)
            _tell(table, batch.take(is_its))
            batch = batch.take(~is_its)
        _tell(tables[0], batch)
    return tables


def _tell(table: FlowTable, batch: Batch) -> None:
    if batch.template.is_identity:
        table.discard(batch)
    else:
        table.put(batch)
