"""A process of a machine that may be ended and started again."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.errors import LabError
from lab.isolation import SBIN
from lab.libvirt.machine import Machine
from lab.openstack import parts

END_SECONDS = 30.0
HOME = "/run/lab/home"


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a service sees: nothing of our own Python's environment, and the lab's ebtables before the real one."""
    path = f"{parts.SOURCES / 'bin'}:{SBIN}"
    return {"PATH": path, "HOME": HOME, "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}


class Service:
    """One service; `log` is all that it said."""

    def __init__(
        self, machine: Machine, name: str, argv: Sequence[str | Path], more: Mapping[str, str] | None = None
    ) -> None:
        """`more` is added to its environment. It is not started yet."""
        self.machine = machine
        self.name = name
        self.log = machine.folder / f"{name}.log"
        self._argv = list(argv)
        self._more = more
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns at once. It ends with its machine."""
        assert self._process is None
        with self.log.open("ab") as log:
            self._process = self.machine.start(self._argv, stdout=log, stderr=log, env=environment(self._more))

    def stop(self, with_signal: int = signal.SIGTERM) -> None:
        """Returns when it has ended. May be repeated."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(with_signal)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart(self, with_signal: int = signal.SIGTERM) -> None:
        """`stop` and `start`."""
        self.stop(with_signal)
        self.start()

    def check(self) -> None:
        """Raise LabError, with its last words, if it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            words = self.log.read_text(errors="replace")[-2000:]
            raise LabError(f"{self.name} of {self.machine.name} ended with {self._process.returncode}: {words}")
