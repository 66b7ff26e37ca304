"""Where from, and where to? Hosts in memory whose hypervisors are asked, as where libvirt moves guests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sami_plugin.agent import Agent
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import OperatorError, Veto
from sami_plugin.model.migration import Flows, MigrationEvent, Offer, Phase
from sami_plugin.model.settings import Settings
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import Refuse
from sami_plugin.session import Session
from sami_plugin.testing.hosts import Hosts, new_guest
from tests.unit.handover.hypervisor import Hypervisor, described
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    IMPATIENT,
    SETTINGS,
    ZONES,
    finish,
    guest_with_flows,
    held,
    hosts_in,
    limited,
    ports,
    states,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
)
from tests.unit.handover.stranger import Stranger

OTHER_ZONE = 77


@pytest.fixture
def hypervisors() -> dict[str, Hypervisor]:
    return {name: Hypervisor(name) for name in ZONES}


@pytest.fixture
def settings() -> Settings:
    return limited(open_seconds=1.5, verdict_seconds=1.0)


@pytest.fixture
def hosts(tmp_path: Path, hypervisors: dict[str, Hypervisor], settings: Settings) -> Iterator[Hosts]:
    with hosts_in(tmp_path, settings, hypervisors=hypervisors) as made:
        yield made


def marked(hosts: Hosts, hypervisors: dict[str, Hypervisor]) -> str:
    """A guest that runs on host-a."""
    guest = guest_with_flows(hosts)
    hypervisors["host-a"].mark(guest)
    return guest


def comes(hosts: Hosts, guest: str, description: str | None, host: str = "host-b") -> None:
    hosts.agents[host].tell(MigrationEvent(guest, Phase.PREPARE, domain=description))
    hosts.plug(host, guest, ZONES[host], GUEST_ADDRESS)
    hosts.say(host, Phase.STARTED, guest)


def is_copying(hosts: Hosts, hypervisors: dict[str, Hypervisor]) -> str:
    """A guest that is on its way from host-a to host-b."""
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    wait_for_step(hosts, "host-b", guest, "in sync")
    return guest


def outcome(hosts: Hosts, host: str, guest: str) -> tuple[str, str]:
    report = hosts.reports(host, guest)[0]
    return report["outcome"], report["reason"]


def test_the_guest_s_description_says_which_host_it_leaves(hosts: Hosts, hypervisors: dict[str, Hypervisor]) -> None:
    guest = is_copying(hosts, hypervisors)
    assert guest not in hypervisors["host-b"].asked, "of a guest that comes a hypervisor must not be asked"
    finish(hosts, guest)
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)
    assert hosts.reports("host-b", guest)[0]["peer"] == "host-a"


def exclude_flavor(hosts: Hosts, *where: str) -> None:
    for host in where:
        hosts.agents[host].host.policies = Policies(excluded_flavors=frozenset({"m1.small"}))


@pytest.mark.parametrize("flavor", ["m1.small", "m1.large"])
def test_guests_of_a_flavor_that_the_operator_excluded_are_left_alone(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], flavor: str
) -> None:
    exclude_flavor(hosts, "host-a", "host-b")
    hypervisors["host-a"].flavor = flavor
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest)
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    assert len(hosts.agents["host-b"].sessions()) == (flavor == "m1.large")
    finish(hosts, guest)
    until_idle(hosts)
    left, arrived = (0, 100) if flavor == "m1.large" else (100, 0)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (left, arrived)
    assert hosts.agents["host-a"].underway() == []


def test_source_that_excluded_a_flavor_gives_nothing_and_says_so(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    exclude_flavor(hosts, "host-a")
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert "wants nothing done for" in outcome(hosts, "host-b", guest)[1]
    with pytest.raises(OperatorError, match=r"\[policy\] excluded_flavors"):
        hosts.agents["host-a"].check(guest, "host-b")


def leaves_unheard(hosts: Hosts, hypervisors: dict[str, Hypervisor], guest: str) -> None:
    """And its hypervisor says so twice, as a hook and an event do."""
    hosts.unplug("host-a", guest)
    hypervisors["host-a"].leaving.discard(guest)
    del hypervisors["host-a"].marks[guest]
    for _ in range(2):
        hosts.say("host-a", Phase.STOPPED, guest)
    until_idle(hosts)


@pytest.mark.parametrize("is_suspended", [False, True])
def test_guest_that_has_left_before_its_hypervisor_says_so_is_asked_for_like_any_other(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], is_suspended: bool
) -> None:
    guest = marked(hosts, hypervisors)
    description = hypervisors["host-a"].description(guest)
    hypervisors["host-a"].leaving.add(guest)
    for phase in (Phase.OUTGOING, Phase.SUSPENDED)[: 1 + is_suspended]:
        hosts.say("host-a", phase, guest)
    hosts.unplug("host-a", guest)
    hypervisors["host-a"].leaving.discard(guest)
    del hypervisors["host-a"].marks[guest]
    comes(hosts, guest, description)
    finish(hosts, guest)
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)
    assert outcome(hosts, "host-b", guest)[0] == "moved"


def test_pause_of_a_job_that_ended_while_no_agent_was_there_is_not_that_of_the_next_one(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    for phase in (Phase.OUTGOING, Phase.SUSPENDED):
        hosts.say("host-a", phase, guest)
    hosts.kill("host-a")
    hosts.start("host-a")
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING))  # as who asks libvirt says it
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    wait_for_step(hosts, "host-b", guest, "in sync")
    assert states(hosts, "host-a") == ["following"]
    finish(hosts, guest)
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)


def test_guest_of_an_excluded_flavor_whose_pause_is_the_first_word_is_left_alone(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    exclude_flavor(hosts, "host-a", "host-b")
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    leaves_unheard(hosts, hypervisors, guest)
    assert len(held(hosts, "host-a")) == 100


def test_guest_whose_flavor_is_excluded_by_a_restart_while_it_leaves_is_left_alone(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest)
    hosts.kill("host-a")
    hosts.start("host-a")
    exclude_flavor(hosts, "host-a")
    hosts.say("host-a", Phase.OUTGOING, guest)
    leaves_unheard(hosts, hypervisors, guest)
    assert len(held(hosts, "host-a")) == 100
    assert hosts.agents["host-a"].underway() == []


@pytest.mark.parametrize("liar", ["host-a", "host-c"])
def test_guest_is_of_the_flavor_that_its_newest_description_says(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], liar: str
) -> None:
    """It was resized after a move that failed; or somebody else had described it so, and let his migration fail."""
    exclude_flavor(hosts, "host-a", "host-b")
    guest = marked(hosts, hypervisors)
    before = described(guest, liar, hypervisors["host-a"].marks[guest])
    hosts.agents["host-b"].tell(MigrationEvent(guest, Phase.PREPARE, domain=before))
    hypervisors["host-a"].flavor = "m1.large"
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest)
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    finish(hosts, guest)
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)


def test_word_that_the_guest_stays_is_of_the_job_before_while_the_hypervisor_says_that_it_leaves(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = is_copying(hosts, hypervisors)
    hosts.agents["host-a"].note(MigrationEvent(guest, Phase.ROLLBACK, role="source"))
    finish(hosts, guest)
    until_idle(hosts)
    assert outcome(hosts, "host-a", guest)[0] == "moved"
    assert len(held(hosts, "host-b")) == 100


def test_destination_s_word_that_the_guest_stays_takes_nothing_back_of_its_next_migration(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = guest_with_flows(hosts)
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    wait_for_step(hosts, "host-a", guest, "export ended")
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")  # again, and the word of the first's end is late
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert outcome(hosts, "host-a", guest)[0] == "stayed"
    hosts.say("host-b", Phase.PREPARE, guest, "host-a")
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.say("host-b", Phase.STARTED, guest)
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    until_idle(hosts)
    assert outcome(hosts, "host-a", guest)[0] == "moved"


def test_where_no_hook_is_installed_the_event_is_enough(hosts: Hosts, hypervisors: dict[str, Hypervisor]) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    hypervisors["host-b"].marks[guest] = hypervisors["host-a"].marks[guest]
    hypervisors["host-b"].host = "host-a"  # what came with the guest still says so
    hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
    hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STARTED, role="destination", is_incoming=True))
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    until_idle(hosts)
    assert len(held(hosts, "host-b")) == 100


def test_guest_that_merely_starts_makes_no_session_and_waits_for_nothing(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    began = time.monotonic()
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.STARTED, role="destination"))
    assert time.monotonic() - began < 1
    assert hosts.agents["host-a"].sessions() == []


def test_event_that_comes_late_begins_nothing_anew(hosts: Hosts, hypervisors: dict[str, Hypervisor]) -> None:
    guest = is_copying(hosts, hypervisors)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    wait_for_step(hosts, "host-b", guest, "complete")
    hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STARTED, role="destination", is_incoming=True))
    finish(hosts, guest)
    until_idle(hosts)
    assert len(hosts.reports("host-b", guest)) == 1
    assert len(held(hosts, "host-b")) == 100


def test_where_nothing_names_the_source_the_migration_goes_on_and_the_report_says_so(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    comes(hosts, guest, None)
    hosts.say("host-b", Phase.RESUMED, guest)
    until_idle(hosts)
    told = outcome(hosts, "host-b", guest)
    assert told[0] == "failed"
    assert "nothing says which host the guest leaves" in told[1]


def test_a_host_whose_job_is_over_gives_nothing_for_what_it_was_told_before(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].here.add(guest)
    hosts.agents["host-a"].note(MigrationEvent(guest, Phase.OUTGOING))  # and the job ended without a word
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    hosts.say("host-b", Phase.RESUMED, guest)
    until_idle(hosts)
    assert held(hosts, "host-b") == set()
    assert len(held(hosts, "host-a")) == 100


@pytest.mark.parametrize("was_given", [True, False])
def test_while_the_source_s_hypervisor_is_started_anew_the_description_shows_where_the_guest_goes(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], was_given: bool
) -> None:
    guest = marked(hosts, hypervisors)
    source = hypervisors["host-a"]
    source.is_away = True
    token = source.marks[guest] if was_given else secrets.token_hex(32)
    comes(hosts, guest, described(guest, "host-a", token))
    if was_given:
        wait_for_step(hosts, "host-b", guest, "in sync")
        source.is_away = False
        finish(hosts, guest)
        until_idle(hosts)
        assert len(held(hosts, "host-b")) == 100
        assert held(hosts, "host-a") == set()
    else:
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        assert "nothing shows that" in outcome(hosts, "host-b", guest)[1]
        assert held(hosts, "host-b") == set()


@pytest.mark.parametrize("settings", [limited(verdict_seconds=0.5)], ids=["patient"])
def test_guest_that_comes_against_a_veto_gets_its_flows_from_an_agent_that_was_away_meanwhile(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    """The job goes on where no hook stops it; where the guest's ports were, the session that was refused had noted."""
    guest = is_copying(hosts, hypervisors)
    description = hypervisors["host-a"].description(guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    assert outcome(hosts, "host-a", guest)[0] == "stayed"
    hosts.kill("host-a")
    hosts.agents["host-b"].tell(MigrationEvent(guest, Phase.PREPARE, domain=description))
    for phase in (Phase.STARTED, Phase.RESUMED):
        hosts.say("host-b", phase, guest)
    hypervisors["host-a"].leaving.clear()
    hypervisors["host-a"].marks.clear()
    hosts.start("host-a")
    hosts.agents["host-a"].note(MigrationEvent(guest, Phase.STOPPED, role="source"))
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)


def test_host_that_was_not_given_the_guest_s_description_gets_nothing_and_stops_nothing(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = is_copying(hosts, hypervisors)
    other = new_guest()
    hypervisors["host-a"].mark(other)
    with Stranger(hosts, "host-x") as stranger:
        for token in ("", "0" * 64, hypervisors["host-a"].marks[other]):
            stranger.heard.clear()
            stranger.ask("host-a", guest, token)
            assert "nothing shows that" in stranger.is_refused()
            assert not any(isinstance(message, Offer | Flows) for message in stranger.heard)
    finish(hosts, guest)
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)


def test_token_of_a_migration_that_did_not_happen_is_worth_nothing_afterwards(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = is_copying(hosts, hypervisors)
    known = hypervisors["host-a"].marks[guest]
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    with Stranger(hosts, "host-x") as stranger:
        stranger.ask("host-a", guest, known)
        assert "nothing shows that" in stranger.is_refused()


def test_ports_that_cannot_be_read_do_not_hide_where_the_guest_comes_from(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    description = hypervisors["host-a"].description(guest)
    assert description is not None
    spoiled = "<sami:ports xmlns:sami='urn:sami:ports:1'><sami:port mac='none'/></sami:ports></metadata>"
    comes(hosts, guest, description.replace("</metadata>", spoiled))
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    until_idle(hosts)
    assert len(held(hosts, "host-b")) == 100


def test_what_a_caller_said_first_is_heard_before_the_session_is_found(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    real = Agent._add

    def add(self: Agent, session: Session) -> None:
        if session.role == "source":
            heard.append(len(session._kept))
        real(self, session)

    monkeypatch.setattr(Agent, "_add", add)
    is_copying(hosts, hypervisors)
    assert heard == [1]


def test_description_that_names_another_host_than_the_guest_s_own_leads_to_nothing(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    comes(hosts, guest, described(guest, "host-c", hypervisors["host-a"].marks[guest]))
    hosts.say("host-b", Phase.RESUMED, guest)
    assert hosts.agents["host-b"].wait_until_idle(10)
    assert held(hosts, "host-b") == set()
    assert len(held(hosts, "host-a")) == 100


def test_nova_and_the_hook_say_the_same_and_make_one_session(hosts: Hosts, hypervisors: dict[str, Hypervisor]) -> None:
    guest = marked(hosts, hypervisors)
    hypervisors["host-a"].leaving.add(guest)
    hosts.agents["host-b"].note(MigrationEvent(guest, Phase.PREPARE))
    hosts.agents["host-b"].note(MigrationEvent(guest, Phase.PREPARE, "host-a"))
    comes(hosts, guest, hypervisors["host-a"].description(guest))
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    until_idle(hosts)
    assert len(hosts.reports("host-b", guest)) == 1
    assert len(held(hosts, "host-b")) == 100


def test_manager_s_announcement_names_the_source_and_the_request_on_both_hosts(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    """Nova says it before libvirt's job begins, which is what the source's agent knows to be true."""
    guest = marked(hosts, hypervisors)
    agent = hosts.agents["host-b"]
    agent.announce(guest, "host-a", "host-b", "req-5f2d0c2e")
    assert agent.sessions() == []
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
    comes(hosts, guest, None)
    wait_for_step(hosts, "host-b", guest, "in sync")
    finish(hosts, guest)
    until_idle(hosts)
    assert len(held(hosts, "host-b")) == 100
    for host in ("host-a", "host-b"):
        (told,) = hosts.reports(host, guest)
        assert (told["outcome"], told["request_id"]) == ("moved", "req-5f2d0c2e")


def test_announcement_for_another_host_is_refused_and_says_what_to_change(hosts: Hosts) -> None:
    with pytest.raises(
        OperatorError, match=r"host-c is not host-b; \[agent\] host has to be what the manager calls it"
    ):
        hosts.agents["host-b"].announce(new_guest(), "host-a", "host-c", "")


def test_announcements_are_forgotten_in_time_and_the_oldest_of_too_many(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, guests = hosts.agents["host-b"], [new_guest() for _ in range(3)]
    monkeypatch.setattr(agent._announced, "_most", 2)
    for guest in guests:
        agent.announce(guest, "host-a", "host-b", "")
    assert list(agent._announced) == guests[1:]
    now = agent.host.monotonic()
    monkeypatch.setattr(type(agent.host), "monotonic", lambda self: now + SETTINGS.limits.session_seconds + 1)
    agent.announce(guests[0], "host-a", "host-b", "")
    assert list(agent._announced) == guests[:1]


@pytest.mark.parametrize("settings", [IMPATIENT], ids=["impatient"])
def test_what_a_guest_leaves_that_nobody_asked_for_is_purged_by_name(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    hosts.unplug("host-a", guest)  # its port goes with it
    hosts.say("host-a", Phase.STOPPED, guest)
    began = time.monotonic()
    until_idle(hosts)
    assert time.monotonic() - began < 5
    assert outcome(hosts, "host-a", guest) == ("purged without arrival", "no agent at the destination asked")
    assert held(hosts, "host-a") == set()


def test_guest_that_starts_anew_where_it_left_keeps_its_new_flows(tmp_path: Path) -> None:
    settings = replace(SETTINGS, started_seconds=5.0, limits=replace(SETTINGS.limits, arrival_seconds=60.0))
    driver = lambda name: MemoryDriver(MemoryDevice(name))  # noqa: E731
    with Hosts(tmp_path, ("host-a",), driver, settings=settings) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        hosts.say("host-a", Phase.STARTED, guest)  # its new host died, and it is started here again
        hosts.drivers["host-a"].insert(hosts.scope("host-a", guest), tcp_flows(7, first_port=7000))
        until_idle(hosts)
        assert ports(hosts, "host-a") == set(range(7000, 7007))


def test_guest_that_is_back_and_nobody_had_announced_it_keeps_its_flows(tmp_path: Path) -> None:
    settings = limited(arrival_seconds=1.0, watch_seconds=0.1)
    with Hosts(tmp_path, ("host-a",), lambda name: MemoryDriver(MemoryDevice(name)), settings=settings) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        hosts.say("host-a", Phase.STOPPED, guest)
        hosts.agents["host-a"].note(MigrationEvent(guest, Phase.RESUMED, role="destination"))
        until_idle(hosts)
        assert len(held(hosts, "host-a")) == 100
        assert outcome(hosts, "host-a", guest)[0] == "unclear"


@pytest.mark.parametrize("settings", [IMPATIENT], ids=["impatient"])
@pytest.mark.parametrize("is_away", [False, True])
def test_guest_that_came_again_while_no_agent_was_there_keeps_its_flows(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], is_away: bool
) -> None:
    """The hypervisor may be connected to a moment later than the agent goes on with what was under way."""
    guest, hypervisor = guest_with_flows(hosts), hypervisors["host-a"]
    hosts.say("host-a", Phase.SUSPENDED, guest)
    hosts.say("host-a", Phase.STOPPED, guest)
    until(lambda: any(one._state() == "abandoned" for one in hosts.agents["host-a"].sessions()))
    hosts.kill("host-a")
    hypervisor.here.add(guest)
    hypervisor.is_away = is_away
    hosts.start("host-a")
    time.sleep(3 * IMPATIENT.limits.arrival_seconds)
    hypervisor.is_away = False
    until_idle(hosts)
    assert len(held(hosts, "host-a")) == 100
    assert any("the guest is back" in remark for remark in hosts.reports("host-a", guest)[0]["remarks"])


def test_job_that_was_aborted_without_a_word_serves_nobody_later(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = is_copying(hosts, hypervisors)
    hypervisors["host-a"].leaving.clear()
    hypervisors["host-a"].here.add(guest)
    hosts.say("host-b", Phase.STOPPED, guest)
    until_idle(hosts)
    with Stranger(hosts, "host-x") as stranger:
        stranger.ask("host-a", guest, hypervisors["host-a"].marks[guest])
        until(lambda: hosts.agents["host-a"].sessions())
        (session,) = hosts.agents["host-a"].sessions()
        assert session._state() == "waiting"


@pytest.mark.parametrize("settings", [IMPATIENT], ids=["impatient"])
def test_guest_that_is_destroyed_while_it_is_copied_leaves_nothing(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    """Its hook says that it is gone before its event says that it moves nowhere any more."""
    guest = is_copying(hosts, hypervisors)
    hypervisors["host-a"].leaving.clear()
    for word in (MigrationEvent(guest, Phase.STOPPED), MigrationEvent(guest, Phase.ROLLBACK, role="source")):
        hosts.agents["host-a"].note(word)
    hosts.say("host-b", Phase.STOPPED, guest)
    assert hosts.agents["host-a"].wait_until_idle(10)
    assert held(hosts, "host-a") == set()
    assert outcome(hosts, "host-a", guest)[0] == "purged without arrival"


@pytest.mark.parametrize("settings", [IMPATIENT], ids=["impatient"])
def test_destination_that_asks_after_the_guest_has_left_is_refused_and_the_purge_goes_on(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = is_copying(hosts, hypervisors)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    hosts.say("host-a", Phase.STOPPED, guest)
    with Stranger(hosts, "host-x") as stranger:
        stranger.ask("host-a", guest)
        assert "has left" in stranger.is_refused()
    assert hosts.agents["host-a"].wait_until_idle(10)
    assert held(hosts, "host-a") == set()


def test_a_guest_that_was_paused_for_a_move_that_failed_keeps_its_flows(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    hosts.say("host-a", Phase.SUSPENDED, guest)
    hosts.say("host-a", Phase.RESUMED, guest)
    hosts.say("host-a", Phase.STOPPED, guest)  # its user ended it, long after
    until_idle(hosts)
    assert hosts.reports("host-a", guest) == []
    assert len(held(hosts, "host-a")) == 100


def test_a_job_that_is_gone_while_the_guest_runs_on_lets_the_destination_let_go(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    guest = is_copying(hosts, hypervisors)
    hypervisors["host-a"].leaving.clear()
    hosts.agents["host-a"].note(MigrationEvent(guest, Phase.ROLLBACK, role="source"))
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (100, 0)
    assert outcome(hosts, "host-a", guest)[0] == outcome(hosts, "host-b", guest)[0] == "stayed"


def test_source_has_to_be_told_where_no_hypervisor_can_be_asked(tmp_path: Path) -> None:
    with (
        Hosts(tmp_path, ("host-a",), lambda name: MemoryDriver(MemoryDevice(name)), settings=SETTINGS) as hosts,
        pytest.raises(OperatorError, match="source: has to be told"),
    ):
        hosts.say("host-a", Phase.PREPARE, new_guest())


def test_guest_that_nobody_announced_and_that_is_there_already_has_a_report(tmp_path: Path) -> None:
    with hosts_in(tmp_path, limited(open_seconds=0.2)) as hosts:
        guest = guest_with_flows(hosts)
        hosts.agents["host-b"].note(MigrationEvent(guest, Phase.STARTED, is_incoming=True))
        hosts.say("host-b", Phase.RESUMED, guest)
        until_idle(hosts)
        assert "nothing says which host" in outcome(hosts, "host-b", guest)[1]


def test_what_a_guest_left_is_purged_though_it_comes_back_before_anybody_said_that_it_had_gone(
    tmp_path: Path,
) -> None:
    with hosts_in(tmp_path) as hosts:
        guest = guest_with_flows(hosts)
        hosts.say("host-a", Phase.OUTGOING, guest, destination="host-b")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.drivers["host-b"].insert(hosts.scope("host-b", guest), tcp_flows(7, first_port=7000))
        hosts.unplug("host-a", guest)
        hosts.say("host-b", Phase.OUTGOING, guest, destination="host-a")
        hosts.say("host-a", Phase.PREPARE, guest, "host-b")
        hosts.plug("host-a", guest, OTHER_ZONE, GUEST_ADDRESS)
        hosts.say("host-a", Phase.STARTED, guest)
        wait_for_step(hosts, "host-a", guest, "in sync")
        finish(hosts, guest, "host-b", "host-a")
        until_idle(hosts)
        assert len(held(hosts, "host-a", OTHER_ZONE)) == 7
        assert held(hosts, "host-a") == set()
        assert sorted(one["outcome"] for one in hosts.reports("host-a", guest)) == ["moved", "purged without arrival"]


def test_job_that_nobody_asked_about_is_over_when_the_hypervisor_is_asked(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    """Of its abort no event tells. When its user shuts the guest down one day, it does not leave."""
    guest, agent = marked(hosts, hypervisors), hosts.agents["host-a"]
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest)
    assert agent.underway() == [(guest, "source")]
    hypervisors["host-a"].leaving.discard(guest)
    hosts.say("host-a", Phase.ROLLBACK, guest)  # as who polls those that are under way finds out
    assert agent.underway() == []
    hosts.say("host-a", Phase.STOPPED, guest)
    assert agent.sessions() == []
    assert hosts.reports("host-a", guest) == []


def test_guest_that_nobody_asked_for_is_in_the_journal_until_its_session_is(
    hosts: Hosts, hypervisors: dict[str, Hypervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts anew between the two finds it as one or as the other."""
    guest, journal = marked(hosts, hypervisors), hosts.agents["host-a"].host.journal
    hypervisors["host-a"].leaving.add(guest)
    hosts.say("host-a", Phase.OUTGOING, guest)
    keep, unfinished = journal.keep_outgoing, []

    def kept(of: str, told: str | None) -> None:
        if told is None:
            unfinished.extend(row["guest"] for row in journal.unfinished())
        keep(of, told)

    monkeypatch.setattr(journal, "keep_outgoing", kept)
    hosts.say("host-a", Phase.STOPPED, guest)
    assert unfinished == [guest]


def test_libvirt_is_not_asked_about_a_guest_whose_hook_brings_its_description(
    hosts: Hosts, hypervisors: dict[str, Hypervisor]
) -> None:
    """It answers only when the hook has returned."""
    agent, guest = hosts.agents["host-b"], new_guest()
    agent.host.policies = Policies(Refuse())
    told = partial(MigrationEvent, guest, domain=f"<domain><uuid>{guest}</uuid></domain>")
    agent.announce(guest, "host-a", "host-b", "req-1")
    with pytest.raises(Veto):
        agent.tell(told(Phase.PREPARE))
    agent.tell(told(Phase.STARTED))
    assert guest not in hypervisors["host-b"].asked
    hosts.say("host-b", Phase.STOPPED, guest)
