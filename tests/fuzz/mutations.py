"""Ways to spoil octets. Pure: the same generator state and octets give the same result.

Any decoder can be hunted with these; see `hunt` for the rest of what a target needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
"""Takes a generator, the octets, and other valid octets to borrow from."""

INTERESTING = (0, 1, 2, 3, 4, 15, 16, 127, 128, 255, 256, 0x3FFF, 0x4000, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)


def flip_bits(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    changed = bytearray(octets)
    for _ in range(generator.choice((1, 1, 2, 8))):
        if changed:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def replace_octets(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    at = generator.randint(0, len(octets))
    new = generator.randbytes(generator.choice((1, 2, 4, 16)))
    return octets[:at] + new + octets[at + len(new) :]


def truncate(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    return octets[: generator.randint(0, len(octets))]


def cut_front(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    return octets[generator.randint(0, len(octets)) :]


def drop(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    start, end = sorted(generator.randint(0, len(octets)) for _ in range(2))
    return octets[:start] + octets[end:]


def repeat(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    start, end = sorted(generator.randint(0, len(octets)) for _ in range(2))
    return octets[:end] + octets[start:end] * generator.choice((1, 1, 2, 5)) + octets[end:]


def insert(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    at = generator.randint(0, len(octets))
    return octets[:at] + generator.randbytes(generator.choice((1, 2, 3, 4, 8, 64))) + octets[at:]


def splice(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    other = generator.choice(corpus)
    return octets[: generator.randint(0, len(octets))] + other[generator.randint(0, len(other)) :]


def join(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    return octets + generator.choice(corpus)


def set_number(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    """Puts a number that is likely to be a limit where a length, count or identifier may stand."""
    size = generator.choice((1, 2, 2, 2, 4))
    if len(octets) < size:
        return octets
    at = generator.randint(0, len(octets) - size)
    here = int.from_bytes(octets[at : at + size], "big")
    number = generator.choice((*INTERESTING, here + 1, here - 1, here * 2, len(octets), len(octets) - at))
    return octets[:at] + (number % (1 << 8 * size)).to_bytes(size, "big") + octets[at + size :]


MUTATORS: tuple[Mutator, ...] = (
    flip_bits,
    replace_octets,
    truncate,
    cut_front,
    drop,
    repeat,
    insert,
    splice,
    join,
    set_number,
    set_number,
)


def mutate(
    generator: random.Random,
    octets: bytes,
    corpus: Sequence[bytes],
    mutators: Sequence[Mutator] = MUTATORS,
    most: int = 4,
    most_octets: int = 1 << 16,
) -> bytes:
    """`octets` spoiled one to `most` times."""
    for _ in range(generator.randint(1, most)):
        octets = generator.choice(mutators)(generator, octets, corpus)[:most_octets]
    return octets
