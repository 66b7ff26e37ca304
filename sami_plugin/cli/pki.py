"""sami pki ..."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliff.command import Command
from cliff.lister import Lister

from sami_plugin.errors import ConfigurationError

if TYPE_CHECKING:
    from sami_plugin.channel.authority import Authority
    from sami_plugin.cli.application import Application

FOLDER = "/etc/sami/pki"
COLUMNS = ("Host", "Serial", "Ends", "Days left", "State")


class PkiInit(Command):
    """Makes a certificate authority for the agents of a cloud, for those who have none.

    It is a folder. Keep it on one machine that only you can reach, not on a compute host: who has its key can be any
    host.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_folder(parser)
        parser.add_argument("--name", default="SAMI", help="the authority's name, for people (default: SAMI)")
        parser.add_argument("--days", type=_days, default=3650, help="how long it counts, in days (default: 3650)")
        return parser

    def take_action(self, parsed_args: Any) -> int:
        from sami_plugin.channel.authority import Authority

        folder = Path(parsed_args.folder)
        Authority.create(folder, parsed_args.name, parsed_args.days)
        self.app.stdout.write(
            f"{folder}: an authority was made\n"
            f"every host needs {folder / 'ca.pem'} as [tls] authorities, and {folder / 'crl.pem'} as [tls] revoked\n"
            "next: sami pki issue HOST, for every host\n"
        )
        return 0


class _Certificate(Command):
    """What issue and renew have in common."""

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_folder(parser)
        parser.add_argument("--days", type=_days, default=365, help="how long it counts, in days (default: 365)")
        parser.add_argument(
            "--output",
            metavar="PATH",
            default=".",
            help="folder for HOST.pem and HOST.key (default: the current one)",
        )
        parser.add_argument("host", metavar="HOST", help="the host's name, as [agent] host has it there")
        return parser

    def _issue(self, authority: Authority, parsed_args: Any) -> None:
        from sami_plugin.channel.authority import write_file

        output = Path(parsed_args.output)
        _refuse_what_is_no_host(parsed_args.host)
        certificate, key = output / f"{parsed_args.host}.pem", output / f"{parsed_args.host}.key"
        if not output.is_dir():
            raise ConfigurationError(f"--output {output}: there is no such folder")
        made = authority.issue(parsed_args.host, parsed_args.days)
        try:
            write_file(key, made[1], mode=0o600)
            write_file(certificate, made[0])
        except OSError as error:
            raise ConfigurationError(f"--output {output}: {error.strerror}") from error
        self.app.stdout.write(
            f"{certificate}, {key}: made for {parsed_args.host}\n"
            f"put them there as [tls] certificate and key; move the key, and keep no copy\n"
        )


def _refuse_what_is_no_host(name: str) -> None:
    """No agent could be called that."""
    from oslo_config import types

    try:
        types.HostDomain()(name)
    except ValueError:
        raise ConfigurationError(
            f"{name!r} is no name that [agent] host takes: letters, digits, '-', '_' and '.'"
        ) from None


class PkiIssue(_Certificate):
    """Makes a host's first certificate and its key."""

    def take_action(self, parsed_args: Any) -> int:
        authority = _authority(parsed_args)
        if _valid(authority, parsed_args.host):
            raise ConfigurationError(
                f"{parsed_args.host} has a certificate that counts; `sami pki renew` makes another, "
                "`sami pki revoke` ends it"
            )
        self._issue(authority, parsed_args)
        return 0


class PkiRenew(_Certificate):
    """Makes another certificate and key for a host, in time before the one that it has ends.

    The one before counts until its own end. An agent takes the new files for sessions that begin after they were put
    in place; nothing has to be restarted, and what runs is not disturbed.
    """

    def take_action(self, parsed_args: Any) -> int:
        authority = _authority(parsed_args)
        if not any(one.host == parsed_args.host for one in authority.issued()):
            raise ConfigurationError(f"{parsed_args.host} never had a certificate of this authority: sami pki issue")
        self._issue(authority, parsed_args)
        return 0


class PkiRevoke(Command):
    """Ends certificates before their time: those of a host, or one by its serial number.

    It counts where the new crl.pem is put in place, from the next session on.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_folder(parser)
        parser.add_argument("--serial", help="this certificate alone, by its number in `sami pki show`")
        parser.add_argument("host", metavar="HOST", nargs="?", help="all certificates of this host")
        return parser

    def take_action(self, parsed_args: Any) -> int:
        if (parsed_args.host is None) == (parsed_args.serial is None):
            raise ConfigurationError("name a host, or a certificate with --serial; `sami pki show` lists them")
        authority = _authority(parsed_args)
        wanted = [
            one
            for one in authority.issued()
            if one.host == parsed_args.host or one.serial.lstrip("0") == (parsed_args.serial or "").upper().lstrip("0")
        ]
        if not wanted:
            name = parsed_args.host or parsed_args.serial
            raise ConfigurationError(f"{name} has no certificate of this authority; `sami pki show` lists them")
        authority.revoke(one.serial for one in wanted)
        for one in wanted:
            self.app.stdout.write(f"{one.host}: {one.serial} is revoked\n")
        self.app.stdout.write(f"put {authority.folder / 'crl.pem'} in place on every host, as [tls] revoked\n")
        return 0


class PkiShow(Lister):
    """Lists what the authority issued, with the days that are left."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_folder(parser)
        parser.add_argument("host", metavar="HOST", nargs="?", help="certificates of this host only")
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        from sami_plugin.channel.identity import days_until
        from sami_plugin.cli.wording import Moment

        rows = []
        for one in _authority(parsed_args).issued():
            left = days_until(one.ends)
            state = "revoked" if one.is_revoked else "ended" if left < 0 else "valid"
            if parsed_args.host in (None, one.host):
                rows.append((one.host, one.serial, Moment(one.ends.timestamp()), int(left), state))
        return COLUMNS, rows


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", metavar="PATH", default=FOLDER, help=f"the authority's folder (default: {FOLDER})")


def _authority(parsed_args: Any) -> Authority:
    from sami_plugin.channel.authority import Authority

    return Authority(Path(parsed_args.folder))


def _valid(authority: Authority, host: str) -> bool:
    from sami_plugin.channel.identity import days_until

    return any(one.host == host and not one.is_revoked and days_until(one.ends) > 0 for one in authority.issued())


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 36500:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to 36500")
    return int(text)
