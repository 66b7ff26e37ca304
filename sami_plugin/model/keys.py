"""Finding flows by key, whole columns at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sami_plugin.model.flows import Batch, Rows, Template

Positions = npt.NDArray[np.intp]

# Tenants choose their flows' keys, so the hash has to be one that they cannot aim at: a sum of products of the key's
# 32-bit halves with 64-bit numbers of this process's own. Any two keys then have one hash once in 2**32 times (Lemire
# and Kaser, "Strongly universal string hashing is fast"). One secret multiplier of 64-bit words would not do:
# differences of their highest bits cancel out whatever it is.
#
# The numbers come from Python's own hash of texts, which is keyed anew in each process (PYTHONHASHSEED): nothing has to
# be handed down, and no outcome depends on them. Two keys with one hash are told apart below, so the hash decides about
# speed and never about identity.
_MULTIPLIERS = tuple(np.uint64(hash(f"sami multiplier {number}") % (1 << 64)) for number in range(16))


def key_words(batch: Batch) -> npt.NDArray[np.uint64]:
    """The keys as rows of 64-bit words, padded with zeros: shape (n, words)."""
    octets = batch.template.key_octets
    words = -(-octets // 8)
    padded = np.zeros((len(batch), words * 8), np.uint8)
    rows = np.ascontiguousarray(batch.rows)
    padded[:, :octets] = rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)[:, :octets]
    return padded.view(np.uint64)


def _hashes(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    halves = words.view(np.uint32)
    hashes = np.zeros(len(words), np.uint64)
    for column in range(halves.shape[1]):
        hashes += np.multiply(halves[:, column], _MULTIPLIERS[column % len(_MULTIPLIERS)], dtype=np.uint64)
    return hashes


FEW = 16
"""So many keys are looked up one by one: whole columns take longer."""


def _keys(batch: Batch) -> list[bytes]:
    octets, size, rows = batch.template.key_octets, batch.template.dtype.itemsize, batch.rows.tobytes()
    return [rows[at : at + octets] for at in range(0, len(rows), size)]


class KeyIndex:
    """Looks keys up among the rows of one template. Immutable; building it sorts once."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._few: dict[bytes, int] | None = None
        if len(batch) <= FEW:
            self._few = {}
            for position, key in enumerate(_keys(batch)):
                self._few.setdefault(key, position)
        else:
            self._sort()

    def _sort(self) -> None:
        batch = self._batch
        self._words = key_words(batch)
        hashes = _hashes(self._words)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def find(self, wanted: Batch) -> Positions:
        """Per row of `wanted`, the position of the row with the same key, or -1."""
        few = self._few  # another thread may do without it from now on
        if few is not None:
            if len(wanted) <= FEW:
                return np.array([few.get(key, -1) for key in _keys(wanted)], np.intp)
            self._sort()
            self._few = None
        found = np.full(len(wanted), -1, np.intp)
        if not len(self._sorted) or not len(wanted):
            return found
        words = key_words(wanted)
        hashes = _hashes(words)
        place = np.searchsorted(self._sorted, hashes)
        open_ = np.arange(len(wanted))
        while len(open_):
            here = place[open_]
            inside = here < len(self._sorted)
            open_, here = open_[inside], here[inside]
            same_hash = self._sorted[here] == hashes[open_]
            open_, here = open_[same_hash], here[same_hash]
            rows = self._order[here]
            equal = (self._words[rows] == words[open_]).all(axis=1)
            found[open_[equal]] = rows[equal]
            open_ = open_[~equal]
            place[open_] += 1
        return found


def last_of_each_key(batch: Batch) -> Positions:
    """The positions of the last row of each key, ascending."""
    if len(batch) <= FEW:
        return np.array(sorted({key: position for position, key in enumerate(_keys(batch))}.values()), np.intp)
    words = key_words(batch)
    order = np.lexsort((np.arange(len(words)), *words.T))
    ordered = words[order]
    is_last = np.ones(len(order), bool)
    is_last[:-1] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.sort(order[is_last])


class FlowTable:
    """Flows by key, of any templates. Whole batches go in and out.

    A row that is put again replaces the former one. Putting a few rows costs little however many there are.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def __len__(self) -> int:
        return sum(kind.count for kind in self._kinds.values())

    def put(self, batch: Batch) -> None:
        if len(batch):
            # A flow that is translated now and was not before, or the other way round, is another template's.
            for kind in self._same_key(batch):
                if kind.template != batch.template and kind.template.is_identity == batch.template.is_identity:
                    kind.discard(batch)
            self._kinds.setdefault(batch.template.name, _Kind(batch.template)).put(batch)

    def discard(self, identities: Batch) -> None:
        """Forget the rows of these keys, whatever their id and their template's state fields."""
        for kind in self._same_key(identities):
            kind.discard(identities)

    def find(self, wanted: Batch) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
        """Per row of `wanted`: whether its key is here, and the `flowId` it has here (0 where it is not)."""
        known = np.zeros(len(wanted), bool)
        ids = np.zeros(len(wanted), np.uint32)
        for kind in self._same_key(wanted):
            kind.find(wanted, known, ids)
        return known, ids

    def rows_of(self, wanted: Batch) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Per row of `wanted`: whether its key is here under the same template, and the row (zeros where not)."""
        known = np.zeros(len(wanted), bool)
        rows, whole = wanted.template.empty(len(wanted)), wanted.template.whole
        kind = self._kinds.get(wanted.template.name)
        if kind is not None:
            for held, at in kind.positions(wanted):
                hit = at >= 0
                known |= hit
                rows.view(whole)[hit] = held.view(whole)[at[hit]]
        return known, rows

    def batches(self) -> list[Batch]:
        """Everything, one batch per template."""
        return [kind.batch() for kind in self._kinds.values() if kind.count]

    def _same_key(self, batch: Batch) -> list[_Kind]:
        return [kind for kind in self._kinds.values() if kind.template.key == batch.template.key]


class _Kind:
    """The rows of one template: segments, each with its own index and a mask of what is still valid."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.segments: list[tuple[Batch, KeyIndex, npt.NDArray[np.bool_]]] = []
        self.count = 0

    def put(self, batch: Batch) -> None:
        batch = batch.take(last_of_each_key(batch))
        self.discard(batch)
        self.count += len(batch)
        # Segments at least halve in size from one to the next: few of them to look through, and a large one is sorted
        # again only when as much has come after it.
        while self.segments and len(self.segments[-1][0]) <= 2 * len(batch):
            before, _, valid = self.segments.pop()
            batch = Batch.joined(self.template, [before.take(valid).rows, batch.rows])
        self.segments.append((batch, KeyIndex(batch), np.ones(len(batch), bool)))

    def discard(self, wanted: Batch) -> None:
        for _, index, valid in self.segments:
            at = index.find(wanted)
            at = np.unique(at[at >= 0]) if len(at) > 1 else at[at >= 0]
            if not len(at):
                continue
            self.count -= int(valid[at].sum())
            valid[at] = False

    def find(self, wanted: Batch, known: npt.NDArray[np.bool_], ids: npt.NDArray[np.uint32]) -> None:
        for rows, at in self.positions(wanted):
            hit = at >= 0
            known |= hit
            ids[hit] = rows["flowId"][at[hit]]

    def positions(self, wanted: Batch) -> Iterator[tuple[Rows, Positions]]:
        """Per segment its rows and, per row of `wanted`, the position of the valid row of its key, or -1."""
        for batch, index, valid in self.segments:
            at = index.find(wanted)
            hit = at >= 0
            at[hit] = np.where(valid[at[hit]], at[hit], -1)
            yield batch.rows, at

    def batch(self) -> Batch:
        return Batch.joined(self.template, [batch.take(valid).rows for batch, _, valid in self.segments])
