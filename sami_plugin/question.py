"""A question to another host's agent, outside of any migration."""

from __future__ import annotations

import queue

from sami_plugin.codec import messages
from sami_plugin.errors import IllegalMessage, PeerUnreachable, RepresentationError
from sami_plugin.line import Line
from sami_plugin.model.migration import Answer, Check, GivesUp
from sami_plugin.model.packet import Packet


class Question:
    """What would become of a guest's flows there? Thread-safe."""

    def __init__(self, line: Line, peer: str) -> None:
        self.peer = peer
        self.line = line
        self._heard: queue.SimpleQueue[Answer | str] = queue.SimpleQueue()
        line.peer, line.lost = peer, self._heard.put

    def deliver(self, packet: Packet) -> None:
        """What the other host says.

        :raises PeerError: as `Line.take`, or it is no answer.
        :raises RepresentationError: it is no message.
        """
        for octets in self.line.take(packet):
            try:
                said = messages.decode(octets)
            except RepresentationError as error:
                self._heard.put(f"{self.peer} said what is no message: {error}")
                raise
            if isinstance(said, Answer):
                self._heard.put(said)
            elif isinstance(said, GivesUp):
                self._heard.put(f"{self.peer} does not answer: {said.reason}")
            else:
                raise IllegalMessage(f"{type(said).__name__} is no answer to Check")

    def ask(self, check: Check, timeout_seconds: float) -> Answer:
        """Blocks until there is an answer.

        :raises PeerUnreachable: there is none.
        """
        self.line.say(messages.encode(check))
        try:
            heard = self._heard.get(timeout=timeout_seconds)
        except queue.Empty:
            raise PeerUnreachable(
                f"{self.peer} has not answered within {timeout_seconds:g} s; is its agent running?"
            ) from None
        finally:
            self.line.finish()
        if isinstance(heard, str):
            raise PeerUnreachable(heard)
        return heard
