"""Real agents, each a process of its own, over a real RabbitMQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from lab import judge, traffic
from lab.agents import AgentProcess, file_and_broker
from lab.broker import Broker
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.migration import Action, Call, Delay
from lab.verdict import has_survived
from sami_plugin.model.migration import Phase

pytestmark = pytest.mark.usefixtures("world")

WATCHED_SECONDS = 5.0


class Cloud:
    """A lab whose hosts have agents, and a broker between them."""

    def __init__(self, lab: Lab, broker: Broker, agents: dict[str, AgentProcess]) -> None:
        self.lab = lab
        self.broker = broker
        self.agents = agents
        self._source = ""

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        if phase == "outgoing":
            self._source = host.name
        self.agents[host.name].tell(Phase(phase), guest.uuid, self._source if phase == "prepare" else None)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@contextmanager
def cloud(broker: Broker) -> Iterator[Cloud]:
    with Lab() as lab, ExitStack() as stack:
        agents = {
            name: stack.enter_context(AgentProcess(lab.folder, name, file_and_broker(host.scope_file, broker.url)))
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
