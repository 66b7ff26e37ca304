"""A way from a host's loopback to the same port of the world's, or of what the world reaches: of a broker, say.

As a program (started by Relay, by path): relay.py LISTENER-DESCRIPTOR ADDRESS PORT.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.namespace import Namespace


class Relay:
    """Listens on 127.0.0.1 of a namespace and connects from the world to `address`, both at `port`."""

    def __init__(self, namespace: Namespace, port: int, address: str = "127.0.0.1") -> None:
        self._namespace = namespace
        self._port = port
        self._address = address
        self._process: subprocess.Popen | None = None

    def mend(self) -> None:
        """New connections work when it returns; frozen ones go on. May be repeated."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            return
        with self._namespace.inside():
            listener = socket.create_server(("127.0.0.1", self._port))
        with listener:
            words = [sys.executable, "-I", "-S", __file__, str(listener.fileno()), self._address, str(self._port)]
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()])

    def cut(self) -> None:
        """Connections end and new ones are refused, as when the broker ends. May be repeated."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """Connections stay and nothing passes, as when a network is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    close = cut


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _relay(listener: socket.socket, address: str, port: int) -> None:
    async def welcome(near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(address, port)
        except OSError:
            near_writer.close()
            return
        await asyncio.gather(_copy(near_reader, far_writer), _copy(far_reader, near_writer))

    server = await asyncio.start_server(welcome, sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_relay(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
