"""The command `sami`: which commands there are, and how an error looks."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from cliff import app
from cliff.commandmanager import CommandManager

from sami_plugin import errors
from sami_plugin.version import release

if TYPE_CHECKING:
    from sami_plugin.drivers.base import FlowDriver

COMMANDS = "sami.cli"
"""The entry points' namespace."""


class Application(app.App):
    """Runs one command. Every error ends as one line on stderr, unless --debug wants the traceback."""

    NAME = "sami"
    LOG = logging.getLogger(NAME)

    def __init__(
        self,
        *,
        load_driver: Callable[[str], FlowDriver] | None = None,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        """`load_driver` makes a firewall driver of a name: by default that of the entry points."""
        super().__init__(
            description="Looks at this host, at its flows, and at what sami-agent did when guests moved.",
            version=release(),
            command_manager=CommandManager(COMMANDS),
            stdout=stdout,
            stderr=stderr,
            deferred_help=True,  # --help behind a command is the command's
        )
        self._load_driver = load_driver
        self._console: logging.Handler | None = None

    def load_driver(self, name: str, config_files: list[str] | None) -> FlowDriver:
        """With the options that the agent's configuration in these files has for it (`configuration.load`).

        :raises ConfigurationError, NotAvailable: there is no such driver, or it cannot be loaded.
        """
        if self._load_driver is not None:
            return self._load_driver(name)
        from sami_plugin.cli import configuration
        from sami_plugin.drivers import loader

        return loader.load_driver(name, **configuration.load(config_files).drivers.get(name, {}))

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, object] | None = None
    ) -> argparse.ArgumentParser:
        return super().build_option_parser(description, version, {"prog": self.NAME} | (argparse_kwargs or {}))

    def configure_logging(self) -> None:
        root = logging.getLogger()
        root.setLevel(logging.DEBUG)
        self._console = logging.StreamHandler(self.stderr)
        levels = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO}
        self._console.setLevel(levels.get(self.options.verbose_level, logging.DEBUG))
        self._console.setFormatter(_OneLine("sami: %(message)s"))
        root.addHandler(self._console)
        if self.options.log_file:
            try:
                to_file = logging.FileHandler(self.options.log_file)
            except OSError as error:
                raise errors.ConfigurationError(f"--log-file {self.options.log_file}: {error.strerror}") from error
            to_file.setFormatter(logging.Formatter(self.LOG_FILE_MESSAGE_FORMAT))
            root.addHandler(to_file)

    def run(self, argv: list[str]) -> int:
        try:
            code = super().run(argv)
            # cliff counts a command line without a command as failed.
            return 0 if getattr(self, "interactive_mode", False) else code
        finally:
            if self._console is not None:  # tests run many applications in one process
                logging.getLogger().removeHandler(self._console)

    def interact(self) -> None:
        """Without a command there is the help, and no prompt: that would need a library more."""
        self.run_subcommand(["help"])

    def run_subcommand(self, argv: list[str]) -> int:
        try:
            self.command_manager.find_command(argv)
        except ValueError:
            known = ", ".join(sorted(self.get_fuzzy_matches(argv[0])))
            self.LOG.error("there is no command %r; did you mean: %s? `sami --help` shows all", " ".join(argv), known)
            return 2
        return super().run_subcommand(argv)


class _OneLine(logging.Formatter):
    """cliff logs the exception that ended a command; what we did not raise on purpose is our own fault."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, Exception):
            record = logging.makeLogRecord(vars(record) | {"msg": _words(record.msg), "args": ()})
        if record.exc_info:
            return super().format(record)
        return " ".join(super().format(record).split())


def _words(error: Exception) -> str:
    # cliff raises ValueError for wrong names of columns.
    if isinstance(error, errors.SamiError | OSError | ValueError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}; this is a fault of sami, --debug shows where"
