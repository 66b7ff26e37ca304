"""sami report: what became of one migration."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from cliff.lister import Lister

from sami_plugin.cli import session
from sami_plugin.cli.terminal import remark
from sami_plugin.cli.wording import Absent, Lines, clock
from sami_plugin.errors import ConfigurationError

COLUMNS = ("Part", "What", "Value", "Detail")


class Report(Lister):
    """Reports one migration: what moved, what did not and why, and when each step was.

    Part is `session`, `verdict` (what the destination said before memory was copied, for how many flows it had places,
    and why not for all), `flows` (how many), `named` (which flows did not make it as they were, and why), `remark`,
    `step` (milliseconds since the first step; the detail has the time of the day and the milliseconds since the former
    step) or `span` (milliseconds between two steps).
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        session.add_session(parser)
        parser.add_argument("--picture", metavar="FILE.png", help="draw the steps' time line into this file too")
        parser.add_argument(
            "--peer-journal", metavar="PATH", help="with --picture: the other host's journal, to draw its steps as well"
        )
        session.add_journal(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        if parsed_args.peer_journal and not parsed_args.picture:
            raise ConfigurationError("--peer-journal: means something together with --picture only")
        journal = session.open_journal(parsed_args)
        row = session.find_session(journal, parsed_args.session)
        if not row["report"]:
            row["report"] = self._unfinished(row, journal.decisions(row["session"]))
        if parsed_args.picture:
            self._draw(row["report"], parsed_args)
        return COLUMNS, list(rows(row["report"]))

    def _unfinished(self, row: dict[str, Any], decisions: list[dict[str, Any]]) -> dict[str, Any]:
        remark(self.app.stderr, f"session {row['session']} has no report yet; what is told is from its decisions")
        return {
            "session": row["session"],
            "guest": row["guest"],
            "role": row["role"],
            "peer": row["peer"],
            "outcome": f"under way, {row['state']}",
            "steps": [{"step": one["event"], "at": one["at"], "monotonic": one["at"]} for one in decisions],
        }

    def _draw(self, report: dict[str, Any], arguments: argparse.Namespace) -> None:
        from sami_plugin.cli import picture

        reports = [report]
        if arguments.peer_journal:
            peer = session.find_session(session.journal_at(arguments.peer_journal), report["session"])
            if not peer["report"]:
                raise ConfigurationError(f"session {report['session']} has no report yet in {arguments.peer_journal}")
            reports.append(peer["report"])
        picture.draw(reports, arguments.picture)
        remark(self.app.stderr, f"the time line is in {arguments.picture}")


def rows(report: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The report as a table."""
    for name in ("session", "guest", "role", "host", "peer", "request_id"):
        if report.get(name):
            yield "session", name, report[name], Lines([])
    yield "session", "outcome", report["outcome"], Lines([report["reason"]] if report.get("reason") else [])
    for name, said in report.get("verdict", {}).items():
        if name != "losses":
            yield "verdict", name, Absent(said), Lines([])
    for reason, count in report.get("verdict", {}).get("losses", {}).items():
        yield "verdict", f"losses: {reason}", count, Lines([])
    for name, count in report.get("flows", {}).items():
        yield "flows", name.replace("_", " "), count, Lines([])
    for reason, entry in report.get("named", {}).items():
        more = entry["count"] - len(entry["flows"])
        yield "named", reason, entry["count"], Lines([*entry["flows"], *([f"... and {more} more"] if more > 0 else [])])
    for text in report.get("remarks", ()):
        yield "remark", text, Absent(None), Lines([])
    steps = report.get("steps", [])
    former = None
    for step in steps:
        since_former = 0.0 if former is None else (step["monotonic"] - former) * 1000
        former = step["monotonic"]
        since_first = (step["monotonic"] - steps[0]["monotonic"]) * 1000
        yield "step", step["step"], round(since_first, 3), Lines([f"{clock(step['at'])}, +{since_former:.3f}"])
    for name, milliseconds in report.get("milliseconds", {}).items():
        yield "span", name, milliseconds, Lines([])
