"""What a policy says."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """What a policy says to a risk."""

    PROCEED = "proceed"
    VETO = "veto"
    ASK = "ask"
    """Somebody else decides."""
