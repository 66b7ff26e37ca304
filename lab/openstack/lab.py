"""The lab: a controller and two compute hosts, the network between them, and the outside."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from lab import isolation
from lab.broker import Broker
from lab.deadline import wait_until
from lab.errors import LabUnavailable
from lab.fabric import SILENCE
from lab.libvirt import parts as libvirt_parts
from lab.libvirt.journal import Journal
from lab.libvirt.lab import WATCH
from lab.libvirt.machine import UNDERLAY, Machine
from lab.libvirt.relay import Relay
from lab.namespace import Namespace
from lab.openstack import addresses, content, golden, parts, settings
from lab.openstack.api import Cloud, wait_for
from lab.openstack.compute import ComputeHost
from lab.openstack.controller import Controller
from lab.openstack.guest import Guest
from lab.openstack.migration import Migration

START_SECONDS = 180.0
POLL_SECONDS = 0.2
_numbers = itertools.count()


def _silent(line: str) -> None:
    """Nobody wants to know."""


class OpenStackLab:
    """A context manager: `with OpenStackLab() as lab`. Runs only in a world (`lab.isolation`) of the machine's root,
    one in each, and where `tools/prepare openstack` has run.

    `hosts` are the compute hosts by name, `cloud` is the APIs, `broker` is RabbitMQ and `relays` the ways to it by
    machine, `journal` is what libvirt and the lab's hook of all hosts said. `folder` is private, seen at the same path
    in every machine, and goes with the lab. Threads may share a lab.
    """

    def __init__(self, say: Callable[[str], None] = _silent, *, logs: Path | None = None, is_new: bool = False) -> None:
        """`say` takes lines for people. The folder `logs` gets all logs when the lab ends, however it ends, and whether
        it came up or not. With `is_new` what is kept of an earlier lab is not used."""
        self.hosts: dict[str, ComputeHost] = {}
        self.guests: dict[str, Guest] = {}
        self.relays: dict[str, Relay] = {}
        self._say = say
        self._logs = logs
        self._is_new = is_new
        self._guest_numbers = itertools.count()

    def __enter__(self) -> OpenStackLab:
        """Build it; guests can be made when it returns. Blocks a minute, the first time two. Raises LabUnavailable."""
        if not isolation.is_inside():
            raise LabUnavailable("this process is not in a world of the lab", f"run it with: {isolation.HOW}")
        parts.check()
        began_at, self._began_at = time.monotonic(), _now()
        prefix = f"os{os.getpid()}-{next(_numbers)}-"
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/run"))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            if self._logs is not None:
                stack.callback(self.save_logs, self._logs)
            self._build(prefix, stack)
            self._stack = stack.pop_all()
        self._say(f"the lab is up after {time.monotonic() - began_at:.0f} s")
        return self

    def __exit__(self, *error: object) -> None:
        """End all guests, machines and processes and delete everything."""
        self._stack.close()

    def save_logs(self, folder: Path) -> None:
        """Copy what all processes of the machines said, and libvirt of their guests; replaces what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for pattern in ("host-*/*.log", "host-*/var/log/libvirt/qemu/*.log", "agent-*/*.log", "events"):
            for log in self.folder.glob(pattern):
                shutil.copy(log, folder / "-".join(log.relative_to(self.folder).parts))

    # --- Guests ------------------------------------------------------------------------------------------------------

    def add_guest(self, name: str, host: str, network: str = "net1", *, is_awaited: bool = True) -> Guest:
        """Have Nova boot a guest on a host. Blocks until it is ready, unless `is_awaited` is False: then
        `Guest.wait_until_ready` must follow."""
        guest = Guest(self.cloud, self.outside, name, next(self._guest_numbers), network, host)
        self.guests[name] = guest
        if is_awaited:
            guest.wait_until_ready()
        return guest

    def remove_guest(self, guest: Guest) -> None:
        """Have Nova delete it; blocks until it is gone."""
        guest.delete()
        self.guests.pop(guest.name, None)

    def start_migration(self, guest: Guest, destination: str | None = None) -> Migration:
        """Ask Nova to move a guest, to the other host where none is named. Does not block."""
        source = guest.host
        other = next(name for name in self.hosts if name != source)
        return Migration(self.cloud, guest, source, destination or other, self.journal)

    def restart_nova_compute(self, *names: str) -> None:
        """On these hosts at once, or on all. Blocks until they report again."""
        hosts = names or tuple(self.hosts)
        for name in hosts:
            self.hosts[name].nova_compute.restart()
        self.wait_until_nova_reports(*hosts)

    def wait_until_nova_reports(self, *names: str) -> None:
        """Blocks until nova-compute of these hosts, which was started a moment ago, has reported."""
        since = _now()

        def report() -> bool:
            for name in names:
                self.hosts[name].nova_compute.check()
            return self._nova_reported(since) >= set(names)

        wait_for(report, f"nova-compute of {' and '.join(names)} to report", START_SECONDS)

    def lead_outside_to_controller(self) -> None:
        """From now on who is outside reaches the APIs, and the controller answers guests by way of the outside. Call
        once."""
        self._connect(self.outside, "out", "under", UNDERLAY)
        self.outside.ip(f"address add {addresses.OUTSIDE_UNDERLAY}/24 dev {UNDERLAY}")
        self.controller.namespace.ip(f"route add {addresses.ALL_NETWORKS} via {addresses.OUTSIDE_UNDERLAY}")

    # --- Building ----------------------------------------------------------------------------------------------------

    def _build(self, prefix: str, stack: contextlib.ExitStack) -> None:
        self._say("machines")
        self._lay_network(prefix, stack)
        controller = self.controller = Controller(self._namespace(prefix, addresses.CONTROLLER, stack), self.folder)
        self._boot(controller, stack)
        for name in addresses.COMPUTES:
            host = self.hosts[name] = ComputeHost(self._namespace(prefix, name, stack), name, self.folder)
            self._boot(host, stack)
            for number in addresses.NETWORKS.values():
                self._connect(host.namespace, name, addresses.provider(number))
            host.start_libvirtd()
        self.cloud = Cloud(controller.namespace)
        self.journal = Journal(
            self.folder / "events", {name: host.folder / "hooks" for name, host in self.hosts.items()}
        )
        self._start_watch(stack)

        self._say("RabbitMQ and MariaDB")
        is_old = not self._is_new and golden.restore(controller.data)
        self.broker = Broker(self.folder, settings.BROKER_PORT)
        stack.callback(self.broker.stop)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda start: start(), (self.broker.start, controller.start_database)))
        for machine in (controller, *self.hosts.values()):
            self.relays[machine.name] = machine.relay(self.broker.port)
        if not is_old:
            self._say("schemas: once, they are kept for the next lab")
            controller.make_schemas()

        self._say("Keystone, Placement, Glance, Neutron and Nova")
        self._start("keystone")
        self._await("keystone")
        if not is_old:
            content.register(self.cloud)
        # The scheduler looks for Placement in the catalogue once, at its start.
        self._start("placement", "neutron-server", "glance-api", "nova-conductor", "nova-api", "nova-scheduler")
        self._await("placement", "neutron")
        for host in self.hosts.values():
            host.neutron_agent.start()
            host.nova_compute.start()
        self._await("nova", "glance")
        if not is_old:
            content.fill(self.cloud)
        wait_for(self._is_complete, "nova-compute and Neutron's agents of all hosts to report", START_SECONDS)
        if not is_old:
            controller.manage_nova("cell_v2", "discover_hosts")
        self._plug_anchors()
        if not is_old:
            self._keep()

    def _lay_network(self, prefix: str, stack: contextlib.ExitStack) -> None:
        self._fabric = self._namespace(prefix, "fabric", stack)
        self.outside = self._namespace(prefix, "outside", stack)
        for namespace in (self._fabric, self.outside):
            for family in ("iptables", "ip6tables", "arptables"):
                namespace.sysctl(f"net.bridge.bridge-nf-call-{family}", 0)
        for bridge in ("under", *map(addresses.provider, addresses.NETWORKS.values())):
            self._fabric.ip(f"link add {bridge} type bridge mcast_snooping 0 stp_state 0", f"link set {bridge} up")
        for number in addresses.NETWORKS.values():
            link = addresses.provider(number)
            self._connect(self.outside, "out", link)
            self.outside.ip(f"address add {addresses.outside(number)}/24 dev {link}")
        self.outside.run(["nft", "-f", "-"], SILENCE)

    def _namespace(self, prefix: str, name: str, stack: contextlib.ExitStack) -> Namespace:
        namespace = Namespace(prefix + name)
        stack.callback(namespace.close)
        return namespace

    def _connect(self, namespace: Namespace, name: str, bridge: str, link: str = "") -> None:
        """A cable from a bridge of the fabric; its end is called as the bridge unless another name is given."""
        end = link or bridge
        self._fabric.ip(
            f"link add {bridge}-{name[:4]} type veth peer name {end} netns {namespace.name}",
            f"link set {bridge}-{name[:4]} master {bridge} up",
        )
        namespace.ip(f"link set {end} up")

    def _boot(self, machine: Machine, stack: contextlib.ExitStack) -> None:
        stack.callback(machine.close)
        self._connect(machine.namespace, machine.name, "under", UNDERLAY)
        machine.boot()

    def _start_watch(self, stack: contextlib.ExitStack) -> None:
        sockets = [f"{name}={host.outer_socket}" for name, host in self.hosts.items()]
        words = [sys.executable, "-m", WATCH, str(self.folder / "events"), *sockets]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=libvirt_parts.FOLDER.parent)
        stack.callback(process.wait)
        stack.callback(process.kill)

    def _start(self, *names: str) -> None:
        for name in names:
            self.controller.services[name].start()

    def _await(self, *apis: str) -> None:
        def answer(api: str) -> bool:
            for service in self.controller.services.values():
                service.check()
            return self.cloud.answers(api)

        for api in apis:
            wait_for(partial(answer, api), f"{api} to answer", START_SECONDS)

    def _is_complete(self) -> bool:
        for host in self.hosts.values():
            host.nova_compute.check()
            host.neutron_agent.check()
        agents = self.cloud.get("network", "/agents")["agents"]
        reported = {one["host"] for one in agents if one["heartbeat_timestamp"].replace(" ", "T") > self._began_at}
        return set(self.hosts) <= self._nova_reported(self._began_at) & reported

    def _nova_reported(self, since: str) -> set[str]:
        computes = self.cloud.get("compute", "/os-services?binary=nova-compute")["services"]
        return {one["host"] for one in computes if one["state"] == "up" and (one["updated_at"] or "") > since}

    def _plug_anchors(self) -> None:
        """In another order on each host, so that no network has the same conntrack zone on both."""
        anchors = {(anchor.host, anchor.network): anchor for anchor in content.anchors(self.cloud)}
        names = list(addresses.NETWORKS)
        orders = {host: names[index:] + names[:index] for index, host in enumerate(self.hosts)}
        for round_number in range(len(names)):
            for name, host in self.hosts.items():
                host.plug(anchors[name, orders[name][round_number]])
            for name, host in self.hosts.items():
                wait_until(
                    lambda host=host, count=round_number + 1: len(host.zones()) >= count,  # type: ignore[misc]
                    f"zone {round_number + 1} of {name}",
                    START_SECONDS,
                    poll_seconds=POLL_SECONDS,
                )

    def _keep(self) -> None:
        self._say("the filled cloud is kept for the next lab")
        self.controller.stop_database()
        golden.keep(self.controller.data)
        self.controller.start_database()


def _now() -> str:
    """As services write moments; a later one is greater, and what is in a kept cloud is smaller."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
