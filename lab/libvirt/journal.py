"""What the hosts' hooks and libvirt daemons said, in one list by time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lab.deadline import wait_until
from lab.errors import DeadlinePassed

# Guests need the processor more.
POLL_SECONDS = 0.01


class Entry(NamedTuple):
    """At `time` (CLOCK_MONOTONIC seconds) `host` said it of `guest`.

    `what` is a libvirt event, "SUSPENDED/MIGRATED", "MIGRATION_ITERATION 1", "JOB_COMPLETED 5" (the number is the
    operation), or a call of the lab's hook, "prepare begin". Guest "-" is the daemon: "WATCHED", "LOST".
    """

    time: float
    host: str
    guest: str
    what: str

    @property
    def is_hook(self) -> bool:
        """A hook's call, and not an event."""
        return self.what[0].islower()


class Journal:
    """Reads what `watch` and the hooks append. Threads may share it."""

    def __init__(self, events: Path, hooks: dict[str, Path]) -> None:
        self._events = events
        self._hooks = hooks

    def entries(self, guest: str | None = None, since: float = 0.0, host: str | None = None) -> list[Entry]:
        """All that was said until now, by time; of one guest, one host, from a time on, where given."""
        every = [Entry(float(time), *words) for time, *words in _lines(self._events, 3)]
        for name, file in self._hooks.items():
            every += [Entry(float(time), name, *words) for time, *words in _lines(file, 2)]
        return sorted(
            entry
            for entry in every
            if entry.time >= since and guest in (None, entry.guest) and host in (None, entry.host)
        )

    def wait_for(self, what: str, guest: str, host: str, since: float = 0.0, seconds: float = 30.0) -> Entry:
        """The first such entry since then, as soon as it is there. Blocks; raises DeadlinePassed with what was said."""
        found: list[Entry] = []

        def is_said() -> bool:
            found.extend(entry for entry in self.entries(guest, since, host) if entry.what == what)
            return bool(found)

        try:
            wait_until(is_said, f"host {host} to say {what} of {guest}", seconds, poll_seconds=POLL_SECONDS)
        except DeadlinePassed as error:
            raise DeadlinePassed(f"{error.what}; said was:\n{show(self.entries(guest, since))}", seconds) from error
        return found[0]


def show(entries: Iterable[Entry]) -> str:
    """For people: a line for each, with milliseconds since the first."""
    every = list(entries)
    return "\n".join(f"{1000 * (e.time - every[0].time):8.1f} ms  {e.host}  {e.guest}  {e.what}" for e in every)


def _lines(file: Path, splits: int) -> list[list[str]]:
    text = file.read_text() if file.exists() else ""
    return [line.split(" ", splits) for line in text[: text.rfind("\n") + 1].splitlines()]
