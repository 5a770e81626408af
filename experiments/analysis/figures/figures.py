"""A comparison -> figures as a paper prints them: delta_m, one metric against another, cost, curves, conflicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from balance.messages import unknown
from experiments.analysis.figures.drawing import COLORS, GREY, STYLE, WIDTH, Array, Curves, looks, scale, size_below, wrapped
from experiments.analysis.figures.training import conflicts, curves
from experiments.analysis.tables import SINGLE_TASK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from experiments.analysis.comparison import Comparison, Estimate, Row

__all__ = ["CAPTIONS", "Curves", "conflicts", "cost", "curves", "delta_m", "every_figure", "most_opposed", "pareto", "save"]

CAPTIONS = {
    "delta_m": "Mean relative drop against networks that learn one task alone. Further left is better; left of the line the "
    "tasks gain from each other. Large marks are means over seeds, strokes single seeds, bars 95 % intervals of the mean; a "
    "bar that reaches the edge goes on beyond it.",
    "pareto": "What is won on one metric and lost on another: means over seeds with their standard errors. On both metrics "
    "together no method beats those with a black rim, and the line bounds what they reach. Numbers as in the table.",
    "cost": "What a method costs and what it brings: time of a training step relative to that of ls, against the result. Lower "
    "left is better. No method is both faster and better than those with a black rim. Numbers as in the table.",
    "curves": "Training by task: the losses before any weighting, and the weights that they and their gradients get. Means "
    "over seeds and short stretches of training. The colour tells the loss balancer, the line style the gradient balancer.",
    "conflicts": "Above, the share of task pairs whose gradients point against each other: lower is more harmony. Below, the "
    "cosine between the gradients of each pair: red pairs hinder each other, blue pairs help. Means over seeds.",
}

LINES_BESIDE = 18  # of a legend as high as the axes

VERDICTS = {  # marker, its face, colour, words
    "best": ("D", COLORS[0], COLORS[0], "best"),
    "alike": ("o", COLORS[0], COLORS[0], "not distinguishable from the best"),
    "unclear": ("o", "white", COLORS[0], "too few seeds to tell it from the best"),
    "worse": ("o", GREY, GREY, "worse than the best"),
}


def every_figure(
    comparison: Comparison, logged: Curves | None = None, axes: tuple[str, str] | None = None
) -> dict[str, Figure]:
    """All figures that have something to show, by name.

    Args:
        comparison: What to draw.
        logged: What the runs logged while they trained; None leaves the figures of that out.
        axes: The two metrics of the Pareto plot; None takes those on which the methods disagree most.

    Raises:
        ValueError: If one of ``axes`` is not a metric of the comparison.
    """
    axes = axes or most_opposed(comparison)
    figures = {
        "delta_m": delta_m(comparison),
        "pareto": pareto(comparison, *axes) if axes else None,
        "cost": cost(comparison),
        "curves": curves(comparison, logged or {}),
        "conflicts": conflicts(comparison, logged or {}),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def save(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Each figure as ``<name>.pdf``, for a paper, and ``<name>.png``; the folder is made where it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
        with rc_context({"pdf.fonttype": 42}):  # publishers refuse Type 3 fonts
            figure.savefig(pdf, metadata={"CreationDate": None})  # the same figure makes the same file
        figure.savefig(png, dpi=150)
        files += [pdf, png]
    return files


@rc_context(STYLE)
def delta_m(comparison: Comparison) -> Figure | None:
    """Means and 95 % intervals, a line for each row in the order of the table; None if there is nothing to draw."""
    rows = [(f"{wrapped(row.label, 40)}   {k}", row.delta_m) for k, row in enumerate(comparison.rows, start=1) if row.delta_m]
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
    found = {estimate.verdict for estimate in finite}
    handles = [
        Line2D([], [], marker=marker, color=color, markerfacecolor=face, markersize=5, linestyle="none", label=words)
        for verdict, (marker, face, color, words) in VERDICTS.items()
        if verdict in found
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@rc_context(STYLE)
def pareto(comparison: Comparison, x: str, y: str) -> Figure | None:
    """Two metrics against each other, with the Pareto front of the means; None if no row has both.

    Raises:
        ValueError: If one of them is not a metric of the comparison.
    """
    for name in (x, y):
        if name not in comparison.metrics:
            raise ValueError(unknown("metric", name, comparison.metrics))
    across, up = (
        Quantity(
            name,
            {row.label: _mean_and_error(row.metrics.get(name)) for row in comparison.rows},
            sign=-1 if name in comparison.higher_is_better else 1,
            reference=(comparison.baselines or {}).get(name, math.nan),
        )
        for name in (x, y)
    )
    return _scatter(comparison.rows, across, up)


@rc_context(STYLE)
def cost(comparison: Comparison) -> Figure | None:
    """Time of a step against delta_m, or against the mean rank without baselines; None if no row has both."""
    rows = comparison.rows
    time = Quantity("time of a step relative to ls", {row.label: (row.time, math.nan) for row in rows}, may_be_log=True)
    if any(row.delta_m for row in rows):
        result = Quantity("delta_m in %", {row.label: _mean_and_error(row.delta_m) for row in rows}, reference=0.0)
    else:
        result = Quantity("mean rank", {row.label: (row.mean_rank, math.nan) for row in rows})
    return _scatter(rows, time, result)


def most_opposed(comparison: Comparison) -> tuple[str, str] | None:
    """The two metrics that put the rows in the least similar orders; None if there are fewer than two."""
    signs = np.array([-1 if name in comparison.higher_is_better else 1 for name in comparison.metrics])
    means = [[_mean_and_error(row.metrics.get(name))[0] for row in comparison.rows] for name in comparison.metrics]
    costs = signs[:, None] * np.array(means)  # (metrics, rows)
    orders = np.nan_to_num(np.sign(costs[:, :, None] - costs[:, None, :]))  # (metrics, rows, rows)
    agreement = np.einsum("iab,jab->ij", orders, orders)
    i, j = min(combinations(range(len(costs)), 2), key=lambda pair: agreement[pair], default=(0, 0))
    return (comparison.metrics[i], comparison.metrics[j]) if i != j else None


def pareto_front(points: Mapping[str, tuple[float, float]], signs: tuple[int, int]) -> list[str]:
    """Labels of the points that no other beats, best in the first coordinate first.

    Args:
        points: By label, finite.
        signs: For each coordinate 1 if lower is better, else -1.
    """
    costs = {label: (signs[0] * x, signs[1] * y) for label, (x, y) in points.items()}
    beaten = {
        label for label, (a, b) in costs.items() if any(c <= a and d <= b and (c, d) != (a, b) for c, d in costs.values())
    }
    return sorted(costs.keys() - beaten, key=lambda label: (costs[label], label))


def _draw_estimate(axes: Axes, y: int, estimate: Estimate) -> None:
    """Mean, interval and seeds; in words where the mean is not in the picture."""
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
    """Room for zero, the means, and as much of their intervals as leaves the means apart."""
    low, high = _core(estimate.mean for estimate in estimates)
    inside = [estimate for estimate in estimates if low <= estimate.mean <= high]
    ends = [x for estimate in inside for x in (*estimate.interval, *estimate.values.values()) if math.isfinite(x)]
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.5 * (high - low) or 1.0
    left, right = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = 0.04 * (right - left) or 1.0
    return left - margin, right + margin


def _core(values: Iterable[float]) -> tuple[float, float]:
    """Range of the values, without the few that would squeeze all others into a tenth of the axis."""
    kept = sorted(values)
    while len(kept) > 2:
        cut = int(np.diff(kept).argmax()) + 1
        rest = max(kept[:cut], kept[cut:], key=len)
        if 2 * len(rest) <= len(kept) or not 0 < rest[-1] - rest[0] < 0.1 * (kept[-1] - kept[0]):
            break
        kept = rest
    return kept[0], kept[-1]


class Quantity(NamedTuple):
    """What an axis of a scatter plot shows.

    Attributes:
        name: For the axis.
        values: Mean and standard error by label of the row.
        sign: 1 if lower is better, else -1.
        reference: Value of the single-task networks, or NaN.
        may_be_log: Whether the axis is logarithmic if the means are spread over more than a factor of ten.
    """

    name: str
    values: Mapping[str, tuple[float, float]]
    sign: int = 1
    reference: float = math.nan
    may_be_log: bool = False


def _scatter(rows: Sequence[Row], x: Quantity, y: Quantity) -> Figure | None:
    """Points with the numbers of their rows, which the legend explains, their Pareto front and the single-task networks."""
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
    handles, numbers = [], {}
    for label, look in looks(rows).items():
        point, name, entry = points[label], look.name, Line2D([], [], linestyle="none")
        if label not in finite:
            name += ": no value"
        elif not all(low <= a <= high for a, (low, high) in zip(point, limits, strict=True)):
            name += f": outside, at ({point[0]:.3g}, {point[1]:.3g})"
        else:
            numbers[look.number] = point
            x_error, y_error = np.nan_to_num([x.values[label][1], y.values[label][1]])
            axes.errorbar(*point, y_error, x_error, color=look.color, elinewidth=0.7, alpha=0.6, zorder=2)
            rim: Any = {"mec": "black", "mew": 1.2} if label in front else {"mec": "white", "mew": 0.4}
            (entry,) = axes.plot(*point, look.marker, color=look.color, markersize=6, zorder=3, **rim)
        entry.set_label(name)
        handles.append(entry)
    handles += _draw_reference(axes, x.reference, y.reference)
    columns, height = size_below(handles)
    beside = sum(str(handle.get_label()).count("\n") + 1 for handle in handles) <= LINES_BESIDE
    figure.set_figheight(3.4 if beside else 3.0 + height)
    figure.legend(
        handles=handles, loc="outside right upper" if beside else "outside lower center", ncols=1 if beside else columns
    )
    _number(axes, numbers)
    return figure


def _mean_and_error(estimate: Estimate | None) -> tuple[float, float]:
    return (estimate.mean, estimate.error) if estimate and math.isfinite(estimate.mean) else (math.nan, math.nan)


def _set_up(axes: Axes, side: Literal["x", "y"], quantity: Quantity, finite: Iterable[str]) -> tuple[float, float]:
    """Label and scale an axis; its limits, with room for error bars and reference."""
    axes.set(**{f"{side}label": f"{quantity.name}, {'lower is better ←' if quantity.sign > 0 else 'higher is better →'}"})
    means = [quantity.values[label][0] for label in finite]
    if quantity.may_be_log and scale(axes, side, means) == "log":
        return min(means) / 1.2, max(means) * 1.2
    low, high = _core(means)
    inside = [quantity.values[label] for label in finite if low <= quantity.values[label][0] <= high]
    ends = [mean + side * error for mean, error in inside for side in (-1, 1) if math.isfinite(error)]
    ends += [end for end in (low, high, quantity.reference) if math.isfinite(end)]
    margin = 0.06 * (max(ends) - min(ends)) or 0.1 * abs(low) or 1.0
    return min(ends) - margin, max(ends) + margin


def _draw_front(axes: Axes, front: Sequence[tuple[float, float]]) -> None:
    """Stairs: between two points of the front lies what is as bad as the worse of them in each metric."""
    stairs = list(front[:1])
    for (_, y), point in pairwise(front):
        stairs += [(point[0], y), point]
    axes.plot(*zip(*stairs, strict=True), color=GREY, linewidth=0.9, zorder=1, gid="front")


def _draw_reference(axes: Axes, x: float, y: float) -> list[Line2D]:
    """Lines at the values of the single-task networks, as far as they are known; their entry in the legend."""
    dots = (0, (1, 2))
    lines = [axes.axvline(x, color="black", linestyle=dots, linewidth=0.9, label=SINGLE_TASK)] if math.isfinite(x) else []
    lines += [axes.axhline(y, color="black", linestyle=dots, linewidth=0.9, label=SINGLE_TASK)] if math.isfinite(y) else []
    return lines[:1]


def _number(axes: Axes, points: Mapping[int, tuple[float, float]]) -> None:
    """A number beside each point, in the nearest place where it covers nothing."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # only now is it known where the points lie on the page
    to_pt = 72 / figure.dpi
    frame = Bbox(axes.bbox.get_points() * to_pt)
    spots = {number: axes.transData.transform(point) * to_pt for number, point in points.items()}
    taken = [_box(spot, 7, 7) for spot in spots.values()]
    angles = np.deg2rad([45, 135, 315, 225, 75, 105, 285, 255, 15, 165, 345, 195])  # away from the error bars first
    shifts = [radius * np.array([np.cos(a), np.sin(a)]) for radius in (11, 14, 19, 25, 32, 40, 52, 66, 84) for a in angles]
    for number, spot in spots.items():
        boxes = [_box(spot + shift, 1 + 5.5 * len(str(number)), 10) for shift in shifts]
        covered = [box.count_overlaps(taken) + (not (frame.contains(*box.min) and frame.contains(*box.max))) for box in boxes]
        k = covered.index(min(covered))
        taken.append(boxes[k])
        far = k >= len(angles)
        axes.annotate(
            str(number),
            points[number],
            (shifts[k][0], shifts[k][1]),
            textcoords="offset points",
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 4, "shrinkB": 3} if far else None,
        )


def _box(middle: Array, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)
