"""What a PCP server holds, from the file in which it keeps that for its next start: PCP itself lists no mappings.

miniupnpd writes a line per mapping, ``TCP:EXTERNAL-PORT:ADDRESS:PORT:EXPIRY:DESCRIPTION`` into its ``lease_file`` and
``TCP;ADDRESS;PORT;REMOTE;REMOTE-PORT;ID;EXPIRY;DESCRIPTION`` into its ``lease_file6``, of the holes in its IPv6
firewall, whose ports are the same on both sides (``upnpredirect.c`` and ``upnppinhole.c`` of 2.3.1). Of a mapping made
by PCP the description is ``PCP MAP`` and the nonce, each four octets of it as a number of the machine's.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import netaddr

from sami_plugin.drivers.pcp.messages import Internal
from sami_plugin.errors import DeviceFailed

_PROTOCOLS = {"TCP": 6, "UDP": 17}
_IPV4 = re.compile(r"([^:;]+):(\d+):([\d.]+):(\d+):(\d+):(.*)")
_IPV6 = re.compile(r"([^:;]+);([\da-fA-F:.]+);(\d+);[^;]*;\d+;\d+;(\d+);(.*)")
_NONCE = re.compile(r"PCP MAP ([\da-f]{8})([\da-f]{8})([\da-f]{8})")


@dataclass(frozen=True, slots=True)
class Lease:
    """One mapping. Without a nonce it is none of PCP's."""

    internal: Internal
    external_port: int
    expiry: int
    """In seconds of the UNIX epoch; 0 where it has no end."""
    nonce: bytes | None


Signature = tuple[tuple[int, int, int] | None, ...]
"""By file, what differs when it was written to; None where there is none."""


def signature(paths: Sequence[str]) -> Signature:
    """What these files are like now."""
    return tuple(map(_signature, paths))


def read(paths: Sequence[str]) -> tuple[list[Lease], int]:
    """The mappings in them, and how many lines are of other protocols than TCP and UDP, or of nothing that is known.

    There is no file while the server has no mapping.

    :raises DeviceFailed: one cannot be read.
    """
    lines = [line for path in paths for line in _lines(path)]
    found = [lease for lease in map(_lease, lines) if lease is not None]
    return found, len(lines) - len(found)


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace", newline="\n") as file:
            return [line for line in map(str.strip, file) if line]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DeviceFailed(f"[pcp] lease_files: {path} cannot be read: {error.strerror}") from error


def _lease(line: str) -> Lease | None:
    if told := _IPV4.fullmatch(line):
        protocol, external_port, address, port, expiry, description = told.groups()
    elif told := _IPV6.fullmatch(line):
        protocol, address, port, expiry, description = told.groups()
        external_port = port
    else:
        return None
    try:
        internal = Internal(_PROTOCOLS[protocol], netaddr.IPAddress(address), _port(port))
        return Lease(internal, _port(external_port), _below(int(expiry), 1 << 32), _nonce(description))
    except (KeyError, ValueError, netaddr.AddrFormatError):
        return None


def _port(text: str) -> int:
    if not (port := int(text)):
        raise ValueError
    return _below(port, 1 << 16)


def _below(number: int, bound: int) -> int:
    if number >= bound:
        raise ValueError
    return number


def _nonce(description: str) -> bytes | None:
    told = _NONCE.fullmatch(description)
    return struct.pack("=3I", *(int(word, 16) for word in told.groups())) if told else None
