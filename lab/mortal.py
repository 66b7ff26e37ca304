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
    with _alone(folder):
        (folder / "die-at").write_text(f"{steps}")


def disarm(folder: Path) -> bool:
    """It lives on, whatever was chosen; whether it had not ended by then."""
    with _alone(folder):
        try:
            (folder / "die-at").unlink()
        except FileNotFoundError:
            return False
        return True


def main() -> int:
    """As sami-agent."""
    file = Path(sys.argv[sys.argv.index("--config-file") + 1]).with_name("die-at")
    for kind, names in STEPS.items():
        for name in names:
            setattr(kind, name, _mortal(getattr(kind, name), file))
    return agent.main()


def _mortal(step: Callable[..., Any], file: Path) -> Callable[..., Any]:
    def mortal(*arguments: Any, **named: Any) -> Any:
        count(file)
        return step(*arguments, **named)

    return mortal


def count(file: Path) -> None:
    """One step less is left; where none was, this process ends."""
    with _alone(file.parent):
        try:
            left = int(file.read_text())
        except FileNotFoundError:
            return
        if left == 0:
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write_text(f"{left - 1}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other thread or process counts or changes what is left; who dies meanwhile lets go of it."""
    with (folder / "die-at.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
