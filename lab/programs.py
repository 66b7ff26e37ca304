"""The processes inside guests and the outside: standard library only, started by path, one subcommand each.

Each prints "ready" on stdout once it does what it is for, and runs until it is ended. A log is lines of
`CLOCK_MONOTONIC-seconds total-bytes-received`, about every 20 ms, whether bytes came or not. All bear being stopped and
continued, and a network that is away for a while.
"""

import argparse
import errno
import fcntl
import json
import os
import select
import socket
import struct
import sys
import termios
import time

SAMPLE_SECONDS = 0.02
# A steady stream is many small writes. Waking up more often takes all of the processor where a hundred streams are, and
# in guests of lab.kernels much sooner.
WAKE_SECONDS = 0.1 if "KERNEL_LAB" in os.environ else SAMPLE_SECONDS
# What is not sent in a stall is not made up for beyond this, else a stall would be followed by a flood.
BACKLOG_SECONDS = 0.25
CHUNK = bytes(65536)
CHUNK_BYTES = len(CHUNK)
# Somebody's link is down, or a queue is full; later it works again.
PASSING = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENOBUFS,
    errno.EAGAIN,
    errno.EPERM,
    errno.EINTR,
    errno.ECONNREFUSED,
    errno.EADDRNOTAVAIL,
}


class Log:
    """Appends samples to a file; without a path it only counts."""

    def __init__(self, path):
        self._file = open(path, "a", buffering=1) if path else None  # noqa: SIM115, open as long as the process
        self.total = 0
        self._grown_at = None
        self._due = 0.0

    def add(self, count):
        self.total += count
        self._grown_at = time.monotonic()

    def write(self):
        now = time.monotonic()
        if self._file and now >= self._due:
            # The time of the bytes, not of the writing: a process that is stopped between the two would else seem to
            # have received at the moment it goes on, and a stall would look shorter than it was.
            at = now if self._grown_at is None else self._grown_at
            self._file.write(f"{at:.6f} {self.total}\n")
            self._grown_at = None
            self._due = now + SAMPLE_SECONDS


class Pace:
    """How many units are due at a steady rate per second."""

    def __init__(self, rate):
        self.rate = rate
        self._last = time.monotonic()
        self._owed = 0.0

    def due(self):
        now = time.monotonic()
        self._owed = min(self._owed + (now - self._last) * self.rate, self.rate * BACKLOG_SECONDS + 1)
        self._last = now
        return int(self._owed)

    def did(self, units):
        self._owed -= units


def ready():
    """Say that the program does what it is for."""
    print("ready", flush=True)


def family_of(address):
    """The socket family of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def pump(connection, rate, log, is_echo=False):
    """Receive everything, send at `rate` bytes a second (or what came in), until the other end is gone for good."""
    connection.setblocking(False)
    pace, to_echo, is_open = Pace(rate), 0, True
    while is_open:
        due = min(to_echo if is_echo else pace.due(), CHUNK_BYTES)
        writers = [connection] if due else []
        readable, writable, _ = select.select([connection], writers, [], WAKE_SECONDS)
        try:
            if readable:
                data = connection.recv(CHUNK_BYTES)
                is_open = bool(data)
                log.add(len(data))
                to_echo += len(data)
            if writable:
                sent = connection.send(CHUNK[:due])
                pace.did(sent)
                to_echo -= sent
                if not readable and rate:
                    # The socket is nearly always writable: without this wait the loop would send byte by byte.
                    select.select([connection], [], [], WAKE_SECONDS)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in PASSING:
                print(f"connection ended: {error}", file=sys.stderr, flush=True)
                is_open = False
        log.write()
    while True:  # the log goes on, so that silence shows
        log.write()
        time.sleep(SAMPLE_SECONDS)


def tcp_serve(options):
    """Serve one client: its first line says what it wants: {"rate": bytes a second, "echo": bool}."""
    listener = socket.create_server((options.address, options.port), family=family_of(options.address))
    log = Log(options.log)
    ready()
    connection, _ = listener.accept()
    listener.close()
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return
        line += byte
    wanted = json.loads(line)
    pump(connection, wanted["rate"], log, wanted["echo"])


def tcp_connect(options):
    """Connect, ask for `--ask` bytes a second (or an echo), send `--send` bytes a second. With `--line` that is said
    instead of what a server of ours understands, and an answer is awaited before anything else is sent."""
    connection = socket.create_connection((options.address, options.port), timeout=10)
    line = options.line or json.dumps({"rate": options.ask, "echo": options.echo})
    connection.sendall(line.encode() + b"\n")
    log = Log(options.log)
    if options.line:
        log.add(len(connection.recv(CHUNK_BYTES)))
    elif options.ask or options.echo:
        if options.send:
            connection.send(CHUNK[: min(1000, int(options.send))])
        log.add(len(connection.recv(CHUNK_BYTES)))
    ready()
    pump(connection, options.send, log)


def tcp_feed(options):
    """Send `--send` bytes a second, in pieces of `--piece`, to one client that says nothing; what its kernel has
    acknowledged counts."""
    listener = socket.create_server((options.address, options.port), family=family_of(options.address))
    log, sent, is_open = Log(options.log), 0, True
    ready()
    connection, _ = listener.accept()
    connection.setblocking(False)
    pace = Pace(options.send / options.piece)
    while True:
        time.sleep(WAKE_SECONDS)
        try:
            if is_open and (due := pace.due()):
                accepted = connection.send(CHUNK[: due * options.piece])
                pace.did(accepted / options.piece)
                sent += accepted
        except OSError as error:
            if error.errno not in PASSING:
                print(f"connection ended: {error}", file=sys.stderr, flush=True)
                is_open = False
        acknowledged = sent - struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
        if is_open and acknowledged > log.total:
            log.add(acknowledged - log.total)
        log.write()


def udp_serve(options):
    """Echo what comes (`--send 0`), or send `--send` packets a second to whoever spoke last."""
    server = socket.socket(family_of(options.address), socket.SOCK_DGRAM)
    server.bind((options.address, options.port))
    ready()
    pace, log, peer = Pace(options.send), Log(options.log), None
    while True:
        readable, _, _ = select.select([server], [], [], WAKE_SECONDS)
        try:
            if readable:
                data, peer = server.recvfrom(CHUNK_BYTES)
                log.add(len(data))
                if not options.send:
                    server.sendto(data, peer)
            elif peer:
                for _ in range(pace.due()):
                    server.sendto(CHUNK[: options.size], peer)
                    pace.did(1)
        except OSError as error:
            if error.errno not in PASSING:
                raise
        log.write()


def udp_stream(options):
    """Send `--send` packets a second from one socket to the server; count what comes back."""
    client = socket.socket(family_of(options.address), socket.SOCK_DGRAM)
    client.connect((options.address, options.port))
    log = Log(options.log)
    client.settimeout(10)
    client.send(CHUNK[: options.size])
    log.add(len(client.recv(CHUNK_BYTES)))
    ready()
    client.setblocking(False)
    pace = Pace(options.send)
    while True:
        readable, _, _ = select.select([client], [], [], WAKE_SECONDS)
        try:
            if readable:
                log.add(len(client.recv(CHUNK_BYTES)))
            for _ in range(pace.due()):
                pace.did(1)
                client.send(CHUNK[: options.size])
        except OSError as error:
            if error.errno not in PASSING:
                raise
        log.write()


def icmp_echo(options):
    """Send `--send` echo requests a second with one identifier; count the bytes of the answers."""
    v6 = ":" in options.address
    request, reply, protocol = (128, 129, socket.IPPROTO_ICMPV6) if v6 else (8, 0, socket.IPPROTO_ICMP)
    raw = socket.socket(family_of(options.address), socket.SOCK_RAW, protocol)
    raw.connect((options.address, 0))
    raw.setblocking(False)
    identifier, sequence, is_ready = os.getpid() & 0xFFFF, 0, False
    pace, log = Pace(options.send), Log(options.log)
    while True:
        readable, _, _ = select.select([raw], [], [], WAKE_SECONDS)
        try:
            if readable:
                data = raw.recv(CHUNK_BYTES)
                data = data if v6 else data[(data[0] & 15) * 4 :]
                kind, _, _, answered = struct.unpack_from("!BBHH", data)
                if (kind, answered) == (reply, identifier):
                    log.add(len(data))
                    if not is_ready:
                        is_ready = True
                        ready()
            for _ in range(pace.due()):
                pace.did(1)
                sequence = (sequence + 1) & 0xFFFF
                head = struct.pack("!BBHHH", request, 0, 0, identifier, sequence)
                body = CHUNK[: options.size]
                # The kernel fills in ICMPv6's checksum, not ICMP's.
                head = head if v6 else head[:2] + struct.pack("!H", checksum(head + body)) + head[4:]
                raw.send(head + body)
        except OSError as error:
            if error.errno not in PASSING:
                raise
        log.write()


def checksum(data):
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


FLOW_PORTS = range(20000, 60000)
FLOW_SOURCES = 10000


def udp_flows(options):
    """Begin `--count` flows as fast as possible, then `--send` new ones a second. One packet each, no two alike."""
    family, sockets = family_of(options.address), []
    log = Log(options.log)

    def begin(number):
        index, offset = divmod(number, len(FLOW_PORTS))
        if index == len(sockets):
            new = socket.socket(family, socket.SOCK_DGRAM)
            new.bind(("", FLOW_SOURCES + index))
            sockets.append(new)
        while True:
            try:
                sockets[index].sendto(b"flow", (options.address, FLOW_PORTS[offset]))
                return
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                time.sleep(0.01)

    for number in range(options.count):
        begin(number)
    log.add(options.count)
    ready()
    pace = Pace(options.send)
    while True:
        time.sleep(WAKE_SECONDS)
        for _ in range(pace.due()):
            begin(log.total)
            log.add(1)
            pace.did(1)
        log.write()


PROGRAMS = {
    "tcp-serve": tcp_serve,
    "tcp-connect": tcp_connect,
    "tcp-feed": tcp_feed,
    "udp-serve": udp_serve,
    "udp-stream": udp_stream,
    "icmp-echo": icmp_echo,
    "udp-flows": udp_flows,
}


def main():
    """Run the program that the command line names, until it is killed."""
    parser = argparse.ArgumentParser(description="One process of the lab's traffic; lab/traffic.py starts them.")
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--address", required=True, help="where to listen, or whom to speak to")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--send", type=float, default=0.0, help="bytes (tcp), packets (udp, icmp) or flows per second")
    parser.add_argument("--ask", type=float, default=0.0, help="bytes per second wanted of the server")
    parser.add_argument("--echo", action="store_true", help="ask the server for what was sent")
    parser.add_argument("--size", type=int, default=200, help="bytes of a packet")
    parser.add_argument("--piece", type=int, default=1, help="bytes that are sent at a time")
    parser.add_argument("--line", help="what to say first")
    parser.add_argument("--count", type=int, default=0, help="flows at once")
    parser.add_argument("--log", help="where samples go")
    options = parser.parse_args()
    PROGRAMS[options.program](options)


if __name__ == "__main__":
    main()
