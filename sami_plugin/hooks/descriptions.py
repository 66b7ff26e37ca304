"""What libvirt said last of the guests that run here.

Also in the journal: a guest may leave while its daemon is away, and an agent that is started anew then has nobody else
to ask what the guest's token was, and where its ports are.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from sami_plugin.errors import JournalError
from sami_plugin.hooks import domain_xml

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
        self._unwritten: set[str] = set()
        """Guests of which the journal has something else, for it failed."""
        try:
            self._known = journal.descriptions()
        except JournalError as error:
            LOG.error("%s", error)

    def get(self, guest: str) -> str | None:
        return self._known.get(guest)

    def guests(self) -> set[str]:
        with self._lock:
            return {*self._known, *self._unwritten}

    def put(self, guest: str, xml: str) -> None:
        """It runs here, and this is how it is. What is too large to be read is not kept."""
        with self._lock:
            if len(xml) > domain_xml.MOST_OCTETS:
                self._drop(guest)
            elif self._known.get(guest) != xml or guest in self._unwritten:
                self._known[guest] = xml
                self._keep(guest, xml)

    def pop(self, guest: str) -> None:
        """It is not here any more."""
        with self._lock:
            self._drop(guest)

    def _drop(self, guest: str) -> None:
        if self._known.pop(guest, None) is not None or guest in self._unwritten:
            self._keep(guest, None)

    def _keep(self, guest: str, xml: str | None) -> None:
        self._unwritten.add(guest)
        try:
            self._journal.keep_description(guest, xml)
            self._unwritten.discard(guest)
        except JournalError as error:
            LOG.error("guest %s: %s", guest, error)
