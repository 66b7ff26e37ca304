"""What needs no PCP server: its files, its clock, and answers that are none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import netaddr
import pytest

from sami_plugin.drivers.pcp import leases
from sami_plugin.drivers.pcp.leases import Lease
from sami_plugin.drivers.pcp.messages import Clock, External, Internal, ResultCode, Server
from sami_plugin.errors import DeviceFailed

GUEST, OUTER = netaddr.IPAddress("192.0.2.10"), netaddr.IPAddress("203.0.113.1")
MAPPING, NONCE, PLACE = Internal(6, GUEST, 80), b"twelve octet", External(OUTER, 8080)

LEASES = """TCP:8080:192.0.2.10:80:1795763997:PCP MAP {nonce}
UDP:8081:192.0.2.10:80:0:a game: of mine
UDP;2001:db8::10;80;(null);0;3;1795763998;PCP MAP {nonce}

*UNKNOWN*:8083:192.0.2.10:81:1795763997:PCP MAP {nonce}
TCP:8080:192.0.2.10:0:1795763997:PCP MAP {nonce}
TCP:80800:192.0.2.10:80:1795763997:PCP MAP {nonce}
TCP:8080:192.0.2.300:80:1795763997:PCP MAP {nonce}
TCP:8080:192.0.2.10:80:PCP MAP {nonce}
TCP:8080:192.0.2.10:80:99999999999999:PCP MAP {nonce}
TCP;2001:db8::1::10;80;(null);0;3;1795763998;PCP MAP {nonce}
\xff\xfe
"""


def test_lines_of_lease_files_are_read_and_what_is_unclear_is_counted(tmp_path: Path) -> None:
    words = "".join(f"{word:08x}" for word in struct.unpack("=3I", NONCE))
    (tmp_path / "leases").write_bytes(LEASES.format(nonce=words).encode("latin-1"))
    found, unknown = leases.read([str(tmp_path / "leases")])
    assert found == [
        Lease(MAPPING, 8080, 1795763997, NONCE),
        Lease(Internal(17, GUEST, 80), 8081, 0, None),
        Lease(Internal(17, netaddr.IPAddress("2001:db8::10"), 80), 80, 1795763998, NONCE),
    ]
    assert unknown == 8


def test_file_that_is_not_there_has_no_mappings_and_a_folder_is_told(tmp_path: Path) -> None:
    assert leases.read([str(tmp_path / "none")]) == ([], 0)
    with pytest.raises(DeviceFailed, match=r"\[pcp\] lease_files: .* cannot be read: Is a directory"):
        leases.read([str(tmp_path)])


@pytest.mark.parametrize(
    ("before", "after", "seconds", "is_anew"),
    [
        (100, 110, 10, False),
        (100, 99, 0, False),  # answers that overtook each other
        (100, 98, 0, True),
        (100, 3, 10, True),
        (100, 1100, 1060, False),  # a clock that runs by a sixteenth too slow
        (100, 1100, 1070, True),
        (100, 1100, 930, True),
    ],
)
def test_epoch_that_does_not_fit_tells_that_a_server_began_anew(
    before: int, after: int, seconds: float, is_anew: bool
) -> None:
    clock = Clock()
    assert not clock.has_begun_anew(before, 5.0)
    assert clock.has_begun_anew(after, 5.0 + seconds) is is_anew


# -------------------------------------------------------------------------------------------------------- what answers


class Wire:
    """In the place of a socket: what was sent, and what comes."""

    def __init__(self, answers: Callable[[bytes], list[bytes]]) -> None:
        self.sent: list[bytes] = []
        self._answers, self._coming = answers, []  # type: ignore[var-annotated]

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return ("192.0.2.1", 40000)

    def settimeout(self, seconds: float) -> None:
        pass

    def send(self, octets: bytes) -> None:
        self.sent.append(octets)
        self._coming = self._answers(octets)

    def recv(self, most: int) -> bytes:
        if not self._coming:
            raise TimeoutError
        return self._coming.pop(0)


def server_of(answers: Callable[[bytes], list[bytes]], monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Wire]:
    wire = Wire(answers)
    monkeypatch.setattr(Server, "_connected", lambda self: wire)
    return Server("192.0.2.254", None), wire


def answer_to(request: bytes, result: int = 0, seconds: int = 600, version: int = 2) -> bytes:
    """As RFC 6887, section 7.2, has it."""
    return struct.pack("!BBxBLL12x", version, request[1] | 0x80, result, seconds, 77) + request[24:]


def test_request_for_a_mapping_is_as_rfc_6887_says(monkeypatch: pytest.MonkeyPatch) -> None:
    server, wire = server_of(lambda request: [answer_to(request)], monkeypatch)
    answer = server.map(MAPPING, NONCE, PLACE, 600)
    assert (answer.result, answer.seconds, answer.epoch, answer.external) == (0, 600, 77, PLACE)
    mapped = "00000000000000000000ffff"
    assert wire.sent == [
        bytes.fromhex(f"02 01 0000 00000258 {mapped}c0000201")
        + NONCE
        + bytes.fromhex(f"06 000000 0050 1f90 {mapped}cb007101")
        + bytes.fromhex(f"01 00 0010 {mapped}c000020a")
        + bytes.fromhex("02 00 0000")
    ]
    server.unmap(MAPPING, NONCE)
    assert wire.sent[1] == (
        bytes.fromhex(f"02 01 0000 00000000 {mapped}c0000201")
        + NONCE
        + bytes.fromhex(f"06 000000 0050 0000 {mapped}00000000")
        + bytes.fromhex(f"01 00 0010 {mapped}c000020a")
    )


def test_request_that_is_lost_is_sent_again_and_what_is_no_answer_to_it_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(request: bytes) -> list[bytes]:
        if len(wire.sent) < 2:
            return []
        other = answer_to(request[:24] + bytes(12) + request[36:])
        return [b"", b"\2", request, other, answer_to(request)[:59], answer_to(request)]

    server, wire = server_of(answers, monkeypatch)
    assert server.map(MAPPING, NONCE, PLACE, 600).external == PLACE
    assert len(wire.sent) == 2


def test_refusal_need_not_repeat_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ResultCode.NOT_AUTHORIZED
    server, _ = server_of(lambda request: [answer_to(request, refused)[:24]], monkeypatch)
    answer = server.map(MAPPING, NONCE, PLACE, 600)
    assert (answer.result, answer.external) == (refused, None)


def test_other_protocol_and_silence_are_told_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = server_of(lambda request: [answer_to(request, 1, version=0)], monkeypatch)
    with pytest.raises(DeviceFailed, match="speaks no PCP 2; correct"):
        server.announce()
    server, wire = server_of(lambda request: [], monkeypatch)
    with pytest.raises(DeviceFailed, match=r"no PCP server answers at 192.0.2.254 port 5351 \(not in 1.5 s\)"):
        server.announce()
    assert len(wire.sent) == 2
    with pytest.raises(DeviceFailed, match="not a moment ago"):
        server.unmap(MAPPING, NONCE)
    assert len(wire.sent) == 2, "a session waits for it again"


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ("00 80 0003 00000001 00000000", "does not tell its outer IPv4 address"),
        ("00 80 0000 00000001 00000000", "does not tell its outer IPv4 address"),
        ("02 80 0001 00000000", "speaks no NAT-PMP"),
    ],
)
def test_server_without_an_outer_address_is_told(told: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, wire = server_of(lambda request: [bytes.fromhex(told)], monkeypatch)
    with pytest.raises(DeviceFailed, match=complaint):
        server.external_address()
    assert wire.sent == [bytes(2)]
