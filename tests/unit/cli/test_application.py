"""What all commands have in common: help, errors, exit codes, a quick start."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sami_plugin.cli.application import Application
from sami_plugin.cmd import agent
from sami_plugin.drivers import loader
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.memory import MemoryDriver
from sami_plugin.errors import ConfigurationError
from tests.unit.cli.command_line import CommandLine

COMMANDS = (
    "doctor",
    "driver list",
    "flow export",
    "flow import",
    "flow list",
    "hook install",
    "hook remove",
    "hook status",
    "report",
    "session list",
    "session show",
)


def is_one_line(text: str) -> bool:
    return text.startswith("sami: ") and text.endswith("\n") and text.count("\n") == 1


def test_help_names_every_command(sami: CommandLine) -> None:
    with pytest.raises(SystemExit) as ended:
        sami("--help")
    assert not ended.value.code
    for command in COMMANDS:
        assert f"\n  {command} " in sami.out
    assert "Could not" not in sami.out


def test_no_command_shows_the_help(sami: CommandLine) -> None:
    assert sami() == 0
    assert "\n  doctor " in sami.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_of_its_own(sami: CommandLine, command: str) -> None:
    assert sami("help", *command.split()) == 0
    assert sami.out.startswith(f"usage: sami {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_behind_a_command_is_the_commands(
    sami: CommandLine, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    sami(*command.split(), "--help")
    assert (sami.out + capsys.readouterr().out).startswith(f"usage: sami {command}")


def test_unknown_command_is_one_line_that_names_similar_ones(sami: CommandLine) -> None:
    assert sami("flow", "lost") == 2
    assert is_one_line(sami.err)
    assert "flow list" in sami.err
    assert sami.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--bogus"),
        ("driver", "list", "surplus"),
        ("flow", "list"),
        ("flow", "list", "--zone", "65536"),
        ("flow", "list", "--zone", "-1"),
        ("flow", "list", "--zone", "1", "--address", "10"),
        ("flow", "list", "--zone", "1", "--limit", "few"),
        ("flow", "list", "--zone", "1", "--limit", "3", "--all"),
        ("flow", "export", "--zone", "1"),
        ("flow", "export", "file"),
        ("flow", "import", "file"),
        ("flow", "import", "file", "--zone", "1", "--neighbour", "nobody"),
        ("hook", "install", "surplus"),
        ("hook", "remove", "--run-folder", "/run"),
        ("hook", "status", "--bogus"),
        ("report",),
        ("session", "list", "surplus"),
        ("session", "show"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_which(
    sami: CommandLine, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sami(*arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("sami ")
    assert "error: " in message


def test_error_of_ours_is_one_line(sami: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConfigurationError("mend\nthis")

    monkeypatch.setattr(sami, "load_driver", fail)
    assert sami("flow", "list", "--zone", "1") == 1
    assert sami.err == "sami: mend this\n"


def test_error_that_nobody_foresaw_is_called_a_fault_of_sami(
    sami: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sami, "load_driver", lambda name: {}[name])
    assert sami("flow", "list", "--zone", "1") == 1
    assert is_one_line(sami.err)
    assert "KeyError" in sami.err
    assert "fault of sami" in sami.err


def test_debug_shows_the_traceback(sami: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sami, "load_driver", lambda name: {}[name])
    assert sami("--debug", "flow", "list", "--zone", "1") == 1
    assert "Traceback" in sami.err


def test_unknown_column_is_one_line(sami: CommandLine) -> None:
    assert sami("flow", "list", "--zone", "1", "-c", "Colour") == 1
    assert is_one_line(sami.err)


def test_log_file_that_cannot_be_written_is_one_line(sami: CommandLine, tmp_path: Path) -> None:
    assert sami("--log-file", tmp_path / "no" / "log", "driver", "list") == 1
    assert is_one_line(sami.err)


def test_interrupt_ends_quietly(sami: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sami, "load_driver", interrupt)
    assert sami("flow", "list", "--zone", "1") == 130
    assert sami.err == ""


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sami_plugin.cmd.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([one for one in ('numpy', 'oslo_messaging', 'oslo_config', 'matplotlib') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", [("status",), ("driver", "list"), ("flow", "list", "--zone", "7", "--driver", "linux_conntrack")]
)
def test_driver_is_made_with_the_options_of_the_named_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    made: dict[str, object] = {}

    def load(name: str, **options: object) -> FlowDriver:
        made[name] = options
        return MemoryDriver()

    monkeypatch.setattr(loader, "load_driver", load)
    file = tmp_path / "agent.conf"
    file.write_text(f"[agent]\njournal = {tmp_path}/journal\n[linux_conntrack]\naccounting = true\n")
    application = Application(stdout=io.StringIO(), stderr=io.StringIO())
    assert application.run([*command, "--config-file", str(file)]) == 0
    assert made["linux_conntrack"] == {"accounting": True}


# sami-agent


def test_agent_names_its_options_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        agent.main(["--help"])
    assert not ended.value.code
    told = " ".join(capsys.readouterr().out.split())
    for option in ("--config-file", "scope_file = /etc/sami/ports.json", "hold_seconds = 30"):
        assert option in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[agent]\nenterprise_number = many\n", "enterprise_number"),
        ("[migration]\nwindow = 900\n", "window"),
        ("agent]\nno option\n", "parse"),
        ("[agent]\ndriver = nobody\n", "nobody"),
        ("[agent]\nscopes = nobody\n", "nobody"),
    ],
)
def test_agent_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file, journal = tmp_path / "agent.conf", tmp_path / "journal.sqlite"
    file.write_text(f"{text}[agent]\njournal = {journal}\n")
    assert agent.main(["--config-file", str(file)]) == 1
    assert not journal.exists()
    told = capsys.readouterr().err
    assert told.startswith("sami-agent: ")
    assert told.count("\n") == 1
    assert said in told
    assert "LocationInfo" not in told


def test_configuration_that_is_not_utf_8_is_told_in_one_line(
    sami: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agent.conf"
    file.write_bytes("[DEFAULT]\ntransport_url = rabbit://sécret@192.0.2.1/\n".encode("latin-1"))
    said = "configuration: a file is not UTF-8: octet 0xe9 in the line that begins with 'transport_url'; write it anew"
    assert agent.main(["--config-file", str(file)]) == 1
    assert capsys.readouterr().err == f"sami-agent: {said}\n"
    assert sami("status", "--config-file", file) == 1
    assert sami.err == f"sami: {said}\n"


def test_agent_that_cannot_start_leaves_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    file = tmp_path / "agent.conf"
    file.write_text(f"[agent]\ndriver = nobody\njournal = {tmp_path}/journal.sqlite\n")
    assert agent.main(["--config-file", str(file)]) == 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_agent_without_its_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["--config-file", str(tmp_path / "none.conf")]) == 1
    assert "none.conf" in capsys.readouterr().err


def test_agent_refuses_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        agent.main(["--bogus"])
    assert ended.value.code == 2
