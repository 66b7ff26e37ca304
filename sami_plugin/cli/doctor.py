"""sami doctor: what this host can and cannot do."""

from __future__ import annotations

import argparse
from typing import Any

from cliff.lister import Lister

from sami_plugin.cli import configuration

COLUMNS = ("Check", "Result", "Reason", "Mend")


class Doctor(Lister):
    """Tries what this host can and cannot do.

    Everything is tried, most of it in a network namespace that is made for it and goes away; nothing of the host is
    changed. `ok` works, `limited` works less well or could not be tried, `missing` is needed and is not there. The exit
    code is 1 if anything is missing. Run it as the agent's user, with its privileges: another user gets other answers.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        configuration.add_config_file(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        from sami_plugin.cli import checks

        found = list(checks.all_checks(parsed_args.config_file))
        self._code = 1 if any(one.result is checks.Result.MISSING for one in found) else 0
        return COLUMNS, [(one.name, one.result.value, one.reason, one.mend) for one in found]

    def run(self, parsed_args: Any) -> int:
        self._code = 1
        return super().run(parsed_args) or self._code
