"""A Carrier of the crudest kind: the `conntrack` tool, by hand, in the pause. It proves the lab, not SAMI."""

import time
from typing import Any

from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab


class HandCarrier:
    """See lab.contract.Carrier. It copies when the source says suspended and purges when the guest runs.

    The tool inserts TCP with BE_LIBERAL by itself, so a connection goes on although its windows are unknown.
    """

    def __init__(self) -> None:
        self._flows: dict[str, int] = {}
        self._milliseconds: dict[str, float] = {}
        self._source: Host | None = None

    def start(self, lab: Lab) -> None:
        """Remember the hosts."""
        self._lab = lab

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        """Follow one guest's one migration at a time."""
        match phase:
            case "outgoing":
                self._source = host
            case "prepare":
                self._destination = host
            case "suspended":
                self._copy(guest)
            case "resumed" if host is self._destination:
                # Exit code 1 when there was nothing to delete.
                self._source.run(["sh", "-c", f"conntrack -D -w {self._source.zone(guest)} || true"])
                self._source.run(["sh", "-c", f"conntrack -D -f ipv6 -w {self._source.zone(guest)} || true"])

    def _copy(self, guest: Guest) -> None:
        began_at = time.monotonic()
        here, there = self._source.zone(guest), self._destination.zone(guest)
        self._flows = {"exported": 0}
        for family in ("ipv4", "ipv6"):
            saved = self._source.run(["conntrack", "-L", "-f", family, "-w", str(here), "-o", "save"])
            lines = [line.replace(f"-w {here}", f"-w {there}") for line in saved.splitlines() if f"-w {here}" in line]
            # An old entry would stay as it is, and kill the connection.
            self._destination.run(["sh", "-c", f"conntrack -D -f {family} -w {there} || true"])
            if lines:
                file = self._lab.folder / f"hand-{family}"
                file.write_text("\n".join(lines) + "\n")
                self._destination.run(["conntrack", "-R", str(file)])
            self._flows["exported"] += len(lines)
        self._milliseconds = {"copy": (time.monotonic() - began_at) * 1000}

    def result(self, guest: Guest) -> dict[str, dict[str, Any]]:
        """How many lines were copied, and how long it took."""
        return {"flows": dict(self._flows), "milliseconds": dict(self._milliseconds)}

    def stop(self) -> None:
        """Nothing is held."""
