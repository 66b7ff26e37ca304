"""Two ends of a channel, and a broker between them that does what a test wants."""

from __future__ import annotations

from collections.abc import Callable

from sami_plugin.channel import tls
from sami_plugin.channel.identity import Credentials
from sami_plugin.channel.tls import Channel
from sami_plugin.errors import StreamBroken
from sami_plugin.model.packet import Packet
from sami_plugin.model.settings import Bounds

BOUNDS = Bounds()


def client(own: Credentials, peer: str, bounds: Bounds = BOUNDS) -> Channel:
    return tls.Channel(peer, lambda: own.context(is_server=False), is_server=False, bounds=bounds)


def server(own: Credentials, peer: str, bounds: Bounds = BOUNDS) -> Channel:
    return tls.Channel(peer, lambda: own.context(is_server=True), is_server=True, bounds=bounds)


class Pair:
    """A destination that calls, a source that answers; packets wait in between until they are carried."""

    def __init__(self, caller: Channel, called: Channel) -> None:
        self.ends = {"d": caller, "s": called}
        self.heard: dict[str, list[bytes]] = {"d": [], "s": []}
        self.under_way: list[tuple[str, Packet]] = []
        self.every: list[tuple[str, Packet]] = []
        self.flights = 0
        self.broken = 0

    @classmethod
    def of(
        cls, credentials: Callable[[str], Credentials], caller: str = "d", called: str = "s", bounds: Bounds = BOUNDS
    ) -> Pair:
        """Ends with the certificates of these hosts, which take each other for d and s."""
        return cls(client(credentials(caller), "s", bounds), server(credentials(called), "d", bounds))

    def say(self, end: str, message: bytes) -> None:
        self.ends[end].say(message)
        self.collect()

    def collect(self) -> None:
        for end, other in (("d", "s"), ("s", "d")):
            made = [(other, packet) for packet in self.ends[end].packets()]
            self.under_way += made
            self.every += made

    def carry(self, to: str, packet: Packet) -> None:
        """As the line does: a server's broken stream is told to the client."""
        try:
            self.heard[to] += self.ends[to].take(packet)
        except StreamBroken:
            self.broken += 1
            if to == "s":
                self.ends["d"].renew(packet.stream)
        self.collect()

    def carry_all(self) -> None:
        while self.under_way:
            flight, self.under_way = self.under_way, []
            self.flights += 1
            for to, packet in flight:
                self.carry(to, packet)
