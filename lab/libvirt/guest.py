"""A guest: a QEMU with a small Linux, and its ports in the firewalls of all hosts."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from lab.deadline import wait_until
from lab.errors import LabError
from lab.libvirt import parts
from lab.libvirt.host import LibvirtHost
from lab.port import Port, Ruled, Rules, is_ipv6

BOOT_SECONDS = 60.0
TELL_SECONDS = 20.0
POLL_SECONDS = 0.02
ECHO_PORT = 7
STREAM_PORT = 9
# TCG pays for each look at another clock than the TSC, and for the mitigations; together a third of 8 streams.
KERNEL_WORDS = "console=ttyS0 quiet panic=-1 clocksource=tsc tsc=reliable mitigations=off"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a guest is made of. `dirty_mib` of its memory are rewritten, and checked, all the time."""

    memory_mib: int = 128
    dirty_mib: int = 0
    is_persistent: bool = False


class Guest(Ruled):
    """`ports` are its NICs' with the rules as they are now, eth0 first.

    Rules hold on every host and for all ports; a change is in all kernels when the call returns. In the guest, port 7
    (TCP) is an echo and port 9 takes streams (lab.libvirt.streams); the rules admit neither by themselves.
    """

    def __init__(
        self,
        name: str,
        uuid: str,
        ports: Sequence[Port],
        shape: Shape,
        program: Callable[[Sequence[Port]], None],
        find: Callable[[], LibvirtHost],
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.ports = tuple(ports)
        self.shape = shape
        self._program = program
        self._find = find
        self._rules_lock = threading.Lock()
        self._program(self.ports)

    def address(self, family: int, nic: int = 0) -> str:
        """The first address of family 4 or 6 of a NIC."""
        return next(address for address in self.ports[nic].addresses if is_ipv6(address) == (family == 6))

    def tell(self, line: str) -> None:
        """Its shell runs the line in the background, its words go to the console. Returns when the shell has taken it.

        Raises LabError where it runs on no host, or does not listen.
        """
        path = self._find().folder / f"{self.name}.control"
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(TELL_SECONDS)
            try:
                control.connect(str(path))
                control.sendall(line.encode() + b"\n")
                if control.makefile("rb").readline() != b"ok\n":
                    raise LabError(f"guest {self.name} did not take the line {line!r}")
            except OSError as error:
                raise LabError(f"guest {self.name} did not take the line {line!r}: {error}") from error

    def console_path(self, host: LibvirtHost) -> Path:
        """Where the console's words are while the guest is on this host."""
        return host.folder / f"{self.name}.console"

    def console(self, host: LibvirtHost) -> str:
        """What its console said while it was on this host, all visits."""
        path = self.console_path(host)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until_ready(self, host: LibvirtHost) -> None:
        """Returns when everything in it runs, after it was started on `host`. Raises DeadlinePassed, LabError."""

        def is_ready() -> bool:
            return "ready after" in self.console(host)

        wait_until(is_ready, f"guest {self.name} to boot on {host.name}", BOOT_SECONDS, poll_seconds=POLL_SECONDS)

    def xml(self) -> str:
        """The domain, for any host."""
        words = [KERNEL_WORDS, f"lab.name={self.name}"]
        if self.shape.dirty_mib:
            words.append(f"lab.dirty={self.shape.dirty_mib}")
        for nic, port in enumerate(self.ports):
            words += [f"lab.ip=eth{nic}:{address}/{64 if is_ipv6(address) else 24}" for address in port.addresses]
        return DOMAIN.format(
            name=escape(self.name),
            uuid=self.uuid,
            memory=self.shape.memory_mib,
            kernel=escape(str(parts.kernel_image())),
            initramfs=escape(str(parts.INITRAMFS)),
            words=escape(" ".join(words)),
            interfaces="".join(INTERFACE.format(mac=port.mac, tap=port.tap) for port in self.ports),
        )

    def _change(self, change: Callable[[Rules], dict]) -> None:
        with self._rules_lock:
            self.ports = tuple(
                dataclasses.replace(port, rules=dataclasses.replace(port.rules, **change(port.rules)))
                for port in self.ports
            )
            self._program(self.ports)


INTERFACE = """
    <interface type='bridge'>
      <mac address='{mac}'/>
      <source bridge='br0'/>
      <target dev='{tap}'/>
      <model type='virtio'/>
    </interface>"""

# append: QEMU opens the file on each arrival, and what was said on an earlier visit shall stay.
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>{interfaces}
    <serial type='file'>
      <source path='/run/lab/{name}.console' append='on'/>
      <target port='0'/>
    </serial>
    <serial type='unix'>
      <source mode='bind' path='/run/lab/{name}.control'/>
      <target port='1'/>
    </serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
