"""Real `sami-agent` processes, one per host, joined by a broker and told of migrations on their unix sockets."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.deadline import STRETCH, wait_until
from lab.guest import Guest
from sami_plugin.errors import JournalError, OperatorError
from sami_plugin.hooks import local_socket
from sami_plugin.journal.journal import Journal
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.testing.certificates import Certificates

START_SECONDS = 60.0
TELL_SECONDS = STOP_SECONDS = 30.0

AGENT = (sys.executable, "-W", "ignore", "-m", "sami_plugin.cmd.agent")
IN_CLEAR = (*AGENT[:-1], "lab.in_clear")

Start = Callable[..., "subprocess.Popen[bytes]"]


def file_and_broker(scope_file: Path, transport_url: str) -> dict[str, dict[str, object]]:
    """Options of an agent whose ports stand in a file, and that talks through this broker."""
    return {"DEFAULT": {"transport_url": transport_url}, "agent": {"scope_file": scope_file}}


class Agent:
    """One agent on its host, as its files show it and its socket hears it."""

    def __init__(self, name: str, configuration: Path, socket: Path, journal: Path, log: Path) -> None:
        self.name = name
        self.configuration = configuration
        self.socket = socket
        self.journal = journal
        self.log = log

    def tell(
        self,
        phase: Phase,
        guest: str,
        source: str | None = None,
        destination: str | None = None,
        domain: str | None = None,
    ) -> None:
        """What this host's hypervisor says of a guest, which `domain` describes."""
        event = MigrationEvent(guest, phase, source, destination, domain=domain)
        local_socket.send(self.socket, event, TELL_SECONDS * STRETCH)

    def tell_of(self, phase: str, guest: Guest, domain: str | None = None) -> None:
        """What the lab's migration says of one of its guests: where to, when it begins to leave; where from, before."""
        source = destination = None
        if phase == Phase.OUTGOING.value:
            assert guest.moves_to is not None
            destination = guest.moves_to.name
        elif phase == Phase.PREPARE.value:
            assert guest.host is not None
            source = guest.host.name
        self.tell(Phase(phase), guest.uuid, source, destination, domain)

    def sessions(self, guest: str) -> list[dict[str, Any]]:
        """The journal's rows of the guest's sessions here, newest first."""
        with closing(Journal(self.journal, read_only=True)) as journal:
            return [row for row in journal.sessions() if row["guest"] == guest]

    def knows_outgoing(self, guest: str) -> bool:
        """Whether the journal says that a job moves the guest away from here."""
        with closing(Journal(self.journal, read_only=True)) as journal:
            return guest in journal.outgoing()

    def reports(self, guest: str) -> list[dict[str, Any]]:
        """Reports of the guest's ended sessions here, newest first."""
        return [json.loads(row["report"]) for row in self.sessions(guest) if row["report"]]

    def ended(self, guest: str) -> int:
        """How many sessions of the guest have ended here."""
        try:
            return len(self.reports(guest))
        except JournalError:  # nothing was written yet
            return 0

    def listens(self) -> bool:
        """Whether it does at this moment."""
        with socket.socket(socket.AF_UNIX) as probe:  # one that was killed has left its socket's file
            return probe.connect_ex(str(self.socket)) == 0


class AgentProcess(Agent):
    """One that is started here. A context manager."""

    def __init__(
        self,
        folder: Path,
        name: str,
        options: Mapping[str, Mapping[str, object]],
        *,
        start: Start = subprocess.Popen,
        program: Sequence[str] = AGENT,
    ) -> None:
        """`options` are those of its configuration by group, besides the places of its files, which are below `folder`.

        All agents of one folder have their certificates from one authority.

        `start` starts a process, as Popen does, where the agent is to run.
        """
        own = folder / f"agent-{name}"
        own.mkdir(parents=True)
        super().__init__(name, own / "sami-agent.conf", own / "agent.sock", own / "journal.sqlite", own / "log")
        places = {"host": name, "journal": self.journal, "socket": self.socket}
        certificates = dataclasses.asdict(Certificates(folder / "certificates").files(name))
        groups = {**options, "agent": {**places, **options.get("agent", {})}, "tls": certificates}
        self.configuration.write_text(
            "".join(
                f"[{group}]\n" + "".join(f"{option} = {value}\n" for option, value in values.items())
                for group, values in groups.items()
            )
        )
        self._start = start
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Processor time that the agent has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def start(self) -> None:
        """Blocks until the agent listens."""
        with self.log.open("ab") as log:
            self._process = self._start(
                [*self._program, "--config-file", str(self.configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        wait_until(self._has_begun, f"agent {self.name} to listen", START_SECONDS)

    def has_died(self) -> bool:
        """Whether it ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def stop(self, with_signal: int = signal.SIGTERM) -> None:
        """May be repeated, and followed by `start`."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(with_signal)  # does nothing where it has ended
            process.wait(STOP_SECONDS * STRETCH)

    def __enter__(self) -> AgentProcess:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _has_begun(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise OperatorError(f"agent {self.name} ended: {self.log.read_text()[-2000:]}")
        return self.listens()
