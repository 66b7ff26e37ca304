"""Hosts that call: each is heard until it has shown who it is, and has said what it wants."""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field

from sami_plugin.errors import Crowded, IllegalMessage, NotAuthorised
from sami_plugin.line import Ended, Line
from sami_plugin.model.newest import Newest
from sami_plugin.model.rate import TokenBucket
from sami_plugin.session import Host, Session

OVER_OF_A_GUEST = 8
"""So many of its former sessions a destination says are over."""
MOST_OVER = 1024


@dataclass(slots=True)
class Caller:
    """A host of which it is not known yet who it is, or what it wants."""

    peer: str
    """Who it says it is."""
    id: str
    """The session in which it calls."""
    line: Line
    until: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    session: Session | None = None
    """What it was given."""


class Callers:
    """Those of one host's agent, by session. Its methods may be called from any thread."""

    def __init__(self, host: Host, ended: Ended, lock: threading.RLock) -> None:
        """`ended` keeps the lines of those that hear nothing but a last word. `lock` is held for both."""
        self._host = host
        self._ended = ended
        self._lock = lock
        self._known: dict[str, Caller] = {}
        self._calls = TokenBucket(host.settings.bounds.handshakes, host.settings.bounds.handshakes_per_second)
        self._overtaken = Newest[str](MOST_OVER)
        """By session that another host says is over, and has not called in, that host."""

    def get(self, sender: str, session_id: str) -> Caller:
        """The one of this session, a new one if need be.

        :raises IllegalMessage: that is no session's name.
        :raises Crowded: more hosts call than may.
        """
        if not is_uuid(session_id):
            raise IllegalMessage("a session is a UUID")
        with self._lock:
            now = self._host.monotonic()
            for old, known in list(self._known.items()):
                if now > known.until and not known.lock.locked():  # else it is being answered, which may take its time
                    # Not among what has ended: who calls late begins anew, under the same name.
                    self._known.pop(old).line.close()
            if session_id not in self._known:
                self._refuse_crowd(now)
                line = self._host.line(session_id, caller=sender)
                until = now + self._host.settings.bounds.handshake_seconds
                self._known[session_id] = Caller(sender, session_id, line, until)
            return self._known[session_id]

    def _refuse_crowd(self, now: float) -> None:
        bounds = self._host.settings.bounds
        if len(self._known) >= bounds.handshakes:
            raise Crowded(f"{bounds.handshakes} hosts call at a time (handshakes)")
        if not self._calls.take(now):
            raise Crowded(f"more hosts call than {bounds.handshakes_per_second:g} a second (handshakes_per_second)")

    def forget(self, caller: Caller) -> None:
        """It has a session now."""
        with self._lock:
            self._known.pop(caller.id, None)

    def hang_up(self, session_id: str) -> None:
        """What was said to the caller still reaches it; what it says is heard no more."""
        with self._lock:
            caller = self._known.pop(session_id, None)
            if caller is not None:
                caller.line.finish()
                self._ended.add(session_id, caller.line, self._host.monotonic())

    # A destination that asks anew says which of its sessions are over. Their calls may come later than that.

    def overtake(self, over: tuple[str, ...], peer: str) -> None:
        """Calls of the peer in these sessions are not answered any more: they would be a newer migration's."""
        with self._lock:
            for session_id in filter(is_uuid, over[-OVER_OF_A_GUEST:]):
                caller = self._known.get(session_id)
                if caller is not None and caller.peer == peer:
                    self.hang_up(session_id)
                self._overtaken.put(session_id, peer)

    def is_overtaken(self, session_id: str, peer: str) -> bool:
        """Whether the peer has said that this session is over."""
        return self._overtaken.get(session_id) == peer

    def refuse_who_was_overtaken(self, caller: Caller, guest: str) -> None:
        """:raises NotAuthorised: the caller has begun another session with the guest since, and was heard in it."""
        if self.is_overtaken(caller.id, caller.peer):
            raise NotAuthorised(f"a newer session of {guest} has come before this one")


def is_uuid(text: str) -> bool:
    """As sessions and guests are named."""
    return as_uuid(text) is not None


def as_uuid(text: str) -> str | None:
    """As it is written here; None where it is none."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None
