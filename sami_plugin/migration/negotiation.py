"""What a destination can take of what a source offers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from sami_plugin.model.flows import TEMPLATES
from sami_plugin.model.migration import Check, Offer
from sami_plugin.model.results import WORDS, Reason

NOT_KEPT = "the driver of that host does not keep {function}, which some of them use"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a guest's flows need."""

    counts: Mapping[str, int]
    """Flows by kind (`Template.name`)."""
    functions: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    """By reason, flows that the source does not give, which are not among the counts."""

    @property
    def flows(self) -> int:
        return sum(self.counts.values()) + sum(self.left_out.values())

    @classmethod
    def of(cls, said: Offer | Check) -> Demand:
        """What a message says, in which a list may be shorter than the other."""
        counts, left_out = zip(said.kinds, said.counts, strict=False), zip(said.reasons, said.left_out, strict=False)
        return cls(dict(counts), said.functions, dict(left_out))


@dataclass(frozen=True, slots=True)
class Weighed:
    """What comes of a demand."""

    places: int
    kinds: tuple[str, ...]
    """Those for which the places are."""
    losses: Mapping[str, int]
    """How many do not come, by reason."""
    degraded: Mapping[str, int]


def weigh(
    demand: Demand,
    *,
    declared: Collection[str],
    admitted: Callable[[str], bool],
    functions: Collection[str],
    promise: Callable[[int], int],
) -> Weighed:
    """What becomes of the demand.

    `declared` are the kinds that the device takes, `admitted` says which of them the source's domain may give,
    `functions` what the device can do, and `promise` how many of so many flows it has a place for.
    """
    losses: Counter[Reason] = Counter()
    taken: Counter[str] = Counter()
    for kind, count in demand.counts.items():
        if kind not in TEMPLATES or TEMPLATES[kind].taken_by(declared).name not in declared:
            losses[Reason.NOT_DECLARED] += count
        elif not admitted(TEMPLATES[kind].usual.name):
            losses[Reason.NOT_ADMITTED] += count
        else:
            taken[kind] = count
    others = sum(count for kind, count in taken.items() if not TEMPLATES[kind].is_flow)
    wanted = taken.total()
    places = others + promise(wanted - others) if wanted > others else others
    losses[Reason.NO_PLACE] = wanted - places
    degraded = {NOT_KEPT.format(function=one): places for one in demand.functions if one not in functions and places}
    named = {WORDS[reason]: count for reason, count in losses.items() if count}
    return Weighed(places, tuple(taken), {**demand.left_out, **named}, degraded)
