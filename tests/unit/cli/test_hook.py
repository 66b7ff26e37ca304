"""`sami hook` in folders of its own, with a process that looks like libvirt's daemon, and the doctor's view of both."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sami_plugin.cli import checks, hook_checks, hook_file
from sami_plugin.cli.checks import Result
from sami_plugin.cmd import libvirt_hook
from sami_plugin.errors import ConfigurationError
from tests.unit.cli.command_line import CommandLine

SHIPPED = Path(libvirt_hook.__file__).read_bytes()
OLDER = SHIPPED.replace(b"\n", b", version 0\n", 2).replace(b", version 0", b"", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where libvirt would look, on a host that has no hooks yet."""
    (tmp_path / "libvirt").mkdir()
    return tmp_path / "libvirt" / "hooks" / "qemu.d"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def start_daemon(tmp_path: Path, run_folder: Path) -> Iterator[Callable[[str], None]]:
    """Starts what looks like a daemon of libvirt."""
    started = []

    def start(name: str = "libvirtd") -> None:
        (tmp_path / name).symlink_to("/bin/sleep")
        time.sleep(0.05)  # start times are counted in hundredths of a second
        process = subprocess.Popen([tmp_path / name, "60"])
        started.append(process)
        (run_folder / f"{name}.pid").write_text(f"{process.pid}\n")
        time.sleep(0.05)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def systemd(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes systemctl say when it last reloaded the daemon, in seconds since the host's start."""
    (run_folder / "systemd" / "system").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)

    def reload(moment: float) -> None:
        script = tmp_path / "bin" / "systemctl"
        script.write_text(f'#!/bin/sh\n[ "$4" = libvirtd.service ] && echo {int(moment * 1e6)}\n')
        script.chmod(0o755)

    return reload


@pytest.fixture
def status(
    sami: CommandLine, folder: Path, run_folder: Path, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    (tmp_path / "agent.conf").write_text(f"[agent]\nsocket = {tmp_path}/agent.sock\n")
    (tmp_path / "hook.conf").write_text(f"socket = {tmp_path}/agent.sock\n")

    def show(*arguments: object) -> tuple[int, dict[str, Any]]:
        code = sami(
            *("hook", "status", "-f", "json", "--folder", folder, "--run-folder", run_folder),
            *("--settings", tmp_path / "hook.conf", "--config-file", tmp_path / "agent.conf", *arguments),
        )
        return code, json.loads(sami.out) if sami.out else {}

    return show


@contextlib.contextmanager
def listener(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen()
        yield
    path.unlink()


def install(sami: CommandLine, folder: Path, run_folder: Path, *arguments: object) -> str:
    assert sami("hook", "install", "--folder", folder, "--run-folder", run_folder, *arguments) == 0
    return sami.out


# --- install


def test_install_puts_the_shipped_file_there_and_it_runs(sami: CommandLine, folder: Path, run_folder: Path) -> None:
    said = install(sami, folder, run_folder)
    assert said.startswith(f"{folder}/50-sami: installed\n")
    (file,) = folder.iterdir()
    assert (file.name, file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == ("50-sami", SHIPPED, 0o755)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    done = subprocess.run([file, "web", "prepare", "begin", "-"], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_install_again_and_over_an_older_version(sami: CommandLine, folder: Path, run_folder: Path) -> None:
    install(sami, folder, run_folder)
    assert "was there already" in install(sami, folder, run_folder)
    (folder / "50-sami").write_bytes(OLDER)
    assert "brought up to date" in install(sami, folder, run_folder)
    assert (folder / "50-sami").read_bytes() == SHIPPED
    (folder / "50-sami").chmod(0o600)
    install(sami, folder, run_folder)
    assert hook_file.is_executable(folder / "50-sami")


def test_file_of_somebody_else_is_neither_replaced_nor_removed(
    sami: CommandLine, folder: Path, run_folder: Path
) -> None:
    folder.mkdir(parents=True)
    for foreign in (b"#!/bin/sh\nexit 0\n", b"", b"#!/bin/sh\n# about sami-libvirt-hook of sami_plugin\n"):
        (folder / "50-sami").write_bytes(foreign)
        for command in ("install", "remove"):
            assert sami("hook", command, "--folder", folder) == 1
            assert "not ours" in sami.err
            assert (folder / "50-sami").read_bytes() == foreign
    install(sami, folder, run_folder, "--name", "51-sami")
    assert sorted(path.name for path in folder.iterdir()) == ["50-sami", "51-sami"]


def test_host_without_libvirt_is_told_so(sami: CommandLine, tmp_path: Path) -> None:
    assert sami("hook", "install", "--folder", tmp_path / "no" / "hooks" / "qemu.d") == 1
    assert "is libvirt installed?" in sami.err
    assert sami.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a/b", "", ".", "..", ".hidden", "-x", "a b", "a\n"])
def test_name_that_is_none_is_refused(sami: CommandLine, folder: Path, name: str) -> None:
    for command in ("install", "remove", "status"):
        assert sami("hook", command, "--folder", folder, f"--name={name}") == 1
        assert "--name" in sami.err
    assert not folder.exists()


def test_folder_that_is_a_file_is_one_line(sami: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in ("install", "remove"):
        assert sami("hook", command, "--folder", tmp_path / "file") == 1
        assert sami.err.startswith(f"sami: {tmp_path}/file/50-sami: Not a directory")
        assert sami.err.count("\n") == 1


def test_install_that_fails_leaves_what_was_there(
    folder: Path, sami: CommandLine, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(sami, folder, run_folder)
    (folder / "50-sami").write_bytes(OLDER)

    def fail(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(hook_file.os, "rename", fail)
    assert sami("hook", "install", "--folder", folder) == 1
    assert "run as root" in sami.err
    (file,) = folder.iterdir()
    assert file.read_bytes() == OLDER


# --- whether libvirt has to be told


def test_daemon_that_started_without_hooks_has_to_look_again(
    sami: CommandLine, folder: Path, run_folder: Path, start_daemon: Callable[..., None]
) -> None:
    assert "no libvirt daemon can be seen" in install(sami, folder, run_folder)
    assert sami("hook", "remove", "--folder", folder) == 0
    start_daemon()
    assert "libvirtd has to look for hooks again: systemctl reload libvirtd" in install(sami, folder, run_folder)
    # Installed once more, nothing is known that was not.
    assert "systemctl reload libvirtd" in install(sami, folder, run_folder)


@pytest.mark.parametrize("name", ["libvirtd", "virtqemud"])
def test_daemon_that_started_with_the_hook_calls_it_and_its_next_version(
    sami: CommandLine, folder: Path, run_folder: Path, start_daemon: Callable[..., None], name: str
) -> None:
    install(sami, folder, run_folder)
    start_daemon(name)
    for _ in range(2):
        assert f"{name} calls it from now on" in install(sami, folder, run_folder)
    (folder / "50-sami").write_bytes(SHIPPED)  # as something that is not `sami hook install` does
    assert "has to look" in install(sami, folder, run_folder)


@pytest.mark.parametrize("other", ["../qemu", "10-other", ".hidden"])
def test_daemon_that_started_with_another_hook_calls_ours_at_once(
    sami: CommandLine, folder: Path, run_folder: Path, start_daemon: Callable[..., None], other: str
) -> None:
    folder.mkdir(parents=True)
    (folder / other).write_text("#!/bin/sh\n")
    start_daemon()
    assert "has to look" in install(sami, folder, run_folder)  # not executable
    assert sami("hook", "remove", "--folder", folder) == 0
    (folder / other).chmod(0o755)
    start_daemon("virtqemud")
    assert "virtqemud calls it from now on" in install(sami, folder, run_folder)


def test_reload_by_systemd_counts(
    folder: Path,
    run_folder: Path,
    sami: CommandLine,
    start_daemon: Callable[..., None],
    systemd: Callable[[float], None],
) -> None:
    start_daemon()
    install(sami, folder, run_folder)
    path = folder / "50-sami"
    for moment, is_told in ((time.monotonic() - 100, False), (time.monotonic() + 1, True), (0, None)):
        systemd(moment)
        assert hook_file.is_told(path, hook_file.daemon(str(run_folder))) is is_told


def test_pid_of_somebody_else_is_no_daemon(run_folder: Path) -> None:
    for text in (str(os.getpid()), "", "many", "-1", "99999999"):
        (run_folder / "libvirtd.pid").write_text(text)
        assert hook_file.daemon(str(run_folder)) is None


# --- remove


def test_remove_takes_the_hook_and_nothing_else(sami: CommandLine, folder: Path, run_folder: Path) -> None:
    install(sami, folder, run_folder)
    (folder / "60-other").write_text("")
    for said in ("removed", "was not there"):
        assert sami("hook", "remove", "--folder", folder) == 0
        assert sami.out == f"{folder}/50-sami: {said}\n"
    assert [path.name for path in folder.iterdir()] == ["60-other"]
    install(sami, folder, run_folder)
    (folder / "50-sami").write_bytes(OLDER)
    assert sami("hook", "remove", "--folder", folder) == 0
    assert not (folder / "50-sami").exists()


# --- status


def test_status_goes_from_nothing_to_all_is_well_by_what_it_says(
    status: Callable[..., tuple[int, dict[str, Any]]],
    sami: CommandLine,
    folder: Path,
    run_folder: Path,
    tmp_path: Path,
    start_daemon: Callable[..., None],
) -> None:
    code, shown = status()
    assert (code, shown["installed"], shown["executable"], shown["daemon"], shown["told"]) == (
        1,
        "no",
        False,
        None,
        None,
    )
    assert any(f"sami hook install --folder {folder}" in line for line in shown["wrong"])
    install(sami, folder, run_folder)
    code, shown = status()
    assert (code, shown["installed"], shown["executable"]) == (1, "yes", True)
    assert [line.split(":")[0] for line in shown["wrong"]] == ["hook is called", "agent"]
    start_daemon()
    with listener(tmp_path / "agent.sock"):
        code, shown = status()
        assert (code, shown["daemon"], shown["told"], shown["agent"]) == (0, "libvirtd", True, "answers")
        assert shown["wrong"] == []
        assert shown["access"].startswith("root")
    code, shown = status()
    assert code == 1
    assert shown["wrong"] == [f"agent: {tmp_path}/agent.sock: {shown['agent']}; start sami-agent"]


def test_status_names_another_version_and_what_libvirt_does_not_run(
    status: Callable[..., tuple[int, dict[str, Any]]], sami: CommandLine, folder: Path, run_folder: Path
) -> None:
    install(sami, folder, run_folder)
    file = folder / "50-sami"
    for change, installed, said in (
        (lambda: file.write_bytes(OLDER), "another version", "is of another version; sami hook install"),
        (lambda: file.write_bytes(b"#!/bin/sh\n"), "not ours", "is not the hook of sami_plugin"),
        (lambda: file.write_bytes(SHIPPED) and file.chmod(0o644), "yes", "is not executable"),
        (lambda: file.chmod(0o777), "yes", "may write"),
    ):
        change()
        code, shown = status()
        assert (code, shown["installed"]) == (1, installed)
        assert said in shown["wrong"][0]


def test_status_compares_the_two_sockets(status: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path) -> None:
    def about_socket() -> list[str]:
        return [line for line in status()[1]["wrong"] if line.startswith("hook's socket")]

    assert about_socket() == []
    (tmp_path / "hook.conf").write_text("socket = /else/where\n")
    assert about_socket()[0].endswith(f"write socket = {tmp_path}/agent.sock into {tmp_path}/hook.conf")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "hook.conf").write_text(f"socket = {tmp_path}/link/agent.sock\n")
    assert about_socket() == []
    (tmp_path / "hook.conf").write_text(f"socket = {tmp_path}/agent.sock\nveto = perhaps\n")
    assert "line 2 is ignored: it has to be yes or no" in about_socket()[0]


def test_status_with_a_bad_configuration_is_one_line(
    status: Callable[..., tuple[int, dict[str, Any]]], sami: CommandLine, tmp_path: Path
) -> None:
    assert status("--config-file", tmp_path / "none.conf") == (1, {})
    assert sami.err.count("\n") == 1


@pytest.mark.parametrize(("mode", "who"), [(0o600, "root"), (0o660, "root, group "), (0o666, "everybody")])
def test_who_may_connect_is_said_in_words(tmp_path: Path, mode: int, who: str) -> None:
    path = tmp_path / "agent.sock"
    with listener(path):
        path.chmod(mode)
        said = hook_checks.access(str(path))
    assert said is not None
    assert who in said
    assert f"mode {mode:04o}" in said
    assert hook_checks.access(str(path)) is None


# --- the doctor


def names(found: list[checks.Check]) -> list[str]:
    return [one.name for one in found]


def test_doctor_looks_at_the_hook_only_where_libvirt_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hook_file, "FOLDER", str(tmp_path))
    monkeypatch.setattr(hook_checks.hook_file, "daemon", lambda run_folder="/run": None)
    assert not hook_checks.is_expected("")
    assert hook_checks.is_expected("qemu:///system")
    (tmp_path / "50-sami").write_bytes(SHIPPED)
    assert hook_checks.is_expected("")
    (tmp_path / "50-sami").unlink()
    monkeypatch.setattr(hook_checks.hook_file, "daemon", lambda run_folder="/run": hook_file.Daemon("x", 1, 0, None))
    assert hook_checks.is_expected("")


def fake_libvirt(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A libvirt-python that does this when a connection is opened."""
    (folder / "libvirt.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder))


ANSWERS = """
class Connection:
    getHostname = lambda self: "host-a"
    getLibVersion = lambda self: 9_000_000
def open(uri):
    assert uri == "qemu:///system"
    return Connection()
"""


def test_doctor_finds_libvirt_as_the_agent_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_libvirt(tmp_path, ANSWERS, monkeypatch)
    python, libvirt = hook_checks.libvirt("qemu:///system")
    assert (python.result, libvirt.result) == (Result.OK, Result.OK)
    assert "libvirt 9.0.0 on host-a" in libvirt.reason
    # It answers, but the agent does not ask.
    _, libvirt = hook_checks.libvirt("")
    assert (libvirt.result, "uri = qemu:///system" in libvirt.mend) == (Result.MISSING, True)
    fake_libvirt(tmp_path, "def open(uri): raise OSError('Failed to connect socket')", monkeypatch)
    _, libvirt = hook_checks.libvirt("qemu:///system")
    assert (libvirt.result, "Failed to connect" in libvirt.reason) == (Result.MISSING, True)
    fake_libvirt(tmp_path, "import time\ndef open(uri): time.sleep(60)", monkeypatch)
    monkeypatch.setattr(hook_checks, "_LIBVIRT_SECONDS", 0.3)
    _, libvirt = hook_checks.libvirt("qemu:///system")
    assert (libvirt.result, "does not answer" in libvirt.reason) == (Result.MISSING, True)


def test_doctor_names_a_libvirt_python_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_libvirt(tmp_path, "import no_such_module", monkeypatch)
    (python,) = hook_checks.libvirt("qemu:///system")
    assert (python.name, python.result) == ("libvirt-python", Result.MISSING)
    assert "sami_plugin[libvirt]" in python.mend


def test_doctor_tells_all_in_the_order_of_mending(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, sami: CommandLine
) -> None:
    fake_libvirt(tmp_path, ANSWERS, monkeypatch)
    monkeypatch.setattr(hook_file, "FOLDER", str(folder))
    ports, conf = tmp_path / "ports.json", tmp_path / "agent.conf"
    ports.write_text('{"ports": []}')
    conf.write_text(
        f"[agent]\nscope_file = {ports}\njournal = {tmp_path}/journal\nsocket = {tmp_path}/agent.sock\n"
        "[libvirt]\nuri = qemu:///system\n"
    )
    found = list(checks._configured([str(conf)]))
    configured = ["configuration", "driver", "journal", "broker", "certificate", "libvirt-python", "libvirt"]
    assert names(found) == [*configured, "hook", "hook's socket", "socket", "scopes", "agent's capabilities"]
    by_name = {one.name: one for one in found}
    assert by_name["hook"].mend == "sami hook install"
    assert by_name["hook's socket"].result is Result.MISSING
    hook_file.install(folder / "50-sami")
    found = list(checks._configured([str(conf)]))
    assert names(found) == [
        *configured,
        "hook",
        "hook is called",
        "hook's socket",
        "socket",
        "scopes",
        "agent's capabilities",
    ]
    assert {one.name: one.result for one in found}["hook"] is Result.OK
    (folder / "50-sami").unlink()
    (folder / "50-sami").mkdir()
    by_name = {one.name: one for one in checks._configured([str(conf)])}
    assert (by_name["hook"].result, "Is a directory" in by_name["hook"].reason) == (Result.MISSING, True)


def test_scope_finder_of_any_kind_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sami_plugin.scopes import loader

    class Finder:
        def find(self, guest: str) -> tuple[()]:
            return ()

        def namespaces(self) -> tuple[str | None, ...]:
            return (None, "/run/netns/fw")

    conf = tmp_path / "agent.conf"
    conf.write_text("[agent]\nscopes = other\n")
    monkeypatch.setattr(loader, "load_scopes", lambda name, conf: Finder())
    known = checks.configuration.load([str(conf)])
    found, capabilities = checks._scopes(known, [str(conf)])
    assert (found.result, "other answers" in found.reason) == (Result.OK, True)
    assert "CAP_SYS_ADMIN to enter 1 network namespaces, /run/netns/fw among them" in capabilities.reason

    def fail(name: str, conf: object) -> None:
        raise ConfigurationError("no such finder")

    monkeypatch.setattr(loader, "load_scopes", fail)
    (found,) = checks._scopes(known, [str(conf)])
    assert found.result is Result.MISSING
