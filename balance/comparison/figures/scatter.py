"""Scatter plots: one metric against another, and the result against its cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from ...messages import unknown
from ..tables import SINGLE_TASK
from .drawing import (
    GREY,
    STYLE,
    WIDTH,
    Array,
    choose_scale,
    legend_size,
    row_styles,
    without_outliers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..run_table import Row, RunTable
    from ..statistics import Estimate
    from .drawing import RowStyle

Point = tuple[float, float]
Limits = tuple[Point, Point]  # of x and of y

LEGEND_LINES = 18  # lines of a legend as high as the axes


class Quantity(NamedTuple):
    """The quantity of an axis.

    Attributes:
        name: Label of the axis.
        values: Mean and standard error by label of the row.
        sign: 1 if lower is better, else -1.
        baseline: Value of the single-task networks, or NaN.
        may_be_log: Whether the axis is logarithmic if the means are spread over more than a factor of ten.
    """

    name: str
    values: Mapping[str, Point]
    sign: int = 1
    baseline: float = math.nan
    may_be_log: bool = False


@rc_context(STYLE)
def pareto(table: RunTable, x: str, y: str) -> Figure | None:
    """Draw two metrics against each other, with the Pareto front of the means; None if no row has both.

    Returns:
        The figure; None if no row has both metrics.

    Raises:
        ValueError: If one of the names is not a metric of the comparison.
    """
    for name in (x, y):
        if name not in table.metrics:
            raise ValueError(unknown("metric", name, table.metrics))
    across, up = (
        Quantity(
            name,
            {row.label: _mean_and_error(row.metrics.get(name)) for row in table.rows},
            sign=-1 if name in table.higher_is_better else 1,
            baseline=(table.baselines or {}).get(name, math.nan),
        )
        for name in (x, y)
    )
    return _scatter(table.rows, across, up)


@rc_context(STYLE)
def cost(table: RunTable) -> Figure | None:
    """Draw the time of a step against delta_m, or against the mean rank without baselines; None if no row has both."""
    rows = table.rows
    time = Quantity("time of a step relative to ls", {row.label: (row.time, math.nan) for row in rows}, may_be_log=True)
    if any(row.delta_m for row in rows):
        result = Quantity("delta_m in %", {row.label: _mean_and_error(row.delta_m) for row in rows}, baseline=0.0)
    else:
        result = Quantity("mean rank", {row.label: (row.mean_rank, math.nan) for row in rows})
    return _scatter(rows, time, result)


def most_opposed(table: RunTable) -> tuple[str, str] | None:
    """Return the two metrics that rank the rows in the least similar orders; None if there are fewer than two."""
    signs = np.array([-1 if name in table.higher_is_better else 1 for name in table.metrics])
    means = [[_mean_and_error(row.metrics.get(name))[0] for row in table.rows] for name in table.metrics]
    costs = signs[:, None] * np.array(means)  # (metrics, rows)
    orders = np.nan_to_num(np.sign(costs[:, :, None] - costs[:, None, :]))  # (metrics, rows, rows)
    agreement = np.einsum("iab,jab->ij", orders, orders)
    i, j = min(combinations(range(len(costs)), 2), key=lambda pair: agreement[pair], default=(0, 0))
    return (table.metrics[i], table.metrics[j]) if i != j else None


def pareto_front(points: Mapping[str, Point], signs: tuple[int, int]) -> list[str]:
    """Return the labels of the points that no other point beats, best in the first coordinate first.

    Args:
        points: By label, finite.
        signs: For each coordinate 1 if lower is better, else -1.
    """
    costs = {label: (signs[0] * x, signs[1] * y) for label, (x, y) in points.items()}
    beaten = {
        label for label, (a, b) in costs.items() if any(c <= a and d <= b and (c, d) != (a, b) for c, d in costs.values())
    }
    return sorted(costs.keys() - beaten, key=lambda label: (costs[label], label))


def _scatter(rows: Sequence[Row], x: Quantity, y: Quantity) -> Figure | None:
    """Draw points with the numbers of their rows, which the legend explains, their Pareto front and the baselines."""
    points = {row.label: (x.values[row.label][0], y.values[row.label][0]) for row in rows}
    finite = {label: point for label, point in points.items() if np.isfinite(point).all()}
    if not finite:
        return None
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    limits = _set_up(axes, "x", x, finite), _set_up(axes, "y", y, finite)
    axes.set(xlim=limits[0], ylim=limits[1])
    front = pareto_front(finite, (x.sign, y.sign))
    _draw_front(axes, [finite[label] for label in front])
    styles = row_styles(rows)
    shown = {label: point for label, point in finite.items() if _inside(point, limits)}
    handles = []
    for label, style in styles.items():
        entry = Line2D([], [], linestyle="none")
        if label in shown:
            errors = (x.values[label][1], y.values[label][1])
            entry = _draw_point(axes, points[label], errors, style, on_front=label in front)
        entry.set_label(style.name + _remark(points[label], limits))
        handles.append(entry)
    _add_legend(figure, [*handles, *_draw_baseline(axes, x.baseline, y.baseline)])
    draw_numbers(axes, {style.number: shown[label] for label, style in styles.items() if label in shown})
    return figure


def _mean_and_error(estimate: Estimate | None) -> Point:
    return (estimate.mean, estimate.error) if estimate and math.isfinite(estimate.mean) else (math.nan, math.nan)


def _set_up(axes: Axes, side: Literal["x", "y"], quantity: Quantity, finite: Iterable[str]) -> Point:
    """Label and scale an axis; return its limits, with room for error bars and the baseline."""
    axes.set(**{f"{side}label": f"{quantity.name}, {'lower is better ←' if quantity.sign > 0 else 'higher is better →'}"})
    means = [quantity.values[label][0] for label in finite]
    if quantity.may_be_log and choose_scale(axes, side, means) == "log":
        return min(means) / 1.2, max(means) * 1.2
    low, high = without_outliers(means)
    inside = [quantity.values[label] for label in finite if low <= quantity.values[label][0] <= high]
    ends = [mean + sign * error for mean, error in inside for sign in (-1, 1) if math.isfinite(error)]
    ends += [end for end in (low, high, quantity.baseline) if math.isfinite(end)]
    margin = 0.06 * (max(ends) - min(ends)) or 0.1 * abs(low) or 1.0
    return min(ends) - margin, max(ends) + margin


def _inside(point: Point, limits: Limits) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(point, limits, strict=True))


def _remark(point: Point, limits: Limits) -> str:
    """Return the remark of the legend on a point that is not drawn; empty for all others."""
    if not np.isfinite(point).all():
        return ": no value"
    return "" if _inside(point, limits) else f": outside, at ({point[0]:.3g}, {point[1]:.3g})"


def _draw_point(axes: Axes, point: Point, errors: Point, style: RowStyle, *, on_front: bool) -> Line2D:
    """Draw a point with error bars; return its marker."""
    x_error, y_error = np.nan_to_num(errors)
    axes.errorbar(*point, y_error, x_error, color=style.color, elinewidth=0.7, alpha=0.6, zorder=2)
    rim: Any = {"mec": "black", "mew": 1.2} if on_front else {"mec": "white", "mew": 0.4}
    (marker,) = axes.plot(*point, style.marker, color=style.color, markersize=6, zorder=3, **rim)
    return marker


def _draw_front(axes: Axes, front: Sequence[Point]) -> None:
    """Draw stairs: a corner between two points of the front is as bad as the worse of them in each metric."""
    stairs = list(front[:1])
    for (_, y), point in pairwise(front):
        stairs += [(point[0], y), point]
    axes.plot(*zip(*stairs, strict=True), color=GREY, linewidth=0.9, zorder=1, gid="front")


def _draw_baseline(axes: Axes, x: float, y: float) -> list[Line2D]:
    """Draw lines at the finite values of the single-task networks; return their entry in the legend."""
    dots = (0, (1, 2))
    lines = [axes.axvline(x, color="black", linestyle=dots, linewidth=0.9, label=SINGLE_TASK)] if math.isfinite(x) else []
    lines += [axes.axhline(y, color="black", linestyle=dots, linewidth=0.9, label=SINGLE_TASK)] if math.isfinite(y) else []
    return lines[:1]


def _add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put the legend at the right side of the axes if it is not higher than they are, else below them."""
    columns, height = legend_size(handles)
    at_side = sum(str(handle.get_label()).count("\n") + 1 for handle in handles) <= LEGEND_LINES
    figure.set_figheight(3.4 if at_side else 3.0 + height)
    if at_side:
        figure.legend(handles=handles, loc="outside right upper")
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def draw_numbers(axes: Axes, points: Mapping[int, Point]) -> None:
    """Write a number near each point, in the nearest place where it covers nothing."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # before it, the points have no positions on the page
    to_pt = 72 / figure.dpi
    frame = Bbox(axes.bbox.get_points() * to_pt)
    positions = {number: axes.transData.transform(point) * to_pt for number, point in points.items()}
    taken = [_box(position, 7, 7) for position in positions.values()]
    angles = np.deg2rad([45, 135, 315, 225, 75, 105, 285, 255, 15, 165, 345, 195])  # away from the error bars first
    shifts = [radius * np.array([np.cos(a), np.sin(a)]) for radius in (11, 14, 19, 25, 32, 40, 52, 66, 84) for a in angles]
    for number, position in positions.items():
        boxes = [_box(position + shift, 1 + 5.5 * len(str(number)), 10) for shift in shifts]
        covered = [box.count_overlaps(taken) + (not (frame.contains(*box.min) and frame.contains(*box.max))) for box in boxes]
        k = covered.index(min(covered))
        taken.append(boxes[k])
        _annotate(axes, number, points[number], shifts[k], with_line=k >= len(angles))


def _annotate(axes: Axes, number: int, point: Point, shift: Array, *, with_line: bool) -> None:
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 4, "shrinkB": 3}
    axes.annotate(
        str(number),
        point,
        (shift[0], shift[1]),
        textcoords="offset points",
        ha="center",
        va="center",
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops=line if with_line else None,
    )


def _box(middle: Array, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)
