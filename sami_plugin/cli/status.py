"""sami status"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from cliff.show import ShowOne

from sami_plugin.cli import configuration
from sami_plugin.cli.session import add_journal, journal_at
from sami_plugin.cli.wording import Absent, Lines, Moment
from sami_plugin.errors import SamiError

if TYPE_CHECKING:
    from sami_plugin.cli.application import Application

DAY_SECONDS = 86400.0
CARRIED = ("imported", "degraded", "refused", "purged", "left_behind")
"""Of a report's figures, those that are added up."""
PAST_DAY = ("under way", "last day", "last day's flows", "last ended", "kinds of refusals")
"""What the journal tells; nothing where there is none."""


class Status(ShowOne):
    """Shows how this host's agent is: whether it listens, its firewall, and what it did in the last day."""

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_journal(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        known = configuration.load(parsed_args.config_file)
        shown: dict[str, Any] = {
            "host": known.host,
            "agent": _agent(known.socket),
            **self._firewall(next(iter(known.drivers)), parsed_args.config_file),
        }
        path = parsed_args.journal or known.journal
        if os.path.exists(path):
            shown |= {"journal": path, **_past_day(path, time.time())}
        else:
            shown["journal"] = f"{path} is not there: no agent has run here yet"
            shown |= dict.fromkeys(PAST_DAY, Absent(None))
        return tuple(shown), tuple(shown.values())

    def _firewall(self, name: str, config_files: list[str] | None) -> dict[str, Any]:
        try:
            can = self.app.load_driver(name, config_files).capabilities()
        except SamiError as error:
            return {"driver": f"{name}: {error}", "flows": Absent(None), "capacity": Absent(None)}
        return {"driver": name, "flows": can.in_use, "capacity": Absent(can.capacity)}


def _agent(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as tried:
        tried.settimeout(2.0)
        try:
            tried.connect(path)
        except PermissionError:
            return f"not known: {path} is another user's"
        except OSError as error:
            return f"does not listen at {path}: {error.strerror or error}"
    return f"listens at {path}"


def _past_day(path: str, now: float) -> dict[str, Any]:
    journal = journal_at(path)
    try:
        sessions, refusals = journal.sessions(), journal.refusals()
    finally:
        journal.close()
    ended = [row for row in sessions if row["ended_at"] is not None and row["ended_at"] > now - DAY_SECONDS]
    outcomes = Counter((row["role"], row["outcome"]) for row in ended)
    flows: Counter[str] = Counter()
    for row in ended:
        reported = json.loads(row["report"] or "{}").get("flows", {})
        flows.update({name: reported[name] for name in CARRIED if name in reported})
    under_way = [row for row in sessions if row["ended_at"] is None]
    told = (
        Lines(f"{row['guest']} {row['role']} {row['state']} {row['peer']}".strip() for row in under_way),
        Lines(f"{count} {outcome}, as {role}" for (role, outcome), count in sorted(outcomes.items())),
        Lines(f"{flows[name]} {name}" for name in CARRIED if name in flows),
        Moment(max((row["ended_at"] for row in ended), default=None)),
        sum(row["last_at"] > now - DAY_SECONDS for row in refusals),
    )
    return dict(zip(PAST_DAY, told, strict=True))
