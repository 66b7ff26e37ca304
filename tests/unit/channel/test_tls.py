"""Two ends of a channel and a broker between them that does what it wants."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sami_plugin.channel import tls
from sami_plugin.channel.identity import Credentials
from sami_plugin.channel.tls import Channel
from sami_plugin.errors import Busy, IllegalMessage, NotAuthorised, PeerUnreachable, StreamBroken
from sami_plugin.model.packet import Packet
from sami_plugin.model.settings import Bounds
from sami_plugin.testing.certificates import Certificates
from tests.unit.channel.pair import Pair, client, server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def credentials(certificates: Certificates) -> Callable[[str], Credentials]:
    made: dict[str, Credentials] = {}

    def of(host: str) -> Credentials:
        if host not in made:
            made[host] = Credentials(host, certificates.files(host))
        return made[host]

    return of


@pytest.fixture
def pair(credentials: Callable[[str], Credentials]) -> Pair:
    return Pair.of(credentials)


def test_messages_come_in_order_each_once_both_ways(pair: Pair) -> None:
    for number in range(20):
        pair.say("d", b"to s %d" % number)
        pair.say("s", b"to d %d" % number)
    pair.carry_all()
    assert pair.heard == {
        "s": [b"to s %d" % number for number in range(20)],
        "d": [b"to d %d" % number for number in range(20)],
    }


def test_handshake_and_first_answer_take_four_flights(pair: Pair) -> None:
    pair.say("d", b"open")
    while not pair.heard["s"]:
        flight, pair.under_way = pair.under_way, []
        pair.flights += 1
        for to, packet in flight:
            pair.carry(to, packet)
    pair.say("s", b"offer")
    pair.say("s", b"flows")
    pair.carry_all()
    assert pair.heard["d"] == [b"offer", b"flows"]
    assert pair.flights == 4


def test_nothing_of_what_is_said_can_be_read_on_the_way(pair: Pair) -> None:
    pair.say("d", b"guest 11111111-2222-3333")
    pair.say("s", b"192.0.2.7" * 100)
    pair.carry_all()
    assert len(pair.heard["d"]) == len(pair.heard["s"]) == 1
    for _, packet in pair.every:
        assert b"11111111" not in packet.octets
        assert b"192.0.2.7" not in packet.octets


@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.lists(st.sampled_from("ds"), min_size=1, max_size=30))
def test_whatever_is_reordered_and_repeated_arrives(
    credentials: Callable[[str], Credentials], seed: int, said: list[str]
) -> None:
    chance, pair = random.Random(seed), Pair.of(credentials)
    expected: dict[str, list[bytes]] = {"d": [], "s": []}
    for number, end in enumerate(["d", *said]):
        pair.say(end, b"%d" % number)
        expected["s" if end == "d" else "d"].append(b"%d" % number)
    while pair.under_way:
        to, packet = pair.under_way.pop(chance.randrange(len(pair.under_way)))
        pair.carry(to, packet)
        if chance.random() < 0.3:
            pair.carry(*chance.choice(pair.every))  # once more
    assert pair.heard == expected


@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.integers(0, 6), st.integers(1, 20))
def test_after_forged_packets_another_stream_goes_on_and_nothing_is_lost_or_doubled(
    credentials: Callable[[str], Credentials], seed: int, forged: int, count: int
) -> None:
    chance, pair = random.Random(seed), Pair.of(credentials)
    expected: dict[str, list[bytes]] = {"d": [], "s": []}
    for number in range(count):
        end = chance.choice("ds") if number else "d"
        pair.say(end, b"%d" % number)
        expected["s" if end == "d" else "d"].append(b"%d" % number)
    while pair.under_way:
        to, packet = pair.under_way.pop(0)
        if forged and chance.random() < 0.3:
            forged -= 1
            octets = bytearray(packet.octets or b"\0")
            octets[chance.randrange(len(octets))] ^= 1 << chance.randrange(8)
            pair.carry(to, Packet(packet.stream, packet.number, bytes(octets)))
        pair.carry(to, packet)
    assert pair.heard == expected


def test_stream_that_is_forged_at_the_server_is_followed_by_another(pair: Pair) -> None:
    pair.say("d", b"one")
    pair.carry_all()
    pair.carry("s", Packet(0, 2, b"what nobody sent"))
    pair.say("d", b"two")
    pair.say("s", b"three")
    pair.carry_all()
    assert pair.heard == {"s": [b"one", b"two"], "d": [b"three"]}
    assert max(packet.stream for _, packet in pair.every) == 1


def test_server_that_was_started_anew_in_the_midst_of_the_handshake_is_called_anew(
    pair: Pair, credentials: Callable[[str], Credentials]
) -> None:
    pair.say("d", b"one")
    for _ in range(2):  # the hello, and its answer
        pair.carry(*pair.under_way.pop())
    pair.ends["s"] = server(credentials("s"), "d")
    pair.carry_all()
    assert pair.heard["s"] == [b"one"]


def test_call_that_was_taken_by_who_ended_before_it_answered_is_made_anew(
    pair: Pair, credentials: Callable[[str], Credentials]
) -> None:
    pair.say("d", b"one")
    pair.carry(*pair.under_way.pop())
    pair.under_way.clear()  # the answer ends with who made it
    pair.ends["s"] = server(credentials("s"), "d")
    for _ in range(2 * Bounds().streams):  # leaves some for what is tampered with
        pair.ends["d"].call_again()
    pair.collect()
    pair.carry_all()
    pair.ends["d"].call_again()
    pair.collect()
    assert pair.heard["s"] == [b"one"]
    assert max(packet.stream for _, packet in pair.every) < Bounds().streams // 2


def test_what_was_taken_and_not_acknowledged_is_said_again_to_the_one_that_comes_after(
    pair: Pair, credentials: Callable[[str], Credentials]
) -> None:
    pair.say("d", b"one")
    pair.carry_all()
    pair.ends["s"] = server(credentials("s"), "d")
    pair.ends["d"].call_again()
    pair.collect()
    pair.carry_all()
    assert pair.heard["s"] == [b"one", b"one"]


def test_server_keeps_the_old_stream_until_the_new_one_has_shown_who_it_is(pair: Pair) -> None:
    pair.say("d", b"one")
    pair.carry_all()
    hello = next(packet for to, packet in pair.every if to == "s")
    pair.carry("s", Packet(5, 0, hello.octets))  # of whoever has the broker
    pair.say("d", b"two")
    pair.carry_all()
    assert pair.heard["s"] == [b"one", b"two"]


def test_packets_of_this_session_come_to_nothing_in_another(credentials: Callable[[str], Credentials]) -> None:
    first, second = Pair.of(credentials), Pair.of(credentials)
    first.say("d", b"arrived")
    first.carry_all()
    assert first.heard["s"] == [b"arrived"]
    for to, packet in first.every:
        if to == "s":
            second.carry("s", packet)
    assert second.heard["s"] == []


def test_repetition_in_the_same_session_comes_to_nothing(pair: Pair) -> None:
    pair.say("d", b"arrived")
    pair.carry_all()
    for to, packet in list(pair.every):
        pair.carry(to, packet)
        pair.carry(to, Packet(packet.stream, packet.number + 100, packet.octets))
    pair.carry_all()
    assert pair.heard == {"s": [b"arrived"], "d": []}


def test_client_gives_up_when_every_stream_is_broken(pair: Pair) -> None:
    pair.say("d", b"one")
    for number in range(Bounds().streams - 1):
        with pytest.raises(StreamBroken):
            pair.ends["d"].take(Packet(number, 0, b"what nobody sent"))
    with pytest.raises(PeerUnreachable, match="tampers"):
        pair.ends["d"].take(Packet(Bounds().streams - 1, 0, b"what nobody sent"))


def test_server_s_word_that_the_stream_is_broken_begins_another(pair: Pair) -> None:
    pair.say("d", b"one")
    pair.carry_all()
    with pytest.raises(StreamBroken):
        pair.ends["d"].take(Packet(0, sum(to == "d" for to, _ in pair.every), b""))
    pair.collect()
    pair.say("s", b"two")
    pair.carry_all()
    assert pair.heard == {"s": [b"one"], "d": [b"two"]}


@pytest.mark.parametrize(("caller", "called"), [("x", "s"), ("d", "x")])
def test_host_that_speaks_as_another_is_refused(
    credentials: Callable[[str], Credentials], caller: str, called: str
) -> None:
    pair = Pair.of(credentials, caller, called)
    pair.say("d", b"open")
    with pytest.raises(NotAuthorised, match=r"it is x that speaks as [ds]"):
        pair.carry_all()
    assert pair.heard == {"d": [], "s": []}


def test_host_of_another_authority_is_refused(credentials: Callable[[str], Credentials], tmp_path: Path) -> None:
    foreign = Credentials("d", Certificates(tmp_path).files("d"))
    pair = Pair.of(credentials)
    pair.ends["d"] = client(foreign, "s")
    pair.say("d", b"open")
    with pytest.raises(NotAuthorised):
        pair.carry_all()
    # It is refused even where the caller believes anybody.
    trusting = foreign.context(is_server=False)
    trusting.verify_mode = ssl.CERT_NONE
    careless = Channel("s", lambda: trusting, is_server=False)
    called = server(credentials("s"), "d")
    careless.say(b"open")
    with pytest.raises(NotAuthorised, match="does not count"):
        carry_between(careless, called)


def carry_between(caller: Channel, called: Channel) -> list[bytes]:
    heard: list[bytes] = []
    for _ in range(6):
        for packet in caller.packets():
            heard += called.take(packet)
        for packet in called.packets():
            try:
                caller.take(packet)
            except NotAuthorised:  # the caller cannot read the name; what the called host makes of it is what counts
                continue
    return heard


def test_older_tls_is_refused(credentials: Callable[[str], Credentials], certificates: Certificates) -> None:
    old = Credentials("d2", certificates.files("d2")).context(is_server=False)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    called = server(credentials("s"), "d")
    caller = Channel("s", lambda: old, is_server=False)
    caller.say(b"open")
    with pytest.raises(StreamBroken, match="unsupported protocol"):
        carry_between(caller, called)


def test_strangers_octets_are_few(pair: Pair, credentials: Callable[[str], Credentials]) -> None:
    with pytest.raises(Busy):
        pair.ends["s"].take(Packet(0, 0, bytes(Bounds().handshake_octets + 1)))
    part = bytes(Bounds().handshake_octets // 2)
    with pytest.raises(StreamBroken, match="its beginning was said to somebody else"):
        pair.ends["s"].take(Packet(0, 2, part))
    pair.ends["s"] = server(credentials("s"), "d")
    pair.say("d", b"open")
    pair.carry(*pair.under_way.pop())
    pair.ends["s"].take(Packet(0, 2, part))
    pair.ends["s"].take(Packet(0, 3, part))
    with pytest.raises(Busy):
        pair.ends["s"].take(Packet(0, 4, part))
    for number in (-1, Bounds().streams, 1 << 40):
        with pytest.raises(IllegalMessage, match="not one of the"):
            pair.ends["s"].take(Packet(number, 0, b"hello"))


def test_what_is_not_acknowledged_is_kept_and_what_is_is_not(credentials: Callable[[str], Credentials]) -> None:
    pair = Pair.of(credentials, bounds=Bounds(session_octets=100_000))
    pair.say("d", b"open")
    pair.carry_all()
    for _ in range(100):  # a bulk copy, in which the other end says nothing by itself
        pair.say("s", bytes(10_000))
        pair.carry_all()
    assert len(pair.heard["d"]) == 100
    kept = pair.ends["s"]._kept_octets
    assert kept < tls.ACKNOWLEDGE_EVERY * 10_000
    pair.ends["s"].say(bytes(100_000 - kept))
    with pytest.raises(PeerUnreachable, match="acknowledged nothing"):
        pair.ends["s"].say(b"x")


def frames() -> Iterator[tuple[bytes, str]]:
    yield tls._FRAME.pack(tls.MOST_MESSAGE_OCTETS + 1, 0, 0), "too long"
    yield tls._FRAME.pack(1, 7, 0) + b"x", "came where 0 was awaited"
    yield tls._FRAME.pack(1, 0, 9) + b"x", "was never sent"


@pytest.mark.parametrize(("octets", "words"), frames())
def test_frame_that_cannot_be_breaks_the_stream(
    credentials: Callable[[str], Credentials], octets: bytes, words: str
) -> None:
    pair = Pair.of(credentials)
    pair.say("d", b"open")
    pair.carry_all()
    stream = pair.ends["s"]._current
    assert stream is not None
    stream.write(octets)
    (packet,) = stream.packets()
    with pytest.raises(StreamBroken, match=words):
        pair.ends["d"].take(packet)
