"""The lab of real libvirt: hosts, the network between them, guests."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lab import isolation
from lab.addresses import guest_mac
from lab.deadline import wait_until
from lab.errors import CommandFailed, LabError, LabUnavailable
from lab.fabric import BridgedFabric
from lab.host import Host
from lab.libvirt import addresses, parts
from lab.libvirt.guest import Guest, Shape
from lab.libvirt.host import LibvirtHost
from lab.libvirt.journal import Journal
from lab.libvirt.machine import UNDERLAY
from lab.libvirt.migration import Migration, Result
from lab.namespace import Namespace
from lab.port import Port, Rules

KINDS = ("bridge", "shared")
START_SECONDS = 30.0
# Started by name: it needs libvirt-python, which this module does not.
WATCH = "lab.libvirt.watch"
_numbers = itertools.count()


class LibvirtLab:
    """A context manager: `with LibvirtLab(hosts=("a", "b"), kind="bridge") as lab`. Runs only in a world
    (`lab.isolation`) of the machine's root, and where `tools/prepare libvirt` has run.

    `hosts` maps names to hosts, `guests` names to guests, `journal` is what all hosts said; `folder` is private, seen
    at the same path in every host, and goes with the lab. Kinds of host: "bridge" has a conntrack zone per port, which
    differs from host to host, "shared" one for all ports of a host. Without `has_hook` hosts have no hook at all.
    Threads may share a lab.
    """

    def __init__(self, hosts: Sequence[str] = ("a", "b"), kind: str = "bridge", has_hook: bool = True) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        self.kind = kind
        self.hosts: dict[str, LibvirtHost] = {}
        self.guests: dict[str, Guest] = {}
        self._host_names = tuple(hosts)
        self._has_hook = has_hook
        self._port_numbers = itertools.count()
        self._address_numbers = itertools.count()

    def __enter__(self) -> LibvirtLab:
        """Build it; every libvirtd answers when it returns. Raises LabUnavailable with what to do about it."""
        if not isolation.is_inside():
            raise LabUnavailable("this process is not in a world of the lab", f"run it with: {isolation.HOW}")
        parts.check()
        prefix = f"lv{os.getpid()}-{next(_numbers)}-"
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/run"))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._build(prefix, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """End all guests, hosts and processes and delete everything."""
        self._stack.close()

    @property
    def outside(self) -> Namespace:
        """The client outside, at `addresses.outside(family, nic)`."""
        return self._fabric.outside

    def add_guest(
        self,
        name: str,
        host: str,
        *,
        nics: int = 1,
        addresses_per_nic: int = 1,
        memory_mib: int = 128,
        dirty_mib: int = 0,
        is_persistent: bool = False,
        rules: Rules = Rules(),  # noqa: B008, a frozen value
        is_awaited: bool = True,
    ) -> Guest:
        """Program a guest's ports on all hosts and boot it on `host`. Blocks until it is ready, unless `is_awaited` is
        False: then `Guest.wait_until_ready` must follow, and others may boot meanwhile.

        Every NIC has so many IPv4 and as many IPv6 addresses; nics=0 makes a guest without a port. Names are short:
        the first tap is called tap-NAME. A persistent guest is defined on `host`, another one is gone when it ends.
        """
        if name in self.guests or not 0 < len(name) <= 9 or not 0 <= nics <= addresses.NICS:
            raise LabError(
                f"a guest's name is new, of 1 to 9 characters, with 0 to {addresses.NICS} NICs, {name!r} not"
            )
        ports = [self._port(name, nic, addresses_per_nic, rules) for nic in range(nics)]
        shape = Shape(memory_mib, dirty_mib, is_persistent)
        guest = Guest(name, str(uuid.uuid4()), ports, shape, self._program, lambda: self.host_of(name))
        self.guests[name] = guest
        self.start_guest(guest, host, is_awaited=is_awaited)
        return guest

    def start_guest(self, guest: Guest, host: str, *, is_awaited: bool = True) -> None:
        """Boot a guest that is shut off, as `add_guest` does."""
        here = self.hosts[host]
        guest.console_path(here).unlink(missing_ok=True)
        if guest.shape.is_persistent:
            here.virsh("define", "/dev/stdin", text=guest.xml())
            here.virsh("start", guest.name)
        else:
            here.virsh("create", "/dev/stdin", text=guest.xml())
        if is_awaited:
            guest.wait_until_ready(here)

    def remove_guest(self, guest: Guest) -> None:
        """End it on every host, whatever its state, and forget its definitions and ports. Conntrack entries stay."""
        for host in self.hosts.values():
            for verb in ("destroy", "undefine"):
                with contextlib.suppress(CommandFailed):
                    host.virsh(verb, guest.name)
            for port in guest.ports:
                host.network.firewall.withdraw(port)
        self.guests.pop(guest.name, None)

    def state(self, guest: Guest, host: str) -> str:
        """libvirt's words for the guest's state there with the reason, "running (migrated)", "" where unknown."""
        try:
            return self.hosts[host].virsh("domstate", "--reason", guest.name)
        except CommandFailed:
            return ""

    def host_of(self, guest: str) -> LibvirtHost:
        """The host on which a guest runs. Raises LabError where it runs on none."""
        for host in self.hosts.values():
            if guest in host.virsh("list", "--name", "--state-running").split():
                return host
        raise LabError(f"guest {guest} runs on no host")

    def start_migration(
        self,
        guest: Guest,
        source: str,
        destination: str,
        *flags: str,
        bandwidth: int | None = None,
        is_postcopy: bool = False,
        is_suspended: bool = False,
    ) -> Migration:
        """Begin to move a guest, peer to peer and live (but with --offline); `flags` are virsh's. Does not block.

        `bandwidth` is in MiB/s, for copying and for post-copy, not for what is sent in the pause. `is_postcopy` permits
        Migration.switch_to_postcopy; with `is_suspended` the guest is left paused at the destination.
        """
        options = [*flags] if "--offline" in flags else ["--live", *flags]
        if is_postcopy:
            options.append("--postcopy")
        if is_suspended:
            options.append("--suspend")
        if bandwidth is not None:
            options += ["--bandwidth", str(bandwidth)]
            if is_postcopy:
                options += ["--postcopy-bandwidth", str(bandwidth)]
        return Migration(guest, self.hosts[source], self.hosts[destination], options, self.journal)

    def migrate(self, guest: Guest, source: str, destination: str, *flags: str, **options) -> Result:
        """As `start_migration`, and wait for its end."""
        return self.start_migration(guest, source, destination, *flags, **options).wait()

    def start_libvirtd(self, host: str) -> None:
        """Blocks until it answers and its events are heard."""
        before = self._watched(host)
        self.hosts[host].start_libvirtd()
        wait_until(lambda: self._watched(host) > before, f"libvirtd of {host} to answer", START_SECONDS)

    def restart_libvirtd(self, host: str, with_signal: int = signal.SIGTERM) -> None:
        """LibvirtHost.stop_libvirtd, then `start_libvirtd`."""
        self.hosts[host].stop_libvirtd(with_signal)
        self.start_libvirtd(host)

    # --- Building ----------------------------------------------------------------------------------------------------

    def _build(self, prefix: str, stack: contextlib.ExitStack) -> None:
        self._fabric = BridgedFabric(prefix)
        stack.callback(self._fabric.close)
        # The outside drops datagrams to higher ports (lab.fabric.SILENCE).
        self.outside.sysctl("net.ipv4.ip_local_port_range", "10000 19999")
        for nic in range(1, addresses.NICS):
            v4, v6 = addresses.outside(4, nic), addresses.outside(6, nic)
            self.outside.ip(f"address add {v4}/24 dev eth0", f"address add {v6}/64 dev eth0 nodad")
        self._fabric.namespace.ip("link add under type bridge mcast_snooping 0 stp_state 0", "link set under up")
        underlay = {name: addresses.underlay(number) for number, name in enumerate(self._host_names)}
        for number, name in enumerate(self._host_names):
            network = Host(name, number, prefix, self.kind, self.folder)
            host = LibvirtHost(network, self.folder, underlay)
            stack.callback(host.close)
            self._fabric.connect(network)
            self._fabric.namespace.ip(
                f"link add under-{name} type veth peer name {UNDERLAY} netns {network.namespace.name}",
                f"link set under-{name} master under up",
            )
            network.set_up()
            host.boot(has_hook=self._has_hook)
            host.start_libvirtd()
            self.hosts[name] = host
        hooks = {name: host.folder / "hooks" for name, host in self.hosts.items()}
        self.journal = Journal(self.folder / "events", hooks)
        self._start_watch(stack)
        for name in self._host_names:
            wait_until(partial(self._watched, name), f"libvirtd of {name} to answer", START_SECONDS)

    def _start_watch(self, stack: contextlib.ExitStack) -> None:
        sockets = [f"{name}={host.outer_socket}" for name, host in self.hosts.items()]
        words = [sys.executable, "-m", WATCH, str(self.folder / "events"), *sockets]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=parts.FOLDER.parent)
        stack.callback(process.wait)
        stack.callback(process.kill)

    def _watched(self, host: str) -> int:
        return sum(entry.what == "WATCHED" for entry in self.journal.entries("-", host=host))

    def _port(self, guest: str, nic: int, address_count: int, rules: Rules) -> Port:
        number = next(self._port_numbers)
        pairs = [addresses.guest(nic, next(self._address_numbers)) for _ in range(address_count)]
        return Port(
            id=str(uuid.uuid4()),
            number=number,
            tap=f"tap-{guest}" if nic == 0 else f"tap-{guest}-{nic}",
            mac=guest_mac(number),
            addresses=tuple(address for pair in pairs for address in pair),
            rules=rules,
        )

    def _program(self, ports: Sequence[Port]) -> None:
        for host in self.hosts.values():
            host.network.firewall.program(*ports)
