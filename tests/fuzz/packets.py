"""The shell of the handshake, and what comes after it: ``python -m tests.fuzz.packets --inputs 100000 --seed 1``.

Spoiled packets are given to a server that knows nobody yet, and to one that has a session. Neither may hear anything.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from sami_plugin.channel.identity import Credentials
from sami_plugin.channel.tls import Channel
from sami_plugin.errors import PeerError
from sami_plugin.model.packet import Packet
from sami_plugin.testing.certificates import Certificates
from tests.fuzz.hunt import Target, main
from tests.unit.channel.pair import Pair


def target() -> Target:
    """With certificates that are made for it."""
    with tempfile.TemporaryDirectory() as folder:
        certificates = Certificates(Path(folder))
        credentials = {host: Credentials(host, certificates.files(host)) for host in "ds"}
    contexts = {host: made.context(is_server=host == "s") for host, made in credentials.items()}

    def pair() -> Pair:
        made = Pair(
            Channel("s", lambda: contexts["d"], is_server=False), Channel("d", lambda: contexts["s"], is_server=True)
        )
        made.say("d", b"open")
        made.say("s", b"offer")
        made.carry_all()
        return made

    def decode(octets: bytes) -> None:
        stranger = Channel("d", lambda: contexts["s"], is_server=True)
        refusal: PeerError | None = None
        try:
            assert stranger.take(Packet(0, 0, octets)) == [], "a stranger was heard"
        except PeerError as error:
            refusal = error
        known = pair()
        number = sum(to == "s" for to, _ in known.every)
        assert known.heard == {"d": [b"offer"], "s": [b"open"]}
        try:
            assert known.ends["s"].take(Packet(0, number, octets)) == [], "what nobody sent was heard"
        except PeerError as error:
            refusal = error
        if refusal is not None:
            raise refusal

    corpus = tuple(packet.octets for _, packet in pair().every)
    return Target("packets", corpus, decode, (PeerError,), seconds=0.5, octets=1 << 20)


if __name__ == "__main__":
    sys.exit(main(target()))
