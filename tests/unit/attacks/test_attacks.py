"""Who wants flow state that is not his, or wants others to have what he made, between real agents in memory.

Each attack is tried twice: as things are, where it has to fail, and with its defence taken out, where it has to
succeed; else the test would say nothing about the defence. The page doc/source/user/attacks.rst lists them.
"""

from __future__ import annotations

import contextlib
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.in_clear import ClearChannel
from sami_plugin import line as line_module
from sami_plugin.agent import Agent
from sami_plugin.callers import Callers
from sami_plugin.channel import tls
from sami_plugin.channel.identity import Credentials
from sami_plugin.channel.ordering import Inbox
from sami_plugin.codec import compression, ipfix, messages
from sami_plugin.drivers import memory as memory_driver
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import Busy, Malformed, SamiError
from sami_plugin.handover import destination
from sami_plugin.migration import source
from sami_plugin.migration.decision import Purge, TimePassed
from sami_plugin.model import scope as scope_module
from sami_plugin.model.flows import TEMPLATES, Batch, ZoneRole, has_end_in
from sami_plugin.model.migration import (
    Arrived,
    Complete,
    FlowChanges,
    Flows,
    InSync,
    MigrationEvent,
    Offer,
    Open,
    Phase,
    Purged,
)
from sami_plugin.model.packet import Packet
from sami_plugin.model.rate import TokenBucket
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Bounds
from sami_plugin.outgoing import Outgoing
from sami_plugin.testing.certificates import Certificates
from sami_plugin.testing.hosts import Hosts, new_guest
from sami_plugin.transport import rpc
from tests.unit.attacks.trial import believe_any_name, both
from tests.unit.channel.pair import Pair
from tests.unit.handover.memory import (
    GUEST_ADDRESS,
    SETTINGS,
    ZONES,
    begin,
    finish,
    guest_with_flows,
    held,
    ports,
    tcp_flows,
    until,
    until_idle,
    wait_for_step,
)
from tests.unit.handover.stranger import Stranger, is_given_flows

SOON = replace(SETTINGS, limits=replace(SETTINGS.limits, open_seconds=1.5, verdict_seconds=0.5), call_seconds=1.0)

BEGINNING = b"\x16\x03\x01\x02\x00"
"""Of a call: the head of a TLS record of which nothing more comes."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, tuple(ZONES), lambda name: MemoryDriver(MemoryDevice(name)), settings=SOON) as made:
        yield made


def test_host_without_a_certificate_of_the_authority(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = guest_with_flows(hosts)
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING, None, "host-x"))

    def attack() -> bool:
        with Stranger(hosts, "host-x", certificates=Certificates(tmp_path / "of-another-authority")) as stranger:
            stranger.ask("host-a", guest)
            return is_given_flows(stranger)

    def take_out() -> None:
        real = Credentials.context

        def careless(self: Credentials, *, is_server: bool) -> ssl.SSLContext:
            context = real(self, is_server=is_server)
            context.verify_mode = ssl.CERT_NONE
            return context

        monkeypatch.setattr(Credentials, "context", careless)
        believe_any_name(monkeypatch)

    both(monkeypatch, attack, take_out)


def test_host_that_speaks_for_another(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guest_with_flows(hosts)
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING, None, "host-c"))
    hosts.agents["host-c"].stop()

    def attack() -> bool:
        with Stranger(hosts, "host-c", speaks_with="host-x") as stranger:
            stranger.ask("host-a", guest)
            return is_given_flows(stranger)

    both(monkeypatch, attack, lambda: believe_any_name(monkeypatch))


def test_enrolled_host_that_is_not_the_destination_asks(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guest_with_flows(hosts)
    hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING, None, "host-b"))

    def attack() -> bool:
        with Stranger(hosts, "host-x") as stranger:
            stranger.ask("host-a", guest)
            return is_given_flows(stranger)

    both(
        monkeypatch,
        attack,
        lambda: monkeypatch.setattr(Agent, "_refuse_who_is_not_the_destination", lambda *_, **__: None),
    )


def test_flows_of_a_guest_that_does_not_leave(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = guest_with_flows(hosts)

    def attack() -> bool:
        with Stranger(hosts, "host-x") as stranger:
            stranger.ask("host-a", guest)
            return is_given_flows(stranger)

    def take_out() -> None:
        real = Agent._leaving

        def leaving(self: Agent, session: str, guest: str, peer: str, outgoing: Any, line: Any = None) -> Any:
            return real(self, session, guest, peer, Outgoing(peer), line)

        monkeypatch.setattr(Agent, "_leaving", leaving)

    both(monkeypatch, attack, take_out)


# --- what is on its way


def take_tls_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "Channel", ClearChannel)
    monkeypatch.setattr(tls, "Channel", ClearChannel)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str, Packet]]:
    """Sender, receiver, session and packet of all that the broker has."""
    found: list[tuple[str, str, str, Packet]] = []
    real = rpc.Transport.call

    def call(self: rpc.Transport, peer: str, session: str, packet: Packet, timeout_seconds: float) -> str:
        found.append((self.host, peer, session, packet))
        return real(self, peer, session, packet, timeout_seconds)

    monkeypatch.setattr(rpc.Transport, "call", call)
    return found


def test_broker_that_reads(
    hosts: Hosts, recorded: list[tuple[str, str, str, Packet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        said = b"".join(packet.octets for _, _, _, packet in recorded)
        assert said
        return guest.encode() in said or uuid.UUID(guest).bytes in said

    both(monkeypatch, attack, lambda: take_tls_out(monkeypatch))


def test_broker_that_says_again_in_another_session_what_it_has_recorded(
    hosts: Hosts, recorded: list[tuple[str, str, str, Packet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        recorded.clear()
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        hosts.agents["host-a"].tell(MigrationEvent(guest, Phase.OUTGOING, None, "host-b"))  # the same once more
        again, before = str(uuid.uuid4()), hosts.reports("host-b", guest)[0]["session"]
        for _, peer, session, packet in list(recorded):
            if (peer, session) == ("host-a", before):
                with contextlib.suppress(SamiError):
                    hosts.agents["host-a"].deliver("host-b", again, packet)
        has_session = any(one.id == again for one in hosts.agents["host-a"].sessions()) or any(
            report["session"] == again for report in hosts.reports("host-a", guest)
        )
        hosts.say("host-a", Phase.ROLLBACK, guest)
        until_idle(hosts)
        return has_session

    both(monkeypatch, attack, lambda: take_tls_out(monkeypatch))


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Credentials]:
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    made = {host: Credentials(host, certificates.files(host)) for host in "ds"}
    return made.__getitem__


def conversation(pair: Pair) -> None:
    """Some of it, both ways, all of it heard."""
    for number in range(6):
        pair.say("d", b"to s %d" % number)
        pair.say("s", b"to d %d" % number)
        pair.carry_all()


WHOLE = {"s": [b"to s %d" % number for number in range(6)], "d": [b"to d %d" % number for number in range(6)]}


def test_broker_that_breaks_a_stream_so_that_arrived_is_said_twice(
    credentials: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        pair = Pair.of(credentials)
        conversation(pair)
        pair.carry("s", Packet(0, sum(to == "s" for to, _ in pair.every), b"what nobody sent"))
        pair.carry_all()
        assert pair.broken
        return pair.heard != WHOLE

    both(monkeypatch, attack, lambda: monkeypatch.setattr(tls.Channel, "_is_new", lambda *_: True))


def test_broker_that_says_again_in_the_session_what_it_has_carried(
    credentials: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        pair = Pair.of(credentials)
        conversation(pair)
        for to, packet in list(pair.every):
            pair.carry(to, packet)
        pair.carry_all()
        return pair.heard != WHOLE or pair.broken > 0

    both(monkeypatch, attack, lambda: monkeypatch.setattr(Inbox, "accept", lambda self, number, octets: [octets]))


def test_broker_that_changes_the_order(
    credentials: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        pair = Pair.of(credentials)
        for number in range(6):
            pair.say("d", b"to s %d" % number)
            pair.say("s", b"to d %d" % number)
        with contextlib.suppress(SamiError):
            while pair.under_way:
                pair.carry(*pair.under_way.pop())
        return pair.heard != WHOLE or pair.broken > 0

    both(monkeypatch, attack, lambda: monkeypatch.setattr(Inbox, "accept", lambda self, number, octets: [octets]))


def test_broker_that_cuts_the_end_off(
    credentials: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        pair = Pair.of(credentials)
        conversation(pair)
        pair.say("s", b"remove these, and not those")
        while pair.under_way:
            to, packet = pair.under_way.pop()
            pair.carry(to, replace(packet, octets=packet.octets[:-11]))
        return b"remove these, an" in pair.heard["d"]

    both(monkeypatch, attack, lambda: take_tls_out(monkeypatch))


def test_agreement_on_an_older_tls(credentials: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch) -> None:
    def attack() -> bool:
        pair = Pair.of(credentials)
        old = credentials("d")._context(ssl.PROTOCOL_TLS_CLIENT)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        pair.ends["d"] = tls.Channel("s", lambda: old, is_server=False)
        pair.say("d", b"open")
        with contextlib.suppress(SamiError):
            pair.carry_all()
        return pair.heard["s"] == [b"open"]

    def take_out() -> None:
        real = Credentials.context

        def careless(self: Credentials, *, is_server: bool) -> ssl.SSLContext:
            context = real(self, is_server=is_server)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            return context

        monkeypatch.setattr(Credentials, "context", careless)

    both(monkeypatch, attack, take_out)


def test_another_host_says_in_the_destination_s_name_that_the_guest_has_arrived(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Credentials("host-x", hosts.certificates.files("host-x"))

    def attack() -> bool:
        guest = guest_with_flows(hosts)
        begin(hosts, guest)
        hosts.say("host-a", Phase.SUSPENDED, guest)
        wait_for_step(hosts, "host-a", guest, "complete")
        session = next(one.id for one in hosts.agents["host-a"].sessions() if one.guest == guest)
        answers: list[Packet] = []
        transport = hosts.agents["host-a"].host.peers.way_to("host-b").transport
        real = transport.call

        def call(peer: str, session_id: str, packet: Packet, seconds: float) -> str:
            if packet.stream == 0:
                return real(peer, session_id, packet, seconds)
            answers.append(packet)
            return rpc.TAKEN

        monkeypatch.setattr(transport, "call", call)
        channel = tls.Channel("host-a", lambda: own.context(is_server=False), is_server=False)
        channel._streams, channel._next_out = 1, 3  # behind Open, Answer and Complete
        channel.say(messages.encode(Arrived()))
        for _ in range(4):
            with contextlib.suppress(SamiError):
                for packet in channel.packets():
                    hosts.agents["host-a"].deliver("host-b", session, packet)
            with contextlib.suppress(AssertionError):
                until(lambda: answers, 0.5)
            with contextlib.suppress(SamiError):  # host-a's own messages, from the first on
                while answers:
                    channel.take(answers.pop(0))
        with contextlib.suppress(AssertionError):
            until(lambda: not held(hosts, "host-a"), 1.0)
        is_purged = not held(hosts, "host-a")
        monkeypatch.setattr(transport, "call", real)
        hosts.say("host-a", Phase.RESUMED, guest)
        hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        for host in ("host-a", "host-b"):
            hosts.unplug(host, guest)
        return is_purged

    both(monkeypatch, attack, lambda: believe_any_name(monkeypatch))


# --- what an enrolled source may have others put in


def source_says(hosts: Hosts, flows: Batch) -> None:
    """host-x, which the guest comes from, says that these are the guest's flows; the migration ends well."""
    with Stranger(hosts, "host-x") as stranger:
        guest = new_guest()
        hosts.say("host-b", Phase.PREPARE, guest, "host-x")
        hosts.plug("host-b", guest, ZONES["host-b"], GUEST_ADDRESS)
        hosts.say("host-b", Phase.STARTED, guest)
        until(lambda: Open in stranger.sessions)
        session = stranger.sessions[Open]
        octets = compression.compress(ipfix.encode([flows], export_time=0, enterprise=SETTINGS.enterprise), "zlib")
        for message in (Offer(1, 1), Flows(octets), InSync(len(flows)), FlowChanges(octets, is_last=True)):
            stranger.say("host-b", session, message)
        until(lambda: any(isinstance(message, Complete) for message in stranger.heard))
        hosts.say("host-b", Phase.RESUMED, guest)
        until(lambda: any(isinstance(message, Arrived) for message in stranger.heard))
        stranger.say("host-b", session, Purged(0, 0))
        until_idle(hosts)
        hosts.unplug("host-b", guest)


def test_source_that_sends_flows_of_a_foreign_address(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    def attack() -> bool:
        source_says(hosts, tcp_flows(3, "203.0.113.9", first_port=4000))
        return ports(hosts, "host-b") >= {4000, 4001, 4002}

    def take_out() -> None:
        for module in (destination, memory_driver, scope_module):
            monkeypatch.setattr(module, "has_end_in", lambda batch, addresses: np.full(len(batch), bool(addresses)))

    both(monkeypatch, attack, take_out)


def test_source_that_names_a_zone_of_another_role(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    # What could be a router's is waited for that long.
    host = hosts.agents["host-b"].host
    limits = replace(host.settings.limits, zone_seconds=0.5)
    monkeypatch.setattr(host, "settings", replace(host.settings, limits=limits))

    def attack() -> bool:
        flows = tcp_flows(3, first_port=5000)
        flows.rows["zoneRole"] = ZoneRole.SNAT
        source_says(hosts, flows)
        return bool(ports(hosts, "host-b") & {5000, 5001, 5002})

    def take_out() -> None:
        # As if each role named the port's own zone.
        real = memory_driver.MemoryDriver.insert
        monkeypatch.setattr(Scope, "owns", lambda self, batch: has_end_in(batch, self.addresses))

        def insert(self: MemoryDriver, scope: Scope, batch: Batch) -> Any:
            batch = Batch(batch.template, batch.rows.copy())
            batch.rows["zoneRole"] = ZoneRole.PORT
            return real(self, scope, batch)

        monkeypatch.setattr(memory_driver.MemoryDriver, "insert", insert)

    both(monkeypatch, attack, take_out)


def test_source_that_has_a_guest_s_flow_translated_to_a_foreign_address(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        template = TEMPLATES["tcp-nat-ipv4"]
        rows, plain = template.empty(1), tcp_flows(1, first_port=6000).rows
        for field in plain.dtype.names or ():
            rows[field] = plain[field]
        rows["postNATSourceIPv4Address"] = rows["sourceIPv4Address"]
        rows["postNATDestinationIPv4Address"] = 0x0A000001  # what the guest sends goes there
        rows["postNAPTSourceTransportPort"], rows["postNAPTDestinationTransportPort"] = 6000, 443
        source_says(hosts, Batch(template, rows))
        return 6000 in ports(hosts, "host-b")

    def take_out() -> None:
        monkeypatch.setattr(destination, "is_translated_elsewhere", lambda batch, addresses: np.zeros(len(batch), bool))

    both(monkeypatch, attack, take_out)


@pytest.mark.parametrize("how", compression.available())
def test_flows_that_unpack_to_more_than_there_is_memory(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = compression.compress(bytes(Bounds().unpacked_octets + 1), how)
    most = Bounds().unpacked_octets

    def attack() -> bool:
        try:
            return len(compression.decompress(bomb, most)) > 1 << 20
        except Malformed:
            return False

    def take_out() -> None:
        nonlocal most
        most = 1 << 40

    both(monkeypatch, attack, take_out)


def test_message_longer_than_a_broker_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    long = messages.encode(Flows(bytes(messages.MOST_OCTETS)))

    def attack() -> bool:
        try:
            return isinstance(messages.decode(long), Flows)
        except Malformed:
            return False

    both(monkeypatch, attack, lambda: monkeypatch.setattr(messages, "MOST_OCTETS", 1 << 40))


# --- who wants no more than to disturb


def test_flood_of_callers_that_never_show_who_they_are(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = hosts.agents["host-a"]

    def attack() -> bool:
        for number in range(Bounds().handshakes + 20):
            with contextlib.suppress(SamiError):
                agent.deliver(f"host-{number}", str(uuid.uuid4()), Packet(0, 0, BEGINNING))
        return len(agent._callers._known) > 64

    both(monkeypatch, attack, lambda: monkeypatch.setattr(Callers, "_refuse_crowd", lambda *_: None))


def test_calls_that_follow_each_other_faster_than_they_can_be_answered(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = hosts.agents["host-a"]

    def attack() -> bool:
        """Each call is over before the next, so there are never many at a time."""
        began, heard = time.monotonic(), 0
        for _ in range(500):
            session = str(uuid.uuid4())
            with contextlib.suppress(SamiError):
                agent.deliver("host-b", session, Packet(0, 0, BEGINNING))
                heard += 1
                agent._callers.hang_up(session)
        bounds = Bounds()
        return heard > bounds.handshakes + (time.monotonic() - began) * bounds.handshakes_per_second + 1

    both(monkeypatch, attack, lambda: monkeypatch.setattr(TokenBucket, "take", lambda *_: True))


def test_guests_that_come_more_at_a_time_than_this_host_can_keep_in_mind(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = hosts.agents["host-b"]
    agent.host.settings = replace(agent.host.settings, bounds=Bounds(sessions=3))

    def attack() -> bool:
        guests = [new_guest() for _ in range(5)]
        for guest in guests:
            with contextlib.suppress(SamiError):
                hosts.say("host-b", Phase.PREPARE, guest, "host-c")
        most = len(agent.sessions())
        for guest in guests:
            hosts.say("host-b", Phase.STOPPED, guest)
        until_idle(hosts)
        return most > 3

    both(monkeypatch, attack, lambda: monkeypatch.setattr(Agent, "_make_room", lambda *_: None))


def test_after_a_flood_a_host_is_heard_again(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, bounds = hosts.agents["host-a"], Bounds()
    for number in range(bounds.handshakes):
        agent.deliver(f"host-{number}", str(uuid.uuid4()), Packet(0, 0, BEGINNING))
    with pytest.raises(Busy):
        agent.deliver("host-y", str(uuid.uuid4()), Packet(0, 0, b""))
    clock = type(agent.host).monotonic
    monkeypatch.setattr(type(agent.host), "monotonic", lambda self: clock(self) + bounds.handshake_seconds + 1)
    guest = guest_with_flows(hosts)
    begin(hosts, guest)
    finish(hosts, guest)
    until_idle(hosts)
    assert (len(held(hosts, "host-a")), len(held(hosts, "host-b"))) == (0, 100)


def test_octets_that_a_stranger_has_kept_for_it(
    credentials: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attack() -> bool:
        pair = Pair.of(credentials, bounds=bounds)
        with contextlib.suppress(SamiError):
            pair.ends["s"].take(Packet(0, 0, BEGINNING))
            for number in range(2, 30):
                pair.ends["s"].take(Packet(0, number, bytes(100_000)))
        return sum(
            len(packet) for stream in pair.ends["s"]._begun.values() for packet in stream._inbox._waiting.values()
        ) > (1 << 20)

    def take_out() -> None:
        nonlocal bounds
        bounds = Bounds(handshake_octets=1 << 30)

    bounds = Bounds()
    both(monkeypatch, attack, take_out)


def test_broker_that_swallows_arrived_and_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's flows must not be gone where it still is, whatever is answered in the other host's name."""
    patient = replace(SOON, limits=replace(SOON.limits, session_seconds=1.5))

    def attack() -> bool:
        with Hosts(
            tmp_path / str(uuid.uuid4()), tuple(ZONES), lambda name: MemoryDriver(MemoryDevice(name)), settings=patient
        ) as hosts:
            guest = guest_with_flows(hosts)
            begin(hosts, guest)
            for agent in hosts.agents.values():
                agent.host.peers.way_to("host-b").transport.call = lambda *_: rpc.TAKEN  # type: ignore[method-assign]
            hosts.say("host-a", Phase.SUSPENDED, guest)
            assert hosts.agents["host-a"].wait_until_idle(20)
            return not held(hosts, "host-a")

    def take_out() -> None:
        def purge(session: source.Source, event: object, now: float) -> source.Decision:
            return replace(session, state=source.State.PURGING), [Purge()]

        monkeypatch.setitem(source.TABLE[source.State.DRAINED], TimePassed, purge)

    both(monkeypatch, attack, take_out)
