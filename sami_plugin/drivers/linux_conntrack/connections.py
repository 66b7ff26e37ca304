"""Netlink connections by network namespace: made once, lent to one thread at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from sami_plugin import errors, privileged
from sami_plugin.drivers.linux_conntrack.decode import Timeouts
from sami_plugin.drivers.linux_conntrack.netlink import Connection

OWN_NAMESPACE = "/proc/thread-self/ns/net"
_SYSCTLS = "/proc/sys/net/netfilter"
_MOST_IDLE = 4


@dataclass(slots=True)
class _Namespace:
    identity: tuple[int, int]
    timeouts: Timeouts
    idle: list[Connection] = field(default_factory=list)


class Connections:
    """Opening a socket in another namespace costs a thread and a setns, so connections are kept.

    A connection keeps its namespace alive. When another namespace appears at a path, the former's are closed.
    """

    def __init__(self, receive_octets: int) -> None:
        self._receive_octets = receive_octets
        self._lock = threading.Lock()
        self._namespaces: dict[str | None, _Namespace] = {}
        self._is_closed = False

    @contextlib.contextmanager
    def lend(self, namespace: str | None) -> Iterator[Connection]:
        """A connection for this thread alone. It is closed, not kept, when the block is left by an exception.

        :raises NotAvailable, NotPermitted: there is no way into the namespace.
        """
        known = self._of(namespace)
        with self._lock:
            connection = known.idle.pop() if known.idle else None
        if connection is None:
            connection = Connection(namespace, self._receive_octets)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            is_kept = self._namespaces.get(namespace) is known and len(known.idle) < _MOST_IDLE
            if is_kept:
                known.idle.append(connection)
        if not is_kept:
            connection.close()

    def timeouts(self, namespace: str | None) -> Timeouts:
        """The namespace's own timeouts for established flows."""
        return self._of(namespace).timeouts

    def let_go(self) -> None:
        """Closes what is idle in namespaces that are gone."""
        with self._lock:
            gone = {path: known for path, known in self._namespaces.items() if not is_at(path, known.identity)}
            for path in gone:
                del self._namespaces[path]
        for known in gone.values():
            _close_idle(known)

    def close(self) -> None:
        """Closes what is idle; what is lent is closed when it comes back. May be repeated."""
        with self._lock:
            self._is_closed = True
            old, self._namespaces = self._namespaces, {}
        for known in old.values():
            _close_idle(known)

    def _of(self, namespace: str | None) -> _Namespace:
        identity = identity_of(namespace)
        with self._lock:
            known = self._namespaces.get(namespace)
            if known is not None and known.identity == identity:
                return known
        fresh = _Namespace(identity, privileged.in_namespace(namespace, _read_timeouts))
        with self._lock:
            if self._is_closed:
                raise errors.DeviceFailed("the driver is closed")
            now = self._namespaces.get(namespace)
            if now is not None and now.identity == identity:
                return now
            self._namespaces[namespace] = fresh
        if now is not None:
            _close_idle(now)
        return fresh


def identity_of(namespace: str | None) -> tuple[int, int]:
    """What tells a network namespace of this machine from every other one that is there.

    :raises NotAvailable: nothing is at this path.
    """
    try:
        found = os.stat(namespace or OWN_NAMESPACE)
    except FileNotFoundError as error:
        raise errors.HasGone(f"there is no network namespace at {namespace}") from error
    except OSError as error:
        raise errors.NotAvailable(f"the network namespace {namespace} cannot be looked at: {error.strerror}") from error
    return found.st_dev, found.st_ino


def is_at(namespace: str | None, identity: tuple[int, int]) -> bool:
    """Whether the namespace of this identity is still the one at this path."""
    try:
        return identity_of(namespace) == identity
    except errors.NotAvailable:
        return False


def sysctl(name: str) -> int | None:
    """A number of net.netfilter of the namespace that the calling thread is in; None where there is none."""
    try:
        with open(f"{_SYSCTLS}/{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _read_timeouts() -> Timeouts:
    usual = Timeouts()
    return Timeouts(
        sysctl("nf_conntrack_tcp_timeout_established") or usual.tcp_established,
        sysctl("nf_conntrack_udp_timeout_stream") or usual.udp_stream,
        sysctl("nf_conntrack_gre_timeout_stream") or usual.gre_stream,
    )


def _close_idle(known: _Namespace) -> None:
    for connection in known.idle:
        connection.close()
    known.idle.clear()
