"""What libvirt said last of the guests that run here.

Also in the journal: a guest may leave while its daemon is away, and an agent that is started anew then has nobody else
to ask what the guest's token was, and where its ports are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Protocol

from sami_plugin.errors import JournalError

LOG = logging.getLogger(__name__)


class Store(Protocol):
    """As much of the journal. Raises `JournalError`."""

    def descriptions(self) -> dict[str, str]: ...

    def keep_description(self, guest: str, xml: str | None) -> None: ...


class Descriptions:
    """Domain XML by guest. Thread-safe. A journal that fails costs an agent that is started anew what it would know."""

    def __init__(self, journal: Store) -> None:
        """Begins with those of the agent before this one."""
        self._journal = journal
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        try:
            self._known = journal.descriptions()
        except JournalError as error:
            LOG.error("%s", error)

    def get(self, guest: str) -> str | None:
        return self._known.get(guest)

    def put(self, guest: str, xml: str) -> None:
        """It runs here, and this is how it is."""
        with self._lock:
            if self._known.get(guest) != xml:
                self._known[guest] = xml
                self._keep(guest, xml)

    def pop(self, guest: str) -> None:
        """It is not here any more."""
        with self._lock:
            if self._known.pop(guest, None) is not None:
                self._keep(guest, None)

    def keep_only(self, guests: Collection[str]) -> None:
        """These are all that run here."""
        for guest in [one for one in self._known if one not in guests]:
            self.pop(guest)

    def _keep(self, guest: str, xml: str | None) -> None:
        try:
            self._journal.keep_description(guest, xml)
        except JournalError as error:
            LOG.error("guest %s: %s", guest, error)
