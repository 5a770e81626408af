"""Fronts of two costs, one for each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from balance.comparison.figures.drawing import COLORS, DASHES, GREY, MARKERS, STYLE, WIDTH
from experiments.analysis.fronts import on_front

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from experiments.analysis.fronts import Front


@rc_context(STYLE)
def fronts_figure(fronts: Sequence[Front], names: tuple[str, str], reference: tuple[float, float]) -> Figure:
    """Draw the fronts of several methods.

    Points that another point of the same method beats are pale. The numbers are shares of the first task in percent.

    Args:
        fronts: One for each method.
        names: Labels of the costs.
        reference: Reference point of the hypervolumes.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, front in enumerate(fronts):
        _draw(axes, front, COLORS[i % len(COLORS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)], numbered=i == 0)
    axes.plot(*reference, "+", color=GREY, markersize=8, label="reference point")
    axes.set(xlabel=f"{names[0]}, lower is better ←", ylabel=f"{names[1]}, lower is better ↓")
    figure.legend(loc="outside right upper", title="numbers: share of the\nfirst task in %", title_fontsize=7)
    return figure


def _draw(axes: Axes, front: Front, color: str, dash: object, marker: str, *, numbered: bool) -> None:
    costs = front.costs
    is_on_front = on_front(costs)
    errors = np.nan_to_num([point.errors for point in front.points])
    axes.errorbar(*costs.T, *errors.T[::-1], linestyle="none", color=color, elinewidth=0.6, alpha=0.4, zorder=1)
    order = np.argsort(costs[is_on_front][:, 0])
    axes.plot(*costs[is_on_front][order].T, linestyle=dash, color=color, linewidth=0.9, zorder=2)
    axes.scatter(
        costs[~is_on_front, 0], costs[~is_on_front, 1], marker=marker, s=20, color=color, alpha=0.3, linewidths=0, zorder=2
    )
    axes.scatter(costs[is_on_front, 0], costs[is_on_front, 1], marker=marker, s=24, color=color, label=front.label, zorder=3)
    for point in front.points if numbered else ():
        axes.annotate(f"{100 * point.preference:.0f}", point.costs, xytext=(3, 3), textcoords="offset points", fontsize=6)
