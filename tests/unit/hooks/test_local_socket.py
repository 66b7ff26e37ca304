"""What a hook may say to the agent, and what the agent answers to anything else."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sami_plugin.errors import ConfigurationError, OperatorError
from sami_plugin.hooks.local_socket import MOST_OCTETS, LocalSocket, parse, send
from sami_plugin.model.migration import MigrationEvent, Phase

GUEST = "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4"


def said(**fields: object) -> bytes:
    return json.dumps({"guest": GUEST, "phase": "prepare", **fields}).encode()


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_is_understood(phase: Phase) -> None:
    assert parse(said(phase=phase.value)) == MigrationEvent(GUEST, phase)


def test_hosts_and_what_is_unknown() -> None:
    event = parse(said(source="host-a", destination="host-b", since="version 9"))
    assert event == MigrationEvent(GUEST, Phase.PREPARE, "host-a", "host-b")


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
        line.sendall(said(source="a" * MOST_OCTETS)[: MOST_OCTETS + 1])
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
