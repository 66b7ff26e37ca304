"""Words of somebody else, as they may be shown."""

from __future__ import annotations


def printable(text: str, most: int) -> str:
    """So many characters of it at the most, and none that moves a cursor or ends a line."""
    text = text[:most]
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
