"""Connections of a guest whose survival is judged by samples, see `lab.verdict`.

Every function returns once bytes flow; the processes of the outside end with the lab, the guest's with the guest.
"""

from __future__ import annotations

import itertools

from lab.deadline import wait_until
from lab.openstack import addresses
from lab.openstack.content import CONTROL_PORT
from lab.openstack.guest import Guest
from lab.openstack.lab import OpenStackLab
from lab.traffic import START_SECONDS, Traffic, new_log, start_program, wait_until_ready

PIECE_OCTETS = 1000
PIECES_PER_SECOND = 3.0
"""So far apart that a guest acknowledges each at once. One that owes an acknowledgement when it is paused sends it
where it arrives; egress is allowed, so that packet makes a new entry, and the connection lives by luck."""
_ports = itertools.count(6000)


def download(lab: OpenStackLab, guest: Guest, pieces_per_second: float = PIECES_PER_SECOND) -> Traffic:
    """The guest connects and says nothing, then or ever; the outside sends pieces. What the guest acknowledged counts.

    No rule admits a packet of the outside's.
    """
    address, port, log = (
        addresses.outside(addresses.NETWORKS[guest.network]),
        next(_ports),
        new_log(lab.folder, "download"),
    )
    words = ["--send", str(PIECE_OCTETS * pieces_per_second), "--piece", str(PIECE_OCTETS)]
    feeder = start_program(lab.outside, "tcp-feed", address, port, *words, log=log)
    wait_until_ready(feeder)
    # At the end of its input nc would shut its side down, and the connection were not ESTABLISHED any more.
    guest.tell(f"(tail -f /dev/null | nc {address} {port}) >/dev/null 2>&1 &")
    return _flowing(Traffic("download", (feeder,), log, port))


def echo(lab: OpenStackLab, guest: Guest, octets_per_second: float = 10_000.0) -> Traffic:
    """The outside connects to the guest's control port and has all that it sends come back; that counts."""
    log = new_log(lab.folder, "echo")
    # The shell reads ahead; what comes after its answer is for cat alone.
    words = ["--send", str(octets_per_second), "--line", "echo; exec cat"]
    client = start_program(lab.outside, "tcp-connect", guest.address, CONTROL_PORT, *words, log=log)
    wait_until_ready(client)
    return _flowing(Traffic("echo", (client,), log, CONTROL_PORT))


def _flowing(traffic: Traffic) -> Traffic:
    """It, as soon as bytes have come."""

    def has_bytes() -> bool:
        return traffic.log.exists() and any(sample.total for sample in traffic.samples())

    wait_until(has_bytes, f"bytes of the {traffic.name}", START_SECONDS)
    return traffic
