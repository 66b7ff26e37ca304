"""A migration's time line as a picture: one row per step, so that no two labels meet."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from sami_plugin.errors import ConfigurationError, NotAvailable, NotPermitted

_COLOURS = {"source": "#b03a2e", "destination": "#1f6fb2"}
_OTHER = "#555555"
_PAUSE = "#e67e22"
MOST_PAUSES = 4
"""How far beyond the pause its picture goes, in lengths of the pause."""
_ENDINGS = ("png", "svg", "pdf")


def draw(reports: list[dict[str, Any]], path: str) -> None:
    """Draws the steps of one migration as one or both of its hosts noted them, by the hosts' clocks.

    On the left all of it; on the right, on a finer scale, what went on around the guest's pause.

    :raises NotAvailable: matplotlib is not installed.
    :raises ConfigurationError: there is nothing to draw, or the file's ending is none that is known.
    :raises NotPermitted: the file cannot be written.
    """
    if path.rpartition(".")[2] not in _ENDINGS:
        raise ConfigurationError(f"--picture {path}: the name has to end in .{', .'.join(_ENDINGS)}")
    steps = sorted(
        (step["at"], report.get("role", ""), report.get("host") or report.get("role", ""), step["step"])
        for report in reports
        for step in report.get("steps", ())
    )
    if not steps:
        raise ConfigurationError("the session has no steps, so there is nothing to draw")
    try:
        import matplotlib
    except ImportError as error:
        raise NotAvailable("pictures need matplotlib; install it with the extra: sami_plugin[plots]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    zero = steps[0][0]
    pause = _pause(steps)
    columns, width = (1, 8) if pause is None else (2, 13)
    size = width, 1.6 + 0.3 * len(steps)
    figure, axes = pyplot.subplots(1, columns, figsize=size, sharey=True, squeeze=False)
    whole = axes[0][0]
    _plot(whole, steps, zero, 1, pause)
    whole.set_xlabel("seconds since the first step")
    whole.set_yticks(range(len(steps)), [step for _, _, _, step in steps])
    whole.set_ylim(len(steps) - 0.4, -0.6)
    if pause is not None:
        near = axes[0][1]
        _plot(near, steps, pause[0], 1000, pause)
        length = (pause[1] - pause[0]) * 1000
        after = max((at - pause[0]) * 1000 for at, _, _, _ in steps)
        near.set_xlim(-0.15 * length, 1.1 * min(after, MOST_PAUSES * length))
        near.set_xlabel(f"milliseconds since the pause, which took {length:.1f} ms")
    for axis in axes[0]:
        axis.grid(alpha=0.25)
    _legend(whole, steps)
    first = reports[0]
    figure.suptitle(f"guest {first['guest']}: {first['outcome']}", fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        with contextlib.suppress(OSError):
            if os.path.exists(path) and not os.path.getsize(path):
                os.unlink(path)
        raise NotPermitted(f"--picture {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


Steps = list[tuple[float, str, str, str]]


def _pause(steps: Steps) -> tuple[float, float] | None:
    """From the guest's pause to its going on, or to what came last of what waits for it."""
    begins = [at for at, _, _, name in steps if name == "suspended"]
    if not begins:
        begins = [at for at, _, _, name in steps if name == "last changes came"]
    if not begins:
        return None
    ends = [at for at, _, _, name in steps if at > begins[0] and name == "resumed"]
    ends = ends or [at for at, _, _, name in steps if at > begins[0] and name in ("complete", "arrived", "stopped")]
    return (begins[0], ends[0]) if ends else None


def _plot(axis: Any, steps: Steps, zero: float, scale: float, pause: tuple[float, float] | None) -> None:
    places = [(at - zero) * scale for at, _, _, _ in steps]
    axis.step(places, range(len(steps)), where="post", color="#bbbbbb", lw=1, zorder=1)
    colours = [_COLOURS.get(role, _OTHER) for _, role, _, _ in steps]
    axis.scatter(places, range(len(steps)), color=colours, s=28, zorder=2)
    if pause is not None:
        begin, end = ((at - zero) * scale for at in pause)
        axis.axvspan(begin, end, color=_PAUSE, alpha=0.25, lw=0, label="the guest is paused")


def _legend(axis: Any, steps: Steps) -> None:
    for role, host in dict.fromkeys((role, host) for _, role, host, _ in steps):
        axis.scatter([], [], color=_COLOURS.get(role, _OTHER), s=28, label=f"{role} {host}" if role != host else role)
    axis.legend(fontsize=8, loc="lower left", framealpha=0.9)
