"""sami check: what would become of a guest's flows."""

from __future__ import annotations

import argparse
import uuid
from typing import Any

from cliff.columns import FormattableColumn
from cliff.show import ShowOne

from sami_plugin.cli import configuration
from sami_plugin.cli.wording import Lines
from sami_plugin.errors import ConfigurationError

COLUMNS = ("guest", "source", "destination", "verdict", "flows", "carried", "kinds", "losses", "not_carried")
TIMEOUT_SECONDS = 600.0
"""The agent has a limit of its own (open_seconds) and tells when it is reached."""


class Check(ShowOne):
    """Asks another host what would become of a guest's flows there, without moving anything.

    Run it on the host that the guest is on. The verdict is that of the other host's policy: `proceed`, `veto`, or `ask`
    where it would ask an operator. The exit code is 1 unless the guest could go there without anybody's word.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("guest", metavar="GUEST", help="the guest's UUID")
        parser.add_argument("--to", metavar="HOST", required=True, help="the host, by its name among the agents")
        configuration.add_config_file(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        from sami_plugin.hooks import local_socket

        try:
            guest = str(uuid.UUID(parsed_args.guest))
        except ValueError as error:
            raise ConfigurationError(f"{parsed_args.guest!r} is no guest's UUID") from error
        path = configuration.load(parsed_args.config_file).socket
        said = {"request": "check", "guest": guest, "to": parsed_args.to}
        answer = local_socket.ask(path, said, TIMEOUT_SECONDS)
        self._code = 0 if answer["verdict"] == "proceed" else 1
        shown = {name: answer[name] for name in COLUMNS}
        shown["kinds"], shown["losses"] = _Counts(shown["kinds"]), _Counts(shown["losses"])
        shown["not_carried"] = Lines(shown["not_carried"])
        return COLUMNS, tuple(shown.values())

    def run(self, parsed_args: Any) -> int:
        self._code = 1
        return super().run(parsed_args) or self._code


class _Counts(FormattableColumn):
    """How many of each: one a line in a table."""

    def human_readable(self) -> str:
        return "\n".join(f"{count} {what}" for what, count in self._value.items())

    def machine_readable(self) -> Any:
        return self._value
