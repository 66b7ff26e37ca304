"""sami refusal ..."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from cliff.lister import Lister

from sami_plugin.cli.session import add_journal, open_journal
from sami_plugin.cli.wording import Moment


class RefusalList(Lister):
    """Lists what hosts and users of this host wanted of its agent and did not get, the last one first."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_journal(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        rows = open_journal(parsed_args).refusals()
        return ("Who", "Reason", "Count", "First", "Last"), [
            (row["who"], row["reason"], row["count"], Moment(row["first_at"]), Moment(row["last_at"])) for row in rows
        ]
