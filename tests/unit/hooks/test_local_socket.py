"""What a hook may say to the agent, and what the agent answers to anything else."""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import socket
import socketserver
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.deadline import wait_until
from sami_plugin.errors import ConfigurationError, OperatorError, Veto
from sami_plugin.hooks import local_socket
from sami_plugin.hooks.local_socket import (
    MOST_OCTETS,
    MOST_OCTETS_WITH_DOMAIN,
    LocalSocket,
    ask,
    guest_of,
    parse,
    send,
    text_of,
)
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.settings import Bounds

GUEST = "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4"


def said(**fields: object) -> bytes:
    return json.dumps({"guest": GUEST, "phase": "prepare", **fields}).encode()


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_is_understood(phase: Phase) -> None:
    assert parse(said(phase=phase.value)) == MigrationEvent(GUEST, phase)


def test_hosts_and_what_is_unknown() -> None:
    event = parse(said(source="host-a", destination="host-b", since="version 9"))
    assert event == MigrationEvent(GUEST, Phase.PREPARE, "host-a", "host-b")


@pytest.mark.parametrize("role", ["source", "destination"])
def test_role_and_domain(role: str) -> None:
    domain = "<domain>\n<name>wéb</name></domain>" * 20_000
    event = parse(said(role=role, domain=domain))
    assert event == MigrationEvent(GUEST, Phase.PREPARE, role=role, domain=domain)
    assert "domain>" not in repr(event)  # it can hold passwords


def test_longest_line_of_an_event() -> None:
    spare = MOST_OCTETS_WITH_DOMAIN - len(said(domain=""))
    assert parse(said(domain="a" * spare)).domain == "a" * spare
    with pytest.raises(OperatorError, match="longer than"):
        parse(said(domain="a" * (spare + 1)))


@pytest.mark.parametrize("guest", [GUEST.upper(), GUEST.replace("-", ""), "{" + GUEST + "}"])
def test_guest_is_one_name_however_it_is_written(guest: str) -> None:
    assert parse(said(guest=guest)).guest == GUEST


BAD = [
    (b"", "not an event"),
    (b"\n", "not an event"),
    (b"prepare\n", "not an event"),
    (b"{", "not an event"),
    (b'"text"', "not an event: an event is a JSON object"),
    (b"[1]", "not an event: an event is a JSON object"),
    (b"null", "not an event: an event is a JSON object"),
    (b"\xff\xfe", "not an event"),
    (b"[" * 4000, "not an event"),
    (b"{}", "guest: has to be"),
    (said(guest=None), "guest: has to be"),
    (said(guest=7), "guest: has to be"),
    (said(guest=["a"]), "guest: has to be"),
    (said(guest="web"), "guest: has to be"),
    (said(guest=GUEST + "0"), "guest: has to be"),
    (said(phase=None), "phase: None is none of outgoing, prepare"),
    (said(phase="prepar"), "phase: 'prepar' is none of outgoing, prepare"),
    (said(phase=["prepare"]), r"phase: \['prepare'\] is none of"),
    (said(phase="x" * 3000), "phase: 'xxx"),
    (said(source=""), "source: has to be"),
    (said(source=7), "source: has to be"),
    (said(source="a\nb"), "source: has to be"),
    (said(source="a" * 256), "source: has to be"),
    (said(destination={"name": "b"}), "destination: has to be"),
    (said(role="guest"), "role: 'guest' is none of source, destination"),
    (said(role=["source"]), r"role: \['source'\] is none of"),
    (said(role=""), "role: '' is none of"),
    (said(domain=""), "domain: has to be"),
    (said(domain=7), "domain: has to be"),
    (said(domain={"name": "web"}), "domain: has to be"),
    (said(domain="<domain>\ud800</domain>"), "domain: has to be"),
    (said(note="a" * MOST_OCTETS), "not an event: longer than 4096 octets without a domain"),
    (said(domain="a" * MOST_OCTETS_WITH_DOMAIN), "not an event: longer than 1048576 octets"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=range(len(BAD)))
def test_bad_line_is_refused_by_field(line: bytes, words: str) -> None:
    with pytest.raises(OperatorError, match=f"^{words}") as caught:
        parse(line)
    assert len(str(caught.value)) < 300


@pytest.fixture
def told() -> list[MigrationEvent]:
    return []


@pytest.fixture
def path(tmp_path: Path, told: list[MigrationEvent]) -> Iterator[Path]:
    def tell(event: MigrationEvent) -> None:
        if event.phase is Phase.STOPPED:
            raise OperatorError("source: has to be told")
        if event.phase is Phase.SUSPENDED:
            raise Veto("no flows, no move")
        if event.phase is Phase.RESUMED:
            raise ZeroDivisionError
        told.append(event)

    listening = LocalSocket(tmp_path / "run" / "agent.sock", tell)
    listening.start()
    yield tmp_path / "run" / "agent.sock"
    listening.stop()


def answers(path: Path, octets: bytes, *, ends: bool = False) -> list[dict[str, str]]:
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(10)
        line.connect(str(path))
        line.sendall(octets)
        if ends:
            line.shutdown(socket.SHUT_WR)
        file = line.makefile()
        return [json.loads(file.readline()) for _ in range(octets.count(b"\n") or 1)]


def test_events_of_one_connection_are_answered_in_order(path: Path, told: list[MigrationEvent]) -> None:
    lines = said() + b"\nnonsense\n" + said(phase="stopped") + b"\n" + said(phase="started") + b"\n"
    first, second, third, last = answers(path, lines)
    assert (first, last) == ({"answer": "ok"}, {"answer": "ok"})
    assert second["answer"] == third["answer"] == "error"
    assert second["reason"].startswith("not an event")
    assert third["reason"] == "source: has to be told"
    assert [event.phase for event in told] == [Phase.PREPARE, Phase.STARTED]


def test_line_without_end_is_an_event_when_the_connection_ends(path: Path, told: list[MigrationEvent]) -> None:
    assert answers(path, said(), ends=True) == [{"answer": "ok"}]
    assert len(told) == 1


def test_line_that_is_too_long_is_refused_and_the_connection_ends(path: Path, told: list[MigrationEvent]) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(10)
        line.connect(str(path))
        line.sendall(said(domain="a" * MOST_OCTETS_WITH_DOMAIN)[: MOST_OCTETS_WITH_DOMAIN + 1])
        file = line.makefile()
        assert "longer than" in json.loads(file.readline())["reason"]
        assert file.readline() == ""
    assert answers(path, said() + b"\n") == [{"answer": "ok"}]
    assert len(told) == 1


def test_only_the_agent_s_user_may_speak(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_send_tells_and_raises_what_was_answered(path: Path, told: list[MigrationEvent]) -> None:
    send(path, MigrationEvent(GUEST, Phase.PREPARE, "host-a", "host-b"))
    assert told == [MigrationEvent(GUEST, Phase.PREPARE, "host-a", "host-b")]
    with pytest.raises(OperatorError, match="source: has to be told"):
        send(path, MigrationEvent(GUEST, Phase.STOPPED))


def test_send_says_that_no_agent_listens(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="is sami-agent running"):
        send(tmp_path / "agent.sock", MigrationEvent(GUEST, Phase.PREPARE))


def test_second_agent_does_not_take_the_socket(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another agent listens there"):
        LocalSocket(path, lambda event: None)
    assert answers(path, said() + b"\n") == [{"answer": "ok"}]


def test_socket_that_a_killed_agent_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    listening = LocalSocket(path, lambda event: None)
    listening.start()
    assert answers(path, said() + b"\n") == [{"answer": "ok"}]
    listening.stop()
    assert not path.exists()


def test_path_that_cannot_be_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "agent.sock", tmp_path / ("long" * 50)):
        with pytest.raises(ConfigurationError, match=str(path)):
            LocalSocket(path, lambda event: None)


def test_veto_is_answered_and_raised(path: Path) -> None:
    assert answers(path, said(phase="suspended") + b"\n") == [{"answer": "veto", "reason": "no flows, no move"}]
    with pytest.raises(Veto, match="no flows, no move"):
        send(path, MigrationEvent(GUEST, Phase.SUSPENDED))


def test_send_tells_role_and_domain(path: Path, told: list[MigrationEvent]) -> None:
    event = MigrationEvent(GUEST, Phase.STARTED, role="destination", domain="<domain/>" * 50_000)
    send(path, event)
    assert told == [event]


def test_error_that_nobody_foresaw_ends_its_connection_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OperatorError, match="no answer"):
        send(path, MigrationEvent(GUEST, Phase.RESUMED))
    assert "ZeroDivisionError" in caplog.text
    send(path, MigrationEvent(GUEST, Phase.STARTED))


@contextlib.contextmanager
def listening(path: Path, tell: local_socket.Tell, **options: Any) -> Iterator[None]:
    made = LocalSocket(path, tell, **options)
    made.start()
    try:
        yield
    finally:
        made.stop()


def is_ended(line: socket.socket) -> bool:
    line.settimeout(5)
    return line.recv(100) == b""


def test_client_that_says_nothing_or_little_is_let_go(tmp_path: Path) -> None:
    told: list[MigrationEvent] = []
    path = tmp_path / "agent.sock"
    with (
        listening(path, told.append, bounds=Bounds(hook_seconds=0.3)),
        socket.socket(socket.AF_UNIX) as silent,
        socket.socket(socket.AF_UNIX) as slow,
    ):
        silent.connect(str(path))
        slow.connect(str(path))
        begin = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # once it is let go
            for octet in said() * 10:
                slow.send(bytes([octet]))
                time.sleep(0.02)
        assert 0.25 < time.monotonic() - begin < 2
        assert is_ended(silent)
    assert told == []


def test_event_may_take_longer_to_handle_than_to_say(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with listening(path, lambda event: time.sleep(0.5), bounds=Bounds(hook_seconds=0.2)):
        assert answers(path, said() + b"\n") == [{"answer": "ok"}]


def test_connections_are_bounded_and_the_one_too_many_is_told(path: Path, told: list[MigrationEvent]) -> None:
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(Bounds().hooks)]
        for line in lines:
            line.settimeout(10)
            line.connect(str(path))
        surplus = stack.enter_context(socket.socket(socket.AF_UNIX))
        surplus.settimeout(10)
        surplus.connect(str(path))
        assert json.loads(surplus.makefile().readline()) == {"answer": "error", "reason": "too many hooks at a time"}
        lines[-1].sendall(said() + b"\n")
        assert json.loads(lines[-1].makefile().readline()) == {"answer": "ok"}
    deadline = time.monotonic() + 10
    while True:  # until the threads have seen that their clients are gone
        with contextlib.suppress(OperatorError):
            send(path, MigrationEvent(GUEST, Phase.STARTED))
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(told) == 2


def test_caller_for_whom_there_is_no_descriptor_waits_and_costs_no_processor(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def refuse(_: object) -> None:
        tries.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short, socket.socket(socket.AF_UNIX) as line:
        short.setattr(socketserver.TCPServer, "get_request", refuse)
        line.settimeout(10)
        line.connect(str(path))
        line.sendall(said() + b"\n")
        wait_until(lambda: len(tries) > 3, "some tries")
        short.undo()
        assert json.loads(line.makefile().readline()) == {"answer": "ok"}
    assert tries[3] - tries[0] >= 0.3


def test_socket_s_mode_and_group_are_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    group = os.getgid()
    for name in (str(group), grp.getgrgid(group).gr_name):
        listening = LocalSocket(path, lambda event: None, mode=0o660, group=name)
        listening.start()
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group)
        listening.stop()


def test_group_that_is_none_is_refused_by_name_and_leaves_no_socket(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="socket_group: there is no group 'nobody-here'"):
        LocalSocket(tmp_path / "agent.sock", lambda event: None, group="nobody-here")
    assert list(tmp_path.iterdir()) == []


def test_user_who_is_not_among_those_who_may_is_refused_counted_and_nothing_is_told(tmp_path: Path) -> None:
    told: list[MigrationEvent] = []
    refused: list[tuple[str, str]] = []
    path = tmp_path / "agent.sock"
    other = str(os.geteuid() + 4711)
    with listening(path, told.append, users=[other], refused=lambda who, error: refused.append((who, str(error)))):
        send(path, MigrationEvent(GUEST, Phase.STARTED))  # the agent's own user always may
    assert len(told) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_socket, "_user_of", lambda connection: 12345)
        with (
            listening(path, told.append, users=[other], refused=lambda who, error: refused.append((who, str(error)))),
            socket.socket(socket.AF_UNIX) as line,
        ):
            line.connect(str(path))  # without a word: it is not to keep a place
            line.settimeout(5)
            assert b"only socket_users may tell" in line.recv(1000)
            assert line.recv(1000) == b""
    assert len(told) == 1
    assert refused == [("user 12345 of this host", "only socket_users may tell of migrations")]


def test_user_that_is_none_is_refused_by_name_and_leaves_no_socket(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="socket_users: there is no user 'nobody-here'"):
        LocalSocket(tmp_path / "agent.sock", lambda event: None, users=["nobody-here"])
    assert list(tmp_path.iterdir()) == []


# requests


class Asked:
    """Answers requests, and keeps what was said with them."""

    def __init__(self) -> None:
        self.said: list[dict[str, object]] = []

    def requests(self) -> dict[str, Any]:
        return {"check": self.check, "approve": self.approve, "break": self.break_, "refuse": self.refuse}

    def check(self, said: local_socket.Said) -> dict[str, object]:
        self.said.append({"guest": guest_of(said), "to": text_of(said, "to")})
        return {"verdict": "veto", "flows": 6}

    def approve(self, said: local_socket.Said) -> None:
        self.said.append({"session": text_of(said, "session")})

    def refuse(self, said: local_socket.Said) -> None:
        raise Veto("nobody may")

    def break_(self, said: local_socket.Said) -> None:
        raise ZeroDivisionError


@contextlib.contextmanager
def asking(path: Path, **options: Any) -> Iterator[Asked]:
    asked = Asked()
    with listening(path, lambda event: None, requests=asked.requests(), **options):
        yield asked


def request(name: object, **fields: object) -> bytes:
    return json.dumps({"request": name, **fields}).encode() + b"\n"


def test_request_is_answered_with_what_it_found_and_events_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with asking(path) as asked:
        check = request("check", guest=GUEST.upper(), to="host-b")
        assert answers(path, said() + b"\n" + check + request("approve", session="01f3")) == [
            {"answer": "ok"},
            {"answer": "ok", "verdict": "veto", "flows": 6},
            {"answer": "ok"},
        ]
        assert asked.said == [{"guest": GUEST, "to": "host-b"}, {"session": "01f3"}]
        assert ask(path, {"request": "check", "guest": GUEST, "to": "host-b"})["flows"] == 6


BAD_REQUESTS = [
    (request("chek"), "request: 'chek' is none of check, approve"),
    (request(None), "request: None is none of check"),
    (request(["check"]), "request: ['check'] is none of check"),
    (request({"check": 1}), "request: {'check': 1} is none of check"),
    (request("x" * 3000), "request: 'xxx"),
    (request("check", to="host-b"), "guest: has to be the guest's UUID"),
    (request("check", guest="web", to="host-b"), "guest: has to be the guest's UUID"),
    (request("check", guest=7, to="host-b"), "guest: has to be the guest's UUID"),
    (request("check", guest=GUEST), "to: has to be a name"),
    (request("check", guest=GUEST, to=""), "to: has to be a name"),
    (request("check", guest=GUEST, to=7), "to: has to be a name"),
    (request("check", guest=GUEST, to="a\nb"), "to: has to be a name"),
    (request("check", guest=GUEST, to="a" * 256), "to: has to be a name"),
    (request("approve"), "session: has to be a name"),
    (request("approve", session=None), "session: has to be a name"),
    (request("approve", session=["01f3"]), "session: has to be a name"),
    (request("approve", session=""), "session: has to be a name"),
    (request("approve", session="0" * 5000), "not an event: longer than 4096 octets without a domain"),
]


def test_bad_request_is_refused_by_field_counted_and_does_nothing(tmp_path: Path) -> None:
    refused: list[str] = []
    path = tmp_path / "agent.sock"
    with asking(path, refused=lambda who, error: refused.append(str(error))) as asked:
        found = answers(path, b"".join(line for line, _ in BAD_REQUESTS))
    assert asked.said == []
    assert refused == [answer["reason"] for answer in found]
    for answer, (_, words) in zip(found, BAD_REQUESTS, strict=True):
        assert answer["answer"] == "error"
        assert answer["reason"].startswith(words)
        assert len(answer["reason"]) < 300


def test_socket_without_requests_answers_none(path: Path) -> None:
    (found,) = answers(path, request("check", guest=GUEST, to="host-b"))
    assert found["answer"] == "error"
    assert found["reason"].startswith("request: 'check' is none of")


def test_request_that_fails_as_nobody_foresaw_ends_its_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "agent.sock"
    with asking(path) as asked:
        with pytest.raises(OperatorError, match="no answer"):
            ask(path, {"request": "break"})
        assert "ZeroDivisionError" in caplog.text
        ask(path, {"request": "approve", "session": "01f3"})
        assert len(asked.said) == 1


def test_request_that_is_vetoed_raises_it(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with asking(path), pytest.raises(Veto, match="nobody may"):
        ask(path, {"request": "refuse"})


def test_nobody_asks_but_those_who_may_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_socket, "_user_of", lambda connection: 12345)
    path = tmp_path / "agent.sock"
    question = {"request": "approve", "session": "01f3"}
    with asking(path, users=[str(os.geteuid() + 4711)]) as asked:
        with pytest.raises(OperatorError, match=r"only socket_users may|is sami-agent running"):
            ask(path, question)
        assert asked.said == []
    with asking(path, users=["12345"]) as asked:
        ask(path, question)
        assert len(asked.said) == 1
