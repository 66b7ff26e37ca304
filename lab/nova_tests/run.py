"""One run of the chosen tests: a release, and a driver that meets an agent, a deaf one, nobody; or no driver."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import CommandFailed
from lab.nova_tests import agents
from lab.nova_tests.agents import Announcement
from lab.nova_tests.chosen import KINDS, chosen
from lab.nova_tests.releases import Release

PROGRAM = Path(__file__).parent / "in_nova.py"
ONE_TESTS_SECONDS = 300
RUN_SECONDS = 3600

Event = dict[str, Any]
"""A line of in_nova.py's log."""
Agent = Callable[[Path], AbstractContextManager[list[Announcement]]]
UNTOUCHED = "untouched"
"""The run in which Nova is left as it is, not even watched."""
AGENTS: dict[str, Agent | None] = {
    UNTOUCHED: None,
    "without": None,
    "with": agents.answering,
    "deaf": agents.deaf,
    "nobody": agents.nobody,
}
"""By the name of a run; None: the driver is not configured."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test ended: passed, failed, skipped, ...; `words` are what it said."""

    ended: str
    seconds: float
    words: str


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a run. `events` and `announcements` are in the order of time, on one clock."""

    name: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    announcements: list[Announcement] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Modules of tests that this release does not have."""

    def of(self, only: Collection[str]) -> Ran:
        """The same, as if only these tests had been run."""
        outcomes = {test: outcome for test, outcome in self.outcomes.items() if test in only}
        events = [event for event in self.events if event["test"] in only]
        return Ran(self.name, outcomes, events, self.announcements, self.absent)


def run(
    release: Release,
    name: str,
    output: Path,
    *,
    kinds: Collection[str] = KINDS,
    is_wide: bool = False,
    only: Collection[str] | None = None,
) -> Ran:
    """Run the chosen tests of these kinds, of them `only` these where it is given.

    Blocks for minutes; keeps all logs below `output`, which is made anew. Raises LabError.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    ran = Ran(name)
    agent = AGENTS[name]
    with contextlib.ExitStack() as stack:
        # Not in the output folder: the name of a socket is short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nova-tests-")))
        socket = folder / "agent.sock"
        if name != UNTOUCHED:
            (output / "nova.conf").write_text(configuration(None if agent is None else socket))
        if agent is not None:
            heard = stack.enter_context(agent(socket))
        for kind in kinds:
            modules = {"modules": chosen(kind, is_wide=is_wide), "only": None if only is None else sorted(only)}
            (output / f"{kind}.json").write_text(json.dumps(modules))
            for event in _run_kind(release, kind, output.resolve(), folder):
                _take(event, ran)
        if agent is not None:
            ran.announcements.extend(heard)
            lines = [json.dumps(dataclasses.asdict(announcement)) + "\n" for announcement in heard]
            (output / "announced.log").write_text("".join(lines))
    return ran


def configuration(socket: Path | None) -> str:
    """Nova's: the driver of Nova's tests, and beside it ours, if there is to be one."""
    lines = ["[oslo_messaging_notifications]", "driver = test"]
    if socket is not None:
        lines += ["driver = sami", "", "[sami]", f"socket = {socket}"]
    return "\n".join(lines) + "\n"


def _run_kind(release: Release, kind: str, output: Path, folder: Path) -> list[Event]:
    log, words = output / f"{kind}.log", output / f"{kind}.out"
    # What the caller's Python and Nova are told is none of this one's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OS_"))}
    environment |= {
        "LANGUAGE": "en_US",
        "OS_TEST_TIMEOUT": str(ONE_TESTS_SECONDS),
        "OS_NOVA_DISABLE_EVENTLET_PATCHING": "False" if release.is_eventlet else "True",
        "PYTHONWARNINGS": "ignore",
    }
    argv = [
        str(release.python),
        str(PROGRAM),
        *(str(output / name) for name in ("nova.conf", f"{kind}.json")),
        str(log),
    ]
    with words.open("wb") as out:
        try:
            code = subprocess.run(
                argv, cwd=folder, env=environment, stdout=out, stderr=out, check=False, timeout=RUN_SECONDS
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CommandFailed(argv, -1, f"did not end within {RUN_SECONDS} s; see {words}") from error
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if code or not events or not events[-1].get("ended"):
        raise CommandFailed(argv, code, f"see {words}: {words.read_text(errors='replace')[-2000:]}")
    return events


def _take(event: Event, ran: Ran) -> None:
    if "outcome" in event:
        ran.outcomes[event["test"]] = Outcome(event["outcome"], event["seconds"], event["words"])
    elif "broken" in event:
        ran.outcomes[event["broken"]] = Outcome("failed", 0.0, event["words"])
    elif "absent" in event:
        ran.absent.append(event["absent"])
    else:
        ran.events.append(event)
