"""The lab of real libvirt itself: what its hosts are, what they say of each kind of migration, what it measures."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.deadline import wait_until
from lab.errors import CommandFailed, LabError
from lab.libvirt import traffic
from lab.libvirt.guest import ECHO_PORT, STREAM_PORT, Guest
from lab.libvirt.host import LibvirtHost
from lab.libvirt.lab import KINDS, LibvirtLab
from lab.libvirt.migration import Migration
from lab.libvirt.streams import Stream, Streams
from lab.verdict import has_survived

# One worker, so that one lab serves all: two hosts and their guests are as much as two cores bear.
pytestmark = [pytest.mark.xdist_group("libvirt"), pytest.mark.usefixtures("libvirt_here")]

WATCHED_SECONDS = 6.0
INCOMING = ["migrate begin", "prepare begin", "start begin", "started begin"]
OUTGOING = ["stopped end", "release end"]
CANCELED = "canceled by client"


def hooks(migration: Migration, host: LibvirtHost) -> list[str]:
    return [entry.what for entry in migration.entries() if entry.host == host.name and entry.is_hook]


def events(migration: Migration, host: LibvirtHost) -> list[str]:
    """Without iterations, the number of which is chance, and the job's end, which is in no order with the guest's."""
    said = [entry.what for entry in migration.entries() if entry.host == host.name and not entry.is_hook]
    return [what for what in said if not what.startswith(("MIGRATION_ITERATION", "JOB_COMPLETED"))]


class Moves:
    """A guest that runs on one of two hosts, and its ways to the other one."""

    def __init__(self, lab: LibvirtLab, guest: Guest) -> None:
        self.lab = lab
        self.guest = guest
        self.source = lab.host_of(guest.name)
        (self.destination,) = (host for host in lab.hosts.values() if host is not self.source)

    def start(self, *flags: str, **options) -> Migration:
        return self.lab.start_migration(self.guest, self.source.name, self.destination.name, *flags, **options)

    def state(self, host: LibvirtHost) -> str:
        return self.lab.state(self.guest, host.name)

    def stays(self, migration: Migration) -> None:
        """Asserts that the guest runs where it was, and the destination undid what it had begun."""
        migration.wait_for("STOPPED/FAILED", self.destination)
        assert hooks(migration, self.destination) == [*INCOMING, *OUTGOING]
        assert events(migration, self.destination) == ["STARTED/MIGRATED", "STOPPED/FAILED"]
        assert hooks(migration, self.source) == []
        assert self.state(self.source).startswith("running")
        assert self.state(self.destination) == ""


@pytest.fixture
def moves(lab) -> Iterator[Moves]:
    """One guest for many tests; a new one when a test has lost it."""
    guest = lab.guests.get("mover") or lab.add_guest("mover", "a")
    yield Moves(lab, guest)
    try:
        lab.host_of("mover")
    except LabError:
        lab.remove_guest(guest)


# --- Hosts -----------------------------------------------------------------------------------------------------------


BRIEF = """
import os, signal
from lab.libvirt.lab import LibvirtLab
with LibvirtLab() as lab:
    lab.add_guest("g", "a", is_awaited=False)
    lab.hosts["a"].relay(5672)
    print(os.stat("/proc/self/ns/pid").st_ino, flush=True)
    signal.pause()
"""


def test_a_killed_lab_leaves_no_process_and_so_no_mount_and_no_namespace():
    words = [sys.executable, "-m", "lab.isolation", "--with-parent", "--", sys.executable, "-c", BRIEF]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        world = int(process.stdout.readline())
        inside = processes_below(process.pid)
        assert any(b"qemu-system" in command_line(pid) for pid in inside)
        process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside), "all processes to end", 10)
    assert world not in {namespace(pid, "pid") for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}


def processes_below(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(each for child in children for each in processes_below(child))]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def namespace(pid: int, kind: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except OSError:
        return 0


def test_hosts_are_fast_and_go_without_a_trace():
    began = time.monotonic()
    with LibvirtLab(hosts=("x", "y", "z"), has_hook=False) as lab:
        assert time.monotonic() - began < 10
        pids = [host.pid for host in lab.hosts.values()]
        assert {host.run(["hostname"]).strip() for host in lab.hosts.values()} == set(lab.hosts)
        assert lab.hosts["x"].run(["ls", "/etc/libvirt/hooks/qemu.d"]) == ""
    assert not lab.folder.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_host_sees_its_own_files_processes_and_links(lab):
    a = lab.hosts["a"]
    assert "first.py" in a.run(["cat", "/proc/1/cmdline"])
    assert "under0" in a.run(["ls", "/sys/class/net"])
    a.run(["sh", "-c", "echo mine >/etc/mine; echo mine >/var/mine"])
    assert not Path("/etc/mine").exists()
    assert not Path("/var/mine").exists()
    assert lab.hosts["b"].run(["sh", "-c", "ls /etc /var | grep -c mine || true"]).strip() == "0"


def test_a_process_in_a_host_gets_signals_and_its_exit_code_comes_back(lab):
    trap = lab.hosts["a"].start(["sh", "-c", "trap 'exit 7' TERM; echo; while :; do sleep 0.01; done"], stdout=-1)
    trap.stdout.readline()
    trap.terminate()
    assert trap.wait(5) == 7
    for step in range(100):  # from before it is one to when it runs
        killed = lab.hosts["a"].start(["sleep", "1000"])
        time.sleep(step * 0.00002)
        killed.kill()
        assert killed.wait(5) == -9
    wait_until(lambda: "sleep 1000" not in lab.hosts["a"].run(["ps", "ax"]), "the process inside to end")


def test_a_python_client_inside_reaches_libvirt(lab):
    code = f"import libvirt; print(libvirt.open('qemu:///system?socket={LibvirtHost.socket}').getHostname())"
    assert lab.hosts["b"].run([sys.executable, "-c", code]).strip() == "b"


def test_the_relay_is_cut_frozen_and_mended(lab):
    with socket.create_server(("127.0.0.1", 0)) as broker:
        threading.Thread(target=say_hello_to_all, args=[broker], daemon=True).start()
        port = broker.getsockname()[1]
        relay = lab.hosts["a"].relay(port)
        probe = f"import socket; print(socket.create_connection(('127.0.0.1', {port}), 2).recv(5))"

        def hears_hello() -> bool:
            process = lab.hosts["a"].start([sys.executable, "-c", probe], stdout=subprocess.PIPE, stderr=-3)
            return b"hello" in process.communicate()[0]

        heard = [hears_hello()]
        for change in (relay.cut, relay.mend, relay.freeze, relay.mend):
            change()
            heard.append(hears_hello())
        assert heard == [True, False, True, False, True]


def say_hello_to_all(broker: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            broker.accept()[0].sendall(b"hello")


# --- Guests ----------------------------------------------------------------------------------------------------------


def test_guests_boot_together_with_ports_of_all_kinds(lab):
    none = lab.add_guest("none", "a", nics=0, is_awaited=False)
    many = lab.add_guest("many", "b", nics=2, addresses_per_nic=2, memory_mib=160, is_awaited=False)
    none.wait_until_ready(lab.hosts["a"])
    many.wait_until_ready(lab.hosts["b"])
    assert none.ports == ()
    every = [address for port in many.ports for address in port.addresses]
    assert len(set(every)) == 8
    many.allow("tcp", ECHO_PORT)
    for address in every:
        with lab.outside.inside(), socket.create_connection((address, ECHO_PORT), 5) as connection:
            connection.sendall(b"?")
            assert connection.recv(1) == b"?"
    assert traffic.echo(lab, many, family=6, nic=1).samples()
    assert traffic.download(lab, many, nic=1).samples()
    zones = {host.zone(port) for host in lab.hosts.values() for port in many.ports}
    assert len(zones) == 4
    lab.remove_guest(none)
    lab.remove_guest(many)


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_dies_without_its_entry_and_lives_with_a_copy(kind):
    with LibvirtLab(kind=kind) as lab:
        guests = [lab.add_guest(name, "a", is_awaited=False) for name in ("without", "copied")]
        downloads = []
        for guest in guests:
            guest.wait_until_ready(lab.hosts["a"])
            downloads.append(traffic.download(lab, guest, family=4 if kind == "bridge" else 6))
            guest.close_egress()
        carry(lab.hosts["a"], lab.hosts["b"], guests[1])
        migrations = [lab.start_migration(guest, "a", "b") for guest in guests]
        assert all(migration.wait().is_ok for migration in migrations)
        cuts = [migration.wait_for("RESUMED/MIGRATED", lab.hosts["b"]).time for migration in migrations]
        until = max(cuts) + WATCHED_SECONDS
        wait_until(lambda: all(each.samples()[-1].time > until for each in downloads), "the time that is watched", 10)
        lives = [has_survived(flow.samples(), cut, WATCHED_SECONDS) for flow, cut in zip(downloads, cuts, strict=True)]
        assert lives == [False, True]


def carry(source: LibvirtHost, destination: LibvirtHost, guest: Guest) -> None:
    """Copy the guest's TCP entries, with the zone translated."""
    for port in guest.ports:
        here, there = source.zone(port), destination.zone(port)
        for family in ("ipv4", "ipv6"):
            saved = source.run(["conntrack", "-L", "-f", family, "-p", "tcp", "-w", str(here), "-o", "save"])
            lines = [line for line in saved.splitlines() if any(each in line.split() for each in port.addresses)]
            text = "".join(f"{line.replace(f'-w {here}', f'-w {there}')}\n" for line in lines)
            if text:
                destination.run(["conntrack", "-R", "/dev/stdin"], text)


def test_dirtied_memory_arrives_whole(lab):
    guest = lab.add_guest("dirty", "a", memory_mib=192, dirty_mib=64)
    here, there = "a", "b"
    for _ in range(3):
        assert lab.migrate(guest, here, there).is_ok
        here, there = there, here
    guest.tell("echo alive")
    wait_until(lambda: "alive" in guest.console(lab.hosts[here]), "the guest to answer", 10)
    assert not any("CORRUPT" in guest.console(host) for host in lab.hosts.values())
    lab.remove_guest(guest)


RATE = 250
"""Packets a second: a gap is told to 4 ms, and an emulated guest bears eight such streams on half a processor."""


def test_streams_run_through_a_migration_with_a_measured_gap(lab):
    guest = lab.add_guest("streamer", "a")
    guest.allow("tcp", STREAM_PORT)
    guest.allow("udp", STREAM_PORT)
    # No firewall at all: nothing but the pause is measured.
    for host in lab.hosts.values():
        for command in ("iptables", "ip6tables"):
            host.run([command, "-I", "FORWARD", "-j", "ACCEPT"])
            host.run([command, "-t", "raw", "-I", "PREROUTING", "-j", "CT", "--notrack"])
    streams = Streams(lab)
    every = [
        streams.begin(guest, protocol, family, is_guests=is_guests, rate=RATE)
        for protocol in ("tcp", "udp")
        for family in (4, 6)
        for is_guests in (True, False)
    ]
    wait_until(lambda: is_steady_for_a_second(streams, every), "the machine to have time for 8 streams", 60)
    migration = lab.start_migration(guest, "a", "b")
    assert migration.wait().is_ok
    until = migration.wait_for("SUSPENDED/MIGRATED").time + 4
    for report in (streams.report(stream, migration.began_at, until) for stream in every):
        for direction in (report.to_outside, report.to_guest):
            assert direction.duplicates == 0
            assert 20 < direction.longest_gap_ms < 2500
    streams.stop()
    for host in lab.hosts.values():
        for command in ("iptables", "ip6tables"):
            host.run([command, "-D", "FORWARD", "-j", "ACCEPT"])
            host.run([command, "-t", "raw", "-D", "PREROUTING", "-j", "CT", "--notrack"])
    lab.remove_guest(guest)


def is_steady_for_a_second(streams: Streams, every: list[Stream]) -> bool:
    end = time.monotonic() + 1
    reports = [streams.report(stream, end - 1, end) for stream in every]
    directions = [direction for report in reports for direction in (report.to_outside, report.to_guest)]
    return all(direction.received > 0.95 * RATE and direction.lost == 0 for direction in directions)


# --- What the hosts say ----------------------------------------------------------------------------------------------


def test_plain(moves):
    migration = moves.start()
    assert migration.wait().is_ok
    migration.wait_for("STOPPED/MIGRATED")
    migration.wait_for("JOB_COMPLETED 5")
    assert hooks(migration, moves.destination) == INCOMING
    assert events(migration, moves.destination) == ["STARTED/MIGRATED", "RESUMED/MIGRATED"]
    assert hooks(migration, moves.source) == OUTGOING
    assert events(migration, moves.source) == ["SUSPENDED/MIGRATED", "STOPPED/MIGRATED"]


@pytest.mark.parametrize("operation", ["migrate", "prepare", "start", "started"])
def test_veto(moves, operation):
    with moves.destination.veto(operation):
        migration = moves.start()
        result = migration.wait()
    assert not result.is_ok
    assert "refused by the lab's hook" in result.words
    until_then = INCOMING[: INCOMING.index(f"{operation} begin") + 1]
    assert hooks(migration, moves.destination) == until_then + (OUTGOING if operation != "migrate" else [])
    assert [entry for entry in migration.entries() if not entry.is_hook] == []
    assert moves.state(moves.source).startswith("running")


def test_abort_while_copying(moves):
    migration = moves.start(bandwidth=4)
    migration.wait_until_copying()
    migration.abort()
    assert CANCELED in migration.wait().words
    moves.stays(migration)
    assert events(migration, moves.source) == []


def test_qemu_killed_while_copying(moves):
    migration = moves.start(bandwidth=4)
    migration.wait_until_copying()
    moves.destination.kill_qemu(moves.guest.name)
    assert not migration.wait().is_ok
    moves.stays(migration)
    assert events(migration, moves.source) == []


def test_abort_in_the_pause(moves):
    with moves.source.slow_cable(100):
        migration = moves.start()
        migration.wait_until_paused()
        migration.abort()
    assert not migration.wait().is_ok  # "canceled by client", or what QEMU said last
    moves.stays(migration)
    assert events(migration, moves.source) == ["SUSPENDED/MIGRATED", "RESUMED/UNPAUSED"]


def test_qemu_killed_in_the_pause(moves):
    with moves.source.slow_cable(32):
        migration = moves.start()
        migration.wait_until_paused()
        moves.destination.kill_qemu(moves.guest.name)
        assert not migration.wait().is_ok
    moves.stays(migration)
    assert events(migration, moves.source) == ["SUSPENDED/MIGRATED", "RESUMED/UNPAUSED"]


def test_qemu_dies_when_all_is_sent(moves):
    with moves.source.slow_cable(160):
        migration = moves.start()
        migration.wait_until_paused()
        with moves.destination.frozen_libvirtd():
            migration.wait_until_all_is_sent()
            moves.destination.kill_qemu(moves.guest.name)
    assert not migration.wait().is_ok
    moves.stays(migration)
    assert events(migration, moves.source) == ["SUSPENDED/MIGRATED", "RESUMED/MIGRATED"]


def test_postcopy_and_its_abort(moves):
    migration = moves.start(bandwidth=16, is_postcopy=True)
    migration.wait_until_copying()
    migration.switch_to_postcopy()
    migration.wait_for("RESUMED/POSTCOPY", moves.destination)
    with pytest.raises(CommandFailed, match="cannot abort migration in post-copy mode"):
        migration.abort()
    assert migration.wait().is_ok
    migration.wait_for("STOPPED/MIGRATED")
    assert hooks(migration, moves.destination) == INCOMING
    assert events(migration, moves.destination) == ["STARTED/MIGRATED", "RESUMED/POSTCOPY", "RESUMED/MIGRATED"]
    assert events(migration, moves.source) == ["SUSPENDED/MIGRATED", "SUSPENDED/POSTCOPY", "STOPPED/MIGRATED"]


def test_qemu_killed_in_postcopy(moves):
    migration = moves.start(bandwidth=4, is_postcopy=True)
    migration.wait_until_copying()
    migration.switch_to_postcopy()
    migration.wait_for("RESUMED/POSTCOPY", moves.destination)
    moves.destination.kill_qemu(moves.guest.name)
    assert not migration.wait().is_ok
    migration.wait_for("STOPPED/FAILED", moves.destination)
    migration.wait_for("SUSPENDED/POSTCOPY_FAILED")
    assert hooks(migration, moves.destination) == [*INCOMING, *OUTGOING]
    assert moves.state(moves.source) == "paused (post-copy failed)"


def test_suspended_at_the_destination(moves):
    migration = moves.start(is_suspended=True)
    assert migration.wait().is_ok
    migration.wait_for("STOPPED/MIGRATED")
    assert "RESUMED/MIGRATED" not in events(migration, moves.destination)
    assert moves.state(moves.destination).startswith("paused")
    moves.destination.virsh("resume", moves.guest.name)


def test_a_guest_paused_by_its_user(moves):
    moves.source.virsh("suspend", moves.guest.name)
    migration = moves.start()
    assert migration.wait().is_ok
    migration.wait_for("STOPPED/MIGRATED")
    assert moves.state(moves.destination).startswith("paused")
    moves.destination.virsh("resume", moves.guest.name)


def test_offline(lab):
    guest = lab.add_guest("offline", "a", is_persistent=True)
    lab.hosts["a"].virsh("destroy", guest.name)
    migration = lab.start_migration(guest, "a", "b", "--offline", "--persistent", "--undefinesource")
    assert migration.wait().is_ok
    migration.wait_for("DEFINED", lab.hosts["b"])
    assert lab.state(guest, "a") == ""
    assert lab.state(guest, "b").startswith("shut off")
    lab.hosts["b"].virsh("start", guest.name)
    guest.wait_until_ready(lab.hosts["b"])
    lab.remove_guest(guest)


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_libvirtd_of_the_destination_restarted_while_copying(moves, with_signal):
    migration = moves.start(bandwidth=4)
    migration.wait_until_copying()
    moves.lab.restart_libvirtd(moves.destination.name, with_signal)
    assert migration.wait().words == "error: internal error: client socket is closed"
    migration.wait_for("release end", moves.destination)
    assert hooks(migration, moves.destination) == [*INCOMING, *OUTGOING]
    assert [entry for entry in migration.entries() if "STOPPED" in entry.what] == []  # who was to hear it was not there
    assert moves.state(moves.source).startswith("running")


def test_libvirtd_of_the_source_killed_while_copying(moves):
    migration = moves.start(bandwidth=4)
    migration.wait_until_copying()
    moves.lab.restart_libvirtd(moves.source.name, signal.SIGKILL)
    assert not migration.wait().is_ok
    migration.wait_for("STOPPED/DESTROYED", moves.destination)
    migration.wait_for("reconnect begin")
    assert hooks(migration, moves.destination) == [*INCOMING, *OUTGOING]
    assert hooks(migration, moves.source) == ["reconnect begin"]
    assert moves.state(moves.source).startswith("running")


def test_libvirtd_of_the_source_ends_a_migration_before_it_ends_itself(moves):
    migration = moves.start(bandwidth=16)
    migration.wait_until_copying()
    moves.lab.restart_libvirtd(moves.source.name)
    assert not migration.wait().is_ok  # virsh has lost its libvirtd
    assert events(migration, moves.destination) == ["STARTED/MIGRATED", "RESUMED/MIGRATED"]
    assert hooks(migration, moves.source) == OUTGOING
    assert moves.state(moves.destination).startswith("running")


def test_three_guests_at_once(lab):
    guests = [lab.add_guest(f"g{number}", "a", is_awaited=False) for number in range(3)]
    for guest in guests:
        guest.wait_until_ready(lab.hosts["a"])
    migrations = [lab.start_migration(guest, "a", "b") for guest in guests]
    assert [migration.wait().is_ok for migration in migrations] == [True] * 3
    for migration in migrations:
        migration.wait_for("STOPPED/MIGRATED")
        assert hooks(migration, lab.hosts["b"]) == INCOMING
        lab.remove_guest(migration.guest)


def test_a_hook_that_is_added_is_called_from_then_on(moves):
    hook = moves.lab.folder / "hook"
    hook.write_text("#!/bin/sh\necho $2 >>/run/lab/own\n")
    moves.destination.install_hook(hook)
    assert moves.start().wait().is_ok
    assert (moves.destination.folder / "own").read_text().split() == ["migrate", "prepare", "start", "started"]
    moves.destination.remove_hook()
