"""A machine of the lab: network, mount, uts and pid namespaces, with an /etc, /var, /run and /dev of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.deadline import wait_until
from lab.errors import CommandFailed, LabError
from lab.isolation import search_path
from lab.libvirt import first, parts
from lab.libvirt.relay import Relay
from lab.namespace import Namespace

UNDERLAY = "under0"
END_SECONDS = 20.0


class Machine:
    """One machine, on the underlay with others. `folder` is /run/lab in it; the lab's folder is seen at its usual path,
    and the machines know each other by name."""

    def __init__(self, namespace: Namespace, name: str, lab_folder: Path, underlay: Mapping[str, str]) -> None:
        """`underlay` has the addresses of all machines by name."""
        self.namespace = namespace
        self.name = name
        self.folder = lab_folder / f"host-{name}"
        self.address = underlay[name]
        self.lab_folder = lab_folder
        self._underlay = underlay
        self._pid = -1
        self._relays: list[Relay] = []

    def boot(self) -> None:
        """Furnish it; its cable to the others is there. Call once."""
        self._write_files()
        self.namespace.ip(f"address add {self.address}/24 dev {UNDERLAY}", f"link set {UNDERLAY} up")
        new = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", sys.executable, "-I", "-S"]
        folders = [str(self.lab_folder), str(self.folder), str(parts.QEMU)]
        process = self.namespace.start([*new, first.__file__, self.name, *folders], stdout=subprocess.PIPE)
        assert process.stdout is not None
        word, _, pid = process.stdout.readline().decode().partition(" ")
        if word != "ready":
            raise LabError(f"host {self.name} did not come up; its reason is on stderr")
        self._pid = int(pid)

    def close(self) -> None:
        """End everything in it and delete it. May be repeated."""
        for relay in self._relays:
            relay.close()
        self.namespace.close()
        # It was killed as its starter's child, and is the last of the host to go.
        wait_until(lambda: not Path(f"/proc/{self._pid}").exists(), f"host {self.name} to end", END_SECONDS)

    def start(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen:
        """Start a process inside of the machine, in its root folder; `options` are Popen's.

        Signals to what is returned reach the process, SIGSTOP excepted, and it ends as the process did. It ends with
        the machine at the latest.
        """
        environment = os.environ | {"PATH": search_path(), "LC_ALL": "C"}
        defaults = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": environment}
        return subprocess.Popen([parts.ENTER, str(self._pid), *argv], **(defaults | options))

    def run(self, argv: Sequence[str | Path], text: str = "", **options: Any) -> str:
        """Run a command inside of the machine, `text` on its stdin; return its stdout. Blocks. Raises CommandFailed."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = self.start(argv, text=True, errors="replace", **pipes, **options)
        words, complaint = process.communicate(text)
        if process.returncode != 0:
            raise CommandFailed([str(word) for word in argv], process.returncode, complaint)
        return words

    def path(self, inner: str | Path) -> Path:
        """Where processes of the world find what the machine calls `inner`, an absolute path."""
        return Path(f"/proc/{self._pid}/root{inner}")

    @property
    def pid(self) -> int:
        """Of the machine's pid 1, as the world counts."""
        return self._pid

    def relay(self, port: int) -> Relay:
        """A port on the world's loopback is now on the machine's, too; may be cut and mended. It ends with it."""
        relay = Relay(self.namespace, port)
        self._relays.append(relay)
        relay.mend()
        return relay

    @property
    def etc(self) -> Path:
        """Its /etc, as processes of the world find it, before and after it is booted."""
        # The kernel does not promise to show what is written beside it to a mounted overlay.
        return self.path("/etc") if self._pid > 0 else self.folder / "etc"

    def _write_files(self) -> None:
        for top in ("etc", "var"):
            (self.folder / top).mkdir(parents=True)
        hosts = "".join(f"{address} {name}\n" for name, address in self._underlay.items())
        (self.folder / "etc/hosts").write_text("127.0.0.1 localhost\n" + hosts)
