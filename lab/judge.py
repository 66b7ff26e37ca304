"""An independent judge of what the kernels know: it asks the `conntrack` tool, never the code that it judges.

Dump at the moment that counts (a file per table), parse when there is time.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lab.errors import CommandFailed
from lab.guest import Guest
from lab.host import Host

FAMILIES = ("ipv4", "ipv6")


class Flow(NamedTuple):
    """An entry's original direction. `ports` are source and destination port, or ICMP's type, code, id, as text."""

    family: str
    protocol: str
    source: str
    destination: str
    ports: tuple[str, ...]


class Entry(NamedTuple):
    """An entry: the reply direction's addresses tell NAT; `timeout_seconds` is None where the kernel gives none."""

    flow: Flow
    reply_source: str
    reply_destination: str
    timeout_seconds: int | None
    id: int | None


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of one zone of one host at `taken_at` (CLOCK_MONOTONIC, the moment before the dump began)."""

    taken_at: float
    entries: dict[Flow, Entry]

    def of(self, addresses: Collection[str], not_with: Collection[str] = ()) -> set[Flow]:
        """The flows that have one of `addresses` at an end, in either direction, and none of `not_with`."""
        wanted, spared = set(addresses), set(not_with)
        found = set()
        for flow, entry in self.entries.items():
            ends = {flow.source, flow.destination, entry.reply_source, entry.reply_destination}
            if ends & wanted and not ends & spared:
                found.add(flow)
        return found


@dataclass(frozen=True, slots=True)
class Dump:
    """A table on its way to a file; `wait()` before the table may change, `table()` to parse it."""

    taken_at: float
    paths: tuple[Path, ...]
    processes: tuple[subprocess.Popen, ...]

    def wait(self) -> None:
        """Return when the kernel's table is in the files. Raises CommandFailed."""
        for process in self.processes:
            if process.wait() != 0:
                raise CommandFailed(list(process.args), process.returncode, "see stderr")

    def table(self) -> Table:
        """The parsed table. Blocks as `wait`."""
        self.wait()
        entries: dict[Flow, Entry] = {}
        for path in self.paths:
            with path.open() as lines:
                entries |= parse(lines)
        return Table(self.taken_at, entries)


def dump(host: Host, zone: int, path: Path) -> Dump:
    """Begin to write the host's entries of `zone` to files beside `path`; returns at once."""
    taken_at = time.monotonic()
    paths, processes = [], []
    for family in FAMILIES:
        file = path.with_name(f"{path.name}.{family}")
        with file.open("w") as out:
            argv = ["conntrack", "-L", "-f", family, "-w", str(zone), "-o", "extended,id"]
            processes.append(host.start(argv, stdout=out, stderr=subprocess.DEVNULL))
        paths.append(file)
    return Dump(taken_at, tuple(paths), tuple(processes))


def table(host: Host, guest: Guest, path: Path) -> Table:
    """The entries of the guest's zone on this host, now."""
    return dump(host, host.zone(guest), path).table()


def missing(before: Table, after: Table) -> set[Flow]:
    """What was in `before` and is not in `after`, and had not run out by its own timeout when `after` was taken."""
    # Whole seconds are left off by the kernel's dump, so an entry of 3 s may have lived for almost 4.
    age = after.taken_at - before.taken_at
    return {
        flow
        for flow, entry in before.entries.items()
        if flow not in after.entries and (entry.timeout_seconds is None or entry.timeout_seconds > age)
    }


def parse(lines: Iterable[str]) -> dict[Flow, Entry]:
    """The entries of `conntrack -L -o extended,id`, 200,000 lines a second; ValueError on a line that is none.

    ipv4     2 tcp      6 431999 ESTABLISHED src=A dst=B sport=1 dport=2 src=B dst=A sport=2 dport=1 [ASSURED] ... id=3
    Timeout and state may be missing, [UNREPLIED] may stand between the directions, packets= and bytes= after each.
    """
    entries = {}
    for line in lines:
        head, first, rest = line.partition("src=")
        original, second, reply = rest.partition("src=")
        if not first or not second:
            raise ValueError(f"not an entry: {line!r}")
        words = head.split()
        source, destination, *others = original.split()
        ports = tuple([word.partition("=")[2] for word in others if word.startswith(PORT_WORDS)])
        answers = reply.split(None, 2)
        number = reply.rpartition(" id=")[2].strip()
        flow = Flow(words[0], words[2], source, destination[4:], ports)
        timeout = int(words[4]) if len(words) > 4 and words[4].isdigit() else None
        entry_id = int(number) if number.isdigit() else None
        entries[flow] = Entry(flow, answers[0], answers[1][4:], timeout, entry_id)
    return entries


PORT_WORDS = ("sport=", "dport=", "type=", "code=", "id=", "srckey=", "dstkey=")
