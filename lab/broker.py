"""A real RabbitMQ of the lab's own: Debian's package, started by hand on the lab's loopback, gone with the lab."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from types import TracebackType

from lab.deadline import wait_until
from lab.errors import CommandFailed, LabUnavailable

START_SECONDS = 60.0


class Broker:
    """A context manager; `url` is what agents of the same lab use."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        """Its files stand below `folder`; without `port` it takes a free one, so that several run side by side.

        Raises LabUnavailable when RabbitMQ is not installed.
        """
        found = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
        if not found:
            raise LabUnavailable("RabbitMQ is not installed", "apt-get install rabbitmq-server")
        # Debian's wrapper in PATH changes the user and finds its folders in /var; this is the script behind it.
        self._server = found[-1]
        self.port = port if port is not None else _free_port()
        self._folder = folder / f"rabbitmq-{self.port}"
        self._epmd_port = _free_port()
        # epmd outlives a node and may still know the one of another broker that was killed a moment ago.
        self._name = f"sami-{uuid.uuid4().hex[:8]}@localhost"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"rabbit://guest:guest@127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Blocks until it takes connections."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": self._name,
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(_free_port()),  # epmd may not know yet that the last one is free again
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq"),
            # Two cores are shared with what is measured: idle schedulers must not spin.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }
        (self._folder / "plugins").write_text("[].\n")
        (self._folder / "rabbitmq.conf").write_text("loopback_users.guest = true\n")
        with (self._folder / "out").open("wb") as out:
            self._process = subprocess.Popen(
                [self._server],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self._folder,
            )
        wait_until(self._has_come_up, "RabbitMQ to take connections", START_SECONDS)

    def account(self, name: str, *, configure: str, write: str, read: str) -> str:
        """Adds a user who may do so much, in regular expressions; returns the URL by which he comes."""
        password = uuid.uuid4().hex
        for words in (["add_user", name, password], ["set_permissions", name, configure, write, read]):
            command = [str(self._server.with_name("rabbitmqctl")), *words]
            done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CommandFailed(command[:2], done.returncode, done.stderr)
        return f"rabbit://{name}:{password}@127.0.0.1:{self.port}/"

    def stop(self) -> None:
        """Ends the server and what it started. May be repeated, and followed by `start`."""
        process, self._process = self._process, None
        if process is not None:
            # The Erlang machine leaves the script's process group. epmd ends with the lab's namespaces.
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended by itself
                os.kill(int((self._folder / "pid").read_text()), signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _has_come_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            words = (self._folder / "out").read_text()[-2000:]
            raise CommandFailed([str(self._server)], self._process.returncode, words)
        return self.is_up()

    def is_up(self) -> bool:
        """Whether something takes AMQP connections at its port."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
