"""What a move of 100,000 TCP entries costs at least, and what it costs through our driver and through conntrack(8).

A move is: dump the source, insert into the destination, dump the destination (has all arrived?), delete from the
source, dump the source (is all gone?). `floor` sends messages that were built beforehand and looks at no answer but the
last, so nothing through ctnetlink can be faster on this machine. `driver` is the same through `LinuxConntrackDriver`,
with decoding, encoding and comparing, one thread, no transport. `tool_pipeline` is what a script would do.

    python -m benchmarks.floor [--entries 100000] [--repeat 5]

Works in two fresh network namespaces; needs root.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from lab.deadline import wait_until
from sami_plugin import privileged
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.encode import Request, dump_request, requests
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, ZoneRole
from sami_plugin.model.protocols import TcpState
from sami_plugin.model.results import Outcome, is_in_device, lost_fields
from sami_plugin.model.scope import Scope

STEPS = ("dump", "insert", "read back", "delete", "prove gone")
SOURCE_ZONE, DESTINATION_ZONE = 5, 9


@contextmanager
def namespaces(count: int = 2) -> Iterator[list[str]]:
    """Paths of fresh network namespaces that live as long as the block."""
    held: list[threading.Thread] = []
    paths: list[str] = []
    release = threading.Event()

    def hold(ready: threading.Event) -> None:
        privileged.in_new_namespace(lambda: _hold(ready))

    def _hold(ready: threading.Event) -> None:
        paths.append(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net")
        ready.set()
        release.wait()

    try:
        for _ in range(count):
            ready = threading.Event()
            thread = threading.Thread(target=hold, args=(ready,), daemon=True)
            thread.start()
            held.append(thread)
            if not ready.wait(10):
                raise RuntimeError("no network namespace could be made; run as root")
        yield paths
    finally:
        release.set()
        for thread in held:
            thread.join()
        # A thread is joined a moment before the kernel has ended it.
        wait_until(lambda: not any(map(os.path.exists, paths)), "the namespaces' threads to end")


def flows(count: int) -> Batch:
    """Established TCP flows from many clients to one guest."""
    rows = TEMPLATES["tcp-ipv4"].empty(count)
    number = np.arange(count)
    rows["zoneRole"], rows["protocolIdentifier"] = ZoneRole.PORT, 6
    rows["sourceIPv4Address"] = 0xC6120000 + number // 50_000
    rows["destinationIPv4Address"] = 0xC0000201
    rows["sourceTransportPort"], rows["destinationTransportPort"] = 1024 + number % 50_000, 443
    rows["conntrackStatus"] = FlowStatus.SEEN_REPLY | FlowStatus.ASSURED | FlowStatus.CONFIRMED
    rows["remainingTimeoutSeconds"] = 86_400
    rows["tcpConnectionState"] = TcpState.ESTABLISHED
    rows["tcpWindowScale"], rows["reverseTcpWindowScale"] = 7, 7
    rows["tcpTrackingFlags"], rows["reverseTcpTrackingFlags"] = 0x01, 0x01
    return Batch(TEMPLATES["tcp-ipv4"], rows)


def scope(namespace: str, zone: int) -> Scope:
    """Where these flows are."""
    import netaddr

    return Scope("port", "guest", {ZoneRole.PORT: zone}, (netaddr.IPAddress("192.0.2.1"),), namespace)


def floor(source: str, destination: str, batch: Batch) -> dict[str, float]:
    """Seconds per step with messages built beforehand and answers thrown away."""
    ours, theirs = _Raw(source), _Raw(destination)
    ours.send(_chunks(Request.INSERT, batch, SOURCE_ZONE))
    insert = _chunks(Request.INSERT, batch, DESTINATION_ZONE)
    delete = _chunks(Request.DELETE, batch, SOURCE_ZONE)
    took = dict(
        zip(
            STEPS,
            (
                timed(lambda: _expect(ours.dump(SOURCE_ZONE) // 248, len(batch))),
                timed(lambda: theirs.send(insert)),
                timed(lambda: _expect(theirs.dump(DESTINATION_ZONE) // 248, len(batch))),
                timed(lambda: ours.send(delete)),
                timed(lambda: _expect(ours.dump(SOURCE_ZONE), 20)),
            ),
            strict=True,
        )
    )
    theirs.send(_chunks(Request.DELETE, batch, DESTINATION_ZONE))
    ours.close()
    theirs.close()
    return took


def through_driver(source: str, destination: str, batch: Batch) -> dict[str, float]:
    """Seconds per step through the driver, everything decoded and compared."""
    driver = LinuxConntrackDriver()
    here, there = scope(source, SOURCE_ZONE), scope(destination, DESTINATION_ZONE)
    _expect(int((driver.insert(here, batch)["outcome"] == Outcome.IMPORTED).sum()), len(batch))
    driver.capabilities(there)  # opens the destination's socket
    exported: list[Batch] = []

    def export() -> None:
        exported.append(_joined([part for part in driver.export(here) if isinstance(part, Batch)]))

    def insert() -> None:
        _expect(int(is_in_device(driver.insert(there, exported[0])).sum()), len(batch))

    def read_back() -> None:
        kept, present = driver.read_back(there, exported[0])
        _expect(int(present.sum()), len(batch))
        _expect(int(lost_fields(exported[0], kept.rows).any()), 0)

    def remove() -> None:
        made = driver.remove(here, exported[0].identities)
        _expect(int((made["outcome"] == Outcome.REMOVED).sum()), len(batch))

    def prove() -> None:
        _expect(int(driver.read_back(here, exported[0])[1].sum()), 0)

    took = {name: timed(step) for name, step in zip(STEPS, (export, insert, read_back, remove, prove), strict=True)}
    for part in driver.export(there):
        if isinstance(part, Batch):
            driver.remove(there, part.identities)
    driver.close()
    return took


def tool_pipeline(source: str, destination: str, batch: Batch) -> dict[str, float]:
    """Seconds per step with conntrack(8): -L -o save, -R, -L, -D of the zone, -L."""
    driver = LinuxConntrackDriver()
    driver.insert(scope(source, SOURCE_ZONE), batch)
    saved: list[bytes] = []

    def restore() -> None:
        text = saved[0].replace(b" -w %d" % SOURCE_ZONE, b" -w %d" % DESTINATION_ZONE)
        _tool(destination, text, "-R", "-")

    def listed(namespace: str, zone: int) -> Callable[[], None]:
        return lambda: saved.append(_tool(namespace, None, "-L", "-w", str(zone), "-o", "save"))

    steps = (
        listed(source, SOURCE_ZONE),
        restore,
        listed(destination, DESTINATION_ZONE),
        lambda: _tool(source, None, "-D", "-w", str(SOURCE_ZONE)),
        listed(source, SOURCE_ZONE),
    )
    took = {name: timed(step) for name, step in zip(STEPS, steps, strict=True)}
    _expect(saved[1].count(b"\n"), len(batch))
    _tool(destination, None, "-D", "-w", str(DESTINATION_ZONE))
    driver.close()
    return took


class _Raw:
    """A netlink socket and nothing else."""

    def __init__(self, namespace: str) -> None:
        self.socket = privileged.open_socket(namespace, socket.AF_NETLINK, socket.SOCK_RAW, nl.NETLINK_NETFILTER)
        self.socket.setsockopt(socket.SOL_SOCKET, nl.SO_RCVBUFFORCE, 8 << 20)
        self.socket.setsockopt(socket.SOL_SOCKET, nl.SO_SNDBUFFORCE, 2 << 20)
        self.socket.bind((0, 0))
        self.buffer = bytearray(1 << 16)

    def send(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self.socket.send(chunk)
            got = self.socket.recv_into(self.buffer)
            if struct.unpack_from("=IHHIIi", self.buffer)[5] or got != 36:
                raise RuntimeError("the kernel refused an entry")

    def dump(self, zone: int) -> int:
        """Octets of the answer."""
        self.socket.send(dump_request(zone).tobytes())
        total = 0
        while True:
            got = self.socket.recv_into(self.buffer)
            total += got
            if struct.unpack_from("=IH", self.buffer, got - 20) == (20, nl.NLMSG_DONE):
                return total

    def close(self) -> None:
        self.socket.close()


def _chunks(request: Request, batch: Batch, zone: int) -> list[bytes]:
    made = requests(request, batch, np.full(len(batch), zone, np.uint16))
    headers = made.view(np.uint32)
    headers[:, 0] = made.shape[1]
    step = (1 << 20) // made.shape[1]
    parts = [made[begin : begin + step] for begin in range(0, len(made), step)]
    for part in parts:
        part[-1, 6] |= nl.NLM_F_ACK
    return [part.tobytes() for part in parts]


def _joined(parts: list[Batch]) -> Batch:
    return Batch.joined(parts[0].template, [part.rows for part in parts])


def _tool(namespace: str, text: bytes | None, *arguments: str) -> bytes:
    command = ["nsenter", f"--net={namespace}", "conntrack", *arguments]
    return subprocess.run(command, input=text, capture_output=True, check=True).stdout


def timed(step: Callable[[], object]) -> float:
    """Seconds that a step takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{found} instead of {wanted}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="A move's floor, and what the driver and conntrack(8) make of it.")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--without-tool", action="store_true", help="leave out conntrack(8), which takes long")
    chosen = parser.parse_args()
    batch = flows(chosen.entries)
    with namespaces() as (source, destination):
        pairs = [
            (floor(source, destination, batch), through_driver(source, destination, batch))
            for _ in range(chosen.repeat)
        ]
        tool = None if chosen.without_tool else tool_pipeline(source, destination, batch)
    print(f"{chosen.entries} TCP entries, median of {chosen.repeat}, seconds")
    print(f"{'':12}{'floor':>9}{'driver':>9}{'ratio':>8}{'tool':>9}")
    for step in (*STEPS, "all"):
        raw, ours = (
            float(np.median([sum(pair[side].values()) if step == "all" else pair[side][step] for pair in pairs]))
            for side in (0, 1)
        )
        theirs = "" if tool is None else f"{sum(tool.values()) if step == 'all' else tool[step]:9.3f}"
        print(f"{step:12}{raw:9.3f}{ours:9.3f}{ours / raw:8.2f}{theirs}")


if __name__ == "__main__":
    main()
