"""Two regions, each with a RabbitMQ, an authority and addresses of its own, and a guest that moves between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import judge, traffic
from lab.agents import AgentProcess
from lab.broker import Broker
from lab.deadline import wait_until
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.migration import Tell, tell_nobody
from lab.traffic import Traffic
from lab.verdict import has_survived
from sami_plugin.model.results import WORDS, Reason
from sami_plugin.testing.certificates import Certificates

pytestmark = pytest.mark.usefixtures("world")

WATCHED_SECONDS = 4.0
PAGE = Path(__file__).parents[2] / "doc/source/user/domains.rst"
REGIONS = {"a": "west", "b": "east"}
EAST_ADDRESSES = ("10.99.0.11", "fd99::b")
# The guests', and not the outside's, which does not move.
MAPS = {
    "a": "10.99.0.0/28=10.92.0.0/28, fd99::/124=fd92::/124",
    "b": "10.92.0.0/28=10.99.0.0/28, fd92::/124=fd99::/124",
}
STREAMS: Mapping[str, Callable[[Lab, Guest], Traffic]] = {
    "TCP over IPv4": traffic.download,
    "TCP over IPv6": lambda lab, guest: traffic.download(lab, guest, family=6),
    "UDP over IPv4": traffic.udp_stream,
    "ICMPv6": lambda lab, guest: traffic.icmp_echo(lab, guest, family=6),
}


class Regions:
    """A lab of routed hosts, each in a region of its own, with a guest that is in the west and has streams."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.agents: dict[str, AgentProcess] = {}
        self.guest = lab.add_guest("g", "a")
        lab.renumber(self.guest, "b", *EAST_ADDRESSES)
        self.streams = {name: begin(lab, self.guest) for name, begin in STREAMS.items()}
        self.guest.close_egress()  # else what the guest says itself begins its flows anew

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        self.agents[host.name].tell_of(phase, guest)

    def move(self, source: str, destination: str, tell: Tell) -> dict[str, bool]:
        """Which of the streams go on."""
        record = self.lab.migrate(self.guest, source, destination, tell)
        assert record.errors == []
        until = record.cut_over_at + WATCHED_SECONDS
        for name, stream in self.streams.items():
            wait_until(lambda s=stream: s.samples()[-1].time > until, f"{name} to be watched", WATCHED_SECONDS + 5)
        return {
            name: has_survived(stream.samples(), record.cut_over_at, WATCHED_SECONDS)
            for name, stream in self.streams.items()
        }

    def reports(self) -> dict[str, dict[str, Any]]:
        """Of the newest session, by host, once it has ended there."""
        for name, agent in self.agents.items():
            wait_until(lambda a=agent: a.ended(self.guest.uuid), f"the session on {name} to end", 30)
        return {name: agent.reports(self.guest.uuid)[0] for name, agent in self.agents.items()}

    def entries(self, host: str) -> set[judge.Flow]:
        """What the kernel there knows of the guest."""
        return set(judge.table(self.lab.hosts[host], self.guest, self.lab.folder / f"table-{host}").entries)


PERMISSIONS = re.compile(r"set_permissions -p sami east '(\S+)' '(\S+)' '(\S+)'")


@pytest.fixture(scope="module")
def accounts(brokers: dict[str, Broker]) -> dict[str, str]:
    """At each broker, the URL of the other region's hosts, with the permissions that the page names."""
    found = PERMISSIONS.search(PAGE.read_text())
    assert found is not None
    configure, write, read = found.groups()
    return {
        host: broker.account("stranger", configure=configure, write=write, read=read)
        for host, broker in brokers.items()
    }


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Broker]]:
    with ExitStack() as stack:
        yield {host: stack.enter_context(Broker(tmp_path_factory.mktemp(name))) for host, name in REGIONS.items()}


@contextmanager
def regions(brokers: Mapping[str, Broker], accounts: Mapping[str, str], *, peers_follow: bool) -> Iterator[Regions]:
    with Lab(kind="routed") as lab, ExitStack() as stack:
        made = Regions(lab)
        for host, other in (("a", "b"), ("b", "a")):
            authority = Certificates(lab.folder / REGIONS[other] / "certificates")
            domain = {
                "hosts": other,
                "transport_url": accounts[other],
                "authorities": authority.folder / "ca.pem",
                "revoked": authority.folder / "crl.pem",
                "address_map": MAPS[host],
                "peers_follow": peers_follow,
            }
            options = {
                "DEFAULT": {"transport_url": brokers[host].url},
                "agent": {"scope_file": lab.hosts[host].scope_file, "domains": REGIONS[other]},
                f"domain:{REGIONS[other]}": domain,
            }
            made.agents[host] = stack.enter_context(AgentProcess(lab.folder / REGIONS[host], host, options))
        yield made


def test_without_sami_no_stream_comes_from_region_to_region() -> None:
    with Lab(kind="routed") as lab:
        assert Regions(lab).move("a", "b", tell_nobody) == dict.fromkeys(STREAMS, False)


def test_streams_live_in_the_other_region_under_its_addresses_and_back_again(
    brokers: dict[str, Broker], accounts: dict[str, str]
) -> None:
    with regions(brokers, accounts, peers_follow=True) as made:
        before = made.entries("a")
        assert len(before) == len(STREAMS)
        assert made.move("a", "b", made.tell) == dict.fromkeys(STREAMS, True), words(made)
        reports = made.reports()
        assert [report["outcome"] for report in reports.values()] == ["moved", "moved"], reports
        assert (made.entries("a"), len(made.entries("b"))) == (set(), len(STREAMS))
        assert {flow.source for flow in made.entries("b")} == set(EAST_ADDRESSES)
        assert made.move("b", "a", made.tell) == dict.fromkeys(STREAMS, True), words(made)
        assert made.entries("a") == before


def test_without_a_translation_in_between_each_flow_is_named_as_not_carriable(
    brokers: dict[str, Broker], accounts: dict[str, str]
) -> None:
    with regions(brokers, accounts, peers_follow=False) as made:
        assert made.move("a", "b", made.tell) == dict.fromkeys(STREAMS, False)
        named = made.reports()["b"]["named"][f"refused: {WORDS[Reason.PEER_CANNOT_FOLLOW]}"]
        assert (named["count"], len(named["flows"])) == (len(STREAMS), len(STREAMS)), named


def words(made: Regions) -> str:
    return "\n".join(agent.log.read_text()[-3000:] for agent in made.agents.values())
