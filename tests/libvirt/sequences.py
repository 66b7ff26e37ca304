"""What may happen to a guest that libvirt moves: each row of DESIGN's table, played with a real one.

A guest holds a download that it began itself. No rule admits a packet of it, so it lives only where its entry is.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest

from lab import addresses
from lab.deadline import wait_until
from lab.errors import CommandFailed
from lab.libvirt import traffic
from lab.libvirt.agents import HOOK, Sami
from lab.libvirt.guest import Guest
from lab.libvirt.host import LibvirtHost
from lab.libvirt.lab import LibvirtLab
from lab.libvirt.migration import Migration
from lab.traffic import Traffic
from lab.verdict import has_survived, longest_stall_seconds
from sami_plugin.cmd import libvirt_hook

WATCHED_SECONDS = 4.0
SLOW_MIB = 4
POSTCOPY_MIB = 128  # a guest stands still until its own pages have come: 2 s of 32 MiB/s, 0.5 s of this
SLOW_CABLE_MEGABITS = 32
ESP = "50"


class Case:
    """A guest with its download, on one of two hosts, and the way to the other one."""

    def __init__(self, lab: LibvirtLab, sami: Sami, guest: Guest, flow: Traffic) -> None:
        self.lab = lab
        self.sami = sami
        self.guest = guest
        self.flow = flow
        self.source = lab.host_of(guest.name)
        (self.destination,) = (host for host in lab.hosts.values() if host is not self.source)
        self._before = {name: agent.ended(guest.uuid) for name, agent in sami.agents.items()}

    def start(self, *flags: str, **options: Any) -> Migration:
        return self.lab.start_migration(self.guest, self.source.name, self.destination.name, *flags, **options)

    def entries(self, host: LibvirtHost) -> int:
        """How many entries the kernel there has in the zones of the guest."""
        return sum(count_in_zone(host, host.zone(port)) for port in self.guest.ports)

    def report(self, host: LibvirtHost) -> dict[str, Any]:
        """Of this migration, once its session has ended there."""
        agent = self.sami.agents[host.name]
        wait_until(
            lambda: agent.ended(self.guest.uuid) > self._before[host.name],
            f"the session on {host.name} to end; it said:\n{agent.log.read_text()[-3000:]}",
            20,
        )
        return agent.reports(self.guest.uuid)[0]

    def goes_on(self, since: float | None = None) -> bool:
        """Whether the guest's download goes on from then on."""
        begin = time.monotonic() if since is None else since
        wait_until(lambda: self.flow.samples()[-1].time > begin + WATCHED_SECONDS, "the time that is watched", 30)
        return has_survived(self.flow.samples(), begin, WATCHED_SECONDS)

    def words(self) -> str:
        """For the message of a test that failed."""
        samples = self.flow.samples()
        return f"the longest stall: {longest_stall_seconds(samples, samples[0].time):.2f} s\n{self.sami.words()}"

    def stays(self) -> None:
        """Asserts that the guest runs where it was, with its entry, and that the destination has none."""
        reports = self.report(self.source), self.report(self.destination)
        assert [report["outcome"] for report in reports] == ["stayed", "stayed"], reports
        assert self.lab.host_of(self.guest.name) is self.source
        assert (self.entries(self.source), self.entries(self.destination)) == (1, 0)
        assert self.goes_on()

    def moves(self, migration: Migration, arrival: str = "RESUMED/MIGRATED") -> None:
        """Asserts that the guest runs at the destination, with its entry, and that the source has none.

        All but the last changes were there before the pause. How often the last ones come before the guest runs
        is counted by the soak: nothing holds a guest for them, and a slow job's pause is 14 ms.
        """
        arrived = migration.wait_for(arrival, self.destination).time
        assert self.goes_on(arrived), self.words()
        reports = self.report(self.source), self.report(self.destination)
        assert [report["outcome"] for report in reports] == ["moved", "moved"], reports
        assert (self.entries(self.source), self.entries(self.destination)) == (0, 1)
        paused = migration.wait_for("SUSPENDED/MIGRATED", self.source).time
        at = {step["step"]: step["monotonic"] for step in reports[1]["steps"]}  # the hosts of the lab share a clock
        assert max(at["scope known"], at["first flows"], at["in sync"]) < paused


def count_in_zone(host: LibvirtHost, zone: int) -> int:
    return sum(
        len(host.run(["conntrack", "-L", "-f", family, "-p", "tcp", "-w", str(zone)]).splitlines())
        for family in ("ipv4", "ipv6")
    )


def downloading(lab: LibvirtLab, name: str, host: str, **options: Any) -> tuple[Guest, Traffic]:
    guest = lab.add_guest(name, host, **options)
    flow = traffic.download(lab, guest)
    guest.close_egress()  # else a guest whose acknowledgement comes first is picked up in the middle
    return guest, flow


Play = Callable[[Case], Migration]
"""Plays a sequence, up to where the migration is over."""

# --- The guest moves


def plain(case: Case) -> Migration:
    migration = case.start(bandwidth=2 * SLOW_MIB)
    assert migration.wait().is_ok
    return migration


def by_events_alone(case: Case) -> Migration:
    """No hook is installed."""
    case.destination.remove_hook(HOOK)
    try:
        return plain(case)
    finally:
        case.destination.install_hook(libvirt_hook.__file__, HOOK)


def postcopy(case: Case) -> Migration:
    migration = case.start(*f"--postcopy --bandwidth {SLOW_MIB} --postcopy-bandwidth {POSTCOPY_MIB}".split())
    migration.wait_until_copying()
    # An agent that dies first of all, and is not back when the guest has left, can know nothing of it.
    knows = case.sami.agents[case.source.name].knows_outgoing
    wait_until(lambda: knows(case.guest.uuid), "the source to know that the guest leaves", 30, poll_seconds=0.05)
    migration.switch_to_postcopy()
    migration.wait_for("RESUMED/POSTCOPY", case.destination)
    with pytest.raises(CommandFailed):
        migration.abort()
    assert migration.wait().is_ok
    return migration


def stays_paused(case: Case) -> Migration:
    migration = case.start(is_suspended=True)
    assert migration.wait().is_ok
    return migration


def paused_by_its_user(case: Case) -> Migration:
    case.source.virsh("suspend", case.guest.name)
    migration = case.start()
    assert migration.wait().is_ok
    return migration


def source_libvirtd_ends(case: Case) -> Migration:
    """It ends when the migration has; nobody on the source hears that the guest was paused, or that it left."""
    migration = case.start(bandwidth=2 * SLOW_MIB)
    migration.wait_until_copying()
    case.lab.restart_libvirtd(case.source.name)
    migration.wait()
    return migration


def broker_away(case: Case, *, has_all: bool = True) -> Migration:
    """At the cut-over, until the guest has run for a while. `has_all`: its flows were there before."""
    migration = case.start(bandwidth=4 * SLOW_MIB)
    migration.wait_until_copying()
    case.sami.relays[case.destination.name].cut()
    assert migration.wait().is_ok
    if has_all:
        arrived = migration.wait_for("RESUMED/MIGRATED", case.destination).time
        assert case.goes_on(arrived), case.words()
    case.sami.relays[case.destination.name].mend()
    return migration


MOVING: dict[str, Play] = {
    "plain": plain,
    "by events alone": by_events_alone,
    "post-copy": postcopy,
}
LEFT_PAUSED: dict[str, Play] = {
    "stays paused at the destination": stays_paused,
    "its user had paused it": paused_by_its_user,
}

# --- The guest stays


def refused(operation: str, case: Case) -> Migration:
    with case.destination.veto(operation):
        migration = case.start()
        assert not migration.wait().is_ok
    return migration


def copying(case: Case) -> Migration:
    migration = case.start(bandwidth=SLOW_MIB)
    migration.wait_until_copying()
    return migration


def abort_while_copying(case: Case) -> Migration:
    migration = copying(case)
    migration.abort()
    assert not migration.wait().is_ok
    return migration


def destination_dies_while_copying(case: Case) -> Migration:
    migration = copying(case)
    case.destination.kill_qemu(case.guest.name)
    assert not migration.wait().is_ok
    return migration


def paused(case: Case) -> Migration:
    migration = case.start()
    migration.wait_until_paused()
    return migration


def abort_in_the_pause(case: Case) -> Migration:
    with case.source.slow_cable(SLOW_CABLE_MEGABITS):
        migration = paused(case)
        migration.abort()
    assert not migration.wait().is_ok
    return migration


def destination_dies_in_the_pause(case: Case) -> Migration:
    with case.source.slow_cable(SLOW_CABLE_MEGABITS):
        migration = paused(case)
        case.destination.kill_qemu(case.guest.name)
    assert not migration.wait().is_ok
    return migration


def destination_dies_when_all_is_sent(case: Case) -> Migration:
    with case.source.slow_cable(5 * SLOW_CABLE_MEGABITS):
        migration = paused(case)
        with case.destination.frozen_libvirtd():
            migration.wait_until_all_is_sent()
            case.destination.kill_qemu(case.guest.name)
    assert not migration.wait().is_ok
    return migration


def libvirtd_restarted(side: str, how: signal.Signals, case: Case) -> Migration:
    migration = copying(case)
    case.lab.restart_libvirtd(getattr(case, side).name, how)
    assert not migration.wait().is_ok
    return migration


STAYING: dict[str, Play] = {
    **{f"another hook refuses {one}": partial(refused, one) for one in ("migrate", "prepare", "start", "started")},
    "abort while memory is copied": abort_while_copying,
    "destination dies while memory is copied": destination_dies_while_copying,
    "abort in the pause": abort_in_the_pause,
    "destination dies in the pause": destination_dies_in_the_pause,
    "destination dies when all is sent": destination_dies_when_all_is_sent,
    "destination's libvirtd is restarted": partial(libvirtd_restarted, "destination", signal.SIGTERM),
    "destination's libvirtd is killed": partial(libvirtd_restarted, "destination", signal.SIGKILL),
    "source's libvirtd is killed": partial(libvirtd_restarted, "source", signal.SIGKILL),
}


# --- The guest may stay


def refused_by_us(case: Case, *, is_heeded: bool) -> Migration:
    """By the policy `veto`, for a flow that is not carried. Whose agent dies meanwhile refuses nobody.

    Unless the hook's settings have it heed the veto, the guest moves all the same.
    """
    zone = case.source.zone(case.guest.ports[0])
    ends = ["-s", case.guest.ports[0].addresses[0], "-d", addresses.OUTSIDE_V4]
    case.source.run(["conntrack", "-I", "-w", str(zone), *ends, "-p", ESP, "-t", "600", "-u", "SEEN_REPLY"])
    with heeding_vetoes(case.destination) if is_heeded else nullcontext():
        migration = case.start()
        migration.wait()
    case.source.run(["conntrack", "-D", "-w", str(zone), *ends, "-p", ESP])
    return migration


@contextmanager
def heeding_vetoes(host: LibvirtHost) -> Iterator[None]:
    """Within it the host's hook of SAMI does as the agent says, which it does not by default."""
    settings = host.path(libvirt_hook.SETTINGS)
    settings.parent.mkdir(exist_ok=True)
    settings.write_text("veto = yes\n")
    try:
        yield
    finally:
        settings.unlink()
