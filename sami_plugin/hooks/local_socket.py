"""The agent's unix socket: this host's hooks tell of migrations here, and its operator asks.

One JSON object a line, one line of answer:

    {"guest": "6ac3...", "phase": "prepare", "source": "host-a", "destination": "host-b"}
    {"answer": "ok"}
    {"guest": "6ac3...", "phase": "started", "role": "destination", "domain": "<domain type='kvm'>..."}
    {"answer": "error", "reason": "phase: 'prepar' is none of outgoing, prepare, ..."}
    {"answer": "veto", "reason": "..."}

Only `guest` and `phase` have to be there. `role` is what this host is in the move. What is asked is a request:

    {"request": "check", "guest": "6ac3...", "to": "host-b"}
    {"answer": "ok", "verdict": "proceed", "flows": 6, ...}
    {"request": "approve", "session": "01f3..."}
    {"answer": "ok"}
"""

from __future__ import annotations

import contextlib
import grp
import json
import logging
import os
import pwd
import socket
import socketserver
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sami_plugin.errors import Busy, ConfigurationError, NotAuthorised, NotPermitted, OperatorError, SamiError, Veto
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.model.settings import Bounds

LOG = logging.getLogger(__name__)

MOST_OCTETS = 4096
"""A longer line is no event, unless it carries a domain."""
MOST_OCTETS_WITH_DOMAIN = 1 << 20
ACCEPT_AGAIN_SECONDS = 0.1
"""Where the process has no descriptor left for a caller."""
ROLES = ("source", "destination")

Tell = Callable[[MigrationEvent], object]
Said = Mapping[str, object]
Requests = Mapping[str, Callable[[Said], Mapping[str, object] | None]]
"""By name, what answers a request. May raise `SamiError`."""
Refused = Callable[[str, SamiError], None]


def parse(line: bytes) -> MigrationEvent:
    """The event that a line holds.

    :raises OperatorError: it holds none; names the field.
    """
    return event_of(said_in(line))


def said_in(line: bytes) -> dict[str, object]:
    """The JSON object that a line holds.

    :raises OperatorError: it holds none, or is too long.
    """
    if len(line) > MOST_OCTETS_WITH_DOMAIN:
        raise OperatorError(f"not an event: longer than {MOST_OCTETS_WITH_DOMAIN} octets")
    try:
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ValueError("an event is a JSON object")
    except (ValueError, RecursionError) as error:
        raise OperatorError(f"not an event: {error}") from error
    if said.get("domain") is None and len(line) > MOST_OCTETS:
        raise OperatorError(f"not an event: longer than {MOST_OCTETS} octets without a domain")
    return said


def guest_of(said: Said) -> str:
    """:raises OperatorError: there is none."""
    try:
        return str(uuid.UUID(said.get("guest")))  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError) as error:
        raise OperatorError("guest: has to be the guest's UUID") from error


def text_of(said: Said, field: str) -> str:
    """A name or an id.

    :raises OperatorError: it is not there, or is none.
    """
    value = said.get(field)
    if not (isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()):
        raise OperatorError(f"{field}: has to be a name")
    return value


def event_of(said: Said) -> MigrationEvent:
    """:raises OperatorError: it is none; names the field."""
    domain, guest = _domain(said.get("domain")), guest_of(said)
    phase = Phase(_one_of("phase", said.get("phase"), tuple(phase.value for phase in Phase)))
    hosts = {}
    for field in ("source", "destination"):
        value = said.get(field)
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()):
            raise OperatorError(f"{field}: has to be a host's name")
        hosts[field] = value
    role = said.get("role")
    if role is not None:
        role = _one_of("role", role, ROLES)
    return MigrationEvent(guest, phase, hosts["source"], hosts["destination"], role, domain)


def _one_of(field: str, value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise OperatorError(f"{field}: {ascii(value)[:40]} is none of {', '.join(known)}")
    return value


def _domain(value: object) -> str | None:
    if value is None:
        return None
    try:
        if isinstance(value, str) and value.encode():  # JSON can hold halves of characters
            return value
    except UnicodeEncodeError:
        pass
    raise OperatorError("domain: has to be the domain's XML")


class LocalSocket:
    """Listens until it is stopped; hands each event on from a thread of its connection."""

    def __init__(
        self,
        path: str | Path,
        tell: Tell,
        *,
        mode: int = 0o600,
        group: str | None = None,
        users: Sequence[str] = (),
        bounds: Bounds = Bounds(),  # noqa: B008, a frozen value
        refused: Refused = lambda who, error: None,
        requests: Requests | None = None,
    ) -> None:
        """`group` owns the socket, a name or a number; None is this process's.

        `users`, names or numbers, may tell of migrations besides root and this process's own; without any, whoever may
        open the socket. `refused` is told who was refused what.

        :raises ConfigurationError: the socket cannot be made so, or another agent listens there.
        """
        self._path = Path(path)
        owner = None if group is None else group_id(group)
        admitted = frozenset({0, os.geteuid(), *map(user_id, users)}) if users else None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            handler = _handler(tell, admitted, bounds, refused, requests or {})
            mask = os.umask(0o177)
            try:
                self._server = _Server(str(self._path), handler, bounds, refused)
            finally:
                os.umask(mask)
        except OSError as error:
            raise ConfigurationError(f"socket {self._path}: {error}") from error
        try:
            if owner is not None:
                os.chown(self._path, -1, owner)
            self._path.chmod(mode)
        except OSError as error:
            self._server.server_close()
            self._path.unlink(missing_ok=True)
            mend = "" if owner is None else "; the agent has to be in the group, or have CAP_CHOWN"
            raise ConfigurationError(
                f"socket {self._path}: mode {mode:04o}, group {group}: {error.strerror}{mend}"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="sami-socket", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
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


def group_id(group: str) -> int:
    """Of a name or a number. Raises ConfigurationError."""
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigurationError(f"socket_group: there is no group {group!r} on this host") from error


def user_id(user: str) -> int:
    """Of a name or a number. Raises ConfigurationError."""
    if user.isascii() and user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise ConfigurationError(f"socket_users: there is no user {user!r} on this host") from error


def _handler(
    tell: Tell, admitted: frozenset[int] | None, bounds: Bounds, refused: Refused, requests: Requests
) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            user = _user_of(self.request)
            who = f"user {user} of this host"
            try:
                if admitted is not None and user not in admitted:  # before it has said a word, or it keeps its place
                    error = NotAuthorised("only socket_users may tell of migrations")
                    refused(who, error)
                    _turn_away(self.request, str(error))
                    return
                answer_all(self.request, tell, bounds.hook_seconds, lambda error: refused(who, error), requests)
            except OSError as error:
                LOG.info("connection of a hook ended: %s", error)

    return Handler


def _turn_away(connection: socket.socket, reason: str) -> None:
    """Says why, to whoever listens."""
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.send(json.dumps({"answer": "error", "reason": reason}).encode() + b"\n")


def _user_of(connection: socket.socket) -> int:
    """Whoever made the connection, by the kernel's word."""
    credentials = struct.Struct("iII")  # struct ucred: process, user, group
    octets = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(octets)[1])


def answer_all(
    connection: socket.socket,
    tell: Tell,
    patience_seconds: float,
    refused: Callable[[SamiError], None],
    requests: Requests | None = None,
) -> None:
    """Hands on each event that comes, and answers it, until the connection ends or has brought too long a line.

    :raises OSError: the other end is slow, or gone.
    """
    received = bytearray()
    while line := _next_line(connection, received, patience_seconds):
        answer = _answer(line, tell, refused, requests or {})
        connection.settimeout(patience_seconds)
        connection.sendall(json.dumps(answer).encode() + b"\n")
        if not line.endswith(b"\n"):
            return


def _next_line(connection: socket.socket, received: bytearray, patience_seconds: float) -> bytes:
    """The next line; without its end where it is too long or the connection ended. Empty: there is none.

    What comes after it stays in `received`.

    :raises TimeoutError: it did not come in time, however busily its parts did.
    """
    deadline = time.monotonic() + patience_seconds
    looked_at = 0
    while (end := received.find(b"\n", looked_at)) < 0 and len(received) <= MOST_OCTETS_WITH_DOMAIN:
        looked_at = len(received)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no whole line came within {patience_seconds:g} s")
        connection.settimeout(left)
        octets = connection.recv(1 << 16)
        if not octets:
            break
        received += octets
    line = bytes(received[: end + 1] if end >= 0 else received)
    del received[: len(line)]
    return line


def _answer(line: bytes, tell: Tell, refused: Callable[[SamiError], None], requests: Requests) -> dict[str, object]:
    try:
        said = said_in(line)
        if "request" in said:
            wanted = _one_of("request", said["request"], tuple(requests))
            return {"answer": "ok", **(requests[wanted](said) or {})}
        tell(event_of(said))
    except Veto as veto:
        LOG.warning("migration refused: %s", veto)
        return {"answer": "veto", "reason": str(veto)}
    except SamiError as error:
        refused(error)
        return {"answer": "error", "reason": str(error)}
    return {"answer": "ok"}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(
        self, path: str, handler: type[socketserver.BaseRequestHandler], bounds: Bounds, refused: Refused
    ) -> None:
        # Where the queue is full, a hook that does not block is turned away by the kernel.
        self.request_queue_size = 2 * bounds.hooks
        self._bounds = bounds
        self._refused = refused
        self._free = threading.BoundedSemaphore(bounds.hooks)
        super().__init__(path, handler)

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_AGAIN_SECONDS)  # who waits to be let in is reported again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self._refused("a hook", Busy(f"there are {self._bounds.hooks} connections (hooks)"))
            _turn_away(request, "too many hooks at a time")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            LOG.warning("a hook was turned away: %s", error)  # there is no thread to be had
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            LOG.exception("an event could not be handled")
        finally:
            self.shutdown_request(request)
            self._free.release()


def send(path: str | Path, event: MigrationEvent, timeout_seconds: float = 30.0) -> None:
    """Tells the agent at `path` of an event and waits for its answer.

    :raises OperatorError: no agent listens there, or it does not take the event.
    :raises Veto: the agent's policy refuses the migration.
    """
    said = {
        "guest": event.guest,
        "phase": event.phase.value,
        "source": event.source,
        "destination": event.destination,
        "role": event.role,
        "domain": event.domain,
    }
    ask(path, said, timeout_seconds)


def ask(path: str | Path, said: Said, timeout_seconds: float = 30.0) -> dict[str, Any]:
    """What the agent at `path` answers.

    :raises OperatorError: no agent listens there, or it does not take what was said.
    :raises Veto: the agent's policy refuses the migration.
    """
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(timeout_seconds)
            line.connect(str(path))
            line.sendall(json.dumps(said).encode() + b"\n")
            answer: dict[str, Any] = json.loads(line.makefile().readline() or "{}")
    except PermissionError as error:
        raise NotPermitted(f"socket {path}: it is another user's; run as root or as the agent's user") from error
    except (OSError, ValueError) as error:
        raise OperatorError(f"socket {path}: {error}; is sami-agent running?") from error
    if answer.get("answer") == "veto":
        raise Veto(str(answer.get("reason")))
    if answer.get("answer") != "ok":
        raise OperatorError(f"socket {path}: {answer.get('reason', 'no answer')}")
    return answer
