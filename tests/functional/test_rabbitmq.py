"""Real agents, each a process of its own, over a real RabbitMQ."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import netaddr
import pytest

from lab import addresses, judge, traffic
from lab.agents import AgentProcess, file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.migration import Action, Call, Delay
from lab.verdict import has_survived

pytestmark = pytest.mark.usefixtures("world")

WATCHED_SECONDS = 5.0


class Cloud:
    """A lab whose hosts have agents, and a broker between them."""

    def __init__(self, lab: Lab, broker: Broker, agents: dict[str, AgentProcess]) -> None:
        self.lab = lab
        self.broker = broker
        self.agents = agents

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        self.agents[host.name].tell_of(phase, guest)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@contextmanager
def cloud(broker: Broker, url: str = "") -> Iterator[Cloud]:
    """`url` is another way to the broker than its own."""
    with Lab() as lab, ExitStack() as stack:
        agents = {
            name: stack.enter_context(
                AgentProcess(lab.folder, name, file_and_broker(host.scope_file, url or broker.url))
            )
            for name, host in lab.hosts.items()
        }
        yield Cloud(lab, broker, agents)


def download_lives_through_a_move(made: Cloud, at: Mapping[str, Action | Sequence[Action]]) -> Guest:
    guest = made.lab.add_guest("g", "a")
    flow = traffic.download(made.lab, guest)
    wait_until(lambda: flow.samples() and flow.samples()[-1].total > 300_000, "the download to be under way", 8)
    record = made.lab.migrate(guest, "a", "b", made.tell, copy_seconds=0.5, at=at)
    assert record.errors == []
    until = record.cut_over_at + WATCHED_SECONDS
    wait_until(lambda: flow.samples()[-1].time > until, "the time that is watched", WATCHED_SECONDS + 5)
    words = "\n".join(agent.log.read_text()[-3000:] for agent in made.agents.values())
    assert has_survived(flow.samples(), record.cut_over_at, WATCHED_SECONDS), words
    for agent in made.agents.values():
        wait_until(lambda agent=agent: agent.ended(guest.uuid), f"agent {agent.name} to end its session", 60)
    return guest


def guest_of(made: Cloud) -> Guest:
    (guest,) = made.lab.guests.values()
    return guest


def assert_moved(made: Cloud, guest: Guest) -> None:
    reports = {name: agent.reports(guest.uuid)[0] for name, agent in made.agents.items()}
    assert [reports[name]["outcome"] for name in "ab"] == ["moved", "moved"], reports
    assert reports["a"]["flows"]["purged"] == reports["b"]["flows"]["imported"] == 1
    assert judge.table(made.lab.hosts["a"], guest, made.lab.folder / "left").of(guest.addresses) == set()


def test_a_download_lives_through_a_move_over_rabbitmq(broker: Broker) -> None:
    with cloud(broker) as made:
        assert_moved(made, download_lives_through_a_move(made, {}))


def test_a_broker_that_dies_and_comes_back_while_memory_is_copied_costs_nothing(broker: Broker) -> None:
    with cloud(broker) as made:

        def restart() -> None:
            made.broker.stop()
            assert not made.broker.is_up()
            made.broker.start()

        guest = download_lives_through_a_move(made, {"copying": Call(restart)})
        assert_moved(made, guest)


def test_agents_that_start_while_the_broker_is_away_are_heard_when_it_comes(broker: Broker) -> None:
    broker.stop()
    with cloud(broker) as made:  # they are there, and hear their host
        broker.start()
        for agent in made.agents.values():
            wait_until(lambda agent=agent: "the broker answers" in agent.log.read_text(), "the agent to find it", 40)
        assert_moved(made, download_lives_through_a_move(made, {}))


def test_a_broker_that_is_away_in_the_pause_delays_the_purge_and_nothing_else(broker: Broker) -> None:
    with cloud(broker) as made:
        left: list[int] = []

        def come_back() -> None:
            left.append(len(judge.table(made.lab.hosts["a"], guest_of(made), made.lab.folder / "kept").entries))
            made.broker.start()

        guest = download_lives_through_a_move(
            made, {"paused": Call(made.broker.stop), "running": [Delay(1.0), Call(come_back)]}
        )
        assert left == [1], "the source keeps its entry as long as it has not heard of the arrival"
        assert_moved(made, guest)


class Tap:
    """A way to the broker on which every octet is kept. A context manager."""

    def __init__(self, port: int) -> None:
        self.octets = bytearray()
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()

    def __enter__(self) -> Tap:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, from_end: socket.socket, to_end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while octets := from_end.recv(1 << 16):
                with self._lock:
                    self.octets += octets
                to_end.sendall(octets)
        with contextlib.suppress(OSError):
            to_end.shutdown(socket.SHUT_WR)

    def readable(self) -> bytes:
        """All of it, and what the payloads in it are."""
        payloads = re.findall(rb"[A-Za-z0-9+/]{40,}={0,2}", self.octets)
        return bytes(self.octets) + b"".join(base64.b64decode(one + b"=" * (-len(one) % 4)) for one in payloads)


def test_broker_that_records_everything_has_no_guest_address_or_port_in_it(broker: Broker) -> None:
    with Tap(broker.port) as tap:
        url = broker.url.replace(str(broker.port), str(tap.port))
        with cloud(broker, url) as made:
            guest = download_lives_through_a_move(made, {})
            assert_moved(made, guest)
            session = made.agents["b"].sessions(guest.uuid)[0]["session"]
    seen = tap.readable()
    assert session.encode() in seen, "what is recorded is this session"
    assert seen.count(b"deliver") > 6
    outside = netaddr.IPAddress(addresses.OUTSIDE_V4)
    for address in (netaddr.IPAddress(guest.v4), netaddr.IPAddress(guest.v6), outside):
        assert str(address).encode() not in seen
        assert address.packed not in seen
    for written in (guest.uuid.encode(), uuid.UUID(guest.uuid).bytes, guest.tap.encode()):
        assert written not in seen
