"""A compute host: libvirtd, nova-compute and Neutron's agent for Linux bridges, which is its firewall."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.deadline import wait_until
from lab.libvirt.host import Hypervisor
from lab.namespace import Namespace
from lab.openstack import addresses, parts, settings
from lab.openstack.content import Anchor
from lab.openstack.controller import write
from lab.openstack.parts import PYTHON, SCRIPTS
from lab.openstack.service import HOME, Service, environment

HOLD_HOOK = "90-hold"
RULES_SECONDS = 180.0
LOOK_SECONDS = 0.1
PLUGINS = "/run/lab/nova-plugins"
"""In Nova's environment: a folder on nova-compute's path."""


class ComputeHost(Hypervisor):
    """One compute host; Nova, Neutron and libvirt call it by its name."""

    def __init__(self, namespace: Namespace, name: str, lab_folder: Path) -> None:
        super().__init__(namespace, name, lab_folder, addresses.UNDERLAY)
        agent = [PYTHON, SCRIPTS / "neutron-linuxbridge-agent"]
        for file in ("neutron.conf", "linuxbridge_agent.ini"):
            agent += ["--config-file", f"/etc/neutron/{file}"]
        self.neutron_agent = Service(self, "neutron-linuxbridge-agent", agent)
        self.nova_compute = Service(self, "nova-compute", [PYTHON, SCRIPTS / "nova-compute"], {"PYTHONPATH": PLUGINS})

    def boot(self, *, has_hook: bool = True) -> None:
        """As a hypervisor's."""
        super().boot(has_hook=has_hook)
        self.install_hook(parts.SOURCES / "hold", HOLD_HOOK)

    def start(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen:
        """As a machine's, with a service's environment unless another is given."""
        return super().start(argv, **({"env": environment()} | options))

    def plug(self, anchor: Anchor) -> None:
        """Make the link of an anchor; Neutron's agent finds it."""
        self.namespace.ip(
            f"tuntap add {anchor.tap} mode tap",
            f"link set {anchor.tap} address fe:{anchor.mac.partition(':')[2]}",
            f"link set {anchor.tap} up",
        )

    @contextmanager
    def held(self, seconds: float) -> Iterator[None]:
        """Within it a guest that comes is held so long before its memory is copied, as one with much memory is."""
        file = self.folder / "hold"
        file.write_text(f"{seconds}")
        try:
            yield
        finally:
            file.unlink()

    # --- What is in its kernel ---------------------------------------------------------------------------------------

    def zones(self) -> set[int]:
        """All conntrack zones that Neutron's agent has given."""
        return {int(zone) for zone in re.findall(r"--zone (\d+)", self._raw_table())}

    def zone(self, tap: str) -> int | None:
        """The conntrack zone of a port; None as long as the agent has not given it one."""
        found = re.search(rf"--physdev-in {tap}\b.*--zone (\d+)", self._raw_table())
        return int(found[1]) if found else None

    def has_rules(self, tap: str) -> bool:
        """Whether the agent has written the port's zone and the rules for what comes to it."""
        rules = self.namespace.run(["iptables-save", "-t", "filter"])
        return self.zone(tap) is not None and re.search(rf"--physdev-out {tap}\b", rules) is not None

    def wait_for_rules(self, tap: str) -> float:
        """When `has_rules` was first seen to hold (CLOCK_MONOTONIC seconds). Blocks; raises DeadlinePassed."""
        wait_until(
            lambda: self.has_rules(tap), f"the rules of {tap} on {self.name}", RULES_SECONDS, poll_seconds=LOOK_SECONDS
        )
        return time.monotonic()

    def entries(self, address: str, *words: str) -> list[str]:
        """The conntrack entries in any zone with this address at one end; `words` narrow it, as `-p tcp`."""
        lines = self.namespace.run(["conntrack", "-L", *words]).splitlines()
        return [line for line in lines if re.search(rf"(src|dst)={re.escape(address)}\b", line)]

    def _raw_table(self) -> str:
        return self.namespace.run(["iptables-save", "-t", "raw"])

    def _write_files(self) -> None:
        super()._write_files()
        write(self.folder / "etc", settings.compute(self.name))
        for folder in (Path(HOME).name, Path(PLUGINS).name, "var/lib/nova/instances", "var/lib/neutron"):
            (self.folder / folder).mkdir(parents=True)
