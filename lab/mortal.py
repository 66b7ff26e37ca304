"""An agent that ends as `kill -9` ends it, before a step that a test has chosen.

A step is a write of its journal, or what it does to its firewall: so it may end between writing down and doing, too.
How many are left to it stands in the file ``die-at`` beside its configuration. Without the file it lives. All
else is `sami-agent`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sami_plugin.cmd import agent
from sami_plugin.drivers.linux_conntrack.driver import LinuxConntrackDriver
from sami_plugin.journal.journal import Journal

_ONE = threading.Lock()
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
    new = folder / "die-at.new"
    new.write_text(f"{steps}")
    new.rename(folder / "die-at")


def disarm(folder: Path) -> bool:
    """It lives on, whatever was chosen; whether it had not ended by then."""
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
        with _ONE:
            _count(file)
        return step(*arguments, **named)

    return mortal


def _count(file: Path) -> None:
    try:
        left = int(file.read_text())
    except FileNotFoundError:
        return
    if left == 0:
        _die(file)
    arm(file.parent, left - 1)


def _die(file: Path) -> None:
    file.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
