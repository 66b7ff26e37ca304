"""Who lays claim to an entry that is not one guest's alone.

In a zone that several ports share, a flow between two guests of one host is one entry. Each session that exported or
imported it, or found it there, claims it; it goes only with the last claim, and only if a session put it there. What
was there before any session is nobody's to discard. The caller holds one lock around each decision and the removal that
follows from it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sami_plugin.model.flows import Batch
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.scope import Scope

Place = tuple[str | None, tuple[tuple[int, int], ...]]
"""A device's table: its namespace and its zones."""


def place_of(scope: Scope) -> Place:
    """The table that holds the scope's flows."""
    return scope.namespace, tuple(sorted((int(role), zone) for role, zone in scope.zones.items()))


class Claims:
    """The claims of all sessions of one role on this host. Not thread-safe."""

    def __init__(self) -> None:
        self._claimed: dict[Place, dict[str, FlowTable]] = {}

    def claim(self, session: str, scope: Scope, batch: Batch) -> None:
        """The session exported these flows or put them in. May be repeated."""
        if scope.is_shared:
            self._claimed.setdefault(place_of(scope), {}).setdefault(session, FlowTable()).put(batch.identities)

    def claimed_by_others(self, session: str, scope: Scope, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which of the flows another session claims."""
        claimed = np.zeros(len(batch), bool)
        for name, table in self._claimed.get(place_of(scope), {}).items() if scope.is_shared else ():
            if name != session:
                claimed |= table.find(batch)[0]
        return claimed

    def unclaimed_by_others(self, session: str, scope: Scope, batch: Batch) -> Batch:
        """Those of the flows that no other session claims."""
        return batch.take(~self.claimed_by_others(session, scope, batch)) if scope.is_shared else batch

    def withdraw(self, session: str, scope: Scope, gone: Batch) -> None:
        """The session claims these flows no more. May be repeated."""
        table = self._claimed.get(place_of(scope), {}).get(session)
        if table is not None:
            table.discard(gone)

    def release(self, session: str, scope: Scope) -> None:
        """The session claims nothing there any more. May be repeated."""
        if scope.is_shared:
            tables = self._claimed.get(place_of(scope), {})
            tables.pop(session, None)
            if not tables:
                self._claimed.pop(place_of(scope), None)
