"""A host of the same domain, with a certificate that counts, that asks for what it may not have."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from sami_plugin.channel.tls import Channel
from sami_plugin.codec import messages
from sami_plugin.errors import SamiError
from sami_plugin.model.migration import Open
from sami_plugin.model.packet import Packet
from sami_plugin.testing.simulator.guests import Guest
from sami_plugin.testing.simulator.network import Identity, connect

if TYPE_CHECKING:
    from sami_plugin.testing.simulator.world import World


class Stranger:
    """Asks a source for the flows of a guest that does not move to it."""

    name = "host-x"

    def __init__(self, world: World) -> None:
        self._world = world
        self._channels: dict[str, tuple[str, Channel]] = {}

    def ask(self, guest: Guest, source: str) -> None:
        world = self._world
        identity = Identity(self.name, world.secrets[self.name], world.secrets, world.nonce)
        session = world.new_uuid()
        channel = Channel(source, lambda: identity, is_server=False, connect=connect)
        self._channels[session] = source, channel
        # In the first version flows follow without another word.
        asked = Open(guest.id, self.name, (1,), (), (), None, token="f" * 64)
        message = messages.encode(asked)
        world.said.setdefault((session, self.name), []).append(message)
        channel.say(message)
        world.network.endpoints[self.name] = self  # type: ignore[assignment]
        self._send(session)

    def _send(self, session: str) -> None:
        source, channel = self._channels[session]
        for packet in channel.packets():
            self._world.network.call(self.name, source, session, packet, lambda answer: None)

    def deliver(self, context: object, sender: str, session: str, stream: int, number: int, payload: str) -> str:
        """As an `Endpoint`."""
        known = self._channels.get(session)
        if known is not None:
            try:
                for message in known[1].take(Packet(stream, number, base64.b64decode(payload))):
                    self._world.hears(self.name, sender, session, message)
            except SamiError as error:
                return type(error).__name__
            self._send(session)
        return "taken"
