"""An agent that speaks without TLS: what TLS costs is measured beside it, and what it prevents is shown.

As a program, what ``sami-agent`` is: python -m lab.in_clear --config-file PATH
"""

from __future__ import annotations

import sys

from sami_plugin import line
from sami_plugin.channel.ordering import Inbox
from sami_plugin.cmd import agent
from sami_plugin.model.packet import Packet


class ClearChannel:
    """In place of `sami_plugin.channel.tls.Channel`: messages as they are, in their order."""

    def __init__(self, peer: str, context: object, **_: object) -> None:
        self._inbox = Inbox()
        self._waiting: list[Packet] = []
        self._sent = 0

    def say(self, message: bytes, *, is_last_word: bool = False) -> None:
        self._waiting.append(Packet(0, self._sent, message))
        self._sent += 1

    def take(self, packet: Packet) -> list[bytes]:
        return self._inbox.accept(packet.number, packet.octets)

    def packets(self) -> list[Packet]:
        packets, self._waiting = self._waiting, []
        return packets

    is_all_said = True

    def renew(self, stream: int) -> None:
        """There is but one."""


if __name__ == "__main__":
    line.Channel = ClearChannel  # type: ignore[assignment, misc]
    sys.exit(agent.main())
