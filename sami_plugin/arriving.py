"""What a destination keeps of each port of a guest that comes: what was put in, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sami_plugin.former import FormerPort
from sami_plugin.model.flows import Batch, has_end_in, names
from sami_plugin.model.keys import FlowTable, KeyIndex
from sami_plugin.model.report import Report
from sami_plugin.model.results import (
    COMPARED_BITS,
    WORDS,
    Outcome,
    Reason,
    Results,
    came_out,
    is_in_device,
    lost_fields,
)
from sami_plugin.model.scope import Scope

REFUSED, DEGRADED = FOUND_ANEW = ("refused: ", "degraded: ")
"""How the reasons begin that are found anew when flows are told anew."""


@dataclass(slots=True)
class Arriving:
    """One port of the guest that comes, and what was put in for it."""

    scope: Scope
    held: FlowTable = field(default_factory=FlowTable)
    """What the device holds thanks to this session, with the device's own ids and none of the bits that it added."""
    former: FlowTable = field(default_factory=FlowTable)
    """What another session, with which this one goes on, has put in, and the source has not told of anew."""
    unsure: FlowTable = field(default_factory=FlowTable)
    """What it was about to put in, or to take out, when its agent ended or its device failed, and the source has not
    told of anew."""
    unadmitted: list[Batch] = field(default_factory=list)
    """What peers had begun when the port's zone was known and its guest ran already."""
    doubtful: list[tuple[Scope, Batch]] = field(default_factory=list)
    """What may be in the device, and for which scope it was put in: the device failed before it said so."""

    def tables(self) -> tuple[FlowTable, ...]:
        """All that is known of flows of the port in the device."""
        return self.held, self.former, self.unsure

    @property
    def has_put_in(self) -> bool:
        """Whether something may be in the device that was put in for the port."""
        return bool(self.doubtful) or any(len(table) for table in self.tables())

    def inherited(self) -> Iterator[Batch]:
        """What another session has done, or was about to do, and the source has not told of anew."""
        yield from (*self.former.batches(), *self.unsure.batches())

    def inherits(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which of these flows are among them."""
        return self.former.find(batch)[0] | self.unsure.find(batch)[0]

    def told_anew(self, batch: Batch) -> None:
        """Of these flows the source has told: they are this session's own now, or are not here."""
        for table in (self.former, self.unsure):
            if len(table):
                table.discard(batch)

    def keep(self, told: Batch, found: Batch, which: npt.NDArray[np.bool_]) -> None:
        """Of what was told, this stays as the guest has made it, whatever is told of it later."""
        kept = told.take(which)
        kept.rows["flowId"] = found.rows["flowId"][which]
        for name in COMPARED_BITS.keys() & set(kept.rows.dtype.names or ()):
            kept.rows[name] &= found.rows[name][which]
        self.held.put(kept)
        self.told_anew(kept)

    def doubtful_parts(self) -> Iterator[tuple[Batch, Batch]]:
        """Of what is doubtful, what this session alone may have put in, and what may have been there before.

        The latter are flows with ports whose guests were running here.
        """
        for scope, batch in self.doubtful:
            is_theirs_too = has_end_in(batch, scope.neighbours)
            yield batch.take(~is_theirs_too), batch.take(is_theirs_too)

    def handed_over(self) -> FormerPort:
        """What is in the device thanks to this session, and to the one with which it goes on, and what may be."""
        for batch in self.held.batches():
            self.former.put(batch.without_ids())
        for ours, _ in self.doubtful_parts():
            self.doubt(ours)
        return FormerPort(self.scope, self.former, self.unsure)

    def doubt(self, batch: Batch) -> None:
        """Of these flows it is not known whether the device has taken them."""
        self.unsure.put(batch.without_ids())


@dataclass(frozen=True, slots=True)
class Unverified:
    """Flows that were put in, what the device answered, and what it holds: looked up while more is being put in."""

    port: Arriving
    scope: Scope
    """As it was then, neighbours included."""
    batch: Batch
    made: Results
    look: Future[tuple[Batch, npt.NDArray[np.bool_]]]
    """Rows and presence of each flow of `batch`."""
    left_out: Mapping[str, npt.NDArray[np.bool_]]
    """By field that the device has no room for, which of the flows had something in it."""

    def has(self, wanted: Batch) -> npt.NDArray[np.bool_]:
        """Which of these flows are among those that the device says it took."""
        if wanted.template.key != self.batch.template.key:
            return np.zeros(len(wanted), bool)
        return KeyIndex(self.batch.take(is_in_device(self.made))).find(wanted) >= 0


@dataclass(frozen=True, slots=True)
class Carried:
    """Flows, or names of flows, as this host calls them and, in the same order, as they came."""

    batch: Batch
    came: Batch


class Findings:
    """Each flow filed under what became of it last, once however often it was sent."""

    def __init__(self) -> None:
        self._ambiguous = FlowTable()
        """By the source's names: by ours they could be taken for others."""
        self._refused: dict[Reason, FlowTable] = {}
        self._degraded: dict[str, FlowTable] = {}
        self._present = FlowTable()
        self._verified = 0

    def settle(self, part: Unverified) -> None:
        """Compares. What counts is what the device holds, not what it answered. Blocks until the look is over.

        :raises SamiError: the device could not be looked at; nothing is filed.
        """
        found, is_there = part.look.result()
        batch, made = part.batch, part.made
        has_vanished = is_in_device(made) & ~is_there
        made["outcome"][has_vanished], made["reason"][has_vanished] = Outcome.REFUSED, Reason.VANISHED
        is_ours = came_out(made, Outcome.IMPORTED)
        made["lost"] = lost_fields(batch, found.rows) * is_ours
        made["outcome"][made["lost"] != 0] = Outcome.DEGRADED
        self._verified += int(np.count_nonzero(is_in_device(made)))
        self.forget(batch)
        part.port.held.discard(batch)
        held = found.take(is_ours)
        for name in COMPARED_BITS.keys() & set(batch.template.dtype.names or ()):
            held.rows[name] &= batch.rows[name][is_ours]
        part.port.held.put(held)
        self.leave(batch.take(came_out(made, Outcome.PRESENT)))
        for code in sorted({*made["reason"][came_out(made, Outcome.REFUSED)].tolist()}):
            self.refuse(batch.take(made["reason"] == code), Reason(code))
        lost = dict(part.left_out)
        for position, state_field in enumerate(batch.template.state if made["lost"].any() else ()):
            lost[state_field[0]] = (made["lost"] >> position) & 1 == 1
        for name, is_lost in lost.items():
            if (is_lost & is_ours).any():
                self._degraded.setdefault(name, FlowTable()).put(batch.take(is_lost & is_ours))

    def refuse(self, batch: Batch, reason: Reason) -> None:
        """Files flows that are not in the device."""
        if len(batch):
            self.forget(batch)
            self._refused.setdefault(reason, FlowTable()).put(batch)

    def leave(self, batch: Batch) -> None:
        """Files flows that are in the device already, and stay as they are."""
        if len(batch):
            self.forget(batch)
            self._present.put(batch)

    def has(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which of these flows were there already, or were refused: the source has told of them."""
        known = np.zeros(len(batch), bool)
        for table in (self._present, *self._refused.values()):
            known |= table.find(batch)[0]
        return known

    def refused_flows(self) -> list[Batch]:
        """What is not in the device, by this host's names."""
        return [batch for table in self._refused.values() for batch in table.batches()]

    def refuse_ambiguous(self, came: Batch) -> None:
        """Files flows that have no name here, by the source's."""
        self._ambiguous.put(came)

    def forget_ambiguous(self, came: Batch) -> None:
        """By the source's names: these ended, or are about to be filed anew."""
        self._ambiguous.discard(came)

    def forget(self, gone: Batch) -> None:
        """These flows ended, or are about to be filed anew."""
        for table in (self._present, *self._refused.values(), *self._degraded.values()):
            table.discard(gone)

    @property
    def refused(self) -> int:
        """How many flows are not in the device."""
        return len(self._ambiguous) + sum(map(len, self._refused.values()))

    def counts(self) -> dict[str, int]:
        """The report's figures."""
        return {
            "degraded": _distinct(self._degraded.values()),
            "present": len(self._present),
            "refused": self.refused,
            "verified": self._verified,
        }

    def name_in(self, report: Report) -> None:
        """Names what did not come as it was sent."""
        for reason, table in (*self._refused.items(), (Reason.AMBIGUOUS_ADDRESS, self._ambiguous)):
            for batch in table.batches():
                report.name(f"{REFUSED}{WORDS[reason]}", len(batch), names(batch))
        for element, table in self._degraded.items():
            for batch in table.batches():
                report.name(f"{DEGRADED}{element} was not kept", len(batch), names(batch))


def _distinct(tables: Iterable[FlowTable]) -> int:
    """How many flows are in any of the tables."""
    union = FlowTable()
    for table in tables:
        for batch in table.batches():
            union.put(batch)
    return len(union)
