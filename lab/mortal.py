"""An agent that ends as `kill -9` ends it, before a step that a test has chosen.

A step is a write of its journal, or what it does to its firewall: so it may end between writing down and doing, too.
How many are left to it stands in the file ``die-at`` beside its configuration. Without the file it lives. All
else is `sami-agent`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sami_plugin.cmd import agent
from sami_plugin.drivers.linux_conntrack.driver import LinuxConntrackDriver
from sami_plugin.journal.journal import Journal

_WRITES = (
    "begin",
    "know",
    "record",
    "keep_payload",
    "note_applied",
    "note_named",
    "go_on",
    "end",
    "keep_outgoing",
    "keep_description",
)
STEPS = {Journal: _WRITES, LinuxConntrackDriver: ("insert", "remove")}


def arm(folder: Path, steps: int) -> None:
    """The agent whose configuration is in the folder ends after so many steps, from now on, before the next one."""
    with _left(folder) as left:
        left.write_text(f"{steps}")


def disarm(folder: Path) -> bool:
    """It lives on, whatever was chosen; whether it had not ended by then."""
    with _left(folder) as left:
        is_armed = left.exists()
        left.unlink(missing_ok=True)
        return is_armed


def main() -> int:
    """As sami-agent."""
    folder = Path(sys.argv[sys.argv.index("--config-file") + 1]).parent
    for kind, names in STEPS.items():
        for name in names:
            setattr(kind, name, _mortal(getattr(kind, name), folder))
    return agent.main()


def _mortal(step: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def mortal(*arguments: Any, **named: Any) -> Any:
        count(folder)
        return step(*arguments, **named)

    return mortal


def count(folder: Path) -> None:
    """One step less is left; where none was, this process ends."""
    with _left(folder) as left:
        if not left.exists():
            return
        steps = int(left.read_text())
        if steps == 0:
            left.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        left.write_text(f"{steps - 1}")


@contextmanager
def _left(folder: Path) -> Iterator[Path]:
    """The file, which no other thread or process reads or changes meanwhile; who dies lets go of it."""
    with (folder / "die-at.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / "die-at"


if __name__ == "__main__":
    sys.exit(main())
