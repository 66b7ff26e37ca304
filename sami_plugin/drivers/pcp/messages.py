"""PCP (RFC 6887) as far as a driver needs it: mappings for a third party, and how long the server has had its state."""

from __future__ import annotations

import enum
import logging
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import netaddr

from sami_plugin import privileged
from sami_plugin.errors import DeviceFailed

PORT = 5351
_VERSION, _IS_ANSWER = 2, 0x80
_ANNOUNCE, _MAP = 0, 1
_THIRD_PARTY, _PREFER_FAILURE = 1, 2
_HEADER = struct.Struct("!BBxBLL12x")
_MAP_BODY = struct.Struct("!12sB3xHH16s")
_MOST_OCTETS = 1100
_EXTERNAL_ADDRESS = bytes(2)
"""The request of NAT-PMP (RFC 6886, section 3.2): PCP itself tells the address with a mapping only."""
_ATTEMPT_SECONDS = (0.5, 1.0)
"""RFC 6887, 8.1.1, begins with 3 s, for a server that may be far. This one is near, and a guest may wait for it."""
_SILENT_SECONDS = 10.0
"""For so long one that did not answer is not asked again."""

LOG = logging.getLogger(__name__)


class ResultCode(enum.IntEnum):
    """RFC 6887, section 7.4."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


@dataclass(frozen=True, slots=True)
class Internal:
    """Whose the mapping is, and what tells it from the others of the same address. The port is never 0: all of them."""

    protocol: int
    address: netaddr.IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class External:
    """What it is reached by behind the device."""

    address: netaddr.IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server answers to one request; `external` where it was asked for a mapping and gives one."""

    result: int
    seconds: int
    epoch: int
    external: External | None = None


class Clock:
    """Tells from a server's epoch times whether it has lost its state since it was asked before (section 8.5)."""

    def __init__(self) -> None:
        self._before: tuple[int, float] | None = None

    def has_begun_anew(self, epoch: int, now: float) -> bool:
        before, self._before = self._before, (epoch, now)
        if before is None:
            return False
        server, client = epoch - before[0], now - before[1]
        return server < -1 or client + 2 < server - server / 16 or server + 2 < client - client / 16


class Server:
    """A PCP server, asked from one network namespace. Each request has a socket of its own, so that no late answer to
    an earlier one is taken for its."""

    def __init__(self, address: str, namespace: str | None) -> None:
        self.address, self._namespace = address, namespace
        self._clock = Clock()
        self._silent_until = 0.0

    def announce(self) -> tuple[int, bool]:
        """Its epoch time, and whether it has begun anew since it was asked for that before.

        :raises DeviceFailed: it does not answer, or not in PCP; so do the others.
        """
        epoch = self._asked(_ANNOUNCE, 0, b"", b"").epoch
        has_begun_anew = self._clock.has_begun_anew(epoch, time.monotonic())
        if has_begun_anew:
            LOG.warning("the PCP server at %s has begun anew: what it had may be lost", self.address)
        return epoch, has_begun_anew

    def ask_again(self) -> None:
        """What it is asked next is sent, though it was silent a moment ago."""
        self._silent_until = 0.0

    def map(self, internal: Internal, nonce: bytes, external: External, seconds: int) -> Answer:
        """Asks for this mapping and no other one; the server may still give another one, or another time."""
        suggested = _MAP_BODY.pack(nonce, internal.protocol, internal.port, external.port, _octets(external.address))
        return self._asked(_MAP, seconds, suggested, self._whose(internal) + _option(_PREFER_FAILURE))

    def unmap(self, internal: Internal, nonce: bytes) -> Answer:
        """Ends the mapping, if it has this nonce."""
        any_address = netaddr.IPAddress("::" if internal.address.version == 6 else "0.0.0.0")
        named = _MAP_BODY.pack(nonce, internal.protocol, internal.port, 0, _octets(any_address))
        return self._asked(_MAP, 0, named, self._whose(internal))

    def _whose(self, internal: Internal) -> bytes:
        return _option(_THIRD_PARTY, internal.address)

    def serves_third_parties(self) -> bool:
        """Whether it takes mappings for others than who asks.

        It is asked to end a mapping of the client's own as if that were another's, which it has to refuse in any case
        (section 13.1): as malformed where it serves third parties, and otherwise because it does not.
        """
        own = netaddr.IPAddress(self._own_address())
        answer = self.unmap(Internal(17, own, PORT), bytes(12))
        return answer.result in (ResultCode.MALFORMED_REQUEST, ResultCode.SUCCESS)

    def external_address(self) -> netaddr.IPAddress:
        """Its IPv4 address outside, by NAT-PMP, which PCP servers speak on the same port."""
        told = self._exchanged(lambda own: _EXTERNAL_ADDRESS, lambda octets: len(octets) >= 4 and octets[1] == 0x80)
        result, address = int.from_bytes(told[2:4], "big"), int.from_bytes(told[8:12], "big")
        if told[0] or len(told) != 12:
            raise DeviceFailed(f"the PCP server at {self.address} speaks no NAT-PMP; miniupnpd needs enable_natpmp=yes")
        if result or not address:
            raise DeviceFailed(
                f"the PCP server at {self.address} does not tell its outer IPv4 address (NAT-PMP result {result}); "
                "look whether its outer interface has one"
            )
        return netaddr.IPAddress(address)

    def _asked(self, opcode: int, seconds: int, body: bytes, options: bytes) -> Answer:
        def is_its(octets: bytes) -> bool:
            if len(octets) < 4 or octets[1] != opcode | _IS_ANSWER:
                return False
            is_refusal = octets[3] != ResultCode.SUCCESS
            # The nonce, the protocol and the internal port are as they were asked for.
            is_about_it = octets[_HEADER.size :][:18] == body[:18] and len(octets) >= _HEADER.size + len(body)
            return octets[0] != _VERSION or (len(octets) >= _HEADER.size and (is_refusal or is_about_it))

        told = self._exchanged(
            lambda own: _request(opcode, seconds) + _octets(netaddr.IPAddress(own)) + body + options, is_its
        )
        if told[0] != _VERSION:
            raise DeviceFailed(f"what answers at {self.address} port {PORT} speaks no PCP 2; correct [pcp] server")
        _, _, result, granted, epoch = _HEADER.unpack_from(told)
        external = None
        if body and result == ResultCode.SUCCESS and seconds:
            *_, port, address = _MAP_BODY.unpack_from(told, _HEADER.size)
            external = External(_address(address), port)
        return Answer(result, granted, epoch, external)

    def _own_address(self) -> str:
        with self._connected() as asking:
            return str(asking.getsockname()[0])

    def _connected(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        asking = privileged.open_socket(self._namespace, family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
        try:
            asking.connect((self.address, PORT))
        except OSError as error:
            asking.close()
            raise self._silent(error.strerror) from error
        return asking

    def _exchanged(self, request: Callable[[str], bytes], is_its: Callable[[bytes], bool]) -> bytes:
        if time.monotonic() < self._silent_until:
            raise self._silent(f"not a moment ago; it is asked again {_SILENT_SECONDS:.0f} s after that")
        with self._connected() as asking:
            asked = request(str(asking.getsockname()[0]))
            for seconds in _ATTEMPT_SECONDS:
                try:
                    asking.send(asked)
                    until = time.monotonic() + seconds
                    while (left := until - time.monotonic()) > 0:
                        asking.settimeout(left)
                        octets = asking.recv(_MOST_OCTETS)
                        if is_its(octets):
                            return octets
                except TimeoutError:
                    continue
                except OSError as error:
                    raise self._silent(error.strerror) from error
        self._silent_until = time.monotonic() + _SILENT_SECONDS
        raise self._silent(f"not in {sum(_ATTEMPT_SECONDS)} s")

    def _silent(self, why: str | None) -> DeviceFailed:
        return DeviceFailed(
            f"no PCP server answers at {self.address} port {PORT} ({why}); start it, or correct [pcp] server"
        )


def _request(opcode: int, seconds: int) -> bytes:
    return struct.pack("!BBHL", _VERSION, opcode, 0, seconds)


def _option(code: int, address: netaddr.IPAddress | None = None) -> bytes:
    octets = b"" if address is None else _octets(address)
    return struct.pack("!BxH", code, len(octets)) + octets


def _octets(address: netaddr.IPAddress) -> bytes:
    """RFC 6887, section 5: IPv4 as IPv6 of ::ffff:0:0/96."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def _address(octets: bytes) -> netaddr.IPAddress:
    number = int.from_bytes(octets, "big")
    return netaddr.IPAddress(number & 0xFFFF_FFFF) if number >> 32 == 0xFFFF else netaddr.IPAddress(number, 6)
