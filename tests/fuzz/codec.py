"""IPFIX payloads, spoiled: ``python -m tests.fuzz.codec --inputs 1000000 --seed 1``."""

from __future__ import annotations

import io
import random
import struct
import sys
from collections.abc import Sequence

from sami_plugin.codec import ipfix, ipfix_file
from sami_plugin.errors import RepresentationError
from sami_plugin.model.flows import TEMPLATES, Batch
from sami_plugin.testing.conformance import flows
from tests.fuzz.hunt import Target, main
from tests.fuzz.mutations import MUTATORS

NOW = 1_700_000_000


def _corpus() -> tuple[bytes, ...]:
    made: list[bytes] = []
    batches: list[Batch] = []
    for template in TEMPLATES.values():
        batch = flows(template, 3)
        batches += [batch, batch.identities]
        made.append(ipfix.encode([batch], export_time=NOW))
        made.append(ipfix.encode([batch.identities], export_time=NOW, sequence=2**32 - 1))
    made.append(ipfix.encode(batches, export_time=NOW, domain=1))
    made.append(ipfix.encode(batches[:3], export_time=NOW) + ipfix.encode(batches[2:4], export_time=NOW, sequence=9))
    file = io.BytesIO()
    ipfix_file.write(file, batches[:2], export_time=NOW)
    made.append(file.getvalue())
    template_set = made[0][16 : 16 + struct.unpack_from("!H", made[0], 18)[0]]
    withdrawal = struct.pack("!HHHH", 2, 8, 256, 0)
    made.append(_message(template_set, withdrawal, template_set, made[0][16 + len(template_set) :]))
    return tuple(made)


def _message(*sets: bytes) -> bytes:
    return struct.pack("!HHIII", 10, 16 + sum(map(len, sets)), NOW, 0, 0) + b"".join(sets)


def _sets(octets: bytes) -> list[bytes]:
    """The sets of all messages, as far as they can be told."""
    found, at = [], 0
    while at + 16 <= len(octets):
        end = at + max(16, int.from_bytes(octets[at + 2 : at + 4], "big"))
        here = at + 16
        while here + 4 <= min(end, len(octets)):
            length = max(4, int.from_bytes(octets[here + 2 : here + 4], "big"))
            found.append(octets[here : here + length])
            here += length
        at = end
    return found


def shuffle_sets(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    """Sets of this payload and another in any order, some twice, in a message of the right length."""
    sets = _sets(octets) + _sets(generator.choice(corpus))
    chosen = [generator.choice(sets) for _ in range(generator.randint(1, 6))] if sets else []
    return _message(*chosen) if sum(map(len, chosen)) < 0xFF00 else octets


def mend_lengths(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    """Makes the first message as long as what is there, so what is inside is looked at."""
    if len(octets) < 16 or len(octets) > 0xFFFF:
        return octets
    return octets[:2] + len(octets).to_bytes(2, "big") + octets[4:]


def spoil_set(generator: random.Random, octets: bytes, corpus: Sequence[bytes]) -> bytes:
    """Changes one number inside a set and keeps all lengths right."""
    sets = _sets(octets)
    if not sets or sum(map(len, sets)) > 0xFF00:
        return octets
    which = generator.randrange(len(sets))
    inside = generator.choice(MUTATORS)(generator, sets[which][4:], [each[4:] for each in sets])[:0x4000]
    sets[which] = sets[which][:2] + (4 + len(inside)).to_bytes(2, "big") + inside
    return _message(*sets) if sum(map(len, sets)) < 0xFF00 else octets


def _decode(octets: bytes) -> object:
    decoded = ipfix.decode(octets)
    for batch in decoded.batches:
        assert batch.rows.dtype == batch.template.dtype
    again = ipfix.decode(ipfix.encode(decoded.batches, export_time=NOW))
    assert [(each.template, each.rows.tobytes()) for each in again.batches] == [
        (each.template, each.rows.tobytes()) for each in decoded.batches
    ]
    return decoded


TARGET = Target(
    name="codec",
    corpus=_corpus(),
    decode=_decode,
    refusals=(RepresentationError,),
    mutators=(*MUTATORS, shuffle_sets, mend_lengths, mend_lengths, spoil_set, spoil_set, spoil_set),
)

if __name__ == "__main__":
    sys.exit(main(TARGET))
