"""The demo's picture: what the receiver got over time, per case, without and with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"without": "#c0392b", "with": "#1f6fb2"}
DASHES = {"without": "--", "with": "-"}
BEFORE_SECONDS = 5.0


def draw(reports: dict[tuple[str, str], dict[str, Any]], titles: dict[str, str], path: Path) -> None:
    """Write a PNG of `reports` (lab.run.Report as a dict, by case and "without" or "with"). Raises ImportError.

    Time is counted from the last pause, bytes from where the picture begins.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    letters = [letter for letter in titles if any(case == letter for case, _ in reports)]
    columns = min(2, len(letters))
    rows = -(-len(letters) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(7.2 * columns, 2.9 * rows + 0.6), squeeze=False)
    for axis in axes.flat[len(letters) :]:
        axis.set_visible(False)
    for axis, letter in zip(axes.flat, letters, strict=False):
        sides = [side for side in ("without", "with") if (letter, side) in reports]
        for side in sides:
            _plot(axis, reports[letter, side], side)
        # Both runs keep the same timetable; the marks are those of the run with SAMI, where there is one.
        _mark(axis, reports[letter, sides[-1]])
        axis.set_title(f"({letter}) {titles[letter]}", fontsize=10, loc="left")
        axis.set_xlabel("seconds since the guest was paused", fontsize=8)
        axis.set_ylabel("MB received", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="best", framealpha=0.6, edgecolor="none")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot(axis: Any, report: dict[str, Any], side: str) -> None:
    zero = report["times"][-1]["paused"]
    start = min(-BEFORE_SECONDS, report["times"][0]["outgoing"] - zero - 0.5)
    shown = [(time - zero, total) for time, total in report["samples"] if time - zero >= start]
    base = shown[0][1] if shown else 0
    stall = report["longest_stall_seconds"]
    end = "lives" if report["survived"] else "dies"
    axis.plot(
        [time for time, _ in shown],
        [(total - base) / 1e6 for _, total in shown],
        color=COLOURS[side],
        linestyle=DASHES[side],
        label=f"{side} SAMI: {end}, longest stall {stall:.2f} s",
    )


def _mark(axis: Any, report: dict[str, Any]) -> None:
    zero, on_axis = report["times"][-1]["paused"], axis.get_xaxis_transform()
    for times, host in zip(report["times"], report["hops"][1:], strict=True):
        begin, pause, run = (times[phase] - zero for phase in ("copying", "paused", "resumed"))
        axis.axvspan(begin, pause, color="#888888", alpha=0.12, lw=0)
        axis.axvspan(pause, run, color="#e67e22", alpha=0.6, lw=0)
        axis.text(begin, 0.03, " copying", fontsize=7, color="#555555", transform=on_axis)
        axis.text(run, 0.1, f" runs on {host}", fontsize=7, color="#b35900", transform=on_axis)
