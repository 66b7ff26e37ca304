"""Requests as the kernel gets them, and what the driver makes of the kernel's answers. No kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin import errors
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver, netlink, probe
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder, Timeouts
from sami_plugin.drivers.linux_conntrack.encode import Request, extras_of, requests
from sami_plugin.drivers.linux_conntrack.netlink import Messages, Torn, failure
from sami_plugin.drivers.linux_conntrack.watch import zone_filter
from sami_plugin.model import protocols
from sami_plugin.model.flows import ACCOUNTING, TEMPLATES, Batch, FlowStatus, ZoneRole, turned_round
from sami_plugin.model.protocols import TcpState
from sami_plugin.model.results import Outcome, Reason
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import PORT_ADDRESSES, flows
from tests.unit.codec.flow_strategies import batches_of

FLOWS = {name: one for name, one in TEMPLATES.items() if one.is_flow}
PLAIN = sorted(name for name, one in FLOWS.items() if not (one.is_translated or one.is_expectation))
SCOPE = Scope("port", "guest", {ZoneRole.PORT: 5}, PORT_ADDRESSES)


def as_messages(octets: np.ndarray) -> Messages:
    octets.view(np.uint32)[:, 0] = octets.shape[1]
    starts = np.arange(len(octets), dtype=np.int64) * octets.shape[1]
    return Messages(octets.reshape(-1), starts, np.full(len(octets), octets.shape[1], np.int64))


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_inserted_decodes_to_what_was_meant(name: str) -> None:
    sent = flows(TEMPLATES[name], 7)
    if "tcp" in name:
        sent.rows["tcpConnectionState"] = [1, 3, 4, 5, 6, 8, 9]
    if "sctp" in name:
        sent.rows["sctpAssociationState"] = [1, 2, 3, 4, 6, 7, 128]
        sent.rows["sctpVerificationTag"] = [0, 1, 2**32 - 1, 3, 4, 5, 6]
    (extras,) = np.unique(extras_of(sent))
    octets = requests(Request.INSERT, sent, np.full(7, 5, np.uint16), int(extras))
    (part,) = Decoder({ZoneRole.PORT: 5}).decode(as_messages(octets))
    assert isinstance(part, Decoded)
    for field in sent.rows.dtype.names or ():
        wanted = sent.rows[field].copy()
        if field in ("flowId", *ACCOUNTING):
            wanted[:] = 0  # no kernel takes it
        if "Flags" in field:
            wanted |= nl.FLAG_BE_LIBERAL
        if field == "conntrackStatus":
            wanted &= np.uint32(nl.STATUS_TAKEN)  # the kernel itself sets what says that there is a helper
        if field == "conntrackStatus" and "gre" in name:
            wanted |= np.uint32(FlowStatus.FIXED_TIMEOUT)  # else it would end with its next packet
        assert np.array_equal(part.batch.rows[field], wanted), field


OPTIONAL = sorted(f"{protocol.kind}-{family}" for protocol in nl.OPTIONAL for family in protocol.families)


@given(st.sampled_from(OPTIONAL).flatmap(lambda name: batches_of(TEMPLATES[name])))
def test_whatever_is_inserted_of_other_protocols_decodes_to_what_was_meant(batch: Batch) -> None:
    rows, protocol = batch.rows, batch.template.protocol
    zones = {role: 5 + int(role) for role in ZoneRole}
    for name in ("greKey", "reverseGreKey"):
        if name in (rows.dtype.names or ()):
            rows[name] &= np.uint32(nl.MOST_GRE_KEY)
    octets = requests(Request.INSERT, batch, 5 + rows["zoneRole"].astype(np.uint16))
    told = batch.template.empty(len(batch))
    for part in Decoder(zones).decode(as_messages(octets)):
        assert isinstance(part, Decoded), part
        assert part.batch.template == batch.template
        told[part.numbers] = part.batch.rows
    wanted = rows.copy()
    wanted["flowId"] = 0  # no kernel takes it
    wanted["conntrackStatus"] &= np.uint32(nl.STATUS_TAKEN)
    wanted["conntrackStatus"] |= np.uint32(FlowStatus.CONFIRMED)
    if protocol is protocols.GRE:
        wanted["conntrackStatus"] |= np.uint32(FlowStatus.FIXED_TIMEOUT)
    if protocol is protocols.SCTP:
        pending = wanted["sctpAssociationState"] == protocols.SctpState.SHUTDOWN_PENDING
        wanted["sctpAssociationState"][pending] = protocols.SctpState.ESTABLISHED
    assert told.tobytes() == wanted.tobytes()


def test_flags_mask_spares_what_speaks_of_sequence_numbers() -> None:
    octets = requests(Request.INSERT, flows(TEMPLATES["tcp-ipv4"], 1), np.zeros(1, np.uint16))[0].tobytes()
    for direction in (nl.TCP_FLAGS_ORIGINAL, nl.TCP_FLAGS_REPLY):
        assert struct.pack("=HH", 6, direction) + bytes((3 | 8, 0x9F)) in octets


def test_state_of_sctp_is_sent_with_both_tags() -> None:
    """The kernel refuses one without the others (nlattr_to_sctp)."""
    sent = flows(TEMPLATES["sctp-ipv4"], 1)
    sent.rows["sctpVerificationTag"], sent.rows["reverseSctpVerificationTag"] = 0xA1B2C3D4, 7
    octets = requests(Request.INSERT, sent, np.zeros(1, np.uint16))[0].tobytes()
    state = struct.pack("=HHB3x", 5, 1, 4)
    tags = struct.pack("=HH", 8, 2) + bytes.fromhex("a1b2c3d4") + struct.pack("=HH", 8, 3) + bytes.fromhex("00000007")
    inner = state + tags
    assert struct.pack("=HHHH", 8 + len(inner), 0x8004, 4 + len(inner), 0x8003) + inner in octets


def test_state_that_no_sctp_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "features", lambda: probe.Features(optional=frozenset(OPTIONAL)))
    sent = flows(TEMPLATES["sctp-ipv4"], 2)
    sent.rows["sctpAssociationState"] = 4, 9
    made = driver_of(Kernel({})).insert(SCOPE, sent)
    assert [(one["outcome"], one["reason"]) for one in made] == [
        (Outcome.IMPORTED, Reason.NONE),
        (Outcome.REFUSED, Reason.INVALID),
    ]


def test_keys_of_gre_that_the_kernel_has_no_room_for_are_refused_and_never_named_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "features", lambda: probe.Features(optional=frozenset(OPTIONAL)))
    sent = flows(TEMPLATES["gre-ipv4"], 3)
    sent.rows["greKey"] = 0xFFFF, 0x10000, 7
    sent.rows["reverseGreKey"] = 7, 7, 0x10007
    kernel = Kernel({nl.CT_GET: lambda count: [errno.ENOENT] * count})
    driver = driver_of(kernel)
    refused, done = (Outcome.REFUSED, Reason.INVALID), (Outcome.IMPORTED, Reason.NONE)
    assert [(one["outcome"], one["reason"]) for one in driver.insert(SCOPE, sent)] == [done, refused, refused]
    assert driver.renew(SCOPE, sent)["outcome"].tolist() == [Outcome.IMPORTED, Outcome.ABSENT, Outcome.ABSENT]
    assert driver.remove(SCOPE, sent)["outcome"].tolist() == [Outcome.REMOVED, Outcome.ABSENT, Outcome.ABSENT]
    assert not driver.read_back(SCOPE, sent)[1].any()
    # One insert, one renewal, one removal by id, one look-up.
    assert sorted(kernel.seen) == sorted([nl.CT_NEW, nl.CT_NEW, nl.CT_DELETE, nl.CT_GET])


def test_zone_is_left_out_only_where_all_rows_are_in_zone_zero() -> None:
    sent = flows(TEMPLATES["udp-ipv4"], 2)
    without, with_ = (requests(Request.GET, sent, np.array(zones, np.uint16)) for zones in ((0, 0), (0, 5)))
    assert with_.shape[1] == without.shape[1] + 8


ASKED = [(it, name) for it in Request for name in PLAIN if it is not Request.CHECK_WINDOWS or "tcp" in name]
"""Only TCP has windows."""


@pytest.mark.parametrize(("request_", "name"), ASKED)
def test_every_request_names_a_tuple(request_: Request, name: str) -> None:
    """A DELETE without a tuple is a flush."""
    octets = requests(request_, flows(TEMPLATES[name], 3), np.zeros(3, np.uint16))
    for row in octets:
        assert row[20:24].view(np.uint16)[1] & nl.NLA_TYPE_MASK == nl.TUPLE_ORIG
        assert row[20:24].view(np.uint16)[0] > 30


def test_turning_round_twice_is_nothing() -> None:
    for name in PLAIN:
        sent = flows(TEMPLATES[name], 3)
        assert np.array_equal(turned_round(turned_round(sent)).rows, sent.rows)
        assert not np.array_equal(turned_round(sent).rows, sent.rows)


def test_states_that_conntrack_does_not_tell_apart_become_the_nearest() -> None:
    assert nl.STATE_TO_KERNEL[TcpState.FIN_WAIT_2] == nl.STATE_TO_KERNEL[TcpState.CLOSE_WAIT]
    assert nl.STATE_TO_KERNEL[TcpState.CLOSING] == nl.STATE_TO_KERNEL[TcpState.LAST_ACK]
    assert nl.STATE_TO_KERNEL[TcpState.LISTEN] == nl.STATE_TO_KERNEL[0] == nl.STATE_TO_KERNEL[77] == nl.NO_STATE


# --- a kernel that answers as told


class Kernel:
    """Stands for a connection: answers each request by its type with the errnos it was told."""

    answers_that_fit = 3  # several batches, so numbers of rows are put together from several

    def __init__(self, codes: dict[int, Callable[[int], list[int]]], in_use: int = 1, capacity: int = 10) -> None:
        self.codes, self.in_use, self.capacity = codes, in_use, capacity
        self.seen: list[int] = []
        self.dumps: list[list[Messages] | Exception] = []

    def ask(self, octets: np.ndarray) -> tuple[np.ndarray, list[tuple[Messages, np.ndarray]]]:
        kind = int(octets[0, 4:6].view(np.uint16)[0])
        if kind == nl.CT_GET_STATS:
            body = b"".join(
                struct.pack("=HH", 8, number + 1) + value.to_bytes(4, "big")
                for number, value in enumerate((self.in_use, self.capacity))
            )
            answer = np.frombuffer(bytes(20) + body, np.uint8).copy()
            return np.zeros(1, np.int32), [(as_messages(answer[None, :]), np.zeros(1, np.int64))]
        self.seen += [kind] * len(octets)
        return np.array(self.codes.get(kind, lambda count: [0] * count)(len(octets)), np.int32), []

    def dump(self, request: np.ndarray, kind: int = nl.CT_NEW) -> Iterator[Messages]:
        if kind == nl.EXP_NEW:
            return
        answer = self.dumps.pop(0)
        if isinstance(answer, Exception):
            raise answer
        yield from answer


class Connections:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @contextlib.contextmanager
    def lend(self, namespace: str | None) -> Iterator[Kernel]:
        yield self.kernel

    def timeouts(self, namespace: str | None) -> Timeouts:
        return Timeouts()


def driver_of(kernel: Kernel) -> LinuxConntrackDriver:
    driver = LinuxConntrackDriver()
    driver._connections = Connections(kernel)  # type: ignore[assignment]
    return driver


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOENT, Reason.NO_ENTRY),
        (errno.EOPNOTSUPP, Reason.NOT_SUPPORTED),
        (errno.ENOMEM, Reason.OUT_OF_MEMORY),
        (errno.ENOSPC, Reason.CHAIN_TOO_LONG),
        (errno.EBUSY, Reason.BUSY),
        (errno.EINVAL, Reason.INVALID),
        (errno.EPERM, Reason.NOT_PERMITTED),
        (errno.EXDEV, Reason.DEVICE_ERROR),
    ],
)
def test_each_errno_has_its_reason(code: int, reason: Reason) -> None:
    kernel = Kernel({nl.CT_NEW: lambda count: [0, code, 0][:count]})
    made = driver_of(kernel).insert(SCOPE, flows(TEMPLATES["tcp-ipv4"], 5))
    refused, done = (Outcome.REFUSED, reason), (Outcome.IMPORTED, Reason.NONE)
    assert [(one["outcome"], one["reason"]) for one in made] == [done, refused, done, done, refused]


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("known", [frozenset(), None], ids=["lacking", "not tried"])
def test_kind_that_this_kernel_does_not_keep_is_refused_before_the_kernel_is_asked(
    name: str, known: frozenset[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "features", lambda: probe.Features(optional=known))
    kernel = Kernel({})
    made = driver_of(kernel).insert(SCOPE, flows(TEMPLATES[name], 3))
    assert {(int(one["outcome"]), int(one["reason"])) for one in made} == {(Outcome.REFUSED, Reason.NOT_DECLARED)}
    assert not kernel.seen


@pytest.mark.parametrize("name", OPTIONAL)
def test_kind_that_this_kernel_keeps_is_inserted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "features", lambda: probe.Features(optional=frozenset(OPTIONAL)))
    made = driver_of(Kernel({})).insert(SCOPE, flows(TEMPLATES[name], 3))
    assert set(made["outcome"]) == {Outcome.IMPORTED}


def test_kinds_of_every_kernel_are_not_tried_for_an_insert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "features", lambda: pytest.fail("the kernel was tried"))
    for name in (name for name in PLAIN if TEMPLATES[name].protocol not in nl.OPTIONAL):
        made = driver_of(Kernel({})).insert(SCOPE, flows(TEMPLATES[name], 1))
        assert set(made["outcome"]) == {Outcome.IMPORTED}


class Forgetful:
    """A kernel that takes all inserts and keeps them, but for one attribute of one protocol, which is 0 then."""

    def __init__(self, protocol: int, header: tuple[int, int], value: bytes) -> None:
        self.protocol, self.forgets = protocol, (struct.pack("=HH", *header), value)
        self.kept: list[np.ndarray] = []
        self.forgotten = 0

    def ask(self, octets: np.ndarray) -> tuple[np.ndarray, list[tuple[Messages, np.ndarray]]]:
        raw, (header, value) = octets.tobytes(), self.forgets
        if struct.pack("=HHB", 5, nl.PROTO_NUM, self.protocol) in raw:
            self.forgotten += raw.count(header + value)
            raw = raw.replace(header + value, header + bytes(len(value)))
        self.kept.append(np.frombuffer(raw, np.uint8).reshape(octets.shape).copy())
        return np.zeros(len(octets), np.int32), []

    def dump(self, request: np.ndarray) -> Iterator[Messages]:
        yield from (as_messages(octets) for octets in self.kept)


@pytest.mark.parametrize(
    ("protocol", "header", "value", "lost"),
    [
        (132, (5, nl.SCTP_STATE), b"\4", "sctp-"),
        (132, (8, nl.SCTP_TAG_ORIGINAL), b"\0\0\0\x0a", "sctp-"),
        (132, (8, nl.SCTP_TAG_REPLY), b"\0\0\0\x0b", "sctp-"),
        (136, (6, nl.PROTO_SRC_PORT), b"\0\x09", "udplite-"),
        (47, (6, nl.PROTO_DST_PORT), b"\0\x09", "gre-"),
        (47, (8, nl.MARK), b"\0\0\0\1", "nothing, for marks are tried elsewhere"),
    ],
)
def test_kind_is_declared_where_every_field_comes_back(
    protocol: int, header: tuple[int, int], value: bytes, lost: str
) -> None:
    kernel = Forgetful(protocol, header, value)
    kept = probe._optional(kernel)  # type: ignore[arg-type]
    # This kernel makes no NAT: what it dumps is what was sent, a reply that is not translated.
    assert kept == {name for name in OPTIONAL if not name.startswith(lost)}
    assert kernel.forgotten >= 2  # IPv4 and IPv6


def test_full_table_is_told_apart_from_missing_memory() -> None:
    kernel = Kernel({nl.CT_NEW: lambda count: [errno.ENOMEM] * count}, in_use=10, capacity=10)
    made = driver_of(kernel).insert(SCOPE, flows(TEMPLATES["udp-ipv4"], 2))
    assert set(made["reason"]) == {Reason.TABLE_FULL}


def test_taken_tuple_that_stays_taken_is_refused_after_a_few_tries() -> None:
    kernel = Kernel(
        {
            nl.CT_NEW: lambda count: [errno.EEXIST] * count,
            nl.CT_GET: lambda count: [errno.ENOENT] * count,
        }
    )
    made = driver_of(kernel).insert(SCOPE, flows(TEMPLATES["udp-ipv4"], 2))
    assert set(made["reason"]) == {Reason.EXISTS}
    assert nl.CT_DELETE not in kernel.seen, "nothing was found, and something deleted"
    assert kernel.seen.count(nl.CT_NEW) < 20


def test_torn_dump_is_done_again_and_not_for_ever() -> None:
    messages = as_messages(requests(Request.INSERT, flows(TEMPLATES["udp-ipv4"], 3), np.full(3, 5, np.uint16)))
    kernel = Kernel({})
    kernel.dumps = [Torn("torn"), Torn("torn"), [messages]]
    assert sum(len(part) for part in driver_of(kernel).export(SCOPE) if isinstance(part, Batch)) == 3
    kernel.dumps = [Torn("torn")] * 50
    with pytest.raises(errors.DeviceFailed, match="changed under"):
        list(driver_of(kernel).export(SCOPE))
    assert len(kernel.dumps) > 40


def test_lookup_that_fails_is_not_taken_for_absence() -> None:
    kernel = Kernel({nl.CT_GET: lambda count: [errno.EIO] * count})
    with pytest.raises(errors.DeviceFailed):
        driver_of(kernel).read_back(SCOPE, flows(TEMPLATES["udp-ipv4"], 2))


def test_kernel_that_does_not_filter_zones_gives_the_same_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "features", lambda: probe.Features(filters_dump_by_zone=False))
    sent = flows(TEMPLATES["udp-ipv4"], 3)
    messages = as_messages(requests(Request.INSERT, sent, np.array([5, 6, 7], np.uint16)))
    kernel = Kernel({})
    kernel.dumps = [[messages]]  # one dump for two zones
    scope = Scope("port", "guest", {ZoneRole.PORT: 5, ZoneRole.SNAT: 7}, PORT_ADDRESSES)
    (batch,) = driver_of(kernel).export(scope)
    assert isinstance(batch, Batch)
    assert batch.rows["zoneRole"].tolist() == [ZoneRole.PORT, ZoneRole.SNAT]


def test_missing_capability_is_the_operators_move() -> None:
    assert isinstance(failure(errno.EPERM, "dump"), errors.NotPermitted)
    assert isinstance(failure(errno.EOPNOTSUPP, "dump"), errors.NotAvailable)
    assert isinstance(failure(errno.EIO, "dump"), errors.DeviceFailed)


# --- the socket filter, run by a small interpreter


def passes(program: bytes, event: bytes) -> bool:
    instructions = list(struct.iter_unpack("=HBBI", program))
    a = x = at = 0
    while True:
        code, jt, jf, k = instructions[at]
        at += 1
        if code == 0x00:
            a = k
        elif code == 0x01:
            x = k
        elif code == 0x20:
            assert k == 0xFFFFF00C
            place = a
            a = 0
            while place + 4 <= len(event):
                size, kind = struct.unpack_from("=HH", event, place)
                if kind & nl.NLA_TYPE_MASK == x:
                    a = place
                    break
                place += (size + 3) & ~3
        elif code == 0x07:
            x = a
        elif code == 0x48:
            (a,) = struct.unpack_from(">H", event, x + k)
        elif code == 0x15:
            at += jt if a == k else jf
        elif code == 0x06:
            return k != 0
        else:
            raise AssertionError(hex(code))


@pytest.mark.parametrize("zones", [[0], [5], [0, 5], [4097, 5, 65535], []])
@pytest.mark.parametrize("zone", [0, 4, 5, 6, 4097, 65535])
def test_filter_lets_its_own_zones_through(zones: list[int], zone: int) -> None:
    event = requests(Request.INSERT, flows(TEMPLATES["tcp-ipv4"], 1), np.array([zone], np.uint16))[0].tobytes()
    assert passes(zone_filter(zones), event) == (zone in zones)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EMFILE, errors.DeviceFailed),
        (errno.ENOBUFS, errors.DeviceFailed),
        (errno.EPROTONOSUPPORT, errors.NotAvailable),
    ],
)
def test_socket_that_there_is_not_for_now_is_told_from_one_that_there_never_is(
    monkeypatch: pytest.MonkeyPatch, code: int, kind: type[errors.SamiError]
) -> None:
    monkeypatch.setattr(netlink.privileged, "open_socket", mock.Mock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(errors.SamiError, match=os.strerror(code)) as caught:
        netlink.Connection(None)
    assert type(caught.value) is kind


def test_socket_that_cannot_be_bound_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.Mock()
    made.bind.side_effect = OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr(netlink.privileged, "open_socket", mock.Mock(return_value=made))
    with pytest.raises(errors.DeviceFailed, match="Cannot allocate memory"):
        netlink.Connection(None)
    made.close.assert_called_once_with()


def test_what_the_kernel_could_not_try_for_lack_of_memory_is_tried_again() -> None:
    connection = mock.Mock()
    connection.ask.return_value = np.array([0, errno.EINVAL], np.int32), []
    assert probe._tried(connection, np.zeros((2, 8), np.uint8)).tolist() == [0, errno.EINVAL]
    connection.ask.return_value = np.array([0, errno.ENOMEM], np.int32), []
    with pytest.raises(errors.DeviceFailed, match="ENOMEM"):
        probe._tried(connection, np.zeros((2, 8), np.uint8))
