"""The address plan: every NIC of a guest is in the network of its place (0: the first), where the outside is, too.

The first is that of lab.addresses.
"""

import ipaddress

NICS = 4  # of a guest, at most
UNDERLAY = "10.91.0.{}"


def underlay(host_number: int) -> str:
    """Where a host's libvirtd and QEMU listen. Hosts are numbered from 0."""
    return UNDERLAY.format(1 + host_number)


def guest(nic: int, number: int) -> tuple[str, str]:
    """An IPv4 and an IPv6 address; `number` counts those of all guests."""
    return f"10.92.{nic}.{11 + number}", _shortest(f"fd92:0:0:{nic}::{11 + number:x}")


def outside(family: int, nic: int = 0) -> str:
    """The outside's address in the network of that NIC, family 4 or 6."""
    return _shortest(f"fd92:0:0:{nic}::fe") if family == 6 else f"10.92.{nic}.254"


def _shortest(v6: str) -> str:
    """As tools print it."""
    return str(ipaddress.IPv6Address(v6))
