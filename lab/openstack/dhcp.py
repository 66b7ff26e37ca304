"""A DHCP server for the guests' networks, run outside: a guest is told what Neutron has for its hardware address.

Neutron lets a guest without an address say nothing else than this. Its own agent for it takes an agent for bridges, a
dnsmasq and a port on some machine.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

from lab.errors import LabError
from lab.namespace import Namespace
from lab.openstack import addresses
from lab.openstack.api import Cloud

SERVER_PORT, CLIENT_PORT = 67, 68
BROADCAST = "255.255.255.255"
NETMASK = "255.255.255.0"
OPTIONS_AT = 240
COOKIE = b"\x63\x82\x53\x63"
HEAD = struct.Struct("!BBBBIHH4s4s4s4s16s192x4s")
"""RFC 2131, section 2, up to the options; the names of server and file are not used."""
BOOT_REQUEST, BOOT_REPLY = 1, 2
ETHERNET, MAC_OCTETS = 1, 6
# Options, RFC 2132.
PAD, MASK, ROUTER, LEASE, KIND, SERVER, END = 0, 1, 3, 51, 53, 54, 255
DISCOVER, OFFER, REQUEST, ACKNOWLEDGEMENT = 1, 2, 3, 5
FOR_EVER = 0xFFFFFFFF
ANSWERS = {DISCOVER: OFFER, REQUEST: ACKNOWLEDGEMENT}
SO_NO_CHECK = 11
LOOK_SECONDS = 0.5
MESSAGE_OCTETS = 2048


class Lease(NamedTuple):
    """What a guest is told; `router` is the server as well."""

    address: str
    router: str


def answer(message: bytes, find: Callable[[str], Lease | None]) -> bytes | None:
    """The answer to a guest's message; None where there is none to give.

    `find` knows the lease of a hardware address, as "fa:16:3e:00:01:0b".
    """
    if len(message) < OPTIONS_AT or message[0] != BOOT_REQUEST or message[OPTIONS_AT - 4 : OPTIONS_AT] != COOKIE:
        return None
    _, kind, size, _, transaction, _, flags, *_, mac, _ = HEAD.unpack_from(message)
    asked = next((value[0] for option, value in _options(message) if option == KIND and value), None)
    if (kind, size) != (ETHERNET, MAC_OCTETS) or asked not in ANSWERS:
        return None
    lease = find(mac[:MAC_OCTETS].hex(":"))
    if lease is None:
        return None
    nobody, address, router = bytes(4), socket.inet_aton(lease.address), socket.inet_aton(lease.router)
    head = HEAD.pack(
        BOOT_REPLY, ETHERNET, MAC_OCTETS, 0, transaction, 0, flags, nobody, address, router, nobody, mac, COOKIE
    )
    told = {
        KIND: bytes([ANSWERS[asked]]),
        SERVER: router,
        LEASE: struct.pack("!I", FOR_EVER),
        MASK: socket.inet_aton(NETMASK),
        ROUTER: router,
    }
    return head + b"".join(bytes([option, len(value)]) + value for option, value in told.items()) + bytes([END])


def _options(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = OPTIONS_AT
    while at + 1 < len(message) and message[at] != END:
        if message[at] == PAD:
            at += 1
            continue
        size = message[at + 1]
        yield message[at], message[at + 2 : at + 2 + size]
        at += 2 + size


class DhcpServer:
    """A context manager: within it the guests of a network are answered, from the outside's link to it."""

    def __init__(self, outside: Namespace, cloud: Cloud, network: int) -> None:
        self._cloud = cloud
        self._router = addresses.outside(network)
        with outside.inside():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, addresses.provider(network).encode())
        # The guest's client looks at packets, whose checksums are left to a network card that there is not.
        self._socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        self._socket.settimeout(LOOK_SECONDS)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"dhcp-{network}", daemon=True)

    def __enter__(self) -> DhcpServer:
        self._socket.bind(("", SERVER_PORT))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._is_over.is_set():
            try:
                message = self._socket.recv(MESSAGE_OCTETS)
                told = answer(message, self._find)
                if told is not None:
                    self._socket.sendto(told, (BROADCAST, CLIENT_PORT))
            except (TimeoutError, LabError):  # nobody asked, or Neutron did not answer: the guest asks again
                continue

    def _find(self, mac: str) -> Lease | None:
        for port in self._cloud.get("network", f"/ports?mac_address={mac}")["ports"]:
            for fixed in port["fixed_ips"]:
                return Lease(fixed["ip_address"], self._router)
        return None
