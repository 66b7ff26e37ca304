"""What the lab asks of whoever carries state from host to host."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab


@runtime_checkable
class Carrier(Protocol):
    """Carries the state of guests that migrate. One per lab: start, any number of tells, stop."""

    def start(self, lab: Lab) -> None:
        """Be ready for migrations of every guest of this lab. Blocks until it is."""

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        """See lab.migration.Tell: it comes from the migrating thread; raising in prepare and started is a veto."""

    def result(self, guest: Guest) -> dict[str, dict[str, Any]]:
        """Of the guest's last migration, once it is over (blocks for that, with a limit):

        {"flows": {"exported", "imported", "degraded", "refused", "verified", "purged"},
         "milliseconds": {step: float}}
        """

    def stop(self) -> None:
        """Let go of everything. May be repeated, and is called when start failed."""


class NoCarrier:
    """Carries nothing: how it is without."""

    def start(self, lab: Lab) -> None:
        """Nothing to prepare."""

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        """Nobody listens."""

    def result(self, guest: Guest) -> dict[str, dict[str, Any]]:
        """Nothing was carried."""
        return {"flows": {}, "milliseconds": {}}

    def stop(self) -> None:
        """Nothing to let go of."""
