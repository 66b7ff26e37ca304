"""The agent as a whole, as its configuration describes it."""

from __future__ import annotations

import dataclasses
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from oslo_config import cfg

from lab.deadline import wait_until
from sami_plugin import conf as options
from sami_plugin import service
from sami_plugin.errors import ConfigurationError
from sami_plugin.hooks import local_socket
from sami_plugin.model.migration import MigrationEvent, Phase
from sami_plugin.testing.certificates import Certificates
from sami_plugin.testing.hosts import new_guest


@pytest.fixture
def configuration(tmp_path: Path) -> cfg.ConfigOpts:
    return written(tmp_path)


def written(tmp_path: Path, broker: str = "fake://") -> cfg.ConfigOpts:
    path = tmp_path / "agent.conf"
    (tmp_path / "ports.json").write_text('{"ports": []}')
    files = dataclasses.asdict(Certificates(tmp_path).files("host-b"))
    tls = "".join(f"{name} = {value}\n" for name, value in files.items())
    path.write_text(
        f"[DEFAULT]\ntransport_url = {broker}\n"
        f"[agent]\nhost = host-b\ndriver = memory\njournal = {tmp_path}/journal\n"
        f"scope_file = {tmp_path}/ports.json\nsocket = {tmp_path}/agent.sock\n"
        f"[migration]\nverdict_seconds = 0.1\n[tls]\n{tls}"
    )
    conf = cfg.ConfigOpts()
    options.register(conf)
    conf([], project="sami", default_config_files=[str(path)], default_config_dirs=[])
    return conf


class Running:
    """An agent in a thread."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self.may_end, self.socket = threading.Event(), Path(conf.agent.socket)
        self.thread = threading.Thread(target=service.run, args=(conf, self.may_end.wait))
        self.thread.start()

    def takes_calls(self) -> bool:
        """The socket is there a moment before anybody listens to it."""
        with socket.socket(socket.AF_UNIX) as line:
            return line.connect_ex(str(self.socket)) == 0

    def tell(self, event: MigrationEvent) -> None:
        local_socket.send(self.socket, event, 10)

    def close(self) -> None:
        self.may_end.set()
        self.thread.join(20)


@pytest.fixture
def running(configuration: cfg.ConfigOpts) -> Iterator[Running]:
    with closing(Running(configuration)) as made:
        wait_until(made.takes_calls, "the agent to listen")
        yield made


def rows(conf: cfg.ConfigOpts) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(conf.agent.journal)) as journal:
        return journal.execute("SELECT session, state, outcome FROM sessions").fetchall()


def test_second_agent_of_a_host_touches_nothing_of_the_first(running: Running, configuration: cfg.ConfigOpts) -> None:
    running.tell(MigrationEvent(new_guest(), Phase.PREPARE, "host-a"))
    before = rows(configuration)
    assert len(before) == 1
    with pytest.raises(ConfigurationError, match="another agent listens there"):
        service.run(configuration, pytest.fail)
    assert rows(configuration) == before
    assert running.socket.exists()


def test_agent_that_cannot_start_leaves_no_socket(configuration: cfg.ConfigOpts) -> None:
    Path(configuration.agent.scope_file).unlink()
    with pytest.raises(ConfigurationError, match="scope_file"):
        service.run(configuration, pytest.fail)
    assert not Path(configuration.agent.socket).exists()


def test_agent_starts_and_ends_while_its_broker_is_away(tmp_path: Path) -> None:
    """Hooks, libvirt and the operator's commands are answered; nobody waits for the broker."""
    began = time.monotonic()
    with closing(Running(written(tmp_path, "rabbit://u:p@127.0.0.1:9/"))) as made:
        wait_until(made.takes_calls, "the agent to listen")
        wait_until(lambda: is_heard(made), "the agent to hear")
    assert not made.thread.is_alive()
    assert time.monotonic() - began < 10


def is_heard(agent: Running) -> bool:
    try:
        agent.tell(MigrationEvent(new_guest(), Phase.OUTGOING, None, "host-c"))
    except OSError:
        return False
    return True
