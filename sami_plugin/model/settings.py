"""The operator's choices as plain values. `conf` reads them from the configuration, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sami_plugin.model.flows import Addresses
from sami_plugin.model.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Limits:
    """The operator's limits that decisions depend on, in seconds."""

    delta_seconds: float = 0.1
    resync_seconds: float = 10.0
    hold_seconds: int = 30
    open_seconds: float = 30.0
    zone_seconds: float = 30.0
    arrival_seconds: float = 60.0
    watch_seconds: float = 1.0
    session_seconds: float = 3600.0
    verdict_seconds: float = 5.0
    ask_seconds: float = 60.0
    silence_means: Verdict = Verdict.PROCEED
    """What counts where an operator was asked and does not answer in time."""
    reservation_seconds: float = 600.0


MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of others is taken, so that nobody can take all of this host. Not for the right ones to notice."""

    sessions: int = 1000
    handshakes: int = 64
    handshakes_per_second: float = 100.0
    handshake_seconds: float = 10.0
    handshake_octets: int = MEBIBYTE // 4
    streams: int = 8
    session_octets: int = 64 * MEBIBYTE
    unpacked_octets: int = 16 * MEBIBYTE
    hooks: int = 64
    hook_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Retention:
    """For how long, and in how much room, the journal keeps what ended. What is under way it keeps in any case."""

    days: float = 30.0
    octets: int = 256 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class Settings:
    """The operator's choices, read once."""

    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    batch_flows: int = 16384
    window: int = 4
    call_seconds: float = 3.0
    message_seconds: float = 120.0
    started_seconds: float = 0.15
    headroom_percent: float = 5.0
    late_import_seconds: float = 30.0
    remove_unadmitted: bool = False
    enterprise: int = 32473
    translations: Addresses = ()


@dataclass(frozen=True, slots=True)
class Files:
    """Where a host's credentials are, all in PEM."""

    certificate: Path
    """Its own, with those between it and the authority behind it, if there are any."""
    key: Path
    authorities: Path
    """The certificates of the authorities whose word counts."""
    revoked: Path | None = None
    """Their lists of revoked certificates; None: nothing is ever revoked."""
