"""The agent's unix socket: this host's hooks tell of migrations here.

One JSON object a line, one line of answer:

    {"guest": "6ac3...", "phase": "prepare", "source": "host-a", "destination": "host-b"}
    {"answer": "ok"}
    {"answer": "error", "reason": "phase: 'prepar' is none of outgoing, prepare, ..."}
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from sami_plugin.errors import ConfigurationError, OperatorError, SamiError
from sami_plugin.model.migration import MigrationEvent, Phase

LOG = logging.getLogger(__name__)

MOST_OCTETS = 4096
"""A longer line is no event."""

Tell = Callable[[MigrationEvent], None]


def parse(line: bytes) -> MigrationEvent:
    """The event that a line holds.

    :raises OperatorError: it holds none; names the field.
    """
    try:
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ValueError("an event is a JSON object")
    except (ValueError, RecursionError) as error:
        raise OperatorError(f"not an event: {error}") from error
    try:
        guest = str(uuid.UUID(said.get("guest")))
    except (ValueError, TypeError, AttributeError) as error:
        raise OperatorError("guest: has to be the guest's UUID") from error
    phases = {phase.value: phase for phase in Phase}
    phase = said.get("phase")
    if not isinstance(phase, str) or phase not in phases:
        raise OperatorError(f"phase: {ascii(phase)[:40]} is none of {', '.join(phases)}")
    hosts = {}
    for field in ("source", "destination"):
        value = said.get(field)
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()):
            raise OperatorError(f"{field}: has to be a host's name")
        hosts[field] = value
    return MigrationEvent(guest, phases[phase], hosts["source"], hosts["destination"])


class LocalSocket:
    """Listens until it is stopped; hands each event on from a thread of its connection."""

    def __init__(self, path: str | Path, tell: Tell) -> None:
        """:raises ConfigurationError: the socket cannot be made, or another agent listens there."""
        self._path = Path(path)
        self._tell = tell
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            mask = os.umask(0o177)
            try:
                self._server = _Server(str(self._path), self._handler())
            finally:
                os.umask(mask)
        except OSError as error:
            raise ConfigurationError(f"socket {self._path}: {error}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="sami-socket", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        if not self._path.exists():
            return
        if not self._path.is_socket():
            raise ConfigurationError(f"socket {self._path}: there is a file of that name, and it is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._path))
            except ConnectionRefusedError:
                self._path.unlink()
                return
        raise ConfigurationError(f"socket {self._path}: another agent listens there")

    def _handler(self) -> type[socketserver.StreamRequestHandler]:
        tell = self._tell

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while line := self.rfile.readline(MOST_OCTETS + 1):
                    answer = _answer(line, tell)
                    self.wfile.write(json.dumps(answer).encode() + b"\n")
                    if len(line) > MOST_OCTETS:
                        return

        return Handler


def _answer(line: bytes, tell: Tell) -> dict[str, str]:
    try:
        if len(line) > MOST_OCTETS:
            raise OperatorError(f"not an event: longer than {MOST_OCTETS} octets")
        tell(parse(line))
    except SamiError as error:
        LOG.warning("event refused: %s", error)
        return {"answer": "error", "reason": str(error)}
    return {"answer": "ok"}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def send(path: str | Path, event: MigrationEvent, timeout_seconds: float = 30.0) -> None:
    """Tells the agent at `path` of an event and waits for its answer.

    :raises OperatorError: no agent listens there, or it does not take the event.
    """
    said = {
        "guest": event.guest,
        "phase": event.phase.value,
        "source": event.source,
        "destination": event.destination,
    }
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(timeout_seconds)
            line.connect(str(path))
            line.sendall(json.dumps(said).encode() + b"\n")
            answer = json.loads(line.makefile().readline() or "{}")
    except (OSError, ValueError) as error:
        raise OperatorError(f"socket {path}: {error}; is sami-agent running?") from error
    if answer.get("answer") != "ok":
        raise OperatorError(f"socket {path}: {answer.get('reason', 'no answer')}")
