"""libvirt's hook as libvirt runs it: a process of its own, the file alone, and a real socket of the agent."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sami_plugin.cmd import libvirt_hook
from sami_plugin.errors import OperatorError, Veto
from sami_plugin.hooks.local_socket import MOST_OCTETS_WITH_DOMAIN, LocalSocket
from sami_plugin.model.migration import MigrationEvent, Phase

PYTHON = "/usr/bin/python3"
GUEST = "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4"
DOMAIN = f"""<domain type='kvm' id='7'>
  <name>web &lt;uuid&gt; "1" \\ é</name>
  <uuid>{GUEST}</uuid>
  <metadata>
    <x:y xmlns:x='urn:x'><uuid>00000000-0000-0000-0000-000000000000</uuid></x:y>
  </metadata>
\t<devices/>
</domain>
"""
TOLD = {("migrate", "begin"): Phase.PREPARE, ("started", "begin"): Phase.STARTED, ("stopped", "end"): Phase.STOPPED}
NOT_TOLD = [
    ("prepare", "begin"),
    ("start", "begin"),
    ("release", "end"),
    ("reconnect", "begin"),
    ("restore", "begin"),
    ("attach", "begin"),
    ("migrate", "end"),
    ("stopped", "begin"),
    ("no-such", "begin"),
]


@dataclasses.dataclass
class Hook:
    """The hook's file, alone in a folder, with settings, a syslog and room for the agent's socket beside it."""

    folder: Path
    syslog: socket.socket
    before: tuple[str, ...] = ()
    took_seconds: float = 0.0

    @property
    def file(self) -> Path:
        return self.folder / "qemu.d" / "50-sami"

    @property
    def agent(self) -> Path:
        return self.folder / "agent.sock"

    def configure(self, *lines: str) -> None:
        text = [f"socket = {self.agent}", f"log = {self.folder}/syslog", *lines]
        (self.folder / "hook.conf").write_text("\n".join(text))

    def __call__(self, *arguments: str, xml: bytes | None = DOMAIN.encode(), code: int = 0, stderr: bytes = b"") -> str:
        """Runs it; what it said to syslog."""
        begin = time.monotonic()
        done = subprocess.run(
            [*self.before, str(self.file), *arguments],
            input=xml,
            capture_output=True,
            check=False,
            timeout=30,
            cwd="/",
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", "SAMI_LIBVIRT_HOOK_CONF": str(self.folder / "hook.conf")},
        )
        self.took_seconds = time.monotonic() - begin
        assert done.stdout == b""
        assert (done.returncode, done.stderr) == (code, stderr)
        return self.said()

    def said(self) -> str:
        try:
            return self.syslog.recv(4096).decode()
        except BlockingIOError:
            return ""


@pytest.fixture(params=["its own interpreter", PYTHON])
def hook(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hook]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "syslog"))
        syslog.setblocking(False)
        made = Hook(tmp_path, syslog, () if request.param != PYTHON else (PYTHON, "-IS"))
        made.file.parent.mkdir()
        shutil.copyfile(libvirt_hook.__file__, made.file)
        made.file.chmod(0o755)
        made.configure()
        yield made
        assert [path.name for path in made.file.parent.iterdir()] == ["50-sami"]  # and no __pycache__


class Agent:
    """The real socket; what it is told is kept, and answered as `answer` does."""

    def __init__(self, path: Path) -> None:
        self.told: list[MigrationEvent] = []
        self.answer: Callable[[], None] = lambda: None
        self._listening = LocalSocket(path, self._tell)
        self._listening.start()

    def _tell(self, event: MigrationEvent) -> None:
        self.told.append(event)
        self.answer()

    def stop(self) -> None:
        # Takes half a second, and nobody needs to wait for it.
        threading.Thread(target=self._listening.stop).start()


@pytest.fixture
def agent(hook: Hook) -> Iterator[Agent]:
    made = Agent(hook.agent)
    yield made
    made.stop()


def raising(error: Exception) -> Callable[[], None]:
    def answer() -> None:
        raise error

    return answer


# --- what is told


@pytest.mark.parametrize(("operation", "sub_operation"), TOLD)
def test_agent_is_told_once_and_nothing_is_logged(hook: Hook, agent: Agent, operation: str, sub_operation: str) -> None:
    assert hook("web", operation, sub_operation, "-") == ""
    (event,) = agent.told
    phase = TOLD[operation, sub_operation]
    if phase is Phase.STOPPED:  # the source hears it too
        assert event == MigrationEvent(GUEST, phase)
    else:
        assert event == MigrationEvent(GUEST, phase, role="destination", domain=DOMAIN)


@pytest.mark.parametrize(("operation", "sub_operation"), NOT_TOLD)
def test_other_operations_end_without_a_look_at_anything(
    hook: Hook, agent: Agent, operation: str, sub_operation: str
) -> None:
    hook.configure("this is no setting")
    assert hook("web", operation, sub_operation, "-") == ""
    assert agent.told == []


def test_xml_that_nobody_reads_is_no_error(hook: Hook) -> None:
    assert hook("web", "prepare", "begin", "-", xml=b"x" * 5_000_000) == ""


def test_name_of_the_guest_may_look_like_an_option(hook: Hook, agent: Agent) -> None:
    for name in ("--help", "-c", "", "a b;c'd", "wéb"):
        assert hook(name, "started", "begin", "-") == ""
    assert len(agent.told) == 5


def test_many_hooks_at_a_time_are_all_heard(hook: Hook, agent: Agent) -> None:
    agent.answer = lambda: time.sleep(0.2)
    threads = [threading.Thread(target=hook, args=("web", "started", "begin", "-")) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(agent.told) == 20
    assert hook.said() == ""


# --- what goes wrong


@pytest.mark.parametrize(("operation", "sub_operation"), TOLD)
def test_without_an_agent_the_guest_goes_on_at_once(hook: Hook, operation: str, sub_operation: str) -> None:
    said = hook("web", operation, sub_operation, "-")
    assert said.startswith("<28>sami-libvirt-hook[")
    assert f"web {operation}: {hook.agent}: No such file or directory; is sami-agent running?" in said
    assert hook.took_seconds < 1


def test_socket_that_nobody_listens_on(hook: Hook) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(hook.agent))
        assert "Connection refused; is sami-agent running?" in hook("web", "migrate", "begin", "-")


def test_without_syslog_the_guest_goes_on(hook: Hook) -> None:
    (hook.folder / "syslog").unlink()
    assert hook("web", "migrate", "begin", "-") == ""


def test_error_of_the_agent_is_logged(hook: Hook, agent: Agent) -> None:
    agent.answer = raising(OperatorError('source:\n"unknown"'))
    assert 'web migrate: sami-agent says: source: "unknown"' in hook("web", "migrate", "begin", "-")


@contextlib.contextmanager
def listener(path: Path, *, queue: int = 5) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen(queue)
        yield made


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("operation", ["migrate", "started"])
def test_agent_that_hangs_holds_the_guest_for_the_limit_and_no_longer(hook: Hook, operation: str, big: bool) -> None:
    hook.configure("verdict_seconds = 0.4", "started_seconds = 0.2")
    # What is big does not fit into the socket: then it is sending that hangs.
    xml = DOMAIN.encode() + b" " * (900_000 if big else 0)
    with listener(hook.agent):
        said = hook("web", operation, "begin", "-", xml=xml)
    limit = 0.4 if operation == "migrate" else 0.2
    assert "timed out" in said or "no answer in time" in said
    assert limit + 0.5 <= hook.took_seconds < limit + 2


def test_agent_whose_queue_is_full_is_asked_again_until_the_limit(hook: Hook) -> None:
    hook.configure("started_seconds = 0.3")
    with listener(hook.agent, queue=0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(hook.agent))
        assert "no answer in time" in hook("web", "started", "begin", "-")
    assert 0.8 <= hook.took_seconds < 2.3


def test_agent_that_answers_octet_by_octet_does_not_stretch_the_limit(hook: Hook) -> None:
    hook.configure("started_seconds = 0.3")

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            while True:
                connection.send(b" ")
                time.sleep(0.1)

    with listener(hook.agent) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        said = hook("web", "started", "begin", "-")
        thread.join()
    assert "no answer in time" in said or "timed out" in said
    assert 0.8 <= hook.took_seconds < 2.3


def test_stdin_that_never_ends_is_left_when_time_is_up(hook: Hook, agent: Agent) -> None:
    hook.configure("started_seconds = 0.2")
    read, write = os.pipe()
    begin = time.monotonic()
    done = subprocess.run(
        [*hook.before, str(hook.file), "web", "started", "begin", "-"],
        stdin=read,
        capture_output=True,
        check=False,
        timeout=30,
        env={"SAMI_LIBVIRT_HOOK_CONF": str(hook.folder / "hook.conf")},
    )
    assert 1.1 < time.monotonic() - begin < 3
    os.close(read)
    os.close(write)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert "web started: out of time" in hook.said()
    assert agent.told == []


def test_agent_that_turns_the_hook_away_is_heard(hook: Hook) -> None:
    def refuse(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.send(b'{"answer": "error", "reason": "too many hooks at a time"}\n')
            connection.shutdown(socket.SHUT_RD)
            time.sleep(0.2)

    with listener(hook.agent) as listening:
        thread = threading.Thread(target=refuse, args=(listening,))
        thread.start()
        said = hook("web", "started", "begin", "-", xml=DOMAIN.encode() + b" " * 900_000)
        thread.join()
    assert "sami-agent says: too many hooks at a time" in said


GARBAGE = [
    b"",
    b"\n",
    b"ok\n",
    b"\xff\xfe\x00\n",
    b"[1]\n",
    b"null\n",
    b"{}\n",
    b'{"answer": ["ok"]}\n',
    b'{"answer": "okay"}\n',
    b'{"answer": "ok"',
    b"[" * 60_000 + b"\n",
    b"x" * 100_000,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_agent_that_answers_garbage_stops_nobody(hook: Hook, garbage: bytes) -> None:
    hook.configure("veto = yes", "verdict_seconds = 0.5")

    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(garbage)

    with listener(hook.agent) as listening:
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        said = hook("web", "migrate", "begin", "-")
        thread.join()
    assert said
    assert "a fault of" not in said


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (b"", "no XML"),
        (b"<domain/>", "no XML"),
        (b"<uuid>", "no XML"),
        (b"<uuid>6ac3d3f1</uuid>", "no XML"),
        (b"<uuid>" + b"g" * 36 + b"</uuid>", "no XML"),
        (b'<uuid>6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f"</uuid>', "no XML"),
        (b"<uuid>" + b"6" * 2_000_000 + b"</uuid>", "no XML"),
        (bytes(range(256)) * 100, "no XML"),
    ],
)
def test_xml_without_uuid_is_logged_and_not_told(hook: Hook, agent: Agent, xml: bytes, reason: str) -> None:
    said = hook("web", "started", "begin", "-", xml=xml)
    assert reason in said
    assert "a fault of" not in said
    assert agent.told == []


def test_xml_may_hold_any_octet(hook: Hook, agent: Agent) -> None:
    xml = f"<domain><uuid>{GUEST}</uuid>".encode() + bytes(range(256)) + "é\u2028𝄞".encode() + b"</domain>"
    assert hook("web", "migrate", "begin", "-", xml=xml) == ""
    assert agent.told[0].domain == xml.decode("utf-8", "replace")


def test_longest_xml_is_told_and_a_longer_one_left_out(hook: Hook, agent: Agent) -> None:
    fields = {"guest": GUEST, "phase": "started", "role": "destination", "domain": ""}
    begin = f"<domain><uuid>{GUEST}</uuid>"
    spare = MOST_OCTETS_WITH_DOMAIN - len(json.dumps(fields)) - len("\n") - len(begin)
    for surplus in (0, 1):
        said = hook("web", "started", "begin", "-", xml=(begin + "x" * (spare + surplus)).encode())
        assert ("left out" in said) == bool(surplus)
    # Quotation marks take two octets in JSON.
    assert "left out" in hook("web", "started", "begin", "-", xml=(begin + '"' * (spare - 100)).encode())
    assert "left out" in hook("web", "started", "begin", "-", xml=(begin + "x" * 3_000_000).encode())
    assert [event.domain is None for event in agent.told] == [False, True, True, True]
    assert {event.guest for event in agent.told} == {GUEST}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("operation", ["migrate", "prepare"])
def test_closed_descriptors_stop_nobody(hook: Hook, agent: Agent, closed: str, operation: str) -> None:
    call = " ".join([*hook.before, str(hook.file)])
    hook.before = ("/bin/sh", "-c", f"{call} web {operation} begin - {closed}; exit $?")
    said = hook()
    if operation == "prepare":
        assert said == ""
    elif "<" in closed:
        assert "stdin cannot be read" in said or "no XML" in said
    else:
        assert (said, len(agent.told)) == ("", 1)


def test_without_arguments_a_person_is_told_what_it_is(hook: Hook) -> None:
    for arguments in ((), ("--help",)):
        assert hook(*arguments, stderr=libvirt_hook.USAGE.encode()) == ""


# --- a veto


def test_veto_counts_only_where_the_operator_wants_it(hook: Hook, agent: Agent) -> None:
    agent.answer = raising(Veto("4 of 6\nflows"))
    assert "goes on against sami-agent's veto: 4 of 6 flows" in hook("web", "migrate", "begin", "-")
    hook.configure("veto = no")
    assert "goes on against" in hook("web", "migrate", "begin", "-")
    hook.configure("veto = yes")
    stderr = b"sami-agent refuses the migration: 4 of 6 flows\n"
    assert "refused by sami-agent: 4 of 6 flows" in hook("web", "migrate", "begin", "-", code=3, stderr=stderr)


@pytest.mark.parametrize(("operation", "sub_operation"), [("started", "begin"), ("stopped", "end")])
def test_only_a_migration_can_be_refused(hook: Hook, agent: Agent, operation: str, sub_operation: str) -> None:
    hook.configure("veto = yes")
    agent.answer = raising(Veto("no"))
    assert "goes on against" in hook("web", operation, sub_operation, "-")


def test_veto_is_one_even_if_nobody_reads_why(hook: Hook, agent: Agent) -> None:
    hook.configure("veto = yes")
    agent.answer = raising(Veto("no"))
    call = " ".join([*hook.before, str(hook.file)])
    hook.before = ("/bin/sh", "-c", f"{call} web migrate begin - 2>&-; exit $?")
    assert "refused by sami-agent" in hook(code=3)


def test_veto_is_one_without_syslog_too(hook: Hook, agent: Agent) -> None:
    hook.configure("veto = yes")
    (hook.folder / "syslog").unlink()
    agent.answer = raising(Veto("no"))
    hook("web", "migrate", "begin", "-", code=3, stderr=b"sami-agent refuses the migration: no\n")


# --- settings


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("verdict_seconds = soon", "line 3 is ignored: it has to be seconds"),
        ("verdict_seconds = 0", "it has to be seconds"),
        ("verdict_seconds = -1", "it has to be seconds"),
        ("started_seconds = nan", "it has to be seconds"),
        ("started_seconds = inf", "it has to be seconds"),
        ("started_seconds =", "it has to be seconds"),
        ("veto = true", "it has to be yes or no"),
        ("socket = agent.sock", "it has to be an absolute path"),
        ("socket = /" + "x" * 107, "it has to be an absolute path"),
        ("colour = red", "there is no setting colour"),
        ("[hook]", "there is no setting [hook]"),
    ],
)
def test_bad_setting_is_ignored_and_logged(hook: Hook, agent: Agent, line: str, why: str) -> None:
    hook.configure(line)
    assert why in hook("web", "started", "begin", "-")
    assert len(agent.told) == 1


def test_settings_file_that_is_none_is_logged(hook: Hook) -> None:
    (hook.folder / "hook.conf").unlink()
    (hook.folder / "hook.conf").mkdir()
    settings, complaints = libvirt_hook.read_settings(str(hook.folder / "hook.conf"))
    assert (vars(settings), len(complaints)) == (vars(libvirt_hook.Settings()), 1)
    hook("web", "started", "begin", "-")


def test_settings_are_read_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "hook.conf"
    file.write_text(
        "# a remark = 1\n; another\n\n socket=/a b \nverdict_seconds = 7\nstarted_seconds= .5\nveto = yes\nlog = /l\n"
    )
    settings, complaints = libvirt_hook.read_settings(str(file))
    assert complaints == []
    assert vars(settings) == {
        "socket": "/a b",
        "verdict_seconds": 7.0,
        "started_seconds": 0.5,
        "veto": True,
        "log": "/l",
    }


def test_sample_shows_every_setting_with_its_default(tmp_path: Path) -> None:
    sample = Path(__file__).parents[3] / "etc" / "sami" / "libvirt-hook.conf.sample"
    shown = [line[1:] for line in sample.read_text().splitlines() if re.match(r"#\w+ = ", line)]
    (tmp_path / "hook.conf").write_text("\n".join(shown))
    settings, complaints = libvirt_hook.read_settings(str(tmp_path / "hook.conf"))
    assert (complaints, vars(settings)) == ([], vars(libvirt_hook.Settings()))
    assert [line.split(" = ")[0] for line in shown] == list(vars(settings))


# --- Python itself fails


@pytest.mark.parametrize("hook", ["its own interpreter"], indirect=True)
@pytest.mark.parametrize("python", ["/no/such/python3", "/bin/false", "/etc/passwd", "sh -c 'kill -9 $$'"])
def test_python_that_is_missing_or_fails_stops_nobody(hook: Hook, python: str) -> None:
    text = hook.file.read_text()
    assert text.count("\n/usr/bin/python3 ") == 1
    hook.file.write_text(text.replace("\n/usr/bin/python3 ", f"\n{python} "))
    done = subprocess.run(
        [str(hook.file), "web", "migrate", "begin", "-"], input=DOMAIN.encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("hook", ["its own interpreter"], indirect=True)
def test_file_that_is_cut_short_stops_nobody(hook: Hook) -> None:
    text = hook.file.read_text()
    hook.file.write_text(text[: len(text) // 2] + "\n(")
    done = subprocess.run([str(hook.file), "web", "migrate", "begin", "-"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


# --- what it costs

MOST_MILLISECONDS = 50.0
MOST_RATIO = 3


def milliseconds(command: list[str], environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment)
    return (time.perf_counter() - begin) * 1000


def test_it_costs_little_more_than_python_s_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 30 runs each, in turns: what counts on a busy machine is the ratio to what Python alone takes there."""
    file, settings, agent = tmp_path / "50-sami", tmp_path / "hook.conf", Agent(tmp_path / "agent.sock")
    shutil.copyfile(libvirt_hook.__file__, file)
    file.chmod(0o755)
    settings.write_text(f"socket = {tmp_path}/agent.sock\nlog = {tmp_path}/syslog\n")
    xml = tmp_path / "domain.xml"
    xml.write_text(DOMAIN + "\n" + "    <disk type='file' device='disk'/>\n" * 200)
    environment = {"LC_ALL": "C", "PATH": "/usr/bin:/bin", "SAMI_LIBVIRT_HOOK_CONF": str(settings)}
    commands = {
        "python3 -IS -c pass": [PYTHON, "-IS", "-c", "pass"],
        "started": ["/bin/sh", "-c", f"exec {file} web started begin - <{xml}"],
        "prepare": [str(file), "web", "prepare", "begin", "-"],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(30):
        for name, command in commands.items():
            took[name].append(milliseconds(command, environment))
    median = {name: statistics.median(values) for name, values in took.items()}
    agent.stop()
    assert agent.told
    floor = median["python3 -IS -c pass"]
    with capsys.disabled():
        sys.stdout.write("\nmedian of 30: " + ", ".join(f"{name} {value:.1f} ms" for name, value in median.items()))
        sys.stdout.write(f"; the hook is {median['started'] / floor:.2f} times Python's start\n")
    assert median["started"] <= max(MOST_MILLISECONDS, MOST_RATIO * floor)
    assert median["prepare"] < floor  # no Python at all


def test_it_is_of_python_3_9() -> None:
    ast.parse(Path(libvirt_hook.__file__).read_text(), feature_version=(3, 9))
