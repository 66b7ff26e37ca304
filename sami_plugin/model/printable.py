"""Words of somebody else, as they may be shown."""

from __future__ import annotations


def printable(text: str, most: int) -> str:
    """So many characters of it at the most, and none that moves a cursor or ends a line."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text[:most])
