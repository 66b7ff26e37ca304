"""A command line that works on a firewall in memory."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from sami_plugin.cli.application import Application
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver


@dataclass
class CommandLine:
    """Runs `sami` in this process; keeps what the last command wrote."""

    device: MemoryDevice = field(default_factory=MemoryDevice)
    out: str = ""
    err: str = ""
    templates: frozenset[str] | None = None
    """Those that the driver declares, where it is to be others than it usually does."""

    @property
    def driver(self) -> MemoryDriver:
        return MemoryDriver(self.device, templates=self.templates)

    def load_driver(self, name: str) -> FlowDriver:
        return self.driver

    def __call__(self, *arguments: object) -> int:
        out, err = io.StringIO(), io.StringIO()
        application = Application(load_driver=self.load_driver, stdout=out, stderr=err)
        try:
            return application.run([str(one) for one in arguments])
        finally:
            self.out, self.err = out.getvalue(), err.getvalue()
