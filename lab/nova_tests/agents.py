"""What the driver may meet at its socket: an agent, one that is deaf, nobody."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sami_plugin.hooks.local_socket import LocalSocket, Said, guest_of, text_of


@dataclass(frozen=True, slots=True)
class Announcement:
    """What an agent was told, and when: seconds of CLOCK_MONOTONIC."""

    at: float
    guest: str
    source: str
    destination: str
    request_id: str


@contextlib.contextmanager
def answering(path: Path) -> Iterator[list[Announcement]]:
    """The agent's own socket, and behind it nothing but the list of what came."""
    heard: list[Announcement] = []

    def announce(said: Said) -> None:
        request = text_of(said, "request_id") if said.get("request_id") else ""
        heard.append(
            Announcement(
                time.monotonic(), guest_of(said), text_of(said, "source"), text_of(said, "destination"), request
            )
        )

    agent = LocalSocket(path, lambda event: None, requests={"announce": announce})
    agent.start()
    try:
        yield heard
    finally:
        agent.stop()


@contextlib.contextmanager
def deaf(path: Path) -> Iterator[list[Announcement]]:
    """Takes every connection and never says a word."""
    taken = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        try:
            yield []
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()


@contextlib.contextmanager
def nobody(path: Path) -> Iterator[list[Announcement]]:
    """There is no socket at all."""
    yield []
