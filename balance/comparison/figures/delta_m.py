"""Figure of delta_m: means, intervals and verdicts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..tables import SINGLE_TASK
from .drawing import COLORS, GREY, STYLE, WIDTH, without_outliers, wrapped

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from matplotlib.axes import Axes

    from ..run_table import RunTable
    from ..statistics import Estimate, Verdict

VERDICTS: dict[Verdict, tuple[str, str, str, str]] = {  # marker, its face, color, words
    "best": ("D", COLORS[0], COLORS[0], "best"),
    "alike": ("o", COLORS[0], COLORS[0], "not distinguishable from the best"),
    "unclear": ("o", "white", COLORS[0], "too few seeds to distinguish it from the best"),
    "worse": ("o", GREY, GREY, "worse than the best"),
}


@rc_context(STYLE)
def delta_m(table: RunTable) -> Figure | None:
    """Draw means and 95 % intervals, a line for each row in the order of the table; None without finite means."""
    rows = [(f"{wrapped(row.label, 40)}   {k}", row.delta_m) for k, row in enumerate(table.rows, start=1) if row.delta_m]
    finite = [estimate for _, estimate in rows if math.isfinite(estimate.mean)]
    if not finite:
        return None
    lines = max(label.count("\n") + 1 for label, _ in rows)
    figure = Figure(figsize=(0.85 * WIDTH, 0.95 + (0.08 + 0.13 * lines) * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=_limits(finite), ylim=(len(rows) - 0.4, -0.6), xlabel="delta_m in %, lower is better ←")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.annotate(SINGLE_TASK, (0, 1), (0, 3), axes.get_xaxis_transform(), "offset points", ha="center", va="bottom")
    for y, (_, estimate) in enumerate(rows):
        _draw_estimate(axes, y, estimate)
    figure.legend(handles=_legend({estimate.verdict for estimate in finite}), loc="outside lower center", ncols=2)
    return figure


def _legend(verdicts: Collection[Verdict]) -> list[Line2D]:
    return [
        Line2D([], [], marker=marker, color=color, markerfacecolor=face, markersize=5, linestyle="none", label=words)
        for verdict, (marker, face, color, words) in VERDICTS.items()
        if verdict in verdicts
    ]


def _draw_estimate(axes: Axes, y: int, estimate: Estimate) -> None:
    """Draw mean, interval and seeds; write the mean if it is outside of the axes or not finite."""
    left, right = axes.get_xlim()
    mean = estimate.mean
    remark: Any = {"va": "center", "color": GREY, "style": "italic"}
    if not math.isfinite(mean):
        axes.annotate("not finite", (0, y), (4, 0), textcoords="offset points", **remark)
    elif not left <= mean <= right:
        words, edge, side = (f"{mean:.3g} →", right, "right") if mean > right else (f"← {mean:.3g}", left, "left")
        axes.annotate(words, (edge, y), ha=side, **remark)
    else:
        marker, face, color, _ = VERDICTS[estimate.verdict]
        low, high = estimate.interval
        reach = [[mean - low], [high - mean]] if math.isfinite(low) else None
        axes.errorbar(mean, y, xerr=reach, fmt=marker, color=color, mfc=face, markersize=5, elinewidth=1.2, zorder=3)
        if len(estimate.values) > 1:
            seeds = list(estimate.values.values())
            axes.plot(seeds, [y] * len(seeds), "|", color=color, markersize=6, markeredgewidth=0.7, alpha=0.7)


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return limits with room for zero, the means, and as much of their intervals as keeps the means distinct."""
    low, high = without_outliers(estimate.mean for estimate in estimates)
    inside = [estimate for estimate in estimates if low <= estimate.mean <= high]
    ends = [x for estimate in inside for x in (*estimate.interval, *estimate.values.values()) if math.isfinite(x)]
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.5 * (high - low) or 1.0
    left, right = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = 0.04 * (right - left) or 1.0
    return left - margin, right + margin
