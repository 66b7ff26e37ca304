"""A real Open vSwitch, and OVN, of a test's own: Debian's packages, started by hand, gone with the test.

The datapath is by default the one in user space, which needs no module of the kernel. It tracks connections by itself,
so that is for what is read of the databases and flows; flows of guests in the kernel's table take `datapath="system"`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.agents import Start
from lab.deadline import wait_until
from lab.errors import CommandFailed, LabUnavailable
from lab.isolation import search_path

START_SECONDS = 30.0
_PACKAGES = {"ovs-vswitchd": "openvswitch-switch", "ovn-controller": "ovn-host", "ovn-northd": "ovn-central"}
_SCHEMAS = Path("/usr/share")


class Programs:
    """Daemons and their tools, with their files and sockets below `folder`. A context manager."""

    needed: tuple[str, ...] = ()

    def __init__(self, folder: Path, start: Start = subprocess.Popen) -> None:
        """`start` starts a process, as Popen does, where it is to run. Raises LabUnavailable: one is not installed."""
        for program in self.needed:
            if shutil.which(program, path=search_path()) is None:
                raise LabUnavailable(f"{program} is not installed", f"apt-get install {_PACKAGES[program]}")
        self.folder = folder
        folders = ("OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVN_RUNDIR", "OVN_DBDIR", "OVN_LOGDIR")
        self._environment = os.environ | {"PATH": search_path()} | dict.fromkeys(folders, str(folder))
        self._start_process = start
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _start(self) -> None:
        raise NotImplementedError

    def _serve(self, name: str, schema: Path) -> None:
        """Starts a database's server; its socket is called NAME.sock."""
        self.run("ovsdb-tool", "create", str(self.folder / f"{name}.db"), str(schema))
        socket = self.folder / f"{name}.sock"
        self._run_on(
            "ovsdb-server",
            str(self.folder / f"{name}.db"),
            f"--remote=punix:{socket}",
            f"--unixctl={self.folder}/{name}.ctl",
        )
        wait_until(socket.exists, f"{socket} to be there", START_SECONDS)

    def _run_on(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log", "ab") as log:
            process = self._start_process([program, *arguments], env=self._environment, stdout=log, stderr=log)
        self._started.append(process)
        return process

    def _stop(self) -> None:
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()

    def run(self, *command: str) -> str:
        """What a tool writes. Raises CommandFailed."""
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise CommandFailed(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout


class OpenVswitch(Programs):
    """A database, and ovs-vswitchd with an integration bridge."""

    needed = ("ovs-vswitchd",)

    def __init__(self, folder: Path, *, datapath: str = "netdev", start: Start = subprocess.Popen) -> None:
        super().__init__(folder, start)
        self.connection = f"unix:{folder}/db.sock"
        self.datapath = datapath

    def _start(self) -> None:
        self._serve("db", _SCHEMAS / "openvswitch" / "vswitch.ovsschema")
        self.vsctl("--no-wait", "init")
        self._run_on("ovs-vswitchd", self.connection, f"--unixctl={self.folder}/ovs-vswitchd.ctl")
        kind = f"datapath_type={self.datapath}"
        self.vsctl("add-br", "br-int", "--", "set", "bridge", "br-int", kind, "fail_mode=secure")

    def vsctl(self, *arguments: str) -> str:
        """Of the database of Open vSwitch."""
        return self.run("ovs-vsctl", f"--db={self.connection}", *arguments)

    def plug(self, tap: str, port: str, mac: str, kind: str = "internal", **more: str) -> int:
        """As libvirt does it; returns the port's number in flows. `more` is of the port, such as `tag`.

        A device that is there is of the kind `system`.
        """
        told = [f"external_ids:iface-id={port}", f"external_ids:attached-mac={mac}", "external_ids:iface-status=active"]
        extra = ["--", "set", "port", tap, *(f"{name}={value}" for name, value in more.items())] if more else []
        self.vsctl("add-port", "br-int", tap, "--", "set", "interface", tap, f"type={kind}", *told, *extra)
        return int(self.vsctl("get", "interface", tap, "ofport"))

    def unplug(self, tap: str) -> None:
        """The guest has left."""
        self.vsctl("del-port", "br-int", tap)

    def tag(self, tap: str, number: int) -> None:
        """As Neutron's agent does it before it programs the port's flows."""
        told = (f"other_config:tag={number}", "other_config:network_type=vxlan", "other_config:segmentation_id=77")
        self.vsctl("set", "port", tap, *told)

    def add_flows(self, text: str) -> None:
        """Into the integration bridge, as ovs-ofctl writes them."""
        file = self.folder / "flows"
        file.write_text(text)
        self.run("ovs-ofctl", "-O", "OpenFlow10", "add-flows", f"unix:{self.folder}/br-int.mgmt", str(file))

    def delete_flows(self, match: str) -> None:
        """From the integration bridge."""
        self.run("ovs-ofctl", "del-flows", f"unix:{self.folder}/br-int.mgmt", match)

    def stop_database(self) -> None:
        """The first process is its server."""
        server = self._started[0]
        server.kill()
        server.wait()

    def start_database(self) -> None:
        """Again, with what was in it."""
        (self.folder / "db.sock").unlink(missing_ok=True)
        self._started[0] = self._again("db")

    def _again(self, name: str) -> subprocess.Popen[bytes]:
        arguments = (f"--remote=punix:{self.folder}/{name}.sock", f"--unixctl={self.folder}/{name}.ctl")
        process = self._run_on("ovsdb-server", str(self.folder / f"{name}.db"), *arguments)
        self._started.remove(process)
        return process


class Central(Programs):
    """OVN's two databases, and ovn-northd."""

    needed = ("ovn-northd",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.southbound = f"unix:{folder}/sb.sock"

    def _start(self) -> None:
        for name in ("nb", "sb"):
            self._serve(name, _SCHEMAS / "ovn" / f"ovn-{name}.ovsschema")
        self.nbctl("init")
        self.sbctl("init")
        databases = (f"--ovnnb-db=unix:{self.folder}/nb.sock", f"--ovnsb-db={self.southbound}")
        self._run_on("ovn-northd", *databases, f"--unixctl={self.folder}/northd.ctl")

    def nbctl(self, *arguments: str) -> str:
        """Of the northbound database, as Neutron writes it. Waits for nothing."""
        return self.run("ovn-nbctl", f"--db=unix:{self.folder}/nb.sock", *arguments)

    def sbctl(self, *arguments: str) -> str:
        """Of the southbound database."""
        return self.run("ovn-sbctl", f"--db={self.southbound}", *arguments)

    def binding(self, port: str, column: str) -> str:
        """What the southbound database has in this column of a logical port's binding; empty if there is none."""
        return self.sbctl("--bare", f"--columns={column}", "find", "port_binding", f"logical_port={port}").strip()


class Chassis(OpenVswitch):
    """One host of OVN's: Open vSwitch, and ovn-controller."""

    needed = ("ovs-vswitchd", "ovn-controller")

    def __init__(
        self,
        folder: Path,
        name: str,
        southbound: str,
        *,
        address: str = "127.0.0.1",
        datapath: str = "netdev",
        start: Start = subprocess.Popen,
    ) -> None:
        """`address` is where tunnels of other hosts end."""
        super().__init__(folder, datapath=datapath, start=start)
        self.name = name
        self._settings = {
            "system-id": name,
            "hostname": name,
            "ovn-remote": southbound,
            "ovn-encap-type": "geneve",
            "ovn-encap-ip": address,
            "ovn-bridge-datapath-type": datapath,
        }

    def _start(self) -> None:
        super()._start()
        told = (f"external_ids:{name}={value}" for name, value in self._settings.items())
        self.vsctl("set", "open", ".", *told)
        self.start_controller()

    def start_controller(self) -> None:
        """Takes up what it left."""
        self._controller = self._run_on("ovn-controller", self.connection)

    def stop_controller(self) -> None:
        """It dies: what it has programmed stays."""
        self._controller.kill()
        self._controller.wait()
        self._started.remove(self._controller)

    def recompute(self) -> None:
        """ovn-controller computes all its flows anew, as it does where it cannot tell what a change means for them."""
        self.run("ovs-appctl", "-t", f"{self.folder}/ovn-controller.{self._controller.pid}.ctl", "inc-engine/recompute")


class Ovn(Chassis):
    """All of OVN for one host, in one folder."""

    def __init__(self, folder: Path, chassis: str = "host-a") -> None:
        self._central = Central(folder)
        self.southbound = self._central.southbound
        self.nbctl, self.sbctl, self.binding = self._central.nbctl, self._central.sbctl, self._central.binding
        super().__init__(folder, chassis, self.southbound)

    def _start(self) -> None:
        self._central.__enter__()
        super()._start()

    def _stop(self) -> None:
        super()._stop()
        self._central._stop()
