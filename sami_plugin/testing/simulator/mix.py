"""What a run is made of, drawn by chance: most runs are small and disturbed by little, some by much."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(slots=True)
class Mix:
    """How often what happens. Chances are from 0 to 1, the rest are counts or seconds."""

    hosts: int = 2
    guests: int = 1
    ports: int = 1
    moves: int = 1
    """Migrations of each guest, one after another."""
    flows: int = 3
    """At most so many of each port at first."""
    foreign: int = 1
    """Flows of nobody on each host."""
    is_shared: float = 0.0
    """Of a port, that its zone is that of others too."""
    residents: int = 0
    """Guests in the shared zones that never move."""
    traffic: int = 2
    """Things that flows do during each migration, about."""
    copy_seconds: float = 1.0
    """Longest copy of a guest's memory."""
    loss: float = 0.0
    repetition: float = 0.0
    delay_seconds: float = 0.001
    """Of a packet, at most; longer delays put packets in another order."""
    outage: float = 0.0
    """That the broker is away for a while during a migration."""
    forgery: float = 0.0
    """Of a packet, that a forged one comes before it."""
    stranger: float = 0.0
    """Of a migration, that a host that the guest does not move to asks for its flows."""
    twice: float = 0.08
    """Of a word of the hypervisor, that it is said twice."""
    mute: float = 0.0
    """Of a word, that it is not said at all."""
    late_words: float = 0.01
    """Seconds that a word takes, at most."""
    policy: float = 0.0
    """Of a host, that its policy may refuse a migration."""
    old_version: float = 0.0
    """Of a host, that it understands the first version of the messages alone."""
    is_described: float = 0.0
    """Of a run, that the guests' descriptions say where they come from, and nobody else does."""
    no_hook: float = 0.1
    """Of a migration of described guests, that no hook announces it."""
    polls: float = 0.2
    """Of a run, that the hypervisor is asked about guests that leave."""
    abort: float = 0.15
    kill: float = 0.02
    goes_back: float = 0.03
    """Of a migration, that the guest returns at once."""
    haste: float = 0.0
    """Of a migration, that it does not wait until the last one's flows have all come."""
    post_copy: float = 0.1
    paused: float = 0.05
    """Of a migration, that its guest's user has paused it."""
    late_zone: float = 0.1
    zone_seconds: float = 0.1
    lost_zone: float = 0.0
    """Of a port, that its zone never appears."""
    cleaning: float = 0.2
    """Of a migration, that the network's own agent deletes the port's entries in the pause."""
    late_packets: float = 0.15
    capacity: int | None = None
    failing_device: float = 0.0
    hiccups: float = 0.0
    """Of a call of a driver, that it fails, and the next one does not."""
    forgetful_device: float = 0.0
    """Of an insert, that the device forgets a flow that it took."""
    lost_events: float = 0.0
    full_journal: float = 0.0
    crash: float = 0.0
    """Of a host, that its agent crashes, at any record, insertion or removal, and is started anew."""
    crash_again: float = 0.3
    """Of an agent that was started anew, that it crashes as well, soon."""
    slow_sessions: float = 0.0
    """Seconds until a session handles what happened, at most."""


def drawn(random: Random, **fixed: Any) -> Mix:
    """A mix for one run; `fixed` fields are as they are given."""
    mix = Mix()
    dice = random.random
    mix.flows = random.choice((0, 0, 1, 1, 1, 1, 2, 4))
    if dice() < 0.06:
        mix.ports = 2
    if dice() < 0.04:
        mix.hosts, mix.moves = 3, random.choice((1, 2, 2, 3))
    elif dice() < 0.03:
        mix.moves = 2
    if dice() < 0.05:
        mix.is_shared, mix.residents = 1.0, random.choice((0, 0, 1))
        mix.guests = random.choice((1, 2, 2))
    elif dice() < 0.02:
        mix.guests = random.choice((2, 2, 3))
    if dice() < 0.15:
        mix.copy_seconds = random.choice((0.0, 0.0, 4.0, 12.0))
    if dice() < 0.25:
        mix.traffic = random.choice((0, 0, 6))
    if dice() < 0.12:
        mix.loss, mix.repetition = random.choice((0.0, 0.05, 0.2)), random.choice((0.0, 0.1, 0.4))
        mix.delay_seconds = random.choice((0.01, 0.1, 0.5))
    if dice() < 0.03:
        mix.outage = 1.0
    if dice() < 0.06:
        mix.forgery = 0.1
    if dice() < 0.05:
        mix.stranger = 1.0
    if dice() < 0.05:
        mix.mute = 0.2
    if dice() < 0.2:
        mix.late_words = 0.1
    if dice() < 0.08:
        mix.slow_sessions = random.choice((0.002, 0.01, 0.03))
    if dice() < 0.1:
        mix.policy = 0.7
    if dice() < 0.1:
        mix.old_version = 0.5
    if dice() < 0.15:
        mix.is_described = 1.0
    if dice() < 0.08:
        mix.abort, mix.goes_back = 0.5, 0.3
    if dice() < 0.01:
        mix.lost_zone = 0.5
    if dice() < 0.03:
        mix.late_zone, mix.zone_seconds = 0.5, random.choice((0.3, 1.0))
    if dice() < 0.06:
        mix.capacity = random.choice((6, 10, 14))
    if dice() < 0.04:
        mix.failing_device, mix.hiccups = 0.3, 0.05
    if dice() < 0.06:
        mix.forgetful_device = 0.5
    if dice() < 0.06:
        mix.lost_events = 0.3
    if dice() < 0.03:
        mix.full_journal = 0.05
    if not mix.mute and dice() < 0.1:  # of a guest that returns unannounced it is said that it stayed
        mix.haste = 1.0
    if dice() < 0.05:
        mix.crash = random.choice((0.5, 1.0))
    for name, value in fixed.items():
        setattr(mix, name, value)
    return mix
