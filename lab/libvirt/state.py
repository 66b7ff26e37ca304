"""A lab that stays up for a person: who runs it, so that other commands find it. One for each clone."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.deadline import wait_until
from lab.errors import LabError
from lab.libvirt import parts

FILE = parts.FOLDER / "up.json"
DOWN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Up:
    """`pid` is the process that the machine sees, `began` when it did (pids are reused, see proc(5), starttime);
    `hosts` has the pid 1 of each host as the world counts, and is empty until the lab is up."""

    pid: int
    began: int
    hosts: dict[str, int]

    @property
    def world(self) -> int:
        """The pid of the world's first process, as the machine counts."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0])

    def write(self) -> None:
        """Replaces what was there."""
        new = FILE.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.rename(FILE)

    def enter(self, host: str, argv: list[str]) -> list[str]:
        """The command that runs `argv` in a host. Raises LabError where there is no such host."""
        if host not in self.hosts:
            raise LabError(f"there is no host {host!r}; there are: {' '.join(self.hosts) or 'none yet'}")
        world = ["nsenter", "-t", str(self.world), "-m", "-n", "-p", "--"]
        return [*world, str(parts.ENTER), str(self.hosts[host]), *argv]

    def end(self) -> None:
        """End the lab and wait until it is gone. Raises DeadlinePassed."""
        os.kill(self.pid, signal.SIGTERM)
        wait_until(lambda: started_at(self.pid) != self.began, "the lab to end", DOWN_SECONDS)


def read() -> Up:
    """What was written last, whether it still runs or not."""
    return Up(**json.loads(FILE.read_text()))


def find() -> Up | None:
    """The lab that runs; None when there is none. Not in its world, which does not see the process."""
    if not FILE.exists():
        return None
    up = read()
    return up if started_at(up.pid) == up.began else None


def started_at(pid: int) -> int | None:
    """The process's start in clock ticks since boot; None when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
