"""How values look in a table, and what they are in JSON, YAML and CSV."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from cliff.columns import FormattableColumn


class Lines(FormattableColumn):
    """Several words: one a line in a table, a list for programs."""

    def __init__(self, value: Iterable[Any]) -> None:
        super().__init__(list(value))

    def human_readable(self) -> str:
        return "\n".join(str(one) for one in self._value)

    def machine_readable(self) -> list[Any]:
        return self._value


class Moment(FormattableColumn):
    """Seconds since 1970: this host's time in a table, UTC in ISO 8601 for programs."""

    def human_readable(self) -> str:
        return "" if self._value is None else datetime.fromtimestamp(self._value).strftime("%Y-%m-%d %H:%M:%S")

    def machine_readable(self) -> str | None:
        if self._value is None:
            return None
        return datetime.fromtimestamp(self._value, UTC).isoformat(timespec="milliseconds")


class Absent(FormattableColumn):
    """A value that may be missing: empty in a table, null for programs."""

    def human_readable(self) -> str:
        return "" if self._value is None else str(self._value)

    def machine_readable(self) -> Any:
        return self._value


def clock(seconds: float) -> str:
    """The time of the day here, to the millisecond."""
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S.%f")[:-3]


def span(seconds: float) -> str:
    """A length of time in the two units that matter: ``2 d 3 h``, ``4 min 5 s``."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or (unit == "s" and not parts):
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2])
