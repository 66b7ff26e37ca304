"""The cases of the demo: connections that die when their state does not move along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab import traffic
from lab.guest import Guest
from lab.lab import Lab
from lab.traffic import Traffic

LISTENED_PORT = 80
FLOOD = 100_000
FLOOD_PER_SECOND = 1000.0
# Long enough that no flow of the flood runs out while a run lasts.
FLOOD_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Case:
    """`begin` sets rules and sysctls and starts the traffic that is judged; `hops` are the hosts that the guest visits.

    `copy_seconds` is how long memory is copied; `needs_quiet` asks for a machine on which nothing else runs.
    """

    letter: str
    title: str
    begin: Callable[[Lab, Guest], Traffic]
    hops: tuple[str, ...] = ("a", "b")
    copy_seconds: float = 1.5
    needs_quiet: bool = False


def _download(lab: Lab, guest: Guest) -> Traffic:
    return traffic.download(lab, guest)


def _revoked(lab: Lab, guest: Guest) -> Traffic:
    guest.allow("tcp", LISTENED_PORT)
    served = traffic.serve(lab, guest, LISTENED_PORT)
    guest.revoke("tcp", LISTENED_PORT)
    guest.close_egress()
    return served


def _strict(lab: Lab, guest: Guest) -> Traffic:
    for host in lab.hosts.values():
        host.sysctl("nf_conntrack_tcp_loose", 0)
    return traffic.upload(lab, guest)


def _returned(lab: Lab, guest: Guest) -> Traffic:
    # The guest speaks and may: the first hop lives on the kernel's loose pick-up, the stale entry kills the second.
    # That takes that the guest has said more meanwhile than the window that the entry remembers. On a busy machine
    # the receiver's kernel takes a stream that comes in bursts for a fast one, and opens its window wider than that.
    lab.outside.sysctl("net.ipv4.tcp_rmem", "4096 65536 65536")
    return traffic.upload(lab, guest, rate=200e3)


def _crowded(lab: Lab, guest: Guest) -> Traffic:
    for host in lab.hosts.values():
        host.sysctl("nf_conntrack_udp_timeout", FLOOD_TIMEOUT_SECONDS)
    watched = traffic.download(lab, guest)
    traffic.flows(lab, guest, count=FLOOD, new_per_second=FLOOD_PER_SECOND)
    return watched


def _download_v6(lab: Lab, guest: Guest) -> Traffic:
    return traffic.download(lab, guest, family=6)


CASES = {
    case.letter: case
    for case in (
        Case("a", "a download that the guest began, no ingress rule", _download),
        Case("b", "the rule that admitted the connection was removed", _revoked),
        Case("c", "nf_conntrack_tcp_loose=0", _strict),
        Case("d", "a guest that moves away and comes back", _returned, hops=("a", "b", "a")),
        Case("e", "as a, among 100,000 flows and 1,000 new a second", _crowded, copy_seconds=4.0, needs_quiet=True),
        Case("f", "as a, over IPv6", _download_v6),
    )
}
