"""The lab: hosts, the network between them, guests."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import addresses, isolation
from lab.errors import LabError, LabUnavailable
from lab.fabric import BridgedFabric, RoutedFabric
from lab.guest import Guest
from lab.host import Host
from lab.migration import Action, Migration, Record, Tell, tell_nobody
from lab.namespace import Namespace
from lab.port import Port, Rules

KINDS = ("bridge", "shared", "routed")
_numbers = itertools.count()


class Lab:
    """A context manager: `with Lab(hosts=("a", "b"), kind="bridge") as lab`. Runs only in a world (`lab.isolation`).

    `hosts` maps names to hosts, `guests` names to guests; `folder` is private and goes with the lab. Kinds of host:
    "bridge" filters on a bridge with a conntrack zone per port, "shared" the same with one zone for all ports of a
    host, "routed" routes to each guest. Threads may share a lab. Several labs may be in one world.
    """

    def __init__(self, hosts: Sequence[str] = ("a", "b"), kind: str = "bridge") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        self.kind = kind
        self._host_names = tuple(hosts)
        self.hosts: dict[str, Host] = {}
        self.guests: dict[str, Guest] = {}

    def __enter__(self) -> Lab:
        """Build it. Raises LabUnavailable outside of a world, and where the kernel lacks what the kind needs."""
        if not isolation.is_inside():
            raise LabUnavailable("this process is not in a world of the lab", f"run it with: {isolation.HOW}")
        if self.kind != "routed" and not os.path.exists("/proc/sys/net/bridge/bridge-nf-call-iptables"):
            raise LabUnavailable("the kernel has no br_netfilter", "run as root: modprobe br_netfilter")
        prefix = f"lab{os.getpid()}-{next(_numbers)}-"
        self._prefix = prefix
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/run"))
        self._open: list = []
        try:
            self.fabric = RoutedFabric(prefix) if self.kind == "routed" else BridgedFabric(prefix)
            self._open.append(self.fabric)
            for number, name in enumerate(self._host_names):
                host = Host(name, number, prefix, self.kind, self.folder)
                self._open.append(host)
                self.fabric.connect(host)
                host.set_up()
                self.hosts[name] = host
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End all processes and delete everything."""
        self._close()

    @property
    def outside(self) -> Namespace:
        """The client outside, at `addresses.OUTSIDE_V4` and `OUTSIDE_V6`."""
        return self.fabric.outside

    def add_guest(
        self,
        name: str,
        host: str | Host,
        *,
        addresses_too: Sequence[str] = (),
        rules: Rules = Rules(),  # noqa: B008, a frozen value
        on: Sequence[str] | None = None,
        is_translated: bool = False,
    ) -> Guest:
        """Make a guest on `host` and program its port on all hosts, or only on those named in `on`.

        It has one IPv4 and one IPv6 address, and `addresses_too`; the outside knows it by others if it `is_translated`,
        which takes routed hosts. Names are short: the tap is called tap-NAME.
        """
        if name in self.guests or not 0 < len(name) <= 11:
            raise LabError(f"a guest's name is new and has 1 to 11 characters, {name!r} is not")
        if is_translated and self.kind != "routed":
            raise LabError(f"hosts of the kind {self.kind} translate no guest's addresses")
        number = len(self.guests)
        port = Port(
            id=str(uuid.uuid4()),
            number=number,
            tap=f"tap-{name}",
            mac=addresses.guest_mac(number),
            addresses=(*addresses.guest_addresses(number), *addresses_too),
            rules=rules,
            public=addresses.public_addresses(number) if is_translated else (),
        )
        programmed = list(self.hosts) if on is None else list(on)

        def program(changed: Port) -> None:
            for each in programmed:
                there = self.hosts[each]
                there.firewall.program(there.as_here(changed))

        program(port)
        guest = Guest(name, str(uuid.uuid4()), port, self._prefix, self.kind == "routed", program)
        self._open.append(guest)
        here = self._host(host)
        guest.plug_in(here)
        here.welcome(guest)
        for other in self.guests.values():
            guest.know(other.addresses, other.port.mac)
            other.know(guest.addresses, guest.port.mac)
            other.link_up()
        self.fabric.introduce(port)
        guest.link_up()
        self.fabric.announce(port, here)
        self.guests[name] = guest
        return guest

    def renumber(self, guest: Guest, host: str | Host, *addresses_there: str) -> None:
        """Give the guest other addresses on a host where it is not, without it or its peers noticing: both translate.

        Of routed hosts only. One for each of its addresses, in their order.
        """
        if not isinstance(self.fabric, RoutedFabric):
            raise LabError(f"guests of hosts of the kind {self.kind} keep their addresses")
        self._host(host).renumber(guest.port, addresses_there)

    def migrate(
        self,
        guest: Guest,
        source: str | Host,
        destination: str | Host,
        tell: Tell = tell_nobody,
        *,
        copy_seconds: float = 0.5,
        pause_seconds: float = 0.12,
        is_port_early: bool = True,
        at: Mapping[str, Action | Sequence[Action]] | None = None,
    ) -> Record:
        """Move a guest as libvirt would and return when it is over; see `lab.migration`. Call it in a thread of its own
        to have several at once. The destination knows the port from `started` on, unless `is_port_early` is False: then
        only when the guest is there, as where a network's agent is slow. Raises IllegalMove when the guest is not on
        `source` or already migrates."""
        move = Migration(
            fabric=self.fabric,
            guest=guest,
            source=self._host(source),
            destination=self._host(destination),
            tell=tell,
            copy_seconds=copy_seconds,
            pause_seconds=pause_seconds,
            is_port_early=is_port_early,
            at=at or {},
        )
        return move.run()

    def _host(self, host: str | Host) -> Host:
        return host if isinstance(host, Host) else self.hosts[host]

    def _close(self) -> None:
        while self._open:
            self._open.pop().close()
        shutil.rmtree(self.folder, ignore_errors=True)
