"""Traffic of real processes between a guest and the outside, or two guests.

Every function starts its processes and returns once bytes flow; the processes end with their namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lab import addresses, programs
from lab.deadline import STRETCH
from lab.errors import DeadlinePassed, LabError
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from lab.verdict import Sample, parse_samples

START_SECONDS = 20.0
BYTES_PER_SECOND = 2e6
COMES_SECONDS = 0.4
ONCE = 0.001
"""Packets a second: the next one is a quarter of an hour away."""
_ports = itertools.count(7000)


class Place(Protocol):
    """Where a program can be started: a Guest, a Host, or the outside's Namespace."""

    def start(self, argv: list[str], **options) -> subprocess.Popen: ...


@dataclass(slots=True)
class Traffic:
    """A running traffic: `log` grows at the end whose receiving counts. `port` is the server's."""

    name: str
    processes: tuple[subprocess.Popen, ...]
    log: Path
    port: int | None = None
    _read: list[Sample] = field(default_factory=list, repr=False)
    _octets: int = 0
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def samples(self) -> list[Sample]:
        """What was received up to now, by time. Of a long log, only what is new is read: this is asked very often."""
        with self._reading, self.log.open("rb") as log:
            log.seek(self._octets)
            whole, end, _ = log.read().rpartition(b"\n")
            self._octets += len(whole + end)
            self._read += parse_samples((whole + end).decode())
            return list(self._read)

    def stop(self) -> None:
        """End the processes. Not while the guest is paused. May be repeated."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def download(lab: Lab, guest: Guest, *, family: int = 4, rate: float = BYTES_PER_SECOND) -> Traffic:
    """The guest connects and asks; then only the outside speaks, `rate` bytes a second. What the guest gets counts."""
    return tcp(lab, guest, family=family, ask=rate)


def upload(lab: Lab, guest: Guest, *, family: int = 4, rate: float = BYTES_PER_SECOND) -> Traffic:
    """The guest connects and sends `rate` bytes a second; the outside's receiving counts."""
    return tcp(lab, guest, family=family, send=rate)


def echo(lab: Lab, guest: Guest, *, family: int = 4, rate: float = BYTES_PER_SECOND) -> Traffic:
    """As upload, but the outside sends all of it back and the guest's receiving counts."""
    return tcp(lab, guest, family=family, send=rate, is_echo=True)


def tcp(
    lab: Lab, guest: Guest, *, family: int = 4, ask: float = 0.0, send: float = 0.0, is_echo: bool = False
) -> Traffic:
    """The guest's connection to the outside: it wants `ask` bytes a second and sends `send`."""
    address, port, log = _outside(family), next(_ports), new_log(lab.folder, "tcp")
    client_receives = bool(ask or is_echo)
    server = start_program(lab.outside, "tcp-serve", address, port, log=None if client_receives else log)
    wait_until_ready(server)
    more = ["--ask", str(ask), "--send", str(send), *(["--echo"] if is_echo else [])]
    client = start_program(guest, "tcp-connect", address, port, *more, log=log if client_receives else None)
    wait_until_ready(client)
    return Traffic("tcp", (server, client), log, port)


def serve(
    lab: Lab, guest: Guest, port: int, *, family: int = 4, rate: float = BYTES_PER_SECOND, client: Guest | None = None
) -> Traffic:
    """The outside (or another guest) connects to the guest's `port`, which an ingress rule must admit, and downloads
    `rate` bytes a second; the client's receiving counts."""
    log = new_log(lab.folder, "serve")
    place: Place = client or lab.outside
    server = start_program(guest, "tcp-serve", guest.address(family), port)
    wait_until_ready(server)
    known_by = guest.address(family) if client else guest.public(family)
    asking = start_program(place, "tcp-connect", known_by, port, "--ask", str(rate), log=log)
    wait_until_ready(asking)
    return Traffic("serve", (server, asking), log, port)


def udp_echo(lab: Lab, guest: Guest, *, family: int = 4, packets: float = 50.0) -> Traffic:
    """The guest sends `packets` a second, the outside sends each back; the guest's receiving counts."""
    return _udp(lab, guest, family, packets, 0.0)


def udp_stream(lab: Lab, guest: Guest, *, family: int = 4, packets: float = 50.0) -> Traffic:
    """The guest and the outside each send `packets` a second, the guest first; the guest's receiving counts."""
    return _udp(lab, guest, family, packets, packets)


def udp_download(lab: Lab, guest: Guest, *, family: int = 4, packets: float = 50.0) -> Traffic:
    """The guest asks once; then only the outside speaks, `packets` a second. What the guest gets counts."""
    return _udp(lab, guest, family, ONCE, packets)


def icmp_echo(lab: Lab, guest: Guest, *, family: int = 4, packets: float = 20.0) -> Traffic:
    """The guest sends `packets` echo requests a second with one identifier; the answers count."""
    log = new_log(lab.folder, "icmp")
    sender = start_program(guest, "icmp-echo", _outside(family), 0, "--send", str(packets), log=log)
    wait_until_ready(sender)
    return Traffic("icmp", (sender,), log)


def flows(lab: Lab, guest: Guest, *, family: int = 4, count: int = 100_000, new_per_second: float = 1000.0) -> Traffic:
    """The guest begins `count` UDP flows as fast as it can; from the return on `new_per_second` more.

    The outside drops them in silence. The log's totals are flows begun. Each lives as long as nf_conntrack_udp_timeout.
    """
    log = new_log(lab.folder, "flows")
    more = ["--count", str(count), "--send", str(new_per_second)]
    sender = start_program(guest, "udp-flows", _outside(family), 0, *more, log=log)
    wait_until_ready(sender, 60.0)
    return Traffic("flows", (sender,), log)


def quiet(guest: Guest, host: Host, number: int) -> None:
    """Makes an entry of the guest's in its zone there, of a UDP stream in which nothing is said."""
    ends = ["-s", guest.v4, "-d", addresses.OUTSIDE_V4, "-p", "udp", "--sport", str(5000 + number), "--dport", "53"]
    host.run(["conntrack", "-I", "-w", str(host.zone(guest)), *ends, "-t", "600", "-u", "SEEN_REPLY,ASSURED"])


def comes(lab: Lab, guest: Guest, family: int, port: int) -> bool:
    """Whether a datagram of the guest comes to the outside."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    outside = addresses.OUTSIDE_V4 if family == 4 else addresses.OUTSIDE_V6
    with lab.outside.inside():
        there = socket.socket(kind, socket.SOCK_DGRAM)
    with guest.namespace.inside():
        here = socket.socket(kind, socket.SOCK_DGRAM)
    with there, here:
        there.settimeout(COMES_SECONDS)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        there.bind((outside, port))
        here.sendto(bytes(200), (outside, port))
        with contextlib.suppress(TimeoutError):
            return len(there.recv(500)) == 200
    return False


def _udp(lab: Lab, guest: Guest, family: int, packets: float, answers: float) -> Traffic:
    address, port, log = _outside(family), next(_ports), new_log(lab.folder, "udp")
    server = start_program(lab.outside, "udp-serve", address, port, "--send", str(answers))
    wait_until_ready(server)
    client = start_program(guest, "udp-stream", address, port, "--send", str(packets), log=log)
    wait_until_ready(client)
    return Traffic("udp", (server, client), log, port)


def _outside(family: int) -> str:
    return addresses.OUTSIDE_V6 if family == 6 else addresses.OUTSIDE_V4


def new_log(folder: Path, name: str) -> Path:
    """A path for samples that no other traffic has."""
    return folder / f"{name}-{next(_ports)}.log"


def start_program(
    place: Place, program: str, address: str, port: int, *more: str, log: Path | None = None
) -> subprocess.Popen:
    """Start one of lab/programs.py; `wait_until_ready` is next."""
    # -I -S: the program starts in 20 ms and can import the standard library only.
    argv = [sys.executable, "-I", "-S", programs.__file__, program, "--address", address, "--port", str(port), *more]
    if log is not None:
        argv += ["--log", str(log)]
    return place.start(argv, stdout=subprocess.PIPE)


def wait_until_ready(process: subprocess.Popen, seconds: float = START_SECONDS) -> None:
    """Return when a program does what it is for. Raises DeadlinePassed, and LabError when it ended instead."""
    readable, _, _ = select.select([process.stdout], [], [], seconds * STRETCH)
    if not readable:
        raise DeadlinePassed(f"{' '.join(process.args[4:])} to be ready", seconds * STRETCH)
    if process.stdout.readline() != b"ready\n":
        raise LabError(f"{' '.join(process.args[4:])} ended with {process.wait()}; its reason is on stderr")
