"""Smaller payloads. zstd where both hosts have it, zlib everywhere."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from sami_plugin.errors import Malformed

try:
    import zstandard
except ImportError:  # the extra "zstd" is not installed
    zstandard = None  # type: ignore[assignment]

ZSTD_LEVEL = 1
ZLIB_LEVEL = 1
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class _Zstd:
    """To make these takes longer than most payloads do. Not thread-safe: who uses one takes it and brings it back."""

    idle: ClassVar[deque[_Zstd]] = deque()

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()

    @classmethod
    @contextmanager
    def taken(cls) -> Iterator[_Zstd]:
        try:
            one = cls.idle.pop()
        except IndexError:
            one = cls()
        yield one
        cls.idle.append(one)


def available() -> tuple[str, ...]:
    """What this host can unpack, best first."""
    return ("zstd", "zlib") if zstandard is not None else ("zlib",)


def choose(offered: Iterable[str]) -> str:
    """The best of what the peer offers that is available here; zlib is always understood."""
    offers = set(offered)
    return next((name for name in available() if name in offers), "zlib")


def compress(octets: bytes, how: str) -> bytes:
    """Smaller bytes, by the way that `choose` gave."""
    if how == "zstd":
        with _Zstd.taken() as one:
            packed: bytes = one.compressor.compress(octets)
        return packed
    return zlib.compress(octets, ZLIB_LEVEL)


def decompress(octets: bytes, most: int) -> bytes:
    """What was compressed, in either way.

    :raises Malformed: it is neither, is cut short, or would unpack to more than `most` octets.
    """
    if octets[:4] == _ZSTD_MAGIC:
        if zstandard is None:
            raise Malformed("compressed with zstd, which this host did not offer", "octet 0")
        try:
            if not 0 <= zstandard.frame_content_size(octets) <= most:
                raise Malformed(f"unpacks to more than {most} octets or does not say to how many", "octet 4")
            with _Zstd.taken() as one:
                plain: bytes = one.decompressor.decompress(octets, max_output_size=most)
        except zstandard.ZstdError as error:
            raise Malformed(f"zstd: {error}", "octet 0") from error
        return plain
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(octets, most)
    except zlib.error as error:
        raise Malformed(f"zlib: {error}", "octet 0") from error
    if not unpacker.eof:
        raise Malformed(f"compressed data that is cut short or unpacks to more than {most} octets", "its end")
    return plain
