"""Hosts of OVN with the kernel's datapath, and guests that move between them as libvirt and Neutron move them.

The hosts' switches, their datapaths and conntrack tables are in the hosts' own network namespaces, in one kernel, which
has to have Open vSwitch (`lab.kernels`). Between the hosts are Geneve tunnels. The outside, which no rule keeps from
anything, is a port of the same logical switch, and stays on the first host.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from lab import addresses, isolation
from lab.deadline import wait_until
from lab.errors import LabUnavailable
from lab.guest import LINK, Guest
from lab.migration import Migration, Record, Tell, tell_nobody
from lab.namespace import Namespace
from lab.open_vswitch import Central, Chassis
from lab.port import Port, Rules

SWITCH, SECURED = "net", "secured"
CABLE_MTU = 1600  # guests keep theirs: a tunnel's headers have room beside it
ETH_RARP = 0x8035
SETTLE_SECONDS = 30.0
NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"
_numbers = itertools.count()


class OvnHost:
    """One host, as `lab.host.Host` to who moves guests. Its switch and controller end with the lab."""

    def __init__(self, name: str, number: int, lab: OvnLab) -> None:
        self.name = name
        self.namespace = Namespace(f"{lab.prefix}host-{name}")
        self.netns_path = self.namespace.path
        self.address = f"10.91.0.{1 + number}"
        folder = lab.folder / f"ovn-{name}"
        folder.mkdir()
        self.chassis = Chassis(
            folder,
            name,
            lab.central.southbound,
            address=self.address,
            datapath="system",
            start=self.namespace.start,
        )
        self._lab = lab
        self._taps: set[str] = set()

    def expect(self, guest: Guest) -> None:
        """The guest's empty shell runs here: QEMU has made its tap, libvirt plugs it in, Neutron has asked for it."""
        self._lab.bind(guest, [*([guest.host.name] if guest.host else []), self.name])
        self.plug(guest.port, _other_end(guest.port))
        self._taps.add(guest.tap)

    def expect_no_more(self, guest: Guest) -> None:
        """It will not come, or it is here. May be repeated."""
        if guest.tap in self._taps and guest.host is not self:
            self.unplug(guest.tap)

    def welcome(self, guest: Guest) -> None:
        """The guest has the other end of its tap here."""
        if guest.tap not in self._taps:
            self.expect(guest)
        self.namespace.ip(f"link set {_other_end(guest.port)} netns {guest.namespace.name} name {LINK}")

    def release(self, guest: Guest, namespace: Namespace) -> None:
        """The guest has left, wherever to: its tap ends, and its link with that."""
        self.unplug(guest.tap)

    def plug(self, port: Port, other_end: str) -> None:
        """Make a port's tap, whose other end is a device of this name, and put it into the integration bridge."""
        self.namespace.ip(
            f"link add {port.tap} type veth peer name {other_end} address {port.mac}", f"link set {port.tap} up"
        )
        self.chassis.plug(port.tap, port.id, port.mac, kind="system")

    def unplug(self, tap: str) -> None:
        """The tap ends."""
        self._taps.discard(tap)
        self.chassis.unplug(tap)
        self.namespace.ip(f"link delete {tap}")

    def passes_on(self, guest: Guest) -> bool:
        """What a guest says before OVN has heard of it is lost; whoever cares waits for `zone`."""
        return True

    def zone(self, guest: Guest) -> int:
        """The conntrack zone that OVN gave the guest's port here. Raises CommandFailed where it has none."""
        return self.zone_of(guest.port.id)

    def zone_of(self, port: str) -> int:
        """Of a logical port."""
        told = self.chassis.vsctl("get", "bridge", "br-int", f"external_ids:ct-zone-{port}")
        return int(told.strip().strip('"'))

    def is_installed(self, tap: str) -> bool:
        """Whether OVN says that all the port's flows are in place."""
        told = self.chassis.vsctl("--if-exists", "get", "interface", tap, "external_ids:ovn-installed")
        return told.strip() == '"true"'

    def compute_anew(self, guest: Guest) -> None:
        """OVN does so while the guest is expected; returns when the bridge does not say any more what it may send from.

        Until the port is bound here OVN writes that when it hears of the port, and does not when it computes all anew.
        """
        bridge = f"unix:{self.chassis.folder}/br-int.mgmt"

        def is_unsaid() -> bool:
            self.chassis.recompute()
            return guest.port.mac not in self.chassis.run("ovs-ofctl", "dump-flows", bridge, "table=73")

        central, port = self._lab.central, guest.port.id
        for what, condition in (
            ("the port to be expected", lambda: central.binding(port, "additional_chassis")),
            (f"OVN to install {guest.tap}", lambda: self.is_installed(guest.tap)),
        ):
            wait_until(condition, what, SETTLE_SECONDS, poll_seconds=0.1)
        wait_until(is_unsaid, "the port's addresses to be gone", SETTLE_SECONDS, poll_seconds=0.5)

    def run(self, argv: Sequence[str], text: str | None = None) -> str:
        """See Namespace.run."""
        return self.namespace.run(argv, text)

    def start(self, argv: Sequence[str], **options) -> subprocess.Popen:
        """See Namespace.start."""
        return self.namespace.start(argv, **options)

    def close(self) -> None:
        """Delete it, its processes included. May be repeated."""
        self.namespace.close()


class OvnGuest(Guest):
    """One that says where it is, as QEMU does for it: until OVN hears that, nothing of a guest that came may pass."""

    def link_up(self) -> None:
        super().link_up()
        hardware = bytes.fromhex(self.port.mac.replace(":", ""))
        head = b"\xff" * 6 + hardware + struct.pack("!H", ETH_RARP)
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 3) + (hardware + bytes(4)) * 2
        with self.namespace.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packet:
            packet.bind((LINK, 0))
            packet.send((head + body).ljust(60, b"\0"))


class OvnLab:
    """A context manager, as `lab.lab.Lab`. Guests may begin what they like; to them only what answers may come."""

    def __init__(self, hosts: Sequence[str] = ("a", "b")) -> None:
        self._host_names = tuple(hosts)
        self.hosts: dict[str, OvnHost] = {}
        self.guests: dict[str, OvnGuest] = {}

    def __enter__(self) -> OvnLab:
        """Build it. Raises LabUnavailable outside of a world, and where something is not installed."""
        if not isolation.is_inside():
            raise LabUnavailable("this process is not in a world of the lab", f"run it with: {isolation.HOW}")
        self.prefix = f"ovn{os.getpid()}-{next(_numbers)}-"
        self.folder = Path(tempfile.mkdtemp(prefix=self.prefix, dir="/run"))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            central = self.folder / "central"
            central.mkdir()
            self.central = stack.enter_context(Central(central))
            for number, name in enumerate(self._host_names):
                host = OvnHost(name, number, self)
                stack.callback(host.close)
                self.hosts[name] = host
            cables = Namespace(f"{self.prefix}cables")
            stack.callback(cables.close)
            self._lay_cables(cables)
            for host in self.hosts.values():
                stack.enter_context(host.chassis)
            self.outside = Namespace(f"{self.prefix}outside")
            stack.callback(self.outside.close)
            self._set_up_switch()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _lay_cables(self, cables: Namespace) -> None:
        cables.ip(f"link add cables mtu {CABLE_MTU} type bridge mcast_snooping 0 stp_state 0", "link set cables up")
        for host in self.hosts.values():
            cables.ip(
                f"link add to-{host.name} mtu {CABLE_MTU} type veth "
                f"peer name uplink mtu {CABLE_MTU} netns {host.namespace.name}",
                f"link set to-{host.name} master cables up",
            )
            host.namespace.ip(f"address add {host.address}/24 dev uplink", "link set uplink up")

    def _set_up_switch(self) -> None:
        """As Neutron writes a network, and a security group that lets guests begin and nobody else."""
        self.nbctl("ls-add", SWITCH, "--", "pg-add", SECURED)
        for direction, side in (("from-lport", "inport"), ("to-lport", "outport")):
            self.nbctl("acl-add", SECURED, direction, "1001", f"{side} == @{SECURED} && ip", "drop")
        for family in ("ip4", "ip6"):
            self.nbctl("acl-add", SECURED, "from-lport", "1002", f"inport == @{SECURED} && {family}", "allow-related")
        both = (addresses.OUTSIDE_V4, addresses.OUTSIDE_V6)
        port = Port("outside", -1, "tap-outside", addresses.OUTSIDE_MAC, both, Rules())
        self._add_port(port)
        home = self.hosts[self._host_names[0]]
        home.plug(port, "vm-outside")
        home.namespace.ip(f"link set vm-outside netns {self.outside.name} name {LINK}")
        self.outside.ip(
            f"address add {addresses.OUTSIDE_V4}/24 dev {LINK}",
            f"address add {addresses.OUTSIDE_V6}/64 dev {LINK} nodad",
            f"link set {LINK} up",
        )
        self._wait_for(home, port.tap)

    def add_guest(self, name: str, host: str) -> OvnGuest:
        """Make a guest there; it can talk when this returns. It has one IPv4 and one IPv6 address."""
        number, here = len(self.guests), self.hosts[host]
        own, port_id = addresses.guest_addresses(number), str(uuid.uuid4())
        port = Port(port_id, number, f"tap{port_id[:11]}", addresses.guest_mac(number), own, Rules())
        self._add_port(port, is_secured=True)
        guest = OvnGuest(name, str(uuid.uuid4()), port, self.prefix, False, lambda changed: None)
        self._stack.callback(guest.close)
        here.welcome(guest)
        guest.host = here  # type: ignore[assignment]
        self.outside.ip(*(f"neigh replace {one} lladdr {port.mac} dev {LINK} nud permanent" for one in own))
        guest.link_up()
        self._wait_for(here, guest.tap)
        self.guests[name] = guest
        return guest

    def migrate(self, guest: Guest, source: str, destination: str, tell: Tell = tell_nobody, **more) -> Record:
        """See `lab.lab.Lab.migrate`. Neutron gives the port to the destination alone once the guest has left here."""
        move = Migration(
            fabric=self,  # type: ignore[arg-type]
            guest=guest,
            source=self.hosts[source],  # type: ignore[arg-type]
            destination=self.hosts[destination],  # type: ignore[arg-type]
            tell=tell,
            **{"copy_seconds": 0.5, "pause_seconds": 0.12, "is_port_early": True, "at": {}, **more},
        )
        try:
            return move.run()
        finally:
            assert guest.host is not None
            self.bind(guest, [guest.host.name])

    def bind(self, guest: Guest, hosts: Iterable[str]) -> None:
        """What Neutron asks of OVN: the port is the first host's, and a second's once the guest is heard there."""
        chosen = list(hosts)
        options = [f"requested-chassis={','.join(chosen)}"]
        if len(chosen) > 1:
            options.append("activation-strategy=rarp")
        self.nbctl("lsp-set-options", guest.port.id, *options)

    def announce(self, port: Port, host: object) -> None:
        """Nothing to say for the guest: it says itself where it is, and OVN hears it."""

    def nbctl(self, *arguments: str) -> str:
        """See `Central.nbctl`."""
        return self.central.nbctl(*arguments)

    def _add_port(self, port: Port, *, is_secured: bool = False) -> None:
        said = " ".join((port.mac, *port.addresses))
        self.nbctl("lsp-add", SWITCH, port.id, "--", "lsp-set-addresses", port.id, said)
        if is_secured:
            members = [*(guest.port.id for guest in self.guests.values()), port.id]
            self.nbctl("lsp-set-port-security", port.id, said, "--", "pg-set-ports", SECURED, *members)

    def _wait_for(self, host: OvnHost, tap: str) -> None:
        wait_until(lambda: host.is_installed(tap), f"OVN to install {tap}", SETTLE_SECONDS, poll_seconds=0.1)


def _other_end(port: Port) -> str:
    """What is the guest's link later."""
    return f"vm-{port.number}"


def domain_xml(guest: Guest, *, says_addresses: bool = True) -> str:
    """libvirt's description of the guest, as far as it is of its port; the addresses are said by Nova's metadata."""
    found = "".join(f"<nova:ip address='{address}'/>" for address in guest.addresses)
    told = f"<nova:ports><nova:port uuid='{guest.port.id}'>{found}</nova:port></nova:ports>"
    nova = f"<nova:instance xmlns:nova='{NOVA}'>{told if says_addresses else ''}</nova:instance>"
    return (
        f"<domain type='qemu'><name>{guest.name}</name><uuid>{guest.uuid}</uuid><metadata>{nova}</metadata>"
        f"<devices><interface type='bridge'><mac address='{guest.port.mac}'/><source bridge='br-int'/>"
        f"<target dev='{guest.tap}'/><virtualport type='openvswitch'><parameters interfaceid='{guest.port.id}'/>"
        "</virtualport></interface></devices></domain>"
    )
