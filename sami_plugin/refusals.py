"""Who wanted what of this host and did not get it: in the log once for each reason, and counted."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from sami_plugin.errors import JournalError, SamiError
from sami_plugin.journal.journal import Journal
from sami_plugin.model.printable import printable

LOG = logging.getLogger(__name__)

STRANGER = "not shown who"
"""Somebody who has not shown a certificate, whatever he calls himself."""
MOST_CHARACTERS = 512
MOST_KINDS = 1000
"""Of refusals that are told apart in memory."""
WRITE_SECONDS = 1.0


class Refusals:
    """Thread-safe. Nothing waits for the disk: a thread of its own writes, at most once a second."""

    def __init__(self, host: str, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        self._lock = threading.Lock()
        self._known: set[tuple[str, str]] = set()
        self._unwritten: Counter[tuple[str, str]] = Counter()
        self._is_due = False
        """A thread writes them soon."""

    def note(self, who: str, error: SamiError) -> None:
        """Counts it. `who` and the error may have words of somebody else in them."""
        words = f"{type(error).__name__}: {error}"
        kind = printable(who, MOST_CHARACTERS), printable(words, MOST_CHARACTERS)
        with self._lock:
            is_new = kind not in self._known
            if len(self._known) >= MOST_KINDS:
                self._known.clear()
            self._known.add(kind)
            if not self._is_due:
                self._is_due = self._write_soon()
            if kind in self._unwritten or len(self._unwritten) < MOST_KINDS:
                self._unwritten[kind] += 1
        if is_new:
            LOG.warning("%s: %s was refused: %s", self._host, *kind)

    def write(self) -> None:
        """Puts into the journal what is not there yet."""
        with self._lock:
            counts, self._unwritten, self._is_due = self._unwritten, Counter(), False
        if counts:
            try:
                self._journal.count_refusals(counts)
            except JournalError as failure:
                LOG.error("%s: %s", self._host, failure)

    def _write_soon(self) -> bool:
        """Whether there is a thread for it; else the next refusal tries again."""
        timer = threading.Timer(WRITE_SECONDS, self.write)
        timer.name, timer.daemon = "sami-refusals", True
        try:
            timer.start()
        except RuntimeError:
            return False
        return True
