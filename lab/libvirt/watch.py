"""Writes what the libvirt daemons say about their guests: watch.py LOG HOST=SOCKET...

A line is "CLOCK_MONOTONIC-seconds host guest what", what as libvirt names it: "SUSPENDED/MIGRATED",
"MIGRATION_ITERATION 1", "JOB_COMPLETED 5". When a daemon is reached the line is "seconds host - WATCHED", when it is
lost "seconds host - LOST"; it is then tried again. What a daemon says before it is reached nobody hears.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

import libvirt

RETRY_SECONDS = 0.02
DETAILS = {
    "DEFINED": (),
    "UNDEFINED": (),
    "STARTED": ("BOOTED", "MIGRATED", "RESTORED", "FROM_SNAPSHOT", "WAKEUP"),
    "SUSPENDED": (
        "PAUSED",
        "MIGRATED",
        "IOERROR",
        "WATCHDOG",
        "RESTORED",
        "FROM_SNAPSHOT",
        "API_ERROR",
        "POSTCOPY",
        "POSTCOPY_FAILED",
    ),
    "RESUMED": ("UNPAUSED", "MIGRATED", "FROM_SNAPSHOT", "POSTCOPY", "POSTCOPY_FAILED"),
    "STOPPED": ("SHUTDOWN", "DESTROYED", "CRASHED", "MIGRATED", "SAVED", "FAILED", "FROM_SNAPSHOT"),
    "SHUTDOWN": (),
    "PMSUSPENDED": (),
    "CRASHED": (),
}


class Watch:
    """One daemon. Its callbacks run on libvirt's event loop."""

    def __init__(self, host: str, socket: str, log: TextIO) -> None:
        self._host = host
        self._uri = f"qemu:///system?socket={socket}"
        self._log = log

    def connect(self) -> None:
        """Blocks until the daemon is reached. May be called from any thread."""
        while True:
            try:
                connection = libvirt.openReadOnly(self._uri)
                connection.registerCloseCallback(self._lost, None)
                for kind, callback in (
                    (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle),
                    (libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, self._iteration),
                    (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._job_completed),
                ):
                    connection.domainEventRegisterAny(None, kind, callback, None)
            except libvirt.libvirtError:
                time.sleep(RETRY_SECONDS)
            else:
                self._connection = connection
                self._say("-", "WATCHED")
                return

    def _lost(self, connection, reason, opaque) -> None:
        self._say("-", "LOST")
        threading.Thread(target=self.connect, daemon=True).start()

    def _lifecycle(self, connection, domain, event, detail, opaque) -> None:
        name = list(DETAILS)[event]
        details = DETAILS[name]
        self._say(domain.name(), f"{name}/{details[detail]}" if detail < len(details) else name)

    def _iteration(self, connection, domain, number, opaque) -> None:
        self._say(domain.name(), f"MIGRATION_ITERATION {number}")

    def _job_completed(self, connection, domain, parameters, opaque) -> None:
        self._say(domain.name(), f"JOB_COMPLETED {parameters.get('operation')}")

    def _say(self, guest: str, what: str) -> None:
        self._log.write(f"{time.monotonic():.6f} {self._host} {guest} {what}\n")


def main() -> None:
    """Until it is killed."""
    libvirt.virEventRegisterDefaultImpl()
    libvirt.registerErrorHandler(lambda *_: None, None)
    with open(sys.argv[1], "a", buffering=1) as log:
        for word in sys.argv[2:]:
            host, _, socket = word.partition("=")
            threading.Thread(target=Watch(host, socket, log).connect, daemon=True).start()
        while True:
            libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    main()
