"""Guests that jobs of this host move away, whether the other host has asked for their flows or not.

Also in the journal: an agent that is started anew in the middle has to know them, for when a guest has left, nothing on
its host tells any more where it went, nor where its ports were.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from sami_plugin.errors import JournalError
from sami_plugin.journal.journal import Journal
from sami_plugin.model.scope import Scope

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One of them."""

    destination: str | None = None
    """Where to, if the hypervisor said so."""
    is_suspended: bool = False
    scopes: tuple[Scope, ...] = ()
    """Its ports, as far as they are known: a session that knows them may end while the job goes on."""
    token: str = field(default="", repr=False)
    """What its description said (`Origin`), which its destination is given."""


class OutgoingGuests:
    """All of them, by guest. Not thread-safe."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known: dict[str, Outgoing] = {}
        self._unconfirmed: set[str] = set()

    def read(self) -> None:
        """Those of the agent before this one.

        :raises JournalError: the journal cannot be read.
        """
        for guest, text in self._journal.outgoing().items():
            told = json.loads(text)
            scopes = tuple(map(Scope.from_dict, told["scopes"]))
            self._known[guest] = Outgoing(told["destination"], told["is_suspended"], scopes, told["token"])
            self._unconfirmed.add(guest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __contains__(self, guest: str) -> bool:
        return guest in self._known

    def unconfirmed(self) -> list[str]:
        """Those of which nothing was heard since `read`: they may have left meanwhile, or have stayed."""
        return list(self._unconfirmed)

    def is_of(self, guest: str, token: str) -> bool:
        """Whether the guest was to leave with this token."""
        known = self._known.get(guest)
        return known is not None and bool(known.token) and hmac.compare_digest(known.token.encode(), token.encode())

    def get(self, guest: str) -> Outgoing | None:
        return self._known.get(guest)

    def put(self, guest: str, outgoing: Outgoing) -> None:
        """What is known of the guest now."""
        self._unconfirmed.discard(guest)
        if self._known.get(guest) != outgoing:
            self._known[guest] = outgoing
            told = {
                "destination": outgoing.destination,
                "is_suspended": outgoing.is_suspended,
                "scopes": [scope.as_dict() for scope in outgoing.scopes],
                "token": outgoing.token,
            }
            self._keep(guest, json.dumps(told))

    def pop(self, guest: str) -> Outgoing | None:
        """What was known of the guest, which is moved away no more."""
        self._unconfirmed.discard(guest)
        known = self._known.pop(guest, None)
        if known is not None:
            self._keep(guest, None)
        return known

    def _keep(self, guest: str, told: str | None) -> None:
        try:
            self._journal.keep_outgoing(guest, told)
        except JournalError as error:  # the migration goes on; an agent that is started anew will not know of it
            LOG.error("guest %s: %s", guest, error)
