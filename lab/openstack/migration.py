"""One live migration through Nova's API, as an operator asks for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lab.errors import DeadlinePassed
from lab.libvirt.journal import Entry, Journal
from lab.openstack.api import Cloud, wait_for
from lab.openstack.guest import Guest

BLOCK_AUTO = "2.30"
BY_INSTANCE = "2.59"
ENDED = {"completed", "failed", "error", "cancelled"}
MIGRATION_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended, as Nova says; `seconds` are from the call on."""

    status: str
    server_status: str
    host: str
    seconds: float


class Migration:
    """One that runs. `request_id` is Nova's, times are CLOCK_MONOTONIC seconds."""

    def __init__(self, cloud: Cloud, guest: Guest, source: str, destination: str, journal: Journal) -> None:
        self.guest = guest
        self.source = source
        self.destination = destination
        self._cloud = cloud
        self._journal = journal
        self._before = {migration["id"] for migration in self._migrations()}
        self.began_at = time.monotonic()
        body = {"os-migrateLive": {"host": destination, "block_migration": "auto"}}
        self.request_id = cloud.call("compute", "POST", f"/servers/{guest.uuid}/action", body, BLOCK_AUTO).request_id

    def wait(self, seconds: float = MIGRATION_SECONDS) -> Result:
        """Its end. Blocks; raises DeadlinePassed with what was said."""
        try:
            wait_for(self._has_ended, f"the migration of {self.guest.name} to end", seconds)
        except DeadlinePassed as error:
            said = "\n".join(map(str, self.entries()))
            raise DeadlinePassed(f"{error.what}: {self._migration()}; said was:\n{said}", seconds) from error
        took = time.monotonic() - self.began_at
        server = self.guest.server()
        return Result(self.status, server["status"], server["OS-EXT-SRV-ATTR:host"], took)

    @property
    def is_ok(self) -> bool:
        """Whether the guest is where it was to go, and Nova thinks so."""
        result = self.wait()
        return (result.status, result.server_status, result.host) == ("completed", "ACTIVE", self.destination)

    @property
    def status(self) -> str:
        """Nova's word for how far it is, "" where it does not know of it yet."""
        found = self._migration()
        return found["status"] if found else ""

    def abort(self) -> None:
        """As `nova live-migration-abort`. Raises Refused where Nova does not take it at this moment."""
        path = f"/servers/{self.guest.uuid}/migrations/{self._migration()['id']}"
        self._cloud.call("compute", "DELETE", path, version=BY_INSTANCE)

    def force_complete(self) -> None:
        """As `nova live-migration-force-complete`. Raises Refused."""
        path = f"/servers/{self.guest.uuid}/migrations/{self._migration()['id']}/action"
        self._cloud.call("compute", "POST", path, {"force_complete": None}, BY_INSTANCE)

    def wait_for(self, what: str, host: str | None = None, seconds: float = 90.0) -> Entry:
        """See Journal.wait_for; without a host it is the source that says it."""
        return self._journal.wait_for(what, self.guest.domain, host or self.source, self.began_at, seconds)

    def entries(self) -> list[Entry]:
        """What libvirt and the lab's hook of both hosts said of this guest since it began."""
        return self._journal.entries(self.guest.domain, self.began_at)

    def _has_ended(self) -> bool:
        if self.status not in ENDED:
            return False
        server = self.guest.server()
        return server["OS-EXT-STS:task_state"] is None or server["status"] == "ERROR"

    def _migration(self) -> Any:
        return next((found for found in self._migrations() if found["id"] not in self._before), None)

    def _migrations(self) -> list[Any]:
        found: list[Any] = self._cloud.get("compute", f"/os-migrations?instance_uuid={self.guest.uuid}", BY_INSTANCE)[
            "migrations"
        ]
        return found
