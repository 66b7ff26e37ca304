"""sami flow ..."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cliff.command import Command
from cliff.lister import Lister

from sami_plugin.cli import scope_options
from sami_plugin.cli.terminal import Progress, remark
from sami_plugin.errors import ConfigurationError, NotAvailable, NotPermitted

if TYPE_CHECKING:
    from sami_plugin.cli.application import Application
    from sami_plugin.cli.flow_transfer import Exported

DEFAULT_LIMIT = 1000
_EXAMPLE_ENTERPRISE = 32473
_OLD_SECONDS = 60


class FlowList(Lister):
    """Lists the flows that this host's firewall holds for a port.

    The timeout is in seconds. An ICMP flow's type, code and identifier, and what a translated flow is translated to,
    stand under Detail.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        scope_options.add_scope_options(parser)
        shown = parser.add_mutually_exclusive_group()
        shown.add_argument(
            "--limit",
            metavar="COUNT",
            type=scope_options.count,
            default=DEFAULT_LIMIT,
            help=f"show so many flows at most; how many more there are is told on stderr (default: {DEFAULT_LIMIT})",
        )
        shown.add_argument("--all", action="store_true", help="show all flows, however many there are")
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        from sami_plugin.cli import flow_rows

        exported = _export(self.app, parsed_args)
        limit = None if parsed_args.all else parsed_args.limit
        if limit is not None and len(exported) > limit:
            remark(self.app.stderr, f"{len(exported) - limit} more flows are not shown; --limit or --all shows them")
        return flow_rows.COLUMNS, flow_rows.rows(exported.batches, limit)


class FlowExport(Command):
    """Writes the flows of a port into an IPFIX file (RFC 5655).

    The file holds no number that means something on this host only: no zone, no namespace. It is readable by its owner
    alone, because it tells whom a guest talks to. Wireshark and tshark open it.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", metavar="FILE", help="the file to write; must not be there yet")
        parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
        scope_options.add_scope_options(parser)
        _add_enterprise(parser)
        return parser

    def take_action(self, parsed_args: Any) -> int:
        from sami_plugin.codec import ipfix_file
        from sami_plugin.model import information_elements

        information_elements.check_enterprise(parsed_args.enterprise_number)
        target = Path(parsed_args.file)
        with _whole_file(target, is_forced=parsed_args.force) as part:
            exported = _export(self.app, parsed_args)
            ipfix_file.write(
                part, exported.batches, export_time=int(time.time()), enterprise=parsed_args.enterprise_number
            )
        self.app.stdout.write(f"{len(exported)} flows written to {target}\n")
        return 0


class FlowImport(Lister):
    """Puts the flows of an IPFIX file into this host's firewall.

    Says what became of each flow, as the firewall tells when it is asked afterwards: imported; degraded, and what was
    not kept; refused, and why. A file that is malformed is refused as a whole. The exit code is 0 if no flow was
    refused, otherwise 1. To import a file again is harmless: entries of the same key are replaced.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", metavar="FILE", help="an IPFIX file, written by `sami flow export`")
        parser.add_argument("--dry-run", action="store_true", help="change nothing; say what would become of each flow")
        scope_options.add_scope_options(parser)
        parser.add_argument(
            "--neighbour",
            metavar="A",
            type=scope_options.address,
            action="append",
            default=[],
            help="with --shared: an address of another local port, whose flows are never touched; may be repeated",
        )
        _add_enterprise(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], Iterable[tuple[Any, ...]]]:
        from sami_plugin.cli import flow_transfer
        from sami_plugin.cli.wording import Lines
        from sami_plugin.codec import ipfix_file
        from sami_plugin.model import information_elements

        information_elements.check_enterprise(parsed_args.enterprise_number)
        if parsed_args.neighbour and not parsed_args.shared:
            raise ConfigurationError("--neighbour: means something together with --shared only")
        scope = scope_options.scope_of(parsed_args, parsed_args.neighbour)
        driver = self.app.load_driver(parsed_args.driver, parsed_args.config_file)
        carried = ipfix_file.read(parsed_args.file, enterprise=parsed_args.enterprise_number)
        self._remark_on(carried)
        if parsed_args.dry_run:
            outcomes = flow_transfer.rehearse(driver, scope, carried.batches)
        else:
            with Progress(self.app.stderr, f"flows of {len(carried)} imported") as done:
                outcomes = flow_transfer.import_(driver, scope, carried.batches, done)
        refused = outcomes.count(flow_transfer.REFUSED) + outcomes.count(flow_transfer.WOULD_REFUSE)
        self._code = 1 if refused else 0
        rows = [(line.result, line.count, line.reason, Lines(_names(line))) for line in outcomes.lines()]
        return ("Result", "Flows", "Reason", "Names"), rows

    def run(self, parsed_args: Any) -> int:
        self._code = 1
        return super().run(parsed_args) or self._code

    def _remark_on(self, carried: Any) -> None:
        age = time.time() - carried.export_time
        if not len(carried):
            remark(self.app.stderr, "the file holds no flows")
        elif age > _OLD_SECONDS:
            from sami_plugin.cli.wording import span

            remark(self.app.stderr, f"the file was written {span(age)} ago; flows get the timeouts that they had then")
        for element in carried.skipped:
            remark(self.app.stderr, f"skipped what is unknown here: {element}")
        for gap in carried.gaps:
            remark(self.app.stderr, f"records are missing before octet {gap.octet}: {gap.found - gap.expected} or so")


def _names(line: Any) -> list[str]:
    more = line.count - len(line.flows)
    return [*line.flows, *([f"... and {more} more"] if more else [])]


def _add_enterprise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--enterprise-number",
        metavar="N",
        type=scope_options.count,
        default=_EXAMPLE_ENTERPRISE,
        help="enterprise number of our own information elements, the same when a file is written and read "
        f"(default: {_EXAMPLE_ENTERPRISE})",
    )


def _export(application: Application, arguments: argparse.Namespace) -> Exported:
    """The flows that were asked for; says on stderr which cannot be told."""
    from sami_plugin.cli import flow_transfer

    scope = scope_options.scope_of(arguments)
    driver = application.load_driver(arguments.driver, arguments.config_file)
    with Progress(application.stderr, "flows exported") as done:
        exported = flow_transfer.export(driver, scope, done)
    for omitted in exported.omitted:
        _remark_omitted(application.stderr, omitted)
    return exported


def _remark_omitted(stream: TextIO, omitted: Any) -> None:
    more = omitted.count - len(omitted.examples)
    named = ", ".join([*omitted.examples, *([f"{more} more"] if more and omitted.examples else [])])
    remark(stream, f"{omitted.count} flows are left out, {omitted.reason}{': ' if named else ''}{named}")


@contextlib.contextmanager
def _whole_file(target: Path, *, is_forced: bool) -> Iterator[Path]:
    """A path to write to; what is there appears as `target` when the block ends well, and vanishes otherwise.

    :raises ConfigurationError: `target` is there and may not be replaced.
    :raises NotPermitted, NotAvailable: it cannot be written.
    """
    if target.is_dir():
        raise ConfigurationError(f"{target} is a directory")
    if target.exists() and not is_forced:
        raise ConfigurationError(f"{target} is there already; --force replaces it")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(descriptor)
        part = Path(name)
        try:
            yield part
            if is_forced:
                part.replace(target)
            else:
                _place_new(part, target)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ConfigurationError(f"{target} is there already; --force replaces it") from error
    except PermissionError as error:
        raise NotPermitted(f"{target} cannot be written: {error.strerror}; run as a user who may") from error
    except OSError as error:
        raise NotAvailable(f"{target} cannot be written: {error.strerror}") from error


def _place_new(part: Path, target: Path) -> None:
    """A link fails where somebody made `target` meanwhile; a rename would replace it."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(str(target)) from None
        part.replace(target)
