"""The kernel's checks of TCP windows, which flows that are put in have to do without until both ends have spoken."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sami_plugin.errors import SamiError
from sami_plugin.model.flows import Batch
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.scope import Scope

LOG = logging.getLogger(__name__)

LOOK_SECONDS = tuple(2.0**power for power in range(2, 11))
"""From one look to the next: half an hour in all. A flow in which an end is silent for longer stays without checks."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """Flows of one template, as they were asked for."""

    scope: Scope
    batch: Batch
    index: KeyIndex = field(init=False)
    """Made once, and not when a guest is paused."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", KeyIndex(self.batch))


class WindowChecks:
    """Looks again and again, in a thread of its own, for flows that can be checked by now."""

    def __init__(self, check: Callable[[Scope, Batch], Batch]) -> None:
        """`check` does it for those of the flows for which it can, and returns those that it may be asked for again."""
        self._check = check
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, int, Waiting]] = []
        self._looked_at: Waiting | None = None
        self._number = itertools.count()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def begin(self, scope: Scope, batch: Batch) -> None:
        """Returns at once."""
        if not len(batch):
            return
        waiting = Waiting(scope, batch)
        with self._changed:
            if self._is_closed:
                return
            self._put(waiting, 0)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="sami-windows", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def waiting(self, scope: Scope) -> list[Waiting]:
        """Flows of the guest that are without checks there and are to have them again."""
        with self._changed:
            all_ = [one for _, _, _, one in self._due]
            if self._looked_at is not None:
                all_.append(self._looked_at)
        there = scope.namespace, scope.guest
        return [one for one in all_ if (one.scope.namespace, one.scope.guest) == there]

    def close(self) -> None:
        """What was not done yet is left. Waits for a look that is under way. May be repeated."""
        with self._changed:
            self._is_closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _put(self, waiting: Waiting, looks: int) -> None:
        if looks < len(LOOK_SECONDS):
            when = time.monotonic() + LOOK_SECONDS[looks]
            heapq.heappush(self._due, (when, next(self._number), looks, waiting))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._is_closed:
                    return
                _, _, looks, waiting = heapq.heappop(self._due)
                self._looked_at = waiting
            scope, batch = waiting.scope, waiting.batch
            try:
                batch = self._check(scope, batch)
            except SamiError as error:
                LOG.info("flows of %s are tracked without window checks for now: %s", scope.port, error)
            except Exception:  # what happens to one must not end it for all
                LOG.exception("flows of %s are tracked without window checks for now", scope.port)
            left = Waiting(scope, batch) if len(batch) else None
            with self._changed:
                self._looked_at = None
                if left is not None:
                    self._put(left, looks + 1)
