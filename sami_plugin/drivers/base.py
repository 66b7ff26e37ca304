"""The contract between SAMI and a firewall.

A driver is held to what it declares in `capabilities`, by the conformance suite in `sami_plugin.testing`. Calling what
was not declared raises `UndeclaredAbility`. Flows come and go as batches (`sami_plugin.model.flows`); a driver does
nothing per flow that it can do per batch.

All methods may block on the device for as long as the device needs. Methods of one driver object may be called from
several threads at a time, a `Watch` from one thread only. All may be repeated: inserting what is there and removing
what is gone are no errors but results.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt

from sami_plugin.model.flows import Batch, Omitted
from sami_plugin.model.results import Results
from sami_plugin.model.risk import FUNCTIONS
from sami_plugin.model.scope import Scope


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do here and now: tried, not guessed."""

    templates: frozenset[str]
    """Names of the templates that it exports and inserts."""
    can_watch: bool
    """`watch` tells changes. Without it changes are found by exporting again."""
    capacity: int | None
    """Flows that the device can hold in all; None where it has no limit of its own."""
    in_use: int
    """Flows that it holds now."""
    device: str
    """Identity of the device."""
    functions: frozenset[str] = FUNCTIONS
    """What it keeps of what not each firewall does (`model.risk`)."""
    notes: tuple[str, ...] = field(default=())
    """For the operator: what the device lacks, each with the mend."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """By template, the identity of a device that serves several hosts, such as a NAT in the network. Where the other
    host has the same one, what it keeps stays in it when a guest moves."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What became different since the last call: apply `removals` first, then `upserts`.

    The two never name the same key, except that a removal with another `flowId` goes before the flow that took its
    place. `is_complete` is False when the device dropped events: only a new export tells what is there. `is_all` is
    False where `collect_last` has more, which takes longer: call it again when these are on their way.
    """

    removals: tuple[Batch, ...] = ()
    upserts: tuple[Batch, ...] = ()
    is_complete: bool = True
    is_all: bool = True


class Watch(abc.ABC):
    """Tells the changes of one scope from the moment it was made."""

    @abc.abstractmethod
    def collect(self) -> Changes:
        """All changes until now, merged: per flow only what it is now. Does not wait for any to happen."""

    def collect_last(self) -> Changes:
        """As `collect`, for the last time: the guest is paused, and nothing is put off."""
        return self.collect()

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the watch. May be repeated."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FlowDriver(abc.ABC):
    """Exports, inserts and removes the flows of a scope of one device.

    Must not define ``__len__`` or ``__bool__``: stevedore mistakes a false driver for a missing one.
    """

    @abc.abstractmethod
    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        """What the driver can do, for the device of `scope` or else of the agent's own namespace.

        :raises NotPermitted, NotAvailable: the device cannot be used at all; the message says why and the mend.
        """

    def attend(self, namespace: str | None) -> None:  # noqa: B027 - most drivers need not
        """The agent runs and will have to tell changes of this namespace's flows one day: prepare what that takes.

        Called when the agent starts, long before a guest moves, and for each port of a guest that moves: often, and by
        several threads. Nothing to do for most devices.

        :raises NotAvailable, NotPermitted: there is no way into the namespace.
        """

    @abc.abstractmethod
    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        """The scope's flows, in batches as the device gives them, while it goes on changing.

        A flow that is there from beginning to end is told at least once, one that comes or goes meanwhile may be.
        The iterator may be abandoned. Rows are complete; `flowId` is the device's id of the flow, or 0 where the device
        has none for a kind of its own (`model.kinds`). Flows with a mark of
        `scope.barred_marks` are omitted, and a watch tells a flow that gets such a mark as removed.

        :raises DeviceFailed: the device gave up; what was told so far is right but not all.
        """

    @abc.abstractmethod
    def watch(self, scope: Scope) -> Watch:
        """Begins to note changes. Make it before `export`, so that no change falls between the two.

        :raises UndeclaredAbility: the driver cannot watch.
        """

    @abc.abstractmethod
    def insert(self, scope: Scope, batch: Batch) -> Results:
        """Puts flows into the device; one result per record, in order. Does not say what the device kept of them.

        A flow of which neither end is an address of the scope is refused: FOREIGN_ADDRESS; one with a mark of
        `scope.barred_marks` too: BARRED. An entry of the same key, or
        of the same tuple turned round, is replaced, unless `scope` is shared and the
        other end is one of its neighbours: then it is left alone and the result is PRESENT, or REFUSED with
        LOCAL_PORTS_OWN where there is none. Where the place that a NAT needs, for what comes to it or for what is sent
        back, is another guest's, that one's entry is left alone: REFUSED, TRANSLATION_TAKEN.

        :raises DeviceFailed: the device gave up; some records may be in it, so remove all of the batch.
        """

    @abc.abstractmethod
    def renew(self, scope: Scope, batch: Batch) -> Results:
        """Sets the remaining timeout of entries that are there; never creates one (ABSENT).

        PRESENT where an entry is there and its timeout is not to be changed.
        """

    def arrived(self, scope: Scope, batch: Batch) -> None:  # noqa: B027 - most drivers need not
        """The guest of these flows runs here and its migration is over: what an insert had to ease can end.

        Rows are as they were asked for, with the device's own `flowId`, or 0 where that is not known. Returns at once;
        what takes time the driver does beside. Nothing to do for most devices.
        """

    @abc.abstractmethod
    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        """What the device holds for each of these flows: rows of the same template and order, and which are there.

        Takes flows only, not identities. Rows of flows that are not there are zero.
        """

    @abc.abstractmethod
    def remove(self, scope: Scope, identities: Batch) -> Results:
        """Removes the named entries and nothing else: REMOVED, or ABSENT where there was none.

        An entry goes only if its key is the same, and its id too where `flowId` is not 0. An empty batch removes
        nothing. There is no way to remove without naming.
        """
