"""A connection that a server began and on which only its peer speaks: no rule admits it but the state of a firewall."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from types import TracebackType

ACCEPT_SECONDS = 30.0
PIECE_SECONDS = 0.1
PIECE = b"." * 1000


class Download:
    """The peer's end. A context manager; after `accept` it speaks until the end."""

    def __init__(self, family: socket.AddressFamily) -> None:
        self._listener = socket.create_server(("", 0), family=family)
        self._listener.settimeout(ACCEPT_SECONDS)
        self._connection: socket.socket | None = None
        self._said = 0
        self._is_over = threading.Event()
        self._speaker = threading.Thread(target=self._speak, daemon=True)

    @property
    def port(self) -> int:
        """Where the server is to connect to."""
        return int(self._listener.getsockname()[1])

    def accept(self) -> None:
        """Blocks until the server has connected.

        :raises TimeoutError: it did not.
        """
        self._connection, _ = self._listener.accept()
        self._speaker.start()

    def silence(self, patience_seconds: float) -> float:
        """Seconds until something said from now on has got through; more than `patience_seconds` where nothing did."""
        assert self._connection is not None
        began, said = time.monotonic(), self._said
        while time.monotonic() - began <= patience_seconds:
            # What was said before is acknowledged as well, for a stream has an order.
            if self._said - _unacknowledged(self._connection) > said:
                break
            time.sleep(0.02)
        return time.monotonic() - began

    def _speak(self) -> None:
        assert self._connection is not None
        self._connection.setblocking(False)
        while not self._is_over.wait(PIECE_SECONDS):
            try:
                self._said += self._connection.send(PIECE)
            except BlockingIOError:  # nothing gets through, and all buffers are full
                continue
            except OSError:  # it was reset: nothing gets through any more
                return

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._speaker.is_alive():
            self._speaker.join()
        with contextlib.suppress(OSError):
            self._listener.close()
            if self._connection is not None:
                self._connection.close()


def _unacknowledged(connection: socket.socket) -> int:
    """Octets that the other end has not acknowledged (SIOCOUTQ)."""
    (count,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))
    return int(count)
