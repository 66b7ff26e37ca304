"""Streams of numbered packets at a steady rate in both directions, and what became of the packets.

Both ends run sources/streams.c. Each packet says what its sender has received, so the outside's log tells both
directions. The guest's clock stands while the guest is paused; its times are brought to the machine's clock.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lab.deadline import wait_until
from lab.libvirt import addresses, parts
from lab.libvirt.guest import STREAM_PORT, Guest
from lab.libvirt.lab import LibvirtLab

PACKETS_PER_SECOND = 1000
BEGIN_SECONDS = 20.0
# The log is written every 20 ms.
LOG_SECONDS = 0.05
FIRST_PORT = 5000
_numbers = itertools.count()

# struct arrival of streams.c: a packet as it came to the outside. at_us is CLOCK_MONOTONIC, sent_us and arrived_us
# (when the last packet came to the guest, 0: none yet) are the guest's clock.
ARRIVAL = np.dtype(
    [
        ("at_us", "u8"),
        ("sequence", "u8"),
        ("sent_us", "u8"),
        ("arrived_us", "u8"),
        ("highest", "u8"),
        ("received", "u8"),
        ("duplicates", "u8"),
        ("stream", "u4"),
        ("rate", "u4"),
    ]
)
Arrivals = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Direction:
    """What became of the packets of one direction. `longest_gap_ms` is between two arrivals at the receiver, or
    between the last one and the end of what was looked at; infinite where nothing came at all. It began at
    `gap_began_at`."""

    received: int
    lost: int
    duplicates: int
    longest_gap_ms: float
    gap_began_at: float


@dataclass(frozen=True, slots=True)
class Report:
    """Both directions of a stream from `since` to `until` (CLOCK_MONOTONIC seconds).

    What came to the guest is known from what the guest says: while nothing comes back, it counts as a gap too.
    """

    since: float
    until: float
    to_outside: Direction
    to_guest: Direction


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream; `name` tells what it is, "tcp/4/guest" where a guest began it over IPv4."""

    number: int
    name: str


class Streams:
    """The outside's end of any number of streams.

    An emulated guest bears eight of 1,000 packets a second each way: they take 85 % of a processor. Where it has more
    to do, or less of a processor, it falls behind, and gaps of a second and losses are the guest's own. So look at a
    report from before what is tested.
    """

    def __init__(self, lab: LibvirtLab) -> None:
        number = next(_numbers)
        self._log = lab.folder / f"streams-{number}"
        self._port = FIRST_PORT + number
        self._stream_numbers = itertools.count(1)
        commands = [f"log {self._log}", f"accept {self._port}"]
        self._process = lab.outside.start([str(parts.STREAMS), *commands], stdin=subprocess.PIPE)

    def begin(
        self,
        guest: Guest,
        protocol: str,
        family: int = 4,
        *,
        is_guests: bool = True,
        nic: int = 0,
        rate: int = PACKETS_PER_SECOND,
    ) -> Stream:
        """Begin one, "tcp" or "udp", by the guest, or by the outside where `is_guests` is False: that needs a rule
        (`guest.allow(protocol, STREAM_PORT)`). Returns when packets flow in both directions."""
        begin = self._log_size()
        stream = Stream(next(self._stream_numbers), f"{protocol}/{family}/{'guest' if is_guests else 'outside'}")
        if is_guests:
            address, port = addresses.outside(family, nic), self._port
            guest.tell(f"echo stream {stream.number} {protocol} {address} {port} {rate} >/streams")
        else:
            address, port = guest.address(family, nic), STREAM_PORT
            assert self._process.stdin is not None
            self._process.stdin.write(f"stream {stream.number} {protocol} {address} {port} {rate}\n".encode())
            self._process.stdin.flush()
        wait_until(
            lambda: np.any(self._arrivals(stream, begin)["received"]),
            f"stream {stream.name}",
            BEGIN_SECONDS,
            poll_seconds=LOG_SECONDS,
        )
        return stream

    def report(self, stream: Stream, since: float, until: float | None = None) -> Report:
        """What became of the packets in that time (CLOCK_MONOTONIC seconds), up to now where no end is given."""
        end = time.monotonic() if until is None else until
        time.sleep(max(0.0, end + LOG_SECONDS - time.monotonic()))
        return judge(self._arrivals(stream), since, end)

    def stop(self) -> None:
        """End the outside's end. May be repeated."""
        self._process.kill()
        self._process.wait()

    def _arrivals(self, stream: Stream, begin: int = 0) -> Arrivals:
        """What came of a stream, from that byte of the log on."""
        if not self._log_size():
            return np.empty(0, ARRIVAL)
        every = np.fromfile(self._log, ARRIVAL, (self._log_size() - begin) // ARRIVAL.itemsize, offset=begin)
        return every[every["stream"] == stream.number]

    def _log_size(self) -> int:
        """In whole arrivals."""
        size = self._log.stat().st_size if self._log.exists() else 0
        return size - size % ARRIVAL.itemsize


def judge(arrivals: Arrivals, since: float, until: float) -> Report:
    """Of one stream's log, in the order of arrival."""
    at = arrivals["at_us"] / 1e6
    window = arrivals[(at >= since) & (at <= until)]
    numbers = np.unique(window["sequence"])
    gap_ms, gap_began_at = _longest_gap(window["at_us"] / 1e6, since, until)
    to_outside = Direction(
        received=len(window),
        lost=int(numbers[-1] - numbers[0]) + 1 - len(numbers) if len(numbers) else 0,
        duplicates=len(window) - len(numbers),
        longest_gap_ms=gap_ms,
        gap_began_at=gap_began_at,
    )
    return Report(since, until, to_outside, _to_guest(arrivals, window, since, until))


def _to_guest(arrivals: Arrivals, window: Arrivals, since: float, until: float) -> Direction:
    told = np.sort(window, order="sequence")
    if not len(told):
        return Direction(0, 0, 0, float("inf"), since)
    highest, received, duplicates = (
        int(told[name][-1]) - int(told[name][0]) for name in ("highest", "received", "duplicates")
    )
    times = _arrival_times(arrivals)
    gap_ms, gap_began_at = _longest_gap(times[(times >= since) & (times <= until)], since, until)
    return Direction(
        received=received,
        lost=max(0, highest - (received - duplicates)),  # what is late at the beginning of the window is no gain
        duplicates=duplicates,
        longest_gap_ms=gap_ms,
        gap_began_at=gap_began_at,
    )


def _arrival_times(arrivals: Arrivals) -> npt.NDArray[np.float64]:
    """When packets came to the guest, by the machine's clock, as far as the guest's packets tell."""
    told = np.sort(arrivals, order="sequence")
    sent, arrived = told["sent_us"].astype(np.int64), told["arrived_us"].astype(np.int64)
    # The two clocks differ by a constant that only a pause makes larger; a packet that was under way for long makes it
    # look larger, too. So it is the least of what this packet and all later ones say.
    offset = np.minimum.accumulate((told["at_us"].astype(np.int64) - sent)[::-1])[::-1]
    is_new = (np.diff(told["received"].astype(np.int64), prepend=0) > 0) & (arrived > 0)
    before = np.maximum(np.searchsorted(sent, arrived[is_new], side="right") - 1, 0)
    return (arrived[is_new] + offset[before]) / 1e6


def _longest_gap(times: npt.NDArray[np.float64], since: float, until: float) -> tuple[float, float]:
    """In milliseconds, and when it began."""
    if not len(times):
        return float("inf"), since
    moments = np.concatenate(([since], np.sort(times), [until]))
    gaps = np.diff(moments)
    longest = int(gaps.argmax())
    return 1000 * float(gaps[longest]), float(moments[longest])
