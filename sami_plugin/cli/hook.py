"""sami hook ..."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cliff.command import Command
from cliff.show import ShowOne

from sami_plugin.cli import configuration

if TYPE_CHECKING:
    from sami_plugin.cli.application import Application

SHOWN = ("hook", "installed", "executable", "daemon", "told", "settings", "socket", "access", "agent", "wrong")


class HookInstall(Command):
    """Puts the hook in place with which libvirt tells sami-agent of migrations.

    Needs root. Says what has to be done so that libvirt calls it. To install it again is harmless, and brings the file
    of another version up to date.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_place(parser)
        _add_run_folder(parser)
        return parser

    def take_action(self, parsed_args: Any) -> int:
        from sami_plugin.cli import hook_file

        path = hook_file.path_of(parsed_args.folder, parsed_args.name)
        daemon = hook_file.daemon(parsed_args.run_folder)
        is_told = hook_file.is_told(path, daemon)
        before = hook_file.install(path)
        done = {
            hook_file.State.ABSENT: "installed",
            hook_file.State.CURRENT: "was there already",
            hook_file.State.ANOTHER_VERSION: "brought up to date",
        }[before]
        self.app.stdout.write(f"{path}: {done}\n")
        if daemon is None:
            self.app.stdout.write(
                "no libvirt daemon can be seen; if one runs, it has to look for hooks again: "
                "systemctl reload libvirtd, or virtqemud\n"
            )
        elif is_told:
            self.app.stdout.write(f"{daemon.name} calls it from now on\n")
        else:
            unless = "" if before is hook_file.State.ABSENT else "unless that was done since it was installed, "
            self.app.stdout.write(
                f"{unless}{daemon.name} has to look for hooks again: systemctl reload {daemon.name}\n"
            )
        return 0


class HookRemove(Command):
    """Removes libvirt's hook of sami-agent, and nothing else. Needs root.

    libvirt need not be told. A file of that name that is not the hook is left alone, and so are the hook's settings.
    """

    app: Application

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_place(parser)
        return parser

    def take_action(self, parsed_args: Any) -> int:
        from sami_plugin.cli import hook_file

        path = hook_file.path_of(parsed_args.folder, parsed_args.name)
        was_there = hook_file.remove(path)
        self.app.stdout.write(f"{path}: {'removed' if was_there else 'was not there'}\n")
        return 0


class HookStatus(ShowOne):
    """Shows whether libvirt's hook is in place, whether libvirt calls it, and whether it reaches sami-agent.

    The exit code is 1 if something is wrong; `wrong` says what, and what mends it. `told` is whether libvirt is known
    to call the hook.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _add_place(parser)
        _add_run_folder(parser)
        parser.add_argument("--settings", metavar="PATH", help="the hook's own settings (default: where it reads them)")
        configuration.add_config_file(parser)
        return parser

    def take_action(self, parsed_args: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        from sami_plugin.cli import hook_checks, hook_file
        from sami_plugin.cli.checks import Result
        from sami_plugin.cli.wording import Absent, Lines

        path = hook_file.path_of(parsed_args.folder, parsed_args.name)
        agent_socket = configuration.load(parsed_args.config_file).socket
        seen = hook_checks.look(path, parsed_args.run_folder, parsed_args.settings)
        wrong = [
            f"{one.name}: {one.reason}" + (f"; {one.mend}" if one.mend else "")
            for one in (*hook_checks.checks(seen, agent_socket), hook_checks.listens(seen))
            if one.result is not Result.OK
        ]
        self._code = 1 if wrong else 0
        return SHOWN, (
            str(path),
            seen.state.value,
            seen.is_executable,
            Absent(seen.daemon.name if seen.daemon else None),
            Absent(seen.is_told),
            seen.settings_file,
            seen.settings.socket,
            Absent(hook_checks.access(seen.settings.socket)),
            "answers" if not seen.silence else seen.silence,
            Lines(wrong),
        )

    def run(self, parsed_args: Any) -> int:
        self._code = 1
        return super().run(parsed_args) or self._code


def _add_place(parser: argparse.ArgumentParser) -> None:
    from sami_plugin.cli import hook_file

    parser.add_argument(
        "--folder",
        metavar="PATH",
        default=hook_file.FOLDER,
        help=f"libvirt's folder of hooks for qemu (default: {hook_file.FOLDER})",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        default=hook_file.NAME,
        help=f"name of the hook's file; libvirt runs them in the order of their names (default: {hook_file.NAME})",
    )


def _add_run_folder(parser: argparse.ArgumentParser) -> None:
    from sami_plugin.cli import hook_file

    parser.add_argument(
        "--run-folder",
        metavar="PATH",
        default=hook_file.RUN_FOLDER,
        help=f"where libvirtd.pid or virtqemud.pid is (default: {hook_file.RUN_FOLDER})",
    )
