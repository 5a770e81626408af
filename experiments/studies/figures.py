"""Figures of a study: critical differences of ranks, delta_m with intervals, cost against quality."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from balance.comparison.figures.drawing import COLORS, GREY, STYLE
from balance.comparison.figures.scatter import draw_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.studies.ranking import Ranking
    from experiments.studies.record import MethodResult, ProblemResult, StudyRecord

KINDS = {"no balancer": COLORS[6], "loss balancer": COLORS[0], "gradient balancer": COLORS[1], "both": COLORS[2]}
COLUMNS = 4  # panels in a row
CUT = 2.5  # spread of the better half of the methods that a panel shows beyond the median


def write_figures(record: StudyRecord, ranking: Ranking, folder: Path) -> list[Path]:
    """Draw all figures as PNG files; return their paths."""
    figures = {
        "critical_difference": critical_difference(record, ranking),
        "delta_m": drops(record, ranking),
        "cost": cost(record, ranking),
    }
    files = [folder / f"{name}.png" for name in figures]
    for file, figure in zip(files, figures.values(), strict=True):
        figure.savefig(file, dpi=150, metadata={"Software": None})
        plt.close(figure)
    return files


def critical_difference(record: StudyRecord, ranking: Ranking) -> Figure:
    """Draw the mean ranks on a line; bars join methods whose ranks do not differ by more than chance."""
    from pandas import Series  # noqa: PLC0415 - of a group that only studies need
    from scikit_posthocs import critical_difference_diagram  # noqa: PLC0415

    colors = _colors(record)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.9 + 0.16 * len(ranking.ranks)), layout="constrained")
        critical_difference_diagram(
            Series(ranking.ranks),
            ranking.p_values,
            ax=axes,
            label_fmt_left="{label}  {rank:.1f}",
            label_fmt_right="{rank:.1f}  {label}",
            elbow_props={"linewidth": 0.8},
            color_palette=colors,
        )
        axes.set_title(
            f"Mean rank of {len(ranking.ranks)} methods on {len(record.problems)} problems; 1 is best. Bars join methods "
            f"that do not differ (Nemenyi, critical difference {ranking.critical_difference:.1f})"
        )
    return figure


def drops(record: StudyRecord, ranking: Ranking) -> Figure:
    """Draw delta_m with 95 % intervals, one panel for each problem; methods have the order of their mean ranks."""
    rows = math.ceil(len(record.problems) / COLUMNS)
    with plt.rc_context(STYLE):
        size = (9.6, rows * (0.6 + 0.14 * len(ranking.ranks)))
        figure, panels = plt.subplots(rows, COLUMNS, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for panel in panels.flat[len(record.problems) :]:
            panel.set_visible(False)
        colors = _colors(record)
        for panel, (name, problem) in zip(panels.flat, record.problems.items(), strict=False):
            _draw_problem(panel, problem, list(ranking.ranks), colors)
            panel.set_title(name)
        panels.flat[0].invert_yaxis()
        handles = [Line2D([], [], color=color, marker="o", markersize=3, label=kind) for kind, color in KINDS.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(KINDS))
        figure.supxlabel(
            "delta_m in % (smaller is better), mean and 95 % interval; an arrow points to a mean outside of the panel"
        )
    return figure


def cost(record: StudyRecord, ranking: Ranking) -> Figure:
    """Draw the mean rank over the time of a step relative to equal weights."""
    times, colors = record.times(), _colors(record)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for number, (name, rank) in enumerate(ranking.ranks.items(), start=1):
            axes.plot(times[name], rank, "o", color=colors[name], markersize=5, label=f"{number}  {name}")
        axes.set(xscale="log", xlabel="time of a step / equal weights, geometric mean over problems", ylabel="mean rank")
        axes.set_xticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
        axes.minorticks_off()
        axes.invert_yaxis()
        figure.legend(loc="outside right upper", fontsize=7, labelspacing=0.3)
        draw_numbers(axes, {n: (times[name], rank) for n, (name, rank) in enumerate(ranking.ranks.items(), start=1)})
    return figure


def _draw_problem(panel: Axes, problem: ProblemResult, methods: list[str], colors: Mapping[str, str]) -> None:
    left, right = _limits([problem.methods[name] for name in methods])
    for place, name in enumerate(methods):
        result = problem.methods[name]
        if not result.mean <= right:
            panel.plot(right, place, ">", color=colors[name], markersize=4, clip_on=False)
            continue
        low, high = result.estimate.interval
        panel.plot([low, high], [place, place], color=colors[name], linewidth=1)
        panel.plot(result.mean, place, "o", color=colors[name], markersize=3)
    panel.axvline(problem.methods["ls"].mean, color=GREY, linewidth=0.6, linestyle=":")
    panel.set(xlim=(left, right), yticks=range(len(methods)), yticklabels=methods)
    panel.tick_params(axis="y", labelsize=7)


def _limits(results: list[MethodResult]) -> tuple[float, float]:
    """Return the limits of an axis that shows the better methods in detail, with their intervals."""
    finite = sorted((result for result in results if math.isfinite(result.mean)), key=lambda result: result.mean)
    middle = finite[len(finite) // 2].mean
    better = finite[: len(finite) // 2 + 1]
    ends = [result.mean if math.isnan(low := result.estimate.interval[0]) else low for result in better]
    reach = max(middle - min(ends), 0.02 * abs(middle), 1e-3)
    return min(ends) - 0.1 * reach, min(finite[-1].mean + 0.3 * reach, middle + CUT * reach)


def _colors(record: StudyRecord) -> dict[str, str]:
    """Return a color by method for its kind: loss balancer, gradient balancer, both or none."""
    methods = next(iter(record.problems.values())).methods
    kinds = {name: (m.loss_method != "ls") + 2 * (m.gradient_method is not None) for name, m in methods.items()}
    return {name: list(KINDS.values())[kind] for name, kind in kinds.items()}
