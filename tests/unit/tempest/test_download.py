"""The peer's end of a download, by real sockets."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tempest_tests.scenario.download import Download


@pytest.fixture
def download() -> Iterator[Download]:
    with Download(socket.AF_INET) as made:
        yield made


def connected(download: Download) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", download.port))
    download.accept()
    return made


def test_what_gets_through_is_seen_at_once(download: Download) -> None:
    with connected(download):
        assert download.silence(5.0) < 1.0


def test_connection_that_is_gone_is_silent_for_as_long_as_one_looks(download: Download) -> None:
    with connected(download) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert download.silence(0.5) > 0.5


def test_peer_that_takes_nothing_more_is_not_taken_for_one_that_does(download: Download) -> None:
    with connected(download) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        assert download._connection is not None
        download._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        end = time.monotonic() + 20
        while download.silence(0.3) <= 0.3:
            assert time.monotonic() < end, "nothing fills up"
        assert download.silence(0.3) > 0.3


def test_nobody_who_connects_is_waited_for_so_long(download: Download) -> None:
    download._listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        download.accept()
