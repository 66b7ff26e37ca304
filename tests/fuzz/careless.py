"""A decoder that does not look how much there is, to see that it is found."""

from __future__ import annotations

from tests.fuzz.hunt import Target

TARGET = Target("careless", (bytes(50),), lambda octets: octets[40], ())
