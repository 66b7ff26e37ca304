"""A guest's way from one host to another, with everything that is told on the way.

    source                              destination                 phase, and key of Record.times and of `at`
    tell outgoing                                                   outgoing
                                        tell prepare                prepare      may veto by raising
                                        tell started                started      may veto by raising
    the guest runs, memory is copied                                copying
    link down, processes stopped                                    paused
    tell suspended                                                  suspended
                                        tap arrives, is announced   moved
                                        processes go on
                                        tell resumed                resumed      the cut-over
                                        link up                     running
    tell stopped                                                    stopped

An end before `resumed` leaves the guest on the source: a source that was told suspended is told resumed, then the
destination is told stopped. One that was not is told nothing, as with libvirt: a job that is aborted while memory is
copied gives no event on the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lab.errors import IllegalMove
from lab.fabric import BridgedFabric, RoutedFabric
from lab.guest import Guest
from lab.host import Host

PHASES = ("outgoing", "prepare", "started", "copying", "paused", "suspended", "moved", "resumed", "running", "stopped")
POINT_OF_NO_RETURN = PHASES.index("resumed")

# tell(host, phase, guest). Called in the migrating thread, one at a time: who is slow slows the migration down, in the
# pause too. What it raises in prepare and started is a veto; elsewhere it is kept in Record.errors and changes nothing.
Tell = Callable[[Host, str, Guest], object]


def tell_nobody(host: Host, phase: str, guest: Guest) -> None:
    """The Tell of a migration that nobody watches."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Stay in this phase for so long: in copying the guest runs, from paused on it does not."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Abort:
    """End the migration; the guest stays on the source or returns to it. Not from `resumed` on."""


@dataclass(frozen=True, slots=True)
class Crash:
    """As Abort, but the destination is told nothing any more: its libvirt died with its QEMU."""


@dataclass(frozen=True, slots=True)
class Call:
    """Call function(). What it raises comes out of migrate(): after an Abort, or once `resumed` after the arrival."""

    function: Callable[[], object]


Action = Delay | Abort | Crash | Call


@dataclass(slots=True)
class Record:
    """What happened: `outcome` is moved, aborted, crashed or vetoed; `times` has CLOCK_MONOTONIC seconds by phase,
    taken before the phase is told, and `returned` when a guest that was paused runs on the source again."""

    source: str
    destination: str
    outcome: str = "moved"
    times: dict[str, float] = field(default_factory=dict)
    errors: list[tuple[str, str, Exception]] = field(default_factory=list)

    @property
    def paused_at(self) -> float:
        """When the guest's processes were stopped."""
        return self.times["paused"]

    @property
    def cut_over_at(self) -> float:
        """When they went on, on the destination."""
        return self.times["resumed"]


class _End(Exception):
    """The migration ends early with this outcome."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(slots=True)
class Migration:
    """One attempt; see the module and Lab.migrate. `at` maps a phase to what happens in it after it was told."""

    fabric: BridgedFabric | RoutedFabric
    guest: Guest
    source: Host
    destination: Host
    tell: Tell
    copy_seconds: float
    pause_seconds: float
    is_port_early: bool
    at: Mapping[str, Action | Sequence[Action]]
    record: Record = field(init=False)
    _is_paused: bool = field(init=False, default=False)
    _is_source_suspended: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        for phase, actions in self.at.items():
            if phase not in PHASES:
                raise ValueError(f"no phase {phase!r}; there are {', '.join(PHASES)}")
            late = PHASES.index(phase) >= POINT_OF_NO_RETURN
            if late and any(isinstance(action, Abort | Crash) for action in _several(actions)):
                raise ValueError(f"in {phase} the guest runs on the destination: no way back")
        self.record = Record(self.source.name, self.destination.name)

    def run(self) -> Record:
        """Do it; return when it is over, one way or the other. Raises IllegalMove before anything was done."""
        if not self.guest.migrating.acquire(blocking=False):
            raise IllegalMove(f"{self.guest.name} migrates already")
        try:
            if self.guest.host is not self.source or self.source is self.destination:
                here = self.guest.host.name if self.guest.host else "no host"
                raise IllegalMove(
                    f"{self.guest.name} is on {here}: no way {self.source.name} to {self.destination.name}"
                )
            self.guest.moves_to = self.destination
            try:
                self._go()
            except _End as end:
                self.record.outcome = end.outcome
                self._return()
            except BaseException:
                if "resumed" in self.record.times:
                    self._arrive()
                else:
                    self.record.outcome = "aborted"
                    self._return()
                raise
        finally:
            self.guest.migrating.release()
        return self.record

    def _go(self) -> None:
        guest = self.guest
        self._phase("outgoing", self.source)
        self._phase("prepare", self.destination)
        if self.is_port_early:
            self.destination.expect(guest)
        self._phase("started", self.destination)
        self._stamp("copying")
        time.sleep(self.copy_seconds)  # stands for the time that copying memory takes
        self._act("copying")

        guest.link_down()
        guest.pause()
        self._is_paused = True
        self._phase("paused")
        self._is_source_suspended = True
        self._phase("suspended", self.source)
        self._move(self.source, self.destination)
        self._phase("moved")
        # The least a pause lasts; what was done in it counts.
        time.sleep(max(0.0, self.record.paused_at + self.pause_seconds - time.monotonic()))
        self._continue()
        self._phase("resumed", self.destination)
        self._arrive()

    def _arrive(self) -> None:
        # The link comes up last: what the guest says before is lost, so it cannot mend its connection by speaking.
        self.guest.link_up()
        self._phase("running")
        self._phase("stopped", self.source)

    def _return(self) -> None:
        if self.guest.host is self.destination:
            self._move(self.destination, self.source)
        self.destination.expect_no_more(self.guest)
        if self._is_paused:
            self._continue()
        if self._is_source_suspended:
            self._tell(self.source, "resumed")
        self.guest.link_up()
        self._stamp("returned")
        if self.record.outcome != "crashed":
            self._tell(self.destination, "stopped")

    def _move(self, here: Host, there: Host) -> None:
        here.release(self.guest, there.namespace)
        self.guest.host = there
        there.welcome(self.guest)
        self.fabric.announce(self.guest.port, there)

    def _continue(self) -> None:
        self._is_paused = False
        self.guest.go_on()

    def _phase(self, phase: str, told: Host | None = None) -> None:
        self._stamp(phase)
        if told is not None:
            self._tell(told, phase)
        self._act(phase)

    def _stamp(self, phase: str) -> None:
        self.record.times[phase] = time.monotonic()

    def _tell(self, host: Host, phase: str) -> None:
        try:
            self.tell(host, phase, self.guest)
        except Exception as error:  # whatever it is, it is the verdict of what is tested
            self.record.errors.append((host.name, phase, error))
            if phase in ("prepare", "started"):
                raise _End("vetoed") from error

    def _act(self, phase: str) -> None:
        for action in _several(self.at.get(phase, ())):
            match action:
                case Delay(seconds):
                    time.sleep(seconds)
                case Abort():
                    raise _End("aborted")
                case Crash():
                    raise _End("crashed")
                case Call(function):
                    function()


def _several(actions: Action | Sequence[Action]) -> Sequence[Action]:
    return actions if isinstance(actions, Sequence) else (actions,)
