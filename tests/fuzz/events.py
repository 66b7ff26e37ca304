"""What hooks write into the agent's socket, descriptions of guests included: ``python -m tests.fuzz.events``."""

from __future__ import annotations

import json
import sys

from sami_plugin.errors import Malformed, OperatorError
from sami_plugin.hooks import domain_xml, local_socket
from tests.fuzz.hunt import Target, main

GUEST = "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4"
DESCRIPTION = f"""<domain type='kvm' id='3'><name>web</name><uuid>{GUEST}</uuid><metadata>
<o:origin xmlns:o='{domain_xml.ORIGIN}' host='compute-1' token='{"0" * 64}'/>
<sami:ports xmlns:sami='{domain_xml.PORTS}'><sami:port mac='52:54:00:00:00:01'>
<sami:address>192.0.2.7</sami:address><sami:address>2001:db8::7</sami:address></sami:port></sami:ports></metadata>
<devices><interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='tap-g'/>
<filterref filter='clean-traffic'><parameter name='IP' value='192.0.2.7'/></filterref></interface></devices></domain>"""
EVENTS: tuple[dict[str, object], ...] = (
    {"guest": GUEST, "phase": "prepare", "source": "host-a", "role": "destination", "domain": DESCRIPTION},
    {"guest": GUEST, "phase": "outgoing", "source": None, "destination": "host-b", "role": "source"},
    {"guest": GUEST.upper(), "phase": "stopped"},
    {"guest": GUEST, "phase": "started", "domain": "<domain><uuid/></domain>"},
)


def decode(octets: bytes) -> None:
    """Refuses it, or finds what any other reader of the same would."""
    event = local_socket.parse(octets)
    if event.domain is not None:
        origin = domain_xml.origin_of(event.domain)
        assert origin is None or len(origin.token) == 64
        for port in domain_xml.ports_of(event.domain):
            assert len(port.device) <= 15


TARGET = Target(
    name="events",
    corpus=tuple(json.dumps(event).encode() for event in EVENTS),
    decode=decode,
    refusals=(OperatorError, Malformed),
    octets=1 << 19,
    octets_per_octet=300,
)

if __name__ == "__main__":
    sys.exit(main(TARGET))
