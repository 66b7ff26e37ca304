"""A host with a libvirtd of its own: network, mount, uts and pid namespaces, a firewall, and a cable to the others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.deadline import wait_until
from lab.errors import CommandFailed, LabError
from lab.host import Host
from lab.isolation import search_path
from lab.libvirt import first, parts
from lab.libvirt.relay import Relay
from lab.port import Port

UNDERLAY = "under0"
END_SECONDS = 20.0
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


class LibvirtHost:
    """One host. `network` is its namespace, bridge and firewall; `folder` is /run/lab in the host.

    In the host, /etc, /var, /run and /dev are its own, the lab's folder is seen at its usual path, and the hosts know
    each other by name. `socket` is libvirt's, as a client inside of the host sees it; `outer_socket` is the same for
    processes of the world.
    """

    socket = "/run/libvirt/libvirt-sock"

    def __init__(self, network: Host, lab_folder: Path, underlay: Mapping[str, str]) -> None:
        self.network = network
        self.name = network.name
        self.folder = lab_folder / f"host-{self.name}"
        self.address = underlay[self.name]
        self.lab_folder = lab_folder
        self._underlay = underlay
        self._pid = -1
        self._libvirtd: subprocess.Popen | None = None
        self._relays: list[Relay] = []

    def set_up(self, has_hook: bool) -> None:
        """Furnish it; its cable to the others is there. `start_libvirtd` is next. Call once."""
        self._write_files()
        if has_hook:
            self.install_hook(parts.HOOK, "10-lab")
        self.network.namespace.ip(f"address add {self.address}/24 dev {UNDERLAY}", f"link set {UNDERLAY} up")
        new = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", sys.executable, "-I", "-S"]
        folders = [str(self.lab_folder), str(self.folder), str(parts.QEMU)]
        process = self.network.namespace.start([*new, first.__file__, self.name, *folders], stdout=subprocess.PIPE)
        assert process.stdout is not None
        word, _, pid = process.stdout.readline().decode().partition(" ")
        if word != "ready":
            raise LabError(f"host {self.name} did not come up; its reason is on stderr")
        self._pid = int(pid)

    def close(self) -> None:
        """End everything in it and delete it. May be repeated."""
        for relay in self._relays:
            relay.close()
        self.network.close()
        # It was killed as its starter's child, and is the last of the host to go.
        wait_until(lambda: not Path(f"/proc/{self._pid}").exists(), f"host {self.name} to end", END_SECONDS)

    # --- Commands and files ------------------------------------------------------------------------------------------

    def start(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen:
        """Start a process inside of the host, in its root folder; `options` are Popen's.

        Signals to what is returned reach the process, SIGSTOP excepted, and it ends as the process did. It ends with
        the host at the latest.
        """
        environment = os.environ | {"PATH": search_path(), "LC_ALL": "C"}
        defaults = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": environment}
        return subprocess.Popen([parts.ENTER, str(self._pid), *argv], **(defaults | options))

    def run(self, argv: Sequence[str | Path], text: str = "") -> str:
        """Run a command inside of the host, `text` on its stdin; return its stdout. Blocks. Raises CommandFailed."""
        process = self.start(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        words, complaint = process.communicate(text)
        if process.returncode != 0:
            raise CommandFailed([str(word) for word in argv], process.returncode, complaint)
        return words

    def virsh(self, *argv: str, text: str = "") -> str:
        """Run `virsh`; as `run`."""
        return self.run(["virsh", "-q", *argv], text).strip()

    def path(self, inner: str | Path) -> Path:
        """Where processes of the world find what the host calls `inner`, an absolute path."""
        return Path(f"/proc/{self._pid}/root{inner}")

    @property
    def outer_socket(self) -> str:
        """See the class."""
        return str(self.path(self.socket))

    @property
    def pid(self) -> int:
        """Of the host's pid 1, as the world counts."""
        return self._pid

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
        new = self._etc / QEMU_D.parent / f"{name}.new"
        shutil.copy(program, new)
        new.chmod(0o755)
        new.rename(self._etc / QEMU_D / name)

    def remove_hook(self, name: str = "50-hook") -> None:
        """Undo `install_hook`."""
        (self._etc / QEMU_D / name).unlink()

    @contextmanager
    def veto(self, operation: str) -> Iterator[None]:
        """Within it the lab's hook refuses this operation (migrate, prepare, start, started, ...) of every guest."""
        file = self.folder / f"veto.{operation}"
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    # --- The cable and the broker ------------------------------------------------------------------------------------

    @contextmanager
    def slow_cable(self, megabits: float) -> Iterator[None]:
        """Within it the host sends no more than that a second to the other hosts, migration data and all."""
        shape = f"root tbf rate {megabits}mbit burst 64k latency 400ms"
        self.network.run(["tc", "qdisc", "add", "dev", UNDERLAY, *shape.split()])
        try:
            yield
        finally:
            self.network.run(["tc", "qdisc", "del", "dev", UNDERLAY, "root"])

    @contextmanager
    def without_firewall(self) -> Iterator[None]:
        """Within it nothing looks at what the host bridges: no rule, no conntrack. Entries that are there stay."""
        switches = [f"net.bridge.bridge-nf-call-{name}" for name in ("iptables", "ip6tables")]
        for switch in switches:
            self.network.namespace.sysctl(switch, 0)
        try:
            yield
        finally:
            for switch in switches:
                self.network.namespace.sysctl(switch, 1)

    def relay(self, port: int) -> Relay:
        """A port on the world's loopback is now on the host's, too; may be cut and mended. It ends with the host."""
        relay = Relay(self.network.namespace, port)
        self._relays.append(relay)
        relay.mend()
        return relay

    def zone(self, port: Port) -> int:
        """The conntrack zone of this port here, whether the guest is here or not."""
        return self.network.firewall.zone(port)

    # --- Inside ------------------------------------------------------------------------------------------------------

    @property
    def _etc(self) -> Path:
        # The kernel does not promise to show what is written beside it to a mounted overlay.
        return self.path("/etc") if self._pid > 0 else self.folder / "etc"

    def _write_files(self) -> None:
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
        hosts = "".join(f"{address} {name}\n" for name, address in self._underlay.items())
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
