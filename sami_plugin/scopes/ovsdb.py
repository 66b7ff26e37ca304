"""What an OVSDB says, as a thread of ovsdbapp keeps it current: the host's own of Open vSwitch, or OVN's southbound."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sami_plugin.errors import NotAvailable, NotPermitted, OperatorError

LOG = logging.getLogger(__name__)

PACKAGE = "ovsdbapp"
SECONDS = 5.0
"""How long a server may take to tell all for the first time."""
WAIT_SECONDS = 2 * SECONDS
RETRY_SECONDS = 30.0
"""Between tries beside, of which ovsdbapp logs each that fails."""
RESTRICT_SECONDS = 1.0
_POLL_SECONDS = 0.01

T = TypeVar("T")
Tables = Mapping[str, Any]
"""By name, the tables of the IDL."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files for connections by TLS (`ssl:`); python-ovs has one set of them for the whole process."""

    private_key: str
    certificate: str
    ca_certificate: str


def libraries() -> tuple[Any, Any, Any]:
    """python-ovs' stream, and ovsdbapp's connection and idlutils.

    :raises ImportError: one of them is not there.
    """
    # python-ovs imports eventlet where that is installed, and does without where it is not. Its import makes a second
    # module threading, which takes the lock of the importing thread away: nobody could wait for its end any more.
    hides = "eventlet" not in sys.modules
    if hides:
        sys.modules["eventlet"] = None  # type: ignore[assignment]
    try:
        from ovs import stream
        from ovsdbapp.backend.ovs_idl import connection, idlutils
    finally:
        if hides:
            del sys.modules["eventlet"]
    return stream, connection, idlutils


class Copy(Generic[T]):
    """What `picture` makes of some columns of a database, made anew by the copy's own thread whenever they change.

    Nothing is imported and nobody is asked before the first question.
    """

    def __init__(
        self,
        connection: str,
        database: str,
        columns: Mapping[str, Sequence[str]],
        picture: Callable[[Tables], T],
        credentials: Credentials | None = None,
    ) -> None:
        """`connection` is as of ovsdb(7): unix:FILE, tcp:ADDRESS:PORT or ssl:ADDRESS:PORT, several with commas."""
        self._connection = connection
        self._database = database
        self._columns = columns
        self._picture = picture
        self._credentials = credentials
        self._conditions: dict[str, list[Any]] = {}
        self._starting = threading.Lock()
        self._running: Any = None
        self._idl: Any = None
        self._made: tuple[T] | None = None
        self._next_try = 0.0
        self._attempting: threading.Thread | None = None
        self._failure: OperatorError | None = None

    def current(self) -> T:
        """What is known now. Waits for the server as long as it has not answered once, but not for ever.

        :raises NotAvailable: ovsdbapp is missing, or nobody answers.
        :raises NotPermitted: this process may not open the server's socket.
        """
        if self._running is None:
            attempt = self._attempt()
            attempt.join(WAIT_SECONDS)
            if attempt.is_alive():
                raise NotAvailable(
                    f"{self._database} at {self._connection} has not answered within {WAIT_SECONDS:g} s; "
                    "is its server all right?"
                )
            if self._failure is not None:
                raise self._failure
        made = self._made
        # A server that is away may come back with other numbers: what it said before is no answer.
        if made is None or not self._idl.is_current():
            raise NotAvailable(f"{self._database} at {self._connection} has no connection; is its server running?")
        return made[0]

    def latest(self) -> T | None:
        """As `current`, but never waits: None as long as nothing is known. Goes on trying beside."""
        if self._running is None:
            if time.monotonic() >= self._next_try:
                self._next_try = time.monotonic() + RETRY_SECONDS
                self._attempt()
            return None
        made = self._made
        return made[0] if made is not None and self._idl.is_current() else None

    def restrict(self, table: str, condition: list[Any]) -> None:
        """The server tells only the table's rows for which one of these clauses holds (RFC 7047, section 5.1).

        Where there is a connection this waits until it does, a second at the most.
        """
        if self._conditions.get(table) == condition:
            return
        self._conditions[table] = condition
        running = self._running
        if running is None:  # `_start` sends it
            return
        self._send(running, table)
        end = time.monotonic() + RESTRICT_SECONDS
        while not self._is_done(running, table) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def is_awaited(self, table: str) -> bool:
        """Whether `latest` is not yet all that the table's newest condition asks for, and may be soon.

        It may not where the last try to connect has failed, before the next. Tries as `latest` does, and never waits.
        """
        self.latest()
        running = self._running
        if running is None:
            return self._attempting is not None and self._attempting.is_alive()
        return not (self._is_done(running, table) and self._idl.is_current())

    def _send(self, running: Any, table: str) -> None:
        """The table's newest condition, also where another thread notes and sends one at the same time."""
        with running.lock:
            self._idl.cond_change(table, self._conditions[table])
            running.txns.alert_notify()  # wakes the thread, and that sends it

    def _is_done(self, running: Any, table: str) -> bool:
        with running.lock:
            # Of a condition that it has already, the IDL tells by when the server does what it says. Of a new one
            # python-ovs tells one answer too many.
            wanted = self._idl.cond_change(table, self._conditions[table])
            return wanted is None or bool(wanted <= self._idl.cond_seqno)

    def close(self) -> None:
        """Ends the thread; the next question begins again. May be repeated."""
        with self._starting:
            running, self._running, self._made = self._running, None, None
        if running is not None:
            running.stop(SECONDS)

    def _attempt(self) -> threading.Thread:
        """In a thread of its own: ovsdbapp waits for the schema without a limit. One at a time."""
        with self._starting:
            if self._attempting is None or not self._attempting.is_alive():
                self._attempting = threading.Thread(target=self._try, name=f"start of {self._database}", daemon=True)
                self._attempting.start()
            return self._attempting

    def _try(self) -> None:
        if self._running is not None:
            return
        try:
            self._start()
            self._failure = None
        except OperatorError as error:
            if str(error) != str(self._failure):
                LOG.warning("%s", error)
            self._failure = error

    def _start(self) -> None:
        self._may_open()
        try:
            stream, connection, idlutils = libraries()
        except ImportError as error:
            raise NotAvailable(
                f"the package {PACKAGE} cannot be imported ({error}); install it with the extra: sami_plugin[ovs]"
            ) from error
        if self._credentials is not None:
            stream.Stream.ssl_set_private_key_file(self._credentials.private_key)
            stream.Stream.ssl_set_certificate_file(self._credentials.certificate)
            stream.Stream.ssl_set_ca_cert_file(self._credentials.ca_certificate)
        copy = self

        class Watched(connection.OvsdbIdl):  # type: ignore[name-defined]
            """Rows change in `run` alone, so they are looked at there, by the thread that changes them."""

            def run(self) -> bool:
                has_changed: bool = super().run()
                if has_changed and self.is_current():
                    copy._made = (copy._picture(self.tables),)
                return has_changed

            def is_current(self) -> bool:
                return bool(self._session.is_connected()) and self.state == self.IDL_S_MONITORING

        try:
            schema = idlutils.get_schema_helper(self._connection, self._database)
            for table, columns in self._columns.items():
                # Older servers' tables lack what newer ones have.
                there = schema.schema_json["tables"].get(table, {"columns": {}})["columns"]
                schema.register_columns(table, [column for column in columns if column in there])
            self._idl = Watched(self._connection, schema)
            applied = dict(self._conditions)
            for table, condition in applied.items():
                self._idl.cond_change(table, condition)
            running = connection.Connection(self._idl, timeout=SECONDS)
            running.start()
        except Exception as error:  # a bare one is what ovsdbapp raises for a server that is away
            raise NotAvailable(
                f"{self._database} at {self._connection} cannot be read ({error}); is its server running?"
            ) from error
        self._running = running
        # What was noted while the server was waited for nobody has sent.
        for table, condition in dict(self._conditions).items():
            if applied.get(table) != condition:
                self._send(running, table)

    def _may_open(self) -> None:
        for one in self._connection.split(","):
            kind, _, path = one.strip().partition(":")
            if kind == "unix" and os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
                raise NotPermitted(f"{path} may not be opened by this process; run the agent in the group that may")
