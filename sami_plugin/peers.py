"""How the agents of other hosts are reached, and by whose word each of them is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sami_plugin.channel.identity import Credentials
from sami_plugin.model.domain import Domain
from sami_plugin.transport.rpc import Receiver, Transport


@dataclass(frozen=True, slots=True)
class Way:
    """The one to all hosts of a domain."""

    transport: Transport
    credentials: Credentials
    domain: Domain | None = None
    """None is this host's own."""


class Peers:
    """All hosts. Who is of no other domain is of this host's own."""

    def __init__(self, own: Way, others: Sequence[Way] = ()) -> None:
        self._own = own
        self._others = tuple(others)

    def way_to(self, host: str) -> Way:
        """By the host's name; of several domains that have it, the first."""
        return next((way for way in self._others if way.domain is not None and way.domain.has(host)), self._own)

    def start(self, receiver: Receiver) -> None:
        """From now on this host is heard; as the transport's."""
        self._own.transport.start(receiver)
        for way in self._others:
            way.transport.connect()

    def stop(self) -> None:
        """As the transport's, of all of them."""
        for transport in {way.transport for way in (self._own, *self._others)}:
            transport.stop()
