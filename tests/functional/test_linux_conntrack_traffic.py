"""Traffic of kinds that not every kernel tracks, through a firewall that lets in nothing but what it knows.

Entries are taken away, as on a host that the guest has not been on, and put in by the driver. What of it takes more
than this kernel has (sockets of SCTP, tunnels) is in tests/kernels.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from lab.namespace import Namespace
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.model.flows import Batch
from sami_plugin.model.protocols import SctpState
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.model.scope import Scope
from tests.two_sides import HERE, SECONDS, THERE, scope_of, two_sides

# Where the kernel has SCTP itself, it aborts associations that it did not begin. conntrack must not see that either.
NO_ABORTS = """table inet aborts {
  chain out { type filter hook output priority raw; meta l4proto 132 @th,96,8 6 drop; }
}
"""


@pytest.fixture
def driver() -> Iterator[LinuxConntrackDriver]:
    made = LinuxConntrackDriver()
    yield made
    made.close()


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    with two_sides() as made:
        for namespace in made:
            namespace.run(["nft", "-f", "-"], NO_ABORTS)
        yield made


@pytest.fixture
def scope(sides: tuple[Namespace, Namespace]) -> Scope:
    return scope_of(sides[0])


def of(template: str, driver: LinuxConntrackDriver, scope: Scope) -> Batch:
    """The flows of this template; there are no others but of ICMP."""
    told = [part for part in driver.export(scope) if not (isinstance(part, Batch) and "icmp" in part.template.name)]
    assert [part.template.name for part in told if isinstance(part, Batch)] == [template], told
    (batch,) = told
    assert isinstance(batch, Batch)
    return batch


def moves(
    template: str, driver: LinuxConntrackDriver, scope: Scope, arrives: Callable[[], bool], change: dict[str, int]
) -> Batch:
    """Takes the entry away and puts it in again, with what is to be `change`d in it; the entry as it was."""
    assert arrives()
    flow = of(template, driver, scope)
    assert len(flow) == 1
    assert driver.remove(scope, flow.identities)["outcome"].tolist() == [Outcome.REMOVED]
    assert not arrives(), "the firewall lets in what it does not know"
    sent = Batch(flow.template, flow.rows.copy())
    for name, value in change.items():
        sent.rows[name] = value
    assert driver.insert(scope, sent)["outcome"].tolist() == [Outcome.IMPORTED]
    kept, present = driver.read_back(scope, sent)
    assert present.all()
    assert not lost_fields(sent, kept.rows).any()
    return flow


def has_udplite() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_udplite(), reason="this kernel has no sockets of UDP-Lite")
def test_udplite_goes_on(sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver) -> None:
    with contextlib.ExitStack() as undo:
        ends = []
        for namespace, address, port in zip(sides, (HERE, THERE), (4000, 5000), strict=True):
            with namespace.inside():
                end = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE))
            end.bind((address, port))
            end.settimeout(SECONDS)
            ends.append(end)
        here, there = ends
        # The kernel takes the checksum of UDP-Lite for one of UDP, over another pseudo-header, and all of it for wrong
        # (nf_conntrack_proto_udp.c, udplite_error).
        sides[0].sysctl("nf_conntrack_checksum", 0)

        def arrives() -> bool:
            there.sendto(b"back", (HERE, 4000))
            with contextlib.suppress(TimeoutError):
                return here.recv(100) == b"back"
            return False

        here.sendto(b"forth", (THERE, 5000))
        assert there.recv(100) == b"forth"
        moves("udplite-ipv4", driver, scope, arrives, {})
        assert all(arrives() for _ in range(3))
        assert len(of("udplite-ipv4", driver, scope)) == 1


# --- SCTP, written by hand: not every kernel has sockets of it

INIT, INIT_ACK, SHUTDOWN, COOKIE_ECHO, COOKIE_ACK, DATA = 1, 2, 7, 10, 11, 0
TAG_OF_THERE, TAG_OF_HERE = 0xA1B2C3D4, 0x01020304
"""What packets to `THERE`, and to `HERE`, carry."""


def crc32c(octets: bytes) -> int:
    """RFC 9260 appendix A."""
    crc = 0xFFFFFFFF
    for octet in octets:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def chunk(kind: int, value: bytes = b"") -> bytes:
    return struct.pack("!BBH", kind, 3 if kind == DATA else 0, 4 + len(value)) + value


def packet(ports: tuple[int, int], tag: int, content: bytes) -> bytes:
    without = struct.pack("!HHII", *ports, tag, 0) + content
    return without[:8] + struct.pack("<I", crc32c(without)) + without[12:]


def introduction(tag: int) -> bytes:
    """What INIT and INIT ACK hold."""
    return struct.pack("!IIHHI", tag, 1 << 16, 1, 1, 1)


class Association:
    """Both ends of an association that `HERE` has begun, as the firewall of `HERE` sees it."""

    def __init__(self, here: socket.socket, there: socket.socket) -> None:
        self._here, self._there = here, there
        self._numbers = itertools.count()
        assert self.to_there(0, chunk(INIT, introduction(TAG_OF_HERE)))
        assert self.to_here(TAG_OF_HERE, chunk(INIT_ACK, introduction(TAG_OF_THERE)))
        assert self.to_there(TAG_OF_THERE, chunk(COOKIE_ECHO, b"cook"))
        assert self.to_here(TAG_OF_HERE, chunk(COOKIE_ACK))

    def to_there(self, tag: int, content: bytes) -> bool:
        return self._passes(self._here, self._there, THERE, packet((4000, 5000), tag, content))

    def to_here(self, tag: int, content: bytes) -> bool:
        return self._passes(self._there, self._here, HERE, packet((5000, 4000), tag, content))

    def data_arrives(self, tag: int = TAG_OF_HERE) -> bool:
        number = next(self._numbers)
        return self.to_here(tag, chunk(DATA, struct.pack("!IHHI", number, 0, 0, 0) + struct.pack("!I", number)))

    def data_leaves(self) -> bool:
        number = next(self._numbers)
        content = struct.pack("!IHHI", number, 0, 0, 0) + struct.pack("!I", number)
        return self.to_there(TAG_OF_THERE, chunk(DATA, content))

    @staticmethod
    def _passes(sender: socket.socket, receiver: socket.socket, address: str, octets: bytes) -> bool:
        sender.sendto(octets, (address, 0))
        with contextlib.suppress(TimeoutError):
            return receiver.recv(2000)[20:] == octets
        return False


def raw(sides: tuple[Namespace, Namespace], protocol: int, undo: contextlib.ExitStack) -> list[socket.socket]:
    """A socket on each side for whatever is in the IP header's payload."""
    ends = []
    for namespace, address in zip(sides, (HERE, THERE), strict=True):
        with namespace.inside():
            end = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol))
        end.bind((address, 0))
        end.settimeout(SECONDS)
        ends.append(end)
    return ends


@pytest.fixture
def association(sides: tuple[Namespace, Namespace]) -> Iterator[Association]:
    with contextlib.ExitStack() as undo:
        yield Association(*raw(sides, socket.IPPROTO_SCTP, undo))


def test_sctp_goes_on_with_its_state_and_tags(
    association: Association, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    flow = moves("sctp-ipv4", driver, scope, association.data_arrives, {})
    assert flow.rows["sctpAssociationState"].tolist() == [SctpState.ESTABLISHED]
    assert flow.rows["sctpVerificationTag"].tolist() == [TAG_OF_THERE]
    assert flow.rows["reverseSctpVerificationTag"].tolist() == [TAG_OF_HERE]
    for _ in range(3):
        assert association.data_arrives()
        assert association.data_leaves()
    assert not association.data_arrives(tag=99), "the firewall lets in what is of no association"
    assert association.to_here(TAG_OF_HERE, chunk(SHUTDOWN, bytes(4)))
    ending = of("sctp-ipv4", driver, scope)
    assert ending.rows["sctpAssociationState"].tolist() == [SctpState.SHUTDOWN_RECEIVED]


def test_sctp_with_another_tag_is_another_association(
    association: Association, scope: Scope, driver: LinuxConntrackDriver
) -> None:
    """Which is why the tags are critical elements."""
    moves("sctp-ipv4", driver, scope, association.data_arrives, {"reverseSctpVerificationTag": 5})
    assert not association.data_arrives()
    assert association.data_arrives(tag=5)


# --- GRE

PLAIN = struct.pack("!HH", 0, 0x0800) + b"packet"
KEYED = struct.pack("!HHI", 0x2000, 0x0800, 77) + b"packet"
"""Of version 0, with a key (RFC 2890)."""


@pytest.mark.parametrize("octets", [PLAIN, KEYED], ids=["without a key", "with a key"])
def test_gre_goes_on_for_the_time_that_it_had(
    sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver, octets: bytes
) -> None:
    with contextlib.ExitStack() as undo:
        here, there = raw(sides, socket.IPPROTO_GRE, undo)

        def arrives() -> bool:
            there.sendto(octets, (HERE, 0))
            with contextlib.suppress(TimeoutError):
                return here.recv(100)[20:] == octets
            return False

        here.sendto(octets, (THERE, 0))
        assert there.recv(100)[20:] == octets
        flow = moves("gre-ipv4", driver, scope, arrives, {})
        assert (flow.rows["greKey"].tolist(), flow.rows["reverseGreKey"].tolist()) == ([0], [0])
        # Several: an entry made by ctnetlink without a fixed timeout ends with its first packet.
        assert all(arrives() for _ in range(3))
        (kept,) = of("gre-ipv4", driver, scope).rows
        assert kept["remainingTimeoutSeconds"] > 0


def test_call_of_pptp_has_its_id_as_the_key_of_its_direction(
    sides: tuple[Namespace, Namespace], scope: Scope, driver: LinuxConntrackDriver
) -> None:
    with contextlib.ExitStack() as undo:
        here, there = raw(sides, socket.IPPROTO_GRE, undo)
        octets = struct.pack("!HHHHI", 0x3001, 0x880B, 0, 77, 1)  # RFC 2637 section 4.1
        here.sendto(octets, (THERE, 0))
        assert there.recv(100)[20:] == octets
        (row,) = of("gre-ipv4", driver, scope).rows
        assert (row["greKey"], row["reverseGreKey"]) == (77, 0)
