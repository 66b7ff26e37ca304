"""What stands for a broker."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

AMQP_START = b"\x01\x00\x00\x00\x00\x01\xf0\x00"


class Broker:
    """Answers each connection with the same octets, through TLS where it has a context."""

    def __init__(self, answer: bytes, context: ssl.SSLContext | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answer, self._context = answer, context
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # Who does not speak TLS is left alone.
            with connection, contextlib.suppress(OSError):
                line = connection
                if self._context is not None:
                    line = self._context.wrap_socket(connection, server_side=True)
                with line:
                    line.recv(8)
                    line.sendall(self._answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
