"""A host with a libvirtd of its own, a firewall, and a cable to the others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lab.errors import LabError
from lab.host import Host
from lab.libvirt import parts
from lab.libvirt.machine import UNDERLAY, Machine
from lab.namespace import Namespace
from lab.port import Port

LIBVIRTD_CONF = """listen_tls = 0
listen_tcp = 1
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""
# There are no cgroups to manage, /dev is private already, and virtlogd does not run.
QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
migration_host = "{address}"
migration_address = "{address}"
"""
QEMU_D = Path("libvirt/hooks/qemu.d")
# libvirtd looks it up before it reads that QEMU is root here.
QEMU_USER = "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n"
QEMU_GROUP = "libvirt-qemu:x:64055:\n"


class Hypervisor(Machine):
    """A machine with a libvirtd. `socket` is its, for clients inside of the machine, `outer_socket` for others."""

    socket = "/run/libvirt/libvirt-sock"

    def __init__(self, namespace: Namespace, name: str, lab_folder: Path, underlay: Mapping[str, str]) -> None:
        super().__init__(namespace, name, lab_folder, underlay)
        self._libvirtd: subprocess.Popen | None = None

    def boot(self, *, has_hook: bool = True) -> None:
        """As a machine's; `start_libvirtd` is next."""
        super().boot()
        if has_hook:
            self.install_hook(parts.HOOK, "10-lab")

    # --- Commands and files ------------------------------------------------------------------------------------------

    def virsh(self, *argv: str, text: str = "") -> str:
        """Run `virsh`; as `run`."""
        return self.run(["virsh", "-q", *argv], text).strip()

    @property
    def outer_socket(self) -> str:
        """See the class."""
        return str(self.path(self.socket))

    # --- libvirtd ----------------------------------------------------------------------------------------------------

    def start_libvirtd(self) -> None:
        """Returns at once; LibvirtLab waits until it answers. Guests that run are found again."""
        assert self._libvirtd is None
        log = self.folder / "libvirtd.log"
        with log.open("ab") as words:
            self._libvirtd = self.start(["libvirtd", "--listen"], stdout=words, stderr=words)

    def stop_libvirtd(self, with_signal: int = signal.SIGTERM) -> None:
        """Guests go on without it. Returns when it ended; it ends an outgoing migration first, unless it is killed
        (SIGKILL). May be repeated."""
        process, self._libvirtd = self._libvirtd, None
        if process is not None:
            process.send_signal(with_signal)
            process.wait()

    @contextmanager
    def frozen_libvirtd(self) -> Iterator[None]:
        """Within it libvirtd is stopped (SIGSTOP): connections stay, and nobody answers."""
        pid = self.path("/run/libvirtd.pid").read_text().strip()
        self.run(["kill", "-STOP", pid])
        try:
            yield
        finally:
            self.run(["kill", "-CONT", pid])

    def kill_qemu(self, guest: str) -> None:
        """SIGKILL to the QEMU that holds this guest here, running or not. Raises LabError when there is none."""
        try:
            pid = self.path(f"/run/libvirt/qemu/{guest}.pid").read_text().strip()
            words = self.path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError as error:
            raise LabError(f"host {self.name} has no QEMU of {guest}: {error}") from error
        if f"guest={guest},debug-threads=on".encode() not in words:
            raise LabError(f"pid {pid} of host {self.name} is not the QEMU of {guest}")
        self.run(["kill", "-KILL", pid])

    # --- Hooks -------------------------------------------------------------------------------------------------------

    def install_hook(self, program: str | Path, name: str = "50-hook") -> None:
        """Copy an executable into hooks/qemu.d, where libvirt calls them in the order of their names, from now on."""
        new = self.etc / QEMU_D.parent / f"{name}.new"
        shutil.copy(program, new)
        new.chmod(0o755)
        new.rename(self.etc / QEMU_D / name)

    def remove_hook(self, name: str = "50-hook") -> None:
        """Undo `install_hook`."""
        (self.etc / QEMU_D / name).unlink()

    @contextmanager
    def veto(self, operation: str) -> Iterator[None]:
        """Within it the lab's hook refuses this operation (migrate, prepare, start, started, ...) of every guest."""
        file = self.folder / f"veto.{operation}"
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    # --- The cable ------------------------------------------------------------------------------------------------

    @contextmanager
    def slow_cable(self, megabits: float) -> Iterator[None]:
        """Within it the host sends no more than that a second to the other hosts, migration data and all."""
        shape = f"root tbf rate {megabits}mbit burst 64k latency 400ms"
        self.namespace.run(["tc", "qdisc", "add", "dev", UNDERLAY, *shape.split()])
        try:
            yield
        finally:
            self.namespace.run(["tc", "qdisc", "del", "dev", UNDERLAY, "root"])

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        super()._write_files()
        etc, var = self.folder / "etc", self.folder / "var"
        for folder in (etc / QEMU_D, var / "lib/libvirt", var / "log/libvirt/qemu", var / "cache/libvirt"):
            folder.mkdir(parents=True)
        for folder in (etc / "libvirt", var / "lib/libvirt", var / "log/libvirt", var / "cache/libvirt"):
            # Nothing of the machine's own libvirt is seen.
            os.setxattr(folder, "trusted.overlay.opaque", b"y")
        values = {"address": self.address, "uuid": uuid.uuid4()}
        (etc / "libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF.format(**values))
        (etc / "libvirt/qemu.conf").write_text(QEMU_CONF.format(**values))
        (etc / "passwd").write_text(Path("/etc/passwd").read_text() + QEMU_USER)
        (etc / "group").write_text(Path("/etc/group").read_text() + QEMU_GROUP)


class LibvirtHost(Hypervisor):
    """A hypervisor with the lab's own firewall; `network` is its namespace, bridge and firewall."""

    def __init__(self, network: Host, lab_folder: Path, underlay: Mapping[str, str]) -> None:
        super().__init__(network.namespace, network.name, lab_folder, underlay)
        self.network = network

    @contextmanager
    def without_firewall(self) -> Iterator[None]:
        """Within it nothing looks at what the host bridges: no rule, no conntrack. Entries that are there stay."""
        switches = [f"net.bridge.bridge-nf-call-{name}" for name in ("iptables", "ip6tables")]
        for switch in switches:
            self.namespace.sysctl(switch, 0)
        try:
            yield
        finally:
            for switch in switches:
                self.namespace.sysctl(switch, 1)

    def zone(self, port: Port) -> int:
        """The conntrack zone of this port here, whether the guest is here or not."""
        return self.network.firewall.zone(port)
