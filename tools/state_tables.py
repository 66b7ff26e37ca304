"""Writes the page of the sessions' states: ``python -m tools.state_tables``.

The page is drawn from the tables that decide (`sami_plugin.migration`): every session that can come about is stepped
with every event, and what comes of it is written down. A test compares the page with what this makes.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from sami_plugin.errors import IllegalMessage
from sami_plugin.migration import decision, destination, source
from sami_plugin.migration.decision import (
    Action,
    ActionFailed,
    Continued,
    Done,
    End,
    Event,
    ExportChanges,
    FindScope,
    Found,
    GuestDid,
    LetGo,
    Negotiated,
    OperatorSaid,
    PeerLost,
    PeerSaid,
    Returns,
    Say,
    Superseded,
    TimePassed,
    WakeAt,
)
from sami_plugin.model.migration import (
    PROTOCOL_VERSION,
    Answer,
    Arrived,
    AskAgain,
    Complete,
    FlowChanges,
    Flows,
    GivesUp,
    InSync,
    MigrationEvent,
    Offer,
    Open,
    Phase,
    Purged,
    Room,
    Stays,
)
from sami_plugin.model.settings import Limits
from sami_plugin.model.verdict import Verdict

PAGE = pathlib.Path(__file__).parents[1] / "doc" / "source" / "contributor" / "states.rst"

OPEN = Open("guest", "host-b", (PROTOCOL_VERSION,), (), (), None)
MESSAGES = (
    OPEN,
    replace(OPEN, versions=()),
    replace(OPEN, versions=(1,)),
    replace(OPEN, has_all=True),
    Offer(PROTOCOL_VERSION, 1),
    Offer(PROTOCOL_VERSION, 0),
    Offer(1, 1),
    Answer(1, 600),
    Room(0, "reason"),
    Flows(b""),
    InSync(0),
    FlowChanges(b"", is_last=False),
    FlowChanges(b"", is_last=True),
    Complete(0, 0),
    Arrived(),
    Purged(0, 0),
    Purged(0, 1),
    Stays("reason"),
    GivesUp("reason"),
    AskAgain("session"),
)
ACTIONS = (
    *("StartExport", "ExportNext", "ExportChanges", "Resync", "Purge", "PurgeLate"),
    *("FindScope", "Import", "Verify", "Renew", "Discard"),
)
EVENTS: tuple[Event, ...] = (
    *(GuestDid(MigrationEvent("guest", phase)) for phase in Phase),
    *(PeerSaid(message) for message in MESSAGES),
    *(Done(what, refused=refused, is_all=is_all) for what in ACTIONS for refused in (0, 1) for is_all in (True, False)),
    *(Negotiated(verdict, "reason", Answer(1, 600)) for verdict in Verdict),
    *(OperatorSaid(may_come) for may_come in (True, False)),
    LetGo(),
    ActionFailed("Import", "reason"),
    PeerLost("reason"),
    Superseded(),
    Continued(),
    Returns(),
    Found("host-a"),
    Found("host-b"),
    TimePassed(),
)
LIMITS = Limits()
TIMES = (0.0, 31.0, 62.0, 3601.0, 3662.0)
"""Before all limits, and after one more of them each."""

Outcomes = dict[str, None]
"""What may come of one event in one state, in the order in which it was found."""


@dataclass(frozen=True)
class Role:
    """What differs between the two state machines."""

    name: str
    module: ModuleType
    beginnings: tuple[Any, ...]

    @property
    def step(self) -> Callable[[Any, Event, float], tuple[Any, list[Action]]]:
        return self.module.step

    @property
    def table(self) -> dict[Any, dict[decision.Cause, object]]:
        return self.module.TABLE


ROLES = (
    Role(
        "source",
        source,
        (
            source.Source(LIMITS, LIMITS.session_seconds),
            source.continuing(LIMITS, 0.0, has_all=True, is_suspended=True, is_gone=False),
            source.recovered(
                LIMITS, 0.0, "drained", is_suspended=True, is_gone=False, has_arrived=False, has_purged=False
            )[0],
        ),
    ),
    Role(
        "destination",
        destination,
        (
            destination.begin(destination.new(LIMITS, 0.0, held_since=0.0), "", 0.0)[0],
            *(
                destination.continuing(
                    LIMITS,
                    0.0,
                    "host-a",
                    has_all=has_all,
                    is_started=False,
                    runs_here=False,
                    held_since=None if has_all else 0.0,
                )
                for has_all in (False, True)
            ),
        ),
    ),
)


@functools.cache
def explore(role: Role) -> dict[tuple[Any, decision.Cause], Outcomes]:
    """What may come of each entry of the role's table, in every session that can come about."""
    found: dict[tuple[Any, decision.Cause], Outcomes] = {}
    to_do = deque((beginning, 0) for beginning in role.beginnings)
    seen = set(to_do)
    while to_do:
        session, earliest = to_do.popleft()
        for event in EVENTS:
            cause = decision.cause_of(event)
            if cause not in role.table[session.state]:
                continue
            for index in range(earliest, len(TIMES)):
                try:
                    after, actions = role.step(session, event, TIMES[index])
                except IllegalMessage:
                    continue
                found.setdefault((session.state, cause), {})[_outcome(session, after, actions)] = None
                after = _alike(after)
                if (after, index) not in seen:
                    seen.add((after, index))
                    to_do.append((after, index))
    return found


def _alike(session: Any) -> Any:
    """The session, less what no decision depends on."""
    reason = "reason" if session.reason else ""
    if not isinstance(session, destination.Destination):
        return replace(session, reason=reason)
    if session.state in (destination.State.DISCARDING, destination.State.ENDED):
        counts = {name: getattr(session, name) for name in ("state", "runs_here", "outcome", "failed_discards")}
        return replace(destination.new(LIMITS, 0.0), reason=reason, **counts)
    nobodys = {"imported": 0, "refused": 0, "in_sync": False, "has_caught_up": False}
    # Whether it looks again; for how long makes no other decision.
    looks = math.inf if session.look_until and session.state is destination.State.RECEIVING else 0.0
    return replace(session, reason=reason, source=session.source and "host-a", look_until=looks, **nobodys)


def _outcome(before: Any, after: Any, actions: list[Action]) -> str:
    done = [_action(action) for action in actions if not isinstance(action, WakeAt)]
    if after.state is not before.state:
        done.insert(0, f"to **{after.state.value}**")
    return "; ".join(done) or "takes note"


def _action(action: Action) -> str:
    match action:
        case Say(message=message):
            return f"say {type(message).__name__}"
        case ExportChanges(is_last=True):
            return f"ExportChanges, the last{'' if action.says_removals else ', without removals'}"
        case FindScope(is_last=True):
            return "FindScope, the last"
        case End(outcome=outcome):
            return f"end: {outcome.value}"
    return type(action).__name__


def _cause(cause: decision.Cause) -> str:
    words = {
        "Negotiated": "what can be taken is known, and the policy has spoken",
        "OperatorSaid": "the operator has answered",
        "LetGo": "nobody waits for the verdict any more",
        "ActionFailed": "an action failed",
        "PeerLost": "the peer knows no such session",
        "Superseded": "another migration of the guest begins",
        "Continued": "the destination goes on with another session",
        "Returns": "the guest is about to come here",
        "Found": "a host says that the guest leaves it",
        TimePassed: "the time has come",
    }
    if cause in words:
        return words[cause]
    if isinstance(cause, Phase):
        return f"guest: {cause.value}"
    return f"{cause} is done" if isinstance(cause, str) else f"peer: {cause.__name__}"


def states_told(module: ModuleType) -> dict[str, str]:
    """What the module's docstring says of each state."""
    return dict(re.findall(r"^([A-Z]+) {2,}(\S.*)$", module.__doc__ or "", re.MULTILINE))


_HEAD = """\
.. This page is made by "python -m tools.state_tables"; a test fails when it is not current.

======================
States of a migration
======================

A session has two ends, one on each host, and each end is a state machine in one table: ``TABLE`` in
``sami_plugin/migration/source.py`` and in ``destination.py``. What a state's row does not list changes nothing; if the
peer said it, it is refused by name. *Guest* is what this host's hypervisor says, *peer* what the other agent says.

Where more than one thing may come of an event, what is known of the session decides: whether the limit is reached, the
guest has been paused, the zone is known, and so on. Requests to be woken are left out.
"""


def page() -> str:
    """The page as reStructuredText."""
    return _HEAD + "".join(f"\n{line}" if line else "\n" for role in ROLES for line in _role(role)) + "\n"


def _role(role: Role) -> Iterator[str]:
    title = f"The {role.name}"
    yield from (title, "=" * len(title), "")
    told = states_told(role.module)
    for state in role.table:
        yield f"* **{state.value}**" + (f": {told[state.name]}" if state.name in told else "")
    yield ""
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 15 25 60", "")
    yield from ("   * - State", "     - What happens", "     - What comes of it")
    found = explore(role)
    for state, row in role.table.items():
        for number, cause in enumerate(row):
            outcomes = list(found.get((state, cause), {}))
            yield f"   * - {state.value if number == 0 else ''}".rstrip()
            yield f"     - {_cause(cause)}"
            yield f"     - | {outcomes[0]}" if outcomes else "     -"
            yield from (f"       | {outcome}" for outcome in outcomes[1:])
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page())
