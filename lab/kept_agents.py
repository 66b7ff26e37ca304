"""Agents that are started anew when they die, and a hypervisor that answers them when they ask where a guest is.

What is said while an agent is away is lost, as it is with real hooks and events. An agent that was started anew is told
what libvirt tells to who connects: how it is now.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType

from lab import mortal
from lab.agents import AgentProcess
from lab.guest import Guest
from lab.host import Host
from lab.lab import Lab
from sami_plugin.errors import OperatorError, Veto
from sami_plugin.model.migration import Phase

MORTAL = (sys.executable, "-P", "-W", "ignore", mortal.__file__)
LOOK_SECONDS = 0.02


class KeptAgents:
    """One agent per host of a lab. A context manager."""

    def __init__(self, lab: Lab, options: Mapping[str, Mapping[str, Mapping[str, object]]]) -> None:
        """`options` are those of the agents' configurations, by host."""
        self._lab = lab
        self.agents = {name: AgentProcess(lab.folder, name, options[name], program=MORTAL) for name in lab.hosts}
        self.deaths = 0
        """How often an agent died by now."""
        self._told: dict[tuple[str, str], list[str]] = defaultdict(list)
        """By host and guest, the phases of the migration that is under way or was the last."""
        self._sources: dict[str, str] = {}
        """By guest, which host it leaves or has left."""
        self._lock = threading.RLock()
        self._restarting = threading.Lock()
        self._has_stopped = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lab-keeper", daemon=True)

    def __enter__(self) -> KeptAgents:
        with ExitStack() as stack:
            for agent in self.agents.values():
                stack.enter_context(agent)
            self._stack = stack.pop_all()
        self._keeper.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._has_stopped.set()
        self._keeper.join()
        self._stack.close()

    def arm(self, host: str, steps: int) -> None:
        """See `lab.mortal.arm`."""
        mortal.arm(self.agents[host].configuration.parent, steps)

    def disarm(self, host: str) -> bool:
        """See `lab.mortal.disarm`."""
        return mortal.disarm(self.agents[host].configuration.parent)

    def are_well(self) -> bool:
        """Whether all of them run, and none is about to be started anew."""
        with self._restarting:
            return not any(agent.has_died() for agent in self.agents.values())

    def tell(self, host: Host, phase: str, guest: Guest) -> None:
        """What the lab's migration says. An agent that is away hears nothing, and no guest is held up by it."""
        with self._lock:
            if phase in ("outgoing", "prepare"):
                self._told[host.name, guest.uuid] = []
            if phase == "prepare" and guest.host is not None:
                self._sources[guest.uuid] = guest.host.name
            self._told[host.name, guest.uuid].append(phase)
        with contextlib.suppress(OperatorError):
            self.agents[host.name].tell_of(phase, guest)

    def _keep(self) -> None:
        while not self._has_stopped.wait(LOOK_SECONDS):
            for name, agent in self.agents.items():
                with self._restarting:
                    if agent.has_died():
                        self.deaths += 1
                        agent.stop()
                        agent.start()
                        self._recall(name, agent)

    def _recall(self, host: str, agent: AgentProcess) -> None:
        with self._lock:
            known = {guest: list(told) for (where, guest), told in self._told.items() if where == host and told}
        for guest in self._lab.guests.values():
            is_known = any(row["ended_at"] is None for row in agent.sessions(guest.uuid))
            for phase in _now(known.get(guest.uuid, [])):
                with contextlib.suppress(OperatorError, Veto):  # nobody stops it any more
                    if phase != "prepare":
                        agent.tell_of(phase, guest)
                    elif not is_known:  # libvirt says so by its first event; the guest may have come by now
                        agent.tell(Phase.PREPARE, guest.uuid, self._sources[guest.uuid])


def _now(told: list[str]) -> list[str]:
    """What libvirt says of a guest of which these words were said, to who was not there to hear them."""
    if "outgoing" in told:
        if "stopped" in told:
            return [Phase.STOPPED.value]
        if "resumed" in told:
            return [Phase.ROLLBACK.value]
        return [phase for phase in ("outgoing", "suspended") if phase in told]
    if "stopped" in told:
        return [Phase.STOPPED.value]
    return [phase for phase in ("prepare", "started", "resumed") if phase in told]
