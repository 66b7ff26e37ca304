"""Netlink messages in columns: sockets, and where in a buffer each message begins.

Nothing here runs a Python statement per message. A datagram costs one `recv`; a dump packs some hundred messages into
each, answers to single requests and events come one per datagram.
"""

from __future__ import annotations

import ctypes
import errno
import secrets
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sami_plugin import errors, privileged
from sami_plugin.drivers.linux_conntrack import attributes as nl

Offsets = npt.NDArray[np.int64]
Octets = npt.NDArray[np.uint8]

HEADER = np.dtype([("length", "=u4"), ("type", "=u2"), ("flags", "=u2"), ("sequence", "=u4"), ("port", "=u4")])
HEADER_OCTETS = 16
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
GENERIC_OCTETS = 4  # struct nfgenmsg: family, version, resource

_CHUNK = 1 << 20
# A dump fills datagrams of at most 32 KiB, however much is offered (netlink_recvmsg in net/netlink/af_netlink.c).
_LARGEST_DATAGRAM = 1 << 16
# What one answer takes of SO_RCVBUF is its truesize, not its length: see `answers_that_fit`.
_OCTETS_PER_ANSWER = 4096
_PATIENCE_MS = 10_000


@dataclass(frozen=True, slots=True)
class Messages:
    """Netlink messages in one buffer.

    `octets` begins at an address that is a multiple of 4 and is valid until the next one is asked for; `starts` are
    octet offsets, multiples of 4, and each of `lengths` is at least 16 and lies inside `octets`.
    """

    octets: Octets
    starts: Offsets
    lengths: Offsets

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def words(self) -> npt.NDArray[np.uint32]:
        return self.octets[: len(self.octets) & ~3].view(np.uint32)

    def headers(self) -> npt.NDArray[np.void]:
        """All headers, as rows of HEADER."""
        at = (self.starts >> 2)[:, None] + np.arange(4)
        return np.ascontiguousarray(self.words[at]).view(HEADER).reshape(len(self))

    def take(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Messages:
        return Messages(self.octets, self.starts[which], self.lengths[which])


def frame(octets: Octets, ends: list[int], sequence: int, count: int, port: int) -> Messages:
    """Where each message begins, in datagrams that lie one behind the other.

    `ends` are the datagrams' ends in `octets`; each begins at the former's end, rounded up to 4. Every message must
    carry `port` and a sequence number among the `count` that begin with `sequence`.

    :raises Malformed: the datagrams are not made of such messages.
    """
    begins = np.zeros(len(ends), np.int64)
    stops = np.asarray(ends, np.int64)
    begins[1:] = _aligned(stops[:-1])
    words = octets[: len(octets) & ~3].view(np.uint32)
    if (stops - begins < HEADER_OCTETS).any():
        raise errors.Malformed("a datagram is shorter than a header", f"octet {begins[stops - begins < 16][0]}")
    # One message per datagram: nothing has to be found.
    lengths = words[begins >> 2].astype(np.int64)
    if (_aligned(lengths) == _aligned(stops - begins)).all():
        starts = begins
    else:
        starts, lengths = _find(words, begins, stops, sequence, count, port)
    beyond = lengths > stops[np.searchsorted(begins, starts, "right") - 1] - starts
    if beyond.any() or (lengths < HEADER_OCTETS).any():
        place = starts[beyond | (lengths < HEADER_OCTETS)][0]
        raise errors.Malformed("a message's length is wrong", f"octet {place}")
    at = starts >> 2
    known = (words[at + 2] - np.uint32(sequence) < count) & (words[at + 3] == port)
    if not known.all():
        raise errors.Malformed("a message answers no request of ours", f"octet {starts[~known][0]}")
    return Messages(octets, starts, lengths)


def frame_single(octets: Octets, ends: list[int]) -> Messages:
    """The messages of datagrams that hold one each, as events do; sequence numbers and ports are others' then.

    :raises Malformed: a datagram is not one message.
    """
    begins = np.zeros(len(ends), np.int64)
    stops = np.asarray(ends, np.int64)
    begins[1:] = _aligned(stops[:-1])
    short = stops - begins < HEADER_OCTETS
    if short.any():
        raise errors.Malformed("a datagram is shorter than a header", f"octet {begins[short][0]}")
    lengths = octets[: len(octets) & ~3].view(np.uint32)[begins >> 2].astype(np.int64)
    wrong = (lengths < HEADER_OCTETS) | (lengths > stops - begins) | (_aligned(lengths) != _aligned(stops - begins))
    if wrong.any():
        raise errors.Malformed("a datagram is not one message", f"octet {begins[wrong][0]}")
    return Messages(octets, begins, lengths)


def _find(
    words: npt.NDArray[np.uint32], begins: Offsets, stops: Offsets, sequence: int, count: int, port: int
) -> tuple[Offsets, Offsets]:
    """Starts and lengths of the messages: every place that looks like a header, less those no message leads to."""
    used = words[: _aligned(stops[-1]) >> 2]
    if count == 1:
        looks = used == np.uint32(sequence)
    else:
        looks = used - np.uint32(sequence) < count
    at = np.flatnonzero(looks) - 2
    at = at[(at >= 0) & (at < len(used) - 3)]
    at = at[used[at + 3] == port]
    lengths = used[at].astype(np.int64)
    candidates = at << 2
    follows = candidates + _aligned(lengths)
    # A datagram may end in a message whose length is no multiple of 4; the next begins rounded up all the same.
    is_chain = (
        len(candidates) > 0
        and candidates[0] == 0
        and follows[-1] == _aligned(stops[-1])
        and np.array_equal(follows[:-1], candidates[1:])
    )
    if is_chain:
        return candidates, lengths
    # Something inside a message looks like a header. Follow the lengths from the beginning of each datagram, from
    # all reached places at once and each time twice as far.
    end = _aligned(stops[-1])
    nodes = len(candidates)
    place = np.searchsorted(candidates, follows)
    place[place >= nodes] = nodes - 1 if nodes else 0
    leads = np.where((follows > candidates) & (candidates[place] == follows), place, nodes) if nodes else place
    leads = np.append(leads, nodes)
    reached = np.zeros(nodes + 1, bool)
    first = np.searchsorted(candidates, 0)
    if first < nodes and candidates[first] == 0:
        reached[first] = True
    hop = leads
    for _ in range(max(nodes, 1).bit_length()):
        reached[hop[reached]] = True
        hop = hop[hop]
    reached = reached[:nodes]
    starts, lengths = candidates[reached], lengths[reached]
    if not len(starts) or starts[0] != 0 or starts[-1] + _aligned(lengths[-1]) != end:
        broken = int(starts[-1] + _aligned(lengths[-1])) if len(starts) else 0
        raise errors.Malformed("there is no message where one must begin", f"octet {broken}")
    return starts, lengths


_Count = TypeVar("_Count", int, np.int64, Offsets)


def _aligned(octets: _Count) -> _Count:
    return (octets + 3) & ~3


class Connection:
    """One netfilter netlink socket, for one thread at a time.

    Not to be used again after an exception other than those that a method documents: answers may be left in it.
    """

    def __init__(self, namespace: str | None, receive_octets: int = 8 << 20) -> None:
        """:raises NotAvailable, NotPermitted: the namespace cannot be entered, or the kernel has no nfnetlink.

        :raises DeviceFailed: the kernel has no socket to give for now.
        """
        try:
            self._socket = privileged.open_socket(
                namespace, socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, nl.NETLINK_NETFILTER
            )
        except OSError as error:
            if error.errno not in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
                raise _no_socket(error) from error
            raise errors.NotAvailable(
                f"the kernel gives no netfilter netlink socket ({error.strerror}); load the module nfnetlink"
            ) from error
        try:
            self._socket.bind((0, 0))
            self._port = self._socket.getsockname()[0]
            _set_buffer(self._socket, nl.SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_octets)
            _set_buffer(self._socket, nl.SO_SNDBUFFORCE, socket.SO_SNDBUF, 2 * _CHUNK)
            for option in (nl.NETLINK_CAP_ACK, nl.NETLINK_EXT_ACK):
                self._socket.setsockopt(nl.SOL_NETLINK, option, 1)
        except OSError as error:
            self._socket.close()
            raise _no_socket(error) from error
        self._socket.setblocking(False)
        self._poll = select.poll()  # not select(), which knows no file descriptor above 1023
        self._poll.register(self._socket, select.POLLIN)
        self._sequence = secrets.randbits(32)
        self._buffer = np.zeros(_CHUNK + _LARGEST_DATAGRAM, np.uint8)
        self._view = memoryview(self._buffer)  # type: ignore[arg-type]

    @property
    def receive_octets(self) -> int:
        """What the kernel really gave, by its own way of counting (it doubles what is asked for)."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    @property
    def answers_that_fit(self) -> int:
        """How many requests may be sent at once so that an answer to each fits into the receive buffer."""
        return max(1, self.receive_octets // _OCTETS_PER_ANSWER)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def join(self, *groups: int) -> None:
        """Receive the events of these groups from now on."""
        for group in groups:
            self._socket.setsockopt(nl.SOL_NETLINK, nl.NETLINK_ADD_MEMBERSHIP, group)

    def attach_filter(self, program: bytes) -> None:
        """Let the kernel pass each event through this classic BPF program (instructions as struct sock_filter)."""
        code = ctypes.create_string_buffer(program, len(program))  # kept until the kernel has copied it
        described = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
        self._socket.setsockopt(socket.SOL_SOCKET, nl.SO_ATTACH_FILTER, described)

    def dump(self, request: Octets, kind: int = nl.CT_NEW) -> Iterator[Messages]:
        """The answers to a dump request (its sequence number and length are filled in here), chunk by chunk.

        Headers' types are `kind` only. A dump that is not read to its end leaves the connection unusable: close it.

        :raises Torn: the kernel says that the table changed in a way that made the dump incomplete.
        :raises DeviceFailed, NotPermitted: the kernel refuses or gives up.
        """
        sequence = self._next_sequence(1)
        self._send(_addressed(request[None, :].copy(), sequence))
        while True:
            used, ends = self._receive_chunk(wait=True)
            if not ends:
                raise errors.DeviceFailed("the kernel stopped in the middle of a dump")
            messages = frame(self._buffer[: _aligned(used)], ends, sequence, 1, self._port)
            headers = messages.headers()
            if (headers["flags"] & nl.NLM_F_DUMP_INTR).any():
                raise Torn("the table changed under the dump")
            is_entry = headers["type"] == kind
            if is_entry.all():
                yield messages
                continue
            others = np.flatnonzero(~is_entry)
            last = others[0]
            other = int(headers["type"][last])
            if other not in (nl.NLMSG_DONE, nl.NLMSG_ERROR) or messages.lengths[last] < HEADER_OCTETS + 4:
                raise errors.Malformed(f"a dump holds a message of type {other}", f"octet {messages.starts[last]}")
            code = int(messages.words[(messages.starts[last] >> 2) + 4].view(np.int32))
            if code < 0:
                raise failure(-code, "dump")
            if last != len(messages) - 1:
                raise errors.Malformed("a dump goes on after its end", f"octet {messages.starts[last]}")
            if is_entry.any():
                yield messages.take(is_entry)
            return

    def ask(self, requests: Octets) -> tuple[npt.NDArray[np.int32], list[tuple[Messages, Offsets]]]:
        """Sends one request per row of `requests` (shape (n, octets), at most `answers_that_fit` rows).

        Sequence numbers are filled in here, and all is sent at once. Returns per request an errno (0: done), and the
        entries that came as answers with the number of the request that each belongs to.

        :raises DeviceFailed: the kernel dropped answers; what was done is unknown.
        :raises NotPermitted: nothing was done.
        """
        count = len(requests)
        sequence = self._next_sequence(count)
        requests = _addressed(requests, sequence)
        # The kernel answers failures, and what was asked for; that all is done is said by the last one's ACK.
        requests[-1, 6] |= nl.NLM_F_ACK
        self._send(requests)
        codes = np.zeros(count, np.int32)
        entries: list[tuple[Messages, Offsets]] = []
        while True:
            used, ends = self._receive_chunk(wait=False)
            if not ends:
                # The kernel works a request off inside send(), so all answers were there. nfnetlink refuses a whole
                # buffer by one answer to its first message (nfnetlink_rcv).
                if codes[0]:
                    raise failure(int(codes[0]), "batch of requests")
                raise errors.DeviceFailed("the kernel did not answer a batch of requests to its end")
            octets = self._buffer[: _aligned(used)]
            messages = frame(octets, ends, sequence, count, self._port)
            headers = messages.headers()
            number = (headers["sequence"] - np.uint32(sequence)).astype(np.int64)
            is_error = headers["type"] == nl.NLMSG_ERROR
            errors_, at = messages.starts[is_error], number[is_error]
            if (messages.lengths[is_error] < HEADER_OCTETS + 4).any():
                raise errors.Malformed("an error message is too short", f"octet {errors_[0]}")
            codes[at] = -messages.words[(errors_ >> 2) + 4].view(np.int32)
            if not is_error.all():
                kept = messages.take(~is_error)
                entries.append((Messages(octets.copy(), kept.starts, kept.lengths), number[~is_error]))
            if (at == count - 1).any():
                return codes, entries

    def transact(self, messages: Sequence[bytes]) -> list[int]:
        """Sends these messages as one buffer, and returns per message an errno: 0 also where no answer was asked for.

        For subsystems that do all or nothing: the first and the last message are the bounds of the batch, and those
        between ask for answers (NLM_F_ACK). All is done if there is no other number than 0, and nothing otherwise.

        :raises DeviceFailed: the kernel dropped answers; what was done is unknown.
        :raises NotPermitted: nothing was done.
        """
        sequence = self._next_sequence(len(messages))
        sent = bytearray()
        for number, one in enumerate(messages):
            at = len(sent)
            sent += one + bytes(-len(one) % 4)
            sent[at + 8 : at + 16] = struct.pack("=II", sequence + number & 0xFFFFFFFF, 0)
        self._send(np.frombuffer(sent, np.uint8))
        codes = [0] * len(messages)
        left = len(messages) - 2
        while left:
            used, ends = self._receive_chunk(wait=False)  # the kernel works it off inside send()
            if not ends:
                if codes[0]:
                    raise failure(codes[0], "transaction")
                raise errors.DeviceFailed("the kernel did not answer a transaction to its end")
            found = frame(self._buffer[: _aligned(used)], ends, sequence, len(messages), self._port)
            headers = found.headers()
            if (headers["type"] != nl.NLMSG_ERROR).any() or (found.lengths < HEADER_OCTETS + 4).any():
                raise errors.Malformed("a transaction is answered with what is no answer", "octet 0")
            for start, number in zip(found.starts, headers["sequence"] - np.uint32(sequence), strict=True):
                codes[number] = -int(found.words[(start >> 2) + 4].view(np.int32))
                left -= 0 < number < len(messages) - 1
        if codes[0]:  # all was in order, and yet it could not be made so: nothing is done
            raise failure(codes[0], "transaction")
        return codes

    def events(self) -> tuple[list[Messages], bool]:
        """All events until now, in order, and whether the kernel dropped none. Does not wait."""
        chunks: list[Messages] = []
        is_complete = True
        while True:
            try:
                used, ends = self._receive_chunk(wait=False)
            except Overrun:
                is_complete = False
                continue
            if not ends:
                return chunks, is_complete
            chunks.append(frame_single(self._buffer[: _aligned(used)].copy(), ends))

    def _next_sequence(self, count: int) -> int:
        sequence = self._sequence
        if sequence + count > 0xFFFFFFFF:
            sequence = 1
        self._sequence = sequence + count
        return sequence

    def _send(self, requests: Octets) -> None:
        try:
            sent = self._socket.send(memoryview(requests.reshape(-1)))  # type: ignore[arg-type]
        except OSError as error:
            raise failure(error.errno or 0, "request") from error
        if sent != requests.size:
            raise errors.DeviceFailed(f"the kernel took {sent} of {requests.size} octets")

    def _receive_chunk(self, wait: bool) -> tuple[int, list[int]]:
        """Datagrams that are there, as many as the buffer takes: octets used, and where each ends.

        With `wait` at least one, unless none comes for long.
        """
        used = 0
        ends: list[int] = []
        receive, view = self._socket.recvfrom_into, self._view
        while used <= _CHUNK:
            try:
                got, (sender, _) = receive(view[used:], 0, socket.MSG_TRUNC)
            except BlockingIOError:
                if ends or not wait:
                    break
                if not self._poll.poll(_PATIENCE_MS):
                    break
                continue
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise Overrun("the kernel dropped messages for lack of room in the receive buffer") from error
                raise failure(error.errno or 0, "answer") from error
            if sender:  # another process; not the kernel
                continue
            if got > len(view) - used:
                raise errors.DeviceFailed(f"the kernel sent a datagram of {got} octets")
            ends.append(used + got)
            used = _aligned(used + got)
        return used, ends


def attributes_of(raw: bytes) -> dict[int, bytes]:
    """The attributes of one level, by number.

    :raises Malformed: they do not fill it.
    """
    return dict(each_attribute(raw))


def each_attribute(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """The same in order, where several may have one number."""
    at = 0
    while at < len(raw):
        size, kind = _ATTRIBUTE.unpack_from(raw, at) if len(raw) - at >= _ATTRIBUTE.size else (0, 0)
        if size < _ATTRIBUTE.size or at + size > len(raw):
            raise errors.Malformed("an attribute's length is wrong", f"octet {at}")
        yield kind & nl.NLA_TYPE_MASK, raw[at + _ATTRIBUTE.size : at + size]
        at += _aligned(size)


class Torn(errors.DeviceFailed):
    """The kernel flagged a dump as interrupted: do it again."""


class Overrun(errors.DeviceFailed):
    """The receive buffer ran over."""

    def __init__(self, what: str) -> None:
        super().__init__(what, errno.ENOBUFS)


def _no_socket(error: OSError) -> errors.DeviceFailed:
    return errors.DeviceFailed(f"the kernel gives no netfilter netlink socket ({error.strerror})", error.errno)


def failure(code: int, what: str) -> errors.SamiError:
    """The error that says what this errno means for a whole request."""
    name = errno.errorcode.get(code, str(code))
    if code in (errno.EPERM, errno.EACCES):
        return errors.NotPermitted(f"the kernel refuses the {what} ({name}); the agent needs CAP_NET_ADMIN")
    if code in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT) and what == "dump":
        return errors.NotAvailable(f"the kernel knows no {what} of conntrack ({name}); load nf_conntrack_netlink")
    return errors.DeviceFailed(f"the kernel answers a {what} with {name}", code)


def _addressed(requests: Octets, sequence: int) -> Octets:
    """The same messages with lengths, and sequence numbers that count up."""
    headers = requests.view(np.uint32)
    headers[:, 0] = requests.shape[1]
    headers[:, 2] = np.arange(sequence, sequence + len(requests), dtype=np.uint64).astype(np.uint32)
    headers[:, 3] = 0
    return requests


def _set_buffer(sock: socket.socket, forced: int, plain: int, octets: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, octets)
    except PermissionError:
        # Beyond net.core.{r,w}mem_max only CAP_NET_ADMIN of the machine's own user namespace gets more.
        sock.setsockopt(socket.SOL_SOCKET, plain, octets)
