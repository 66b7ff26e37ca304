"""The only code that enters other network namespaces. Needs CAP_SYS_ADMIN there; everything else does with less.

A socket belongs for good to the network namespace in which it was made. So a short-lived thread enters the namespace,
makes the socket and ends; no thread of ours is ever left in a namespace that is not the agent's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from sami_plugin import errors

CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def in_namespace(namespace: str | None, work: Callable[[], T]) -> T:
    """What `work` returns when it runs inside the network namespace at this path (None: the caller's own).

    Blocks until `work` is done. What `work` raises is raised here. `work` must not start threads.

    :raises NotAvailable: there is no network namespace at this path.
    :raises NotPermitted: this process may not enter it.
    """
    if namespace is None:
        return work()
    return _in_thread(lambda: _enter(namespace), work)


def in_new_namespace(work: Callable[[], T]) -> T:
    """What `work` returns when it runs inside a fresh, empty network namespace.

    The namespace goes away with the last socket that `work` made in it.

    :raises NotPermitted: this process may not make namespaces.
    """
    return _in_thread(_unshare, work)


def open_socket(namespace: str | None, family: int, kind: int, protocol: int) -> socket.socket:
    """A socket of the network namespace at this path (None: the caller's own).

    :raises NotAvailable, NotPermitted: as `in_namespace`.
    :raises OSError: the kernel does not give such a socket.
    """
    return in_namespace(namespace, lambda: socket.socket(family, kind, protocol))


def _in_thread(move: Callable[[], None], work: Callable[[], T]) -> T:
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            move()
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread, all of it
            failed.append(error)

    thread = threading.Thread(target=run, name="sami-namespace", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise errors.NotAvailable(f"no network namespace can be entered for now: {error}") from error
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _enter(namespace: str) -> None:
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise errors.HasGone(f"there is no network namespace at {namespace}") from error
    except OSError as error:
        raise errors.NotAvailable(f"the network namespace {namespace} cannot be opened: {error.strerror}") from error
    try:
        _call("setns", fd, CLONE_NEWNET)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise errors.NotPermitted(
                f"the network namespace {namespace} cannot be entered; the agent needs CAP_SYS_ADMIN for that"
            ) from error
        kind = errors.HasGone if error.errno == errno.EINVAL else errors.NotAvailable  # a file that it has left behind
        raise kind(f"{namespace} is no network namespace: {error.strerror}") from error
    finally:
        os.close(fd)


def _unshare() -> None:
    try:
        _call("unshare", CLONE_NEWNET)
    except OSError as error:
        raise errors.NotPermitted(f"no network namespace can be made: {error.strerror}; needs CAP_SYS_ADMIN") from error


def _call(name: str, *arguments: int) -> None:
    # os.setns and os.unshare came with Python 3.12.
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
