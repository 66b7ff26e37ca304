"""Connections of a guest whose survival is judged by samples, see `lab.verdict`.

Every function returns once bytes flow; the processes of the outside end with the lab, the guest's with the guest.
"""

from __future__ import annotations

import itertools

from lab.deadline import wait_until
from lab.libvirt import addresses
from lab.libvirt.guest import ECHO_PORT, Guest
from lab.libvirt.lab import LibvirtLab
from lab.traffic import START_SECONDS, Traffic, new_log, start_program, wait_until_ready

BYTES_PER_SECOND = 200e3
_ports = itertools.count(6000)


def download(
    lab: LibvirtLab, guest: Guest, *, family: int = 4, nic: int = 0, rate: float = BYTES_PER_SECOND
) -> Traffic:
    """The guest connects and says nothing, then or ever; the outside sends `rate` bytes a second. Counted is what the
    guest acknowledged. Needs open egress to begin, and no ingress rule. Close egress then: else a guest that happens to
    acknowledge first where it arrives is picked up in the middle, and lives without its entry."""
    address, port, log = addresses.outside(family, nic), next(_ports), new_log(lab.folder, "download")
    feeder = start_program(lab.outside, "tcp-feed", address, port, "--send", str(rate), log=log)
    wait_until_ready(feeder)
    # At the end of its input nc would shut its side down, and the connection were not ESTABLISHED any more.
    guest.tell(f"tail -f /dev/null | nc {address} {port} >/dev/null")
    return _flowing(Traffic("download", (feeder,), log, port))


def echo(lab: LibvirtLab, guest: Guest, *, family: int = 4, nic: int = 0, rate: float = BYTES_PER_SECOND) -> Traffic:
    """The outside connects to the guest's echo, which a rule must admit (`guest.allow("tcp", ECHO_PORT)`), and sends
    `rate` bytes a second. Counted is what comes back."""
    log = new_log(lab.folder, "echo")
    more = ["--send", str(rate), "--echo"]
    client = start_program(lab.outside, "tcp-connect", guest.address(family, nic), ECHO_PORT, *more, log=log)
    wait_until_ready(client)
    return _flowing(Traffic("echo", (client,), log, ECHO_PORT))


def _flowing(traffic: Traffic) -> Traffic:
    """It, as soon as bytes have come."""

    def has_bytes() -> bool:
        return traffic.log.exists() and any(sample.total for sample in traffic.samples())

    wait_until(has_bytes, f"bytes of the {traffic.name}", START_SECONDS)
    return traffic
