"""sami check, and sami session approve and refuse: what is asked of the agent, and what is made of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sami_plugin.errors import OperatorError, PeerUnreachable
from sami_plugin.hooks.local_socket import LocalSocket, Said
from tests.unit.cli.command_line import CommandLine

GUEST, SESSION = "6ac30000-0000-4000-8000-000000000001", "01f30000-0000-4000-8000-000000000009"
NO_PLACE = "there was no free place for it"
ANSWER: dict[str, object] = {
    "guest": GUEST,
    "source": "host-a",
    "destination": "host-b",
    "verdict": "veto",
    "flows": 6,
    "carried": 4,
    "kinds": {"tcp-ipv4": 5, "udp-ipv6": 1},
    "losses": {NO_PLACE: 2},
    "not_carried": ["icmp 192.0.2.7 > 198.51.100.1", "udp 192.0.2.7:53 > 198.51.100.1:53"],
}
DECISIONS = ("approve", "refuse")

Answer = Callable[[Said], dict[str, object] | None]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "agent.conf"
    path.write_text(f"[agent]\nhost = host-a\nsocket = {tmp_path}/agent.sock\n")
    return path


@contextmanager
def agent(conf: Path, answer: Answer) -> Iterator[list[Said]]:
    """One that says `answer` to every request; what it was asked."""
    asked: list[Said] = []

    def answered(said: Said) -> dict[str, object] | None:
        asked.append(dict(said))
        return answer(said)

    requests = dict.fromkeys(("check", *DECISIONS), answered)
    listening = LocalSocket(conf.parent / "agent.sock", lambda event: None, requests=requests)
    listening.start()
    try:
        yield asked
    finally:
        listening.stop()


def check(sami: CommandLine, conf: Path, *more: str, guest: str = GUEST) -> int:
    return sami("check", guest, "--to", "host-b", "--config-file", conf, *more)


def test_check_shows_what_the_agent_says_as_json(sami: CommandLine, conf: Path) -> None:
    with agent(conf, lambda said: ANSWER) as asked:
        assert check(sami, conf, "-f", "json", guest=GUEST.upper()) == 1
    assert json.loads(sami.out) == ANSWER
    assert asked == [{"request": "check", "guest": GUEST, "to": "host-b"}]
    assert sami.err == ""


def test_check_is_a_table_with_one_count_and_one_flow_a_line(sami: CommandLine, conf: Path) -> None:
    with agent(conf, lambda said: ANSWER):
        check(sami, conf)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in sami.out.splitlines() if line[0] == "|"]
    assert rows == [
        ["Field", "Value"],
        ["guest", GUEST],
        ["source", "host-a"],
        ["destination", "host-b"],
        ["verdict", "veto"],
        ["flows", "6"],
        ["carried", "4"],
        ["kinds", "5 tcp-ipv4"],
        ["", "1 udp-ipv6"],
        ["losses", f"2 {NO_PLACE}"],
        ["not_carried", "icmp 192.0.2.7 > 198.51.100.1"],
        ["", "udp 192.0.2.7:53 > 198.51.100.1:53"],
    ]


@pytest.mark.parametrize(("verdict", "code"), [("proceed", 0), ("veto", 1), ("ask", 1)])
def test_check_ends_with_0_only_where_the_guest_may_come_without_anybody_s_word(
    sami: CommandLine, conf: Path, verdict: str, code: int
) -> None:
    with agent(conf, lambda said: {**ANSWER, "verdict": verdict}):
        assert check(sami, conf, "-f", "value", "-c", "verdict") == code
    assert sami.out.strip() == verdict


def test_check_of_what_is_no_uuid_asks_nobody(sami: CommandLine, conf: Path) -> None:
    with agent(conf, lambda said: ANSWER) as asked:
        assert check(sami, conf, guest="web") == 1
    assert sami.err == "sami: 'web' is no guest's UUID\n"
    assert (asked, sami.out) == ([], "")


def test_check_without_a_host_is_wrong_usage(sami: CommandLine, conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sami("check", GUEST, "--config-file", conf)
    assert ended.value.code == 2
    assert "--to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OperatorError("guest: host-a knows no port of it; is the guest here?"),
        PeerUnreachable("host-b has not answered within 30 s; is its agent running?"),
    ],
)
def test_agent_s_error_is_one_line_and_the_code_is_1(sami: CommandLine, conf: Path, error: Exception) -> None:
    def fail(said: Said) -> None:
        raise error

    with agent(conf, fail):
        for arguments in (("check", GUEST, "--to", "host-b"), *(("session", one, SESSION) for one in DECISIONS)):
            assert sami(*arguments, "--config-file", conf) == 1
            assert sami.err == f"sami: socket {conf.parent}/agent.sock: {error}\n"
            assert sami.out == ""


def test_without_an_agent_each_says_so_in_one_line(sami: CommandLine, conf: Path) -> None:
    for arguments in (("check", GUEST, "--to", "host-b"), *(("session", one, SESSION) for one in DECISIONS)):
        assert sami(*arguments, "--config-file", conf) == 1
        assert sami.err.startswith(f"sami: socket {conf.parent}/agent.sock: ")
        assert sami.err.endswith("is sami-agent running?\n")
        assert sami.err.count("\n") == 1


@pytest.mark.parametrize("said", DECISIONS)
def test_operator_s_word_reaches_the_agent_and_nothing_is_written(sami: CommandLine, conf: Path, said: str) -> None:
    with agent(conf, lambda said: None) as asked:
        for session in (SESSION, SESSION[:4], GUEST):
            assert sami("session", said, session, "--config-file", conf) == 0
            assert (sami.out, sami.err) == ("", "")
    assert asked == [{"request": said, "session": session} for session in (SESSION, SESSION[:4], GUEST)]


@pytest.mark.parametrize("said", DECISIONS)
def test_operator_s_word_about_no_session_is_wrong_usage(
    sami: CommandLine, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sami("session", said)
    assert ended.value.code == 2
    assert "SESSION" in capsys.readouterr().err
