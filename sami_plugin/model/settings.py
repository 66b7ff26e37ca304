"""The operator's choices as plain values. `conf` reads them from the configuration, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


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


@dataclass(frozen=True, slots=True)
class Settings:
    """The operator's choices, read once."""

    limits: Limits = field(default_factory=Limits)
    batch_flows: int = 16384
    window: int = 4
    call_seconds: float = 10.0
    message_seconds: float = 120.0
    verdict_seconds: float = 5.0
    started_seconds: float = 2.0
    enterprise: int = 32473


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
