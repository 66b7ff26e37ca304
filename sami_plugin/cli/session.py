"""sami session ..."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cliff.columns import FormattableColumn
from cliff.command import Command
from cliff.lister import Lister
from cliff.show import ShowOne

from sami_plugin.cli import configuration
from sami_plugin.cli.wording import Absent, Moment, clock
from sami_plugin.errors import ConfigurationError, NotPermitted

if TYPE_CHECKING:
    from sami_plugin.journal.journal import Journal


class SessionList(Lister):
    """Lists the migrations that this host's agent took part in, newest first."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_journal(parser)
        parser.add_argument("--guest", metavar="UUID", help="only sessions of this guest; its first characters suffice")
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        journal = open_journal(parsed_args)
        rows = [row for row in journal.sessions() if row["guest"].startswith(parsed_args.guest or "")]
        columns = ("Session", "Guest", "Role", "Peer", "State", "Outcome", "Started", "Seconds")
        return columns, [
            (
                row["session"],
                row["guest"],
                row["role"],
                row["peer"],
                row["state"],
                Absent(row["outcome"]),
                Moment(row["started_at"]),
                Absent(None if row["ended_at"] is None else round(row["ended_at"] - row["started_at"], 3)),
            )
            for row in rows
        ]


SHOWN = (
    "session",
    "guest",
    "role",
    "peer",
    "state",
    "outcome",
    "reason",
    "started",
    "ended",
    "verdict",
    "flows",
    "decisions",
)


class SessionShow(ShowOne):
    """Shows one migration: its state, its outcome, and every decision in order."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_session(parser)
        add_journal(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        journal = open_journal(parsed_args)
        row = find_session(journal, parsed_args.session)
        report = row["report"]
        return SHOWN, (
            row["session"],
            row["guest"],
            row["role"],
            row["peer"],
            row["state"],
            Absent(row["outcome"]),
            Absent(report.get("reason") or None),
            Moment(row["started_at"]),
            Moment(row["ended_at"]),
            _Verdict(report.get("verdict", {})),
            _Counts(report.get("flows", {})),
            _Decisions(journal.decisions(row["session"])),
        )


class _Decide(Command):
    """What an operator says to a session whose policy asks."""

    request: str

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "session",
            metavar="SESSION",
            help="the session's id, of which the first characters are enough, or the guest",
        )
        configuration.add_config_file(parser)
        return parser

    def take_action(self, parsed_args: Any) -> None:
        from sami_plugin.hooks import local_socket

        path = configuration.load(parsed_args.config_file).socket
        local_socket.ask(path, {"request": self.request, "session": parsed_args.session})


class SessionApprove(_Decide):
    """Lets a guest come although flows will be lost: the policy `ask` waits for this on the guest's destination.

    `sami session list` shows the sessions under way, `sami session show` which of them waits (`verdict: ask`) and what
    would be lost.
    """

    request = "approve"


class SessionRefuse(_Decide):
    """Has a guest stay where it is, because flows would be lost: the policy `ask` waits for this on its destination."""

    request = "refuse"


class _Counts(FormattableColumn):
    def human_readable(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self._value.items())

    def machine_readable(self) -> Any:
        return self._value


class _Verdict(FormattableColumn):
    """What was said before memory was copied, and to what; empty where nobody said anything."""

    def human_readable(self) -> str:
        said = self._value
        if not said:
            return ""
        whose = f" ({said['policy']})" if "policy" in said else ""
        flows = "an unknown number of" if said["flows"] is None else said["flows"]
        losses = "".join(f"; {count}: {reason}" for reason, count in said["losses"].items())
        return f"{said['verdict']}{whose}: {said['places']} of {flows} flows have a place{losses}"

    def machine_readable(self) -> Any:
        return self._value


class _Decisions(FormattableColumn):
    """One a line: when, what happened, the state it led to, and what was to be done."""

    def human_readable(self) -> str:
        return "\n".join(
            f"{clock(one['at'])}  {one['event']}  ->  {one['state']}: {', '.join(one['actions'])}"
            for one in self._value
        )

    def machine_readable(self) -> Any:
        return [{name: one[name] for name in ("number", "at", "event", "state", "actions")} for one in self._value]


def add_session(parser: argparse.ArgumentParser) -> None:
    """The argument for `find_session`."""
    parser.add_argument(
        "session",
        metavar="SESSION",
        help="the session's id; or the guest's UUID, an address of its, or the id of the request that moved it, which "
        "mean the newest session; of ids the first characters are enough",
    )


def add_journal(parser: argparse.ArgumentParser) -> None:
    """The options for `open_journal`."""
    parser.add_argument("--journal", metavar="PATH", help="the agent's journal (default: what the configuration says)")
    configuration.add_config_file(parser)


def open_journal(arguments: argparse.Namespace) -> Journal:
    """The journal that was asked for, for reading.

    :raises ConfigurationError, NotPermitted, JournalError: it is not there, may not be read, or is none.
    """
    path = arguments.journal
    if path is None:
        path = configuration.load(arguments.config_file).journal
    return journal_at(path)


def journal_at(path: str) -> Journal:
    """As `open_journal`, of this path."""
    from sami_plugin.journal.journal import Journal

    if os.path.isdir(path):
        raise ConfigurationError(f"{path} is a directory and no journal")
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError as error:
        raise NotPermitted(f"the journal {path} may not be read; run as root or as the agent's user") from error
    except OSError as error:
        raise ConfigurationError(
            f"the journal {path} cannot be read: {error.strerror}; has an agent run here? --journal names another"
        ) from error
    return Journal(path, read_only=True)


def _is_about(row: dict[str, Any], text: str) -> bool:
    """Whether a request of this id, or a port with this address, is the session's."""
    if row["report"] and (request := json.loads(row["report"]).get("request_id")) and request.startswith(text):
        return True
    return any(text in port["addresses"] for port in json.loads(row["ports"]))


def find_session(journal: Journal, text: str) -> dict[str, Any]:
    """The row of the one session whose id begins so, or else of the newest session of the one guest that is meant.

    It is by its UUID, by the request that moved it, or by an address of one of its ports.

    :raises ConfigurationError: there is none, or more than one.
    """
    rows = journal.sessions() if text else []
    found = [row for row in rows if row["session"].startswith(text)]
    if not found:
        found = [row for row in rows if row["guest"].startswith(text) or _is_about(row, text)]
        if len({row["guest"] for row in found}) == 1:
            found = found[:1]
    if len(found) != 1:
        what = "no session, guest or request begins" if not found else f"{len(found)} sessions or guests begin"
        raise ConfigurationError(f"{what} with {text!r} in {journal.path}; `sami session list` shows them")
    row = found[0]
    row["report"] = json.loads(row["report"]) if row["report"] else {}
    return row
