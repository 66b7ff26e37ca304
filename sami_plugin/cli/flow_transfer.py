"""Flows of a scope out of a firewall, and into it: what the commands do, without their words.

As in `handover`, what counts is what the device holds when it is read back, not what it answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import FlowDriver
from sami_plugin.errors import NotAvailable, SamiError
from sami_plugin.model.flows import Addresses, Batch, Omitted, has_end_in, names
from sami_plugin.model.keys import last_of_each_key
from sami_plugin.model.results import WORDS, Outcome, Reason, Results, is_in_device, lost_fields, results
from sami_plugin.model.scope import Scope

NAMED = 3
"""How many flows are named for each thing that became of some."""
_FLOWS_AT_ONCE = 16384
_ADDRESSES_AT_ONCE = 64

Count = Callable[[int], None]


@dataclass(slots=True)
class Exported:
    """The flows of a scope, each once, one batch per template; and what could not be told."""

    batches: list[Batch] = field(default_factory=list)
    omitted: list[Omitted] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def export(driver: FlowDriver, scope: Scope, done: Count) -> Exported:
    """What the device holds in `scope`; only flows with an end in its addresses, where it has some.

    :raises SamiError: as `FlowDriver.export`.
    """
    # A driver looks at addresses in shared scopes only. Who names addresses here wants their flows and no others.
    scope = replace(scope, is_shared=bool(scope.addresses))
    parts: dict[str, list[Batch]] = {}
    exported = Exported()
    count = 0
    for piece in driver.export(scope):
        if isinstance(piece, Omitted):
            exported.omitted.append(piece)
            continue
        if len(piece):
            parts.setdefault(piece.template.name, []).append(piece)
            count += len(piece)
            done(count)
    for group in parts.values():
        batch = Batch.joined(group[0].template, [part.rows for part in group])
        # A device may tell a flow twice, when its table changes under the export.
        exported.batches.append(batch.take(last_of_each_key(batch)))
    return exported


@dataclass(slots=True)
class Line:
    """What became of some flows, and why."""

    result: str
    reason: str
    count: int = 0
    flows: tuple[str, ...] = ()


class Outcomes:
    """What became of all flows, by result and reason."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], Line] = {}

    def note(self, result: str, reason: str, batch: Batch) -> None:
        if len(batch):
            line = self._lines.setdefault((result, reason), Line(result, reason))
            line.count += len(batch)
            line.flows += names(batch, NAMED - len(line.flows))

    def lines(self) -> list[Line]:
        """What went well first."""
        return sorted(self._lines.values(), key=lambda line: (_ORDER.index(line.result), -line.count, line.reason))

    def count(self, result: str) -> int:
        """How many flows; a flow that lost several fields is in several lines of degraded ones."""
        return sum(line.count for line in self._lines.values() if line.result == result)


IMPORTED, DEGRADED, PRESENT, REFUSED = "imported", "degraded", "present", "refused"
WOULD_IMPORT, WOULD_REPLACE, WOULD_REFUSE = "would import", "would replace", "would refuse"
_ORDER = (IMPORTED, DEGRADED, PRESENT, REFUSED, WOULD_IMPORT, WOULD_REPLACE, WOULD_REFUSE)

ONLY_A_NAME = "the file has its name only, no state"


def import_(driver: FlowDriver, scope: Scope, batches: Iterable[Batch], done: Count) -> Outcomes:
    """Puts flows into the device and reads them back. Without addresses in `scope`, every flow is its port's.

    :raises NotAvailable: the device gave up in the middle; the message says how far it came.
    """
    outcomes = Outcomes()
    count = 0
    for place, batch in _pieces(scope, batches, outcomes, REFUSED):
        try:
            made = driver.insert(place, batch)
            _read_back(driver, place, batch, made)
        except SamiError as error:
            raise NotAvailable(
                f"{error}; {count} flows were dealt with before, so the import is not complete: mend it and repeat it"
            ) from error
        _file(outcomes, batch, made)
        count += len(batch)
        done(count)
    return outcomes


def rehearse(driver: FlowDriver, scope: Scope, batches: Iterable[Batch]) -> Outcomes:
    """What `import_` would do as far as it can be told without a change; what the device keeps is not among it."""
    outcomes = Outcomes()
    templates = driver.capabilities(scope).templates
    for place, batch in _pieces(scope, batches, outcomes, WOULD_REFUSE):
        if batch.template.name not in templates:
            outcomes.note(WOULD_REFUSE, WORDS[Reason.NOT_DECLARED], batch)
            continue
        is_expired = batch.rows["remainingTimeoutSeconds"] == 0
        outcomes.note(WOULD_REFUSE, WORDS[Reason.EXPIRED], batch.take(is_expired))
        batch = batch.take(~is_expired)
        is_there = driver.read_back(place, batch)[1]
        outcomes.note(WOULD_IMPORT, "", batch.take(~is_there))
        outcomes.note(WOULD_REPLACE, "an entry of the same key is there", batch.take(is_there))
    return outcomes


def _pieces(scope: Scope, batches: Iterable[Batch], outcomes: Outcomes, refused: str) -> Iterator[tuple[Scope, Batch]]:
    """Flows to insert, a bounded number at a time, and the scope to insert them into. Files the others."""
    for batch in batches:
        if batch.template.is_identity:
            outcomes.note(refused, ONLY_A_NAME, batch)
            continue
        batch = batch.take(last_of_each_key(batch))
        has_role = np.isin(batch.rows["zoneRole"], list(scope.zones))
        outcomes.note(refused, "it belongs into a zone of another role, which was not named", batch.take(~has_role))
        batch = batch.take(has_role)
        if scope.addresses:
            is_ours = has_end_in(batch, scope.addresses)
            outcomes.note(refused, WORDS[Reason.FOREIGN_ADDRESS], batch.take(~is_ours))
            groups: Iterable[tuple[Addresses, Batch]] = [(scope.addresses, batch.take(is_ours))]
        else:
            groups = _by_address(batch)
        for addresses, group in groups:
            place = replace(scope, addresses=addresses)
            for begin in range(0, len(group), _FLOWS_AT_ONCE):
                yield place, group.take(np.arange(begin, min(begin + _FLOWS_AT_ONCE, len(group))))


def _by_address(batch: Batch) -> Iterator[tuple[Addresses, Batch]]:
    """The flows with addresses of which each has one: a driver takes no flow of a port that has no address.

    The commonest addresses come first: in a port's own zone the first few are all.
    """
    import netaddr

    while len(batch):
        ends = np.concatenate([batch.rows[field] for field in batch.template.end_fields])
        values, counts = np.unique(ends, axis=0, return_counts=True)
        commonest = values[np.argsort(-counts, kind="stable")[:_ADDRESSES_AT_ONCE]]
        if batch.template.is_ipv6:
            addresses = tuple(netaddr.IPAddress(int(high) << 64 | int(low), 6) for high, low in commonest)
        else:
            addresses = tuple(netaddr.IPAddress(int(value), 4) for value in commonest)
        is_taken = has_end_in(batch, addresses)
        yield addresses, batch.take(is_taken)
        batch = batch.take(~is_taken)


def _read_back(driver: FlowDriver, scope: Scope, batch: Batch, made: Results) -> None:
    """Corrects what the device answered by what it holds."""
    at: npt.NDArray[np.intp] = np.flatnonzero(is_in_device(made))
    if not len(at):
        return
    sent = batch.take(at)
    found, is_there = driver.read_back(scope, sent)
    made[at[~is_there]] = results(int(np.count_nonzero(~is_there)), Outcome.REFUSED, Reason.VANISHED)
    is_ours = is_there & (made["outcome"][at] == Outcome.IMPORTED)
    lost = np.where(is_ours, lost_fields(sent, found.rows), np.uint64(0))
    made["lost"][at] = lost
    made["outcome"][at[lost != 0]] = Outcome.DEGRADED


def _file(outcomes: Outcomes, batch: Batch, made: Results) -> None:
    outcomes.note(IMPORTED, "", batch.take(made["outcome"] == Outcome.IMPORTED))
    there = batch.take(made["outcome"] == Outcome.PRESENT)
    outcomes.note(PRESENT, "it was there already, and its other end is a local port's", there)
    for mask in np.unique(made["lost"][made["outcome"] == Outcome.DEGRADED]):
        lost = [name[0] for position, name in enumerate(batch.template.state) if int(mask) >> position & 1]
        which = (made["outcome"] == Outcome.DEGRADED) & (made["lost"] == mask)
        outcomes.note(DEGRADED, f"not kept: {', '.join(lost)}", batch.take(which))
    for code in np.unique(made["reason"][made["outcome"] == Outcome.REFUSED]):
        which = (made["outcome"] == Outcome.REFUSED) & (made["reason"] == code)
        outcomes.note(REFUSED, WORDS[Reason(int(code))], batch.take(which))
