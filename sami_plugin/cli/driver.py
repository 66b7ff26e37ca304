"""sami driver ..."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cliff.lister import Lister

from sami_plugin.cli import configuration
from sami_plugin.errors import SamiError

if TYPE_CHECKING:
    from sami_plugin.cli.application import Application

COLUMNS = ("Name", "Usable", "Templates", "Can watch", "Capacity", "In use", "Notes")


class DriverList(Lister):
    """Lists the firewall drivers that are installed, and what each can do on this host."""

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        configuration.add_config_file(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        from sami_plugin.drivers import loader

        return COLUMNS, list(self._rows(loader.known_drivers(), parsed_args.config_file))

    def _rows(self, names: Iterable[str], config_files: list[str] | None) -> Iterator[tuple[Any, ...]]:
        from sami_plugin.cli.wording import Absent, Lines

        for name in names:
            try:
                can = self.app.load_driver(name, config_files).capabilities()
            except SamiError as error:
                yield name, False, Lines([]), Absent(None), Absent(None), Absent(None), Lines([str(error)])
                continue
            yield (
                name,
                True,
                Lines(sorted(can.templates)),
                can.can_watch,
                Absent(can.capacity),
                can.in_use,
                Lines(can.notes),
            )
