"""A hypervisor that can be asked, in memory."""

from __future__ import annotations

import secrets

from sami_plugin.hooks import domain_xml


class Hypervisor:
    """Knows which guests are in a job that moves them away, and marks those that run here."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.leaving: set[str] = set()
        self.here: set[str] = set()
        self.is_away = False
        self.asked: list[str] = []
        self.marks: dict[str, str] = {}
        self.flavor = "m1.small"
        """Of all of them."""

    def is_leaving(self, guest: str) -> bool | None:
        self.asked.append(guest)
        return None if self.is_away else guest in self.leaving

    def is_here(self, guest: str) -> bool | None:
        return None if self.is_away else guest in self.here

    def description(self, guest: str) -> str | None:
        self.asked.append(guest)
        return described(guest, self.host, self.marks[guest], self.flavor) if guest in self.marks else None

    def mark(self, guest: str) -> None:
        self.marks[guest] = secrets.token_hex(32)


def described(guest: str, host: str, token: str, flavor: str = "m1.small") -> str:
    return (
        f"<domain><uuid>{guest}</uuid><metadata>"
        f"<n:instance xmlns:n='{domain_xml.NOVA}'><n:flavor name='{flavor}'/></n:instance>"
        f"<o:origin xmlns:o='{domain_xml.ORIGIN}' host='{host}' token='{token}'/></metadata></domain>"
    )
