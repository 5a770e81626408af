"""What the runs of a comparison logged while they trained -> figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from experiments.analysis.figures.drawing import (
    POINTS,
    STYLE,
    WIDTH,
    Array,
    Curves,
    Look,
    Series,
    count_steps,
    looks,
    scale,
    size_below,
    thinned,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from experiments.analysis.comparison import Comparison, Row

GROUPS = {"loss": "loss", "weight": "loss weight", "gradient_weight": "gradient weight"}
COSINES = colormaps["RdBu"].with_extremes(bad="#D9D9D9")
MOST_TASKS = 6
TASKS_ABREAST = 4
MOST_PAIRS = 30
MAPS_ABREAST = 3
MAP_TITLE = 30  # characters


@rc_context(STYLE)
def curves(comparison: Comparison, logged: Curves) -> Figure | None:
    """Losses and weights over training, a panel for each task and quantity; None if nothing was logged.

    Weights of the gradients are left out for rows without gradient balancer, where they are one. Of many tasks the first six
    are drawn.
    """
    tasks = _tasks(comparison, logged)
    shown = tasks[:MOST_TASKS]
    panels = {(group, task): _lines(comparison.rows, logged, group, task) for group in GROUPS for task in shown}
    groups = [group for group in GROUPS if any(panels[group, task] for task in shown)]
    if not groups:
        return None
    keys = [[(group, task) for task in shown] for group in groups]
    abreast = len(shown) <= TASKS_ABREAST
    if not abreast:  # a page is higher than wide
        keys = [list(column) for column in zip(*keys, strict=True)]
    drawn = {label for lines in panels.values() for label in lines}
    handles = [look.line for label, look in looks(comparison.rows).items() if label in drawn]
    columns, height = size_below(handles)
    figure = Figure(figsize=(WIDTH, height + 0.4 + 1.35 * len(keys)), layout="constrained")
    grid = figure.subplots(len(keys), len(keys[0]), squeeze=False, sharex=True)
    for (i, j), axes in np.ndenumerate(grid):
        group, task = keys[i][j]
        across, down = (task, GROUPS[group]) if abreast else (GROUPS[group], task)
        _draw_lines(axes, panels[group, task], looks(comparison.rows))
        axes.set_title(wrapped(across, 100 // len(keys[0])) if i == 0 else "")
        axes.set_ylabel(wrapped(down, 20) if j == 0 else "")
        axes.set_xlabel("step" if i == len(keys) - 1 else "")
    if len(shown) < len(tasks):
        figure.suptitle(f"The first {len(shown)} of {len(tasks)} tasks")
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


@rc_context(STYLE)
def conflicts(comparison: Comparison, logged: Curves) -> Figure | None:
    """Share of task pairs in conflict, and cosines of every pair, over training; None if no row has any of that.

    Of many pairs the thirty of the lowest mean cosine are drawn; of many rows the first twelve, or six if pairs are many too.
    """
    tasks = _tasks(comparison, logged)
    of_rows = {row.label: _not_empty(logged.get(row.label, {})) for row in comparison.rows}
    counts = {label: series["conflicts"] for label, series in of_rows.items() if "conflicts" in series and len(tasks) > 1}
    rates = {label: (steps, count / math.comb(len(tasks), 2)) for label, (steps, count) in counts.items()}
    cosines = {label: {key: series[key] for key in series if key.startswith("cosine/")} for label, series in of_rows.items()}
    cosines = {label: of_pairs for label, of_pairs in cosines.items() if of_pairs}
    if not rates and not cosines:
        return None
    pairs = _lowest(cosines)
    maps = {label: cosines[label] for label in list(cosines)[: 12 if len(pairs) <= 10 else 6]}
    remarks = [
        line for remark in _remarks(comparison.rows, cosines, len(pairs), len(maps)) for line in textwrap.wrap(remark, 115)
    ]
    handles = [look.line for label, look in looks(comparison.rows).items() if label in rates]
    columns, height = size_below(handles) if handles else (1, 0.0)
    upper_height = height + 1.6
    title_height = 0.22 + 0.13 * max((wrapped(label, MAP_TITLE).count("\n") + 1 for label in maps), default=1)
    lower_height = 1.0 + math.ceil(len(maps) / MAPS_ABREAST) * (title_height + 0.13 * max(len(pairs), 4)) + 0.14 * len(remarks)
    figure = Figure(figsize=(WIDTH, upper_height + lower_height), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[upper_height, lower_height], squeeze=False)[:, 0]
    axes = upper.add_subplot()
    _draw_lines(axes, rates, looks(comparison.rows))
    axes.set(xlabel="step", ylabel="conflict rate", yscale="linear", ylim=(0, max(0.2, axes.get_ylim()[1])))
    upper.legend(handles=handles, loc="outside lower center", ncols=columns)
    if maps:
        _draw_maps(lower, maps, pairs, tasks)
    lower.supxlabel("\n".join(remarks))
    return figure


def _tasks(comparison: Comparison, logged: Curves) -> list[str]:
    """Names of the tasks as they were logged, or else as the metrics have them."""
    keys = [key for row in comparison.rows for key in logged.get(row.label, {}) if key.startswith("loss/")]
    names = [key.removeprefix("loss/") for key in keys] or [name.partition("/")[0] for name in comparison.metrics]
    return list(dict.fromkeys(names))


def _lines(rows: Sequence[Row], logged: Curves, group: str, task: str) -> dict[str, Series]:
    """What a panel shows, by label."""
    key = f"{group}/{task}"
    balanced = [row.label for row in rows if row.gradient_method or group != "gradient_weight"]
    found = {label: _not_empty(logged.get(label, {})) for label in balanced}
    return {label: of_row[key] for label, of_row in found.items() if key in of_row}


def _not_empty(of_row: Mapping[str, Series]) -> dict[str, Series]:
    return {key: series for key, series in of_row.items() if len(series[0])}


def _draw_lines(axes: Axes, lines: Mapping[str, Series], styles: Mapping[str, Look]) -> None:
    """A line for each row, the first on top."""
    thin = {label: thinned(*series) for label, series in lines.items()}
    for k, (label, (steps, values)) in enumerate(thin.items()):
        marker = "." if np.isfinite(values).sum() == 1 else ""  # a line of one point cannot be seen
        axes.plot(
            steps, values, color=styles[label].color, linestyle=styles[label].dash, marker=marker, zorder=3 - k / len(thin)
        )
    scale(axes, "y", [value for _, values in thin.values() for value in values])
    count_steps(axes.xaxis)


def _draw_maps(figure: SubFigure, maps: Mapping[str, Mapping[str, Series]], pairs: Sequence[str], tasks: Sequence[str]) -> None:
    """A heat map of cosines for each row: pairs down, training across."""
    names = {f"cosine/{a}__{b}": f"{_short(a)}, {_short(b)}" for a, b in permutations(tasks, 2)}
    grid = figure.add_gridspec(math.ceil(len(maps) / MAPS_ABREAST), min(MAPS_ABREAST, len(maps)))
    panels = []
    for k, (label, of_pairs) in enumerate(maps.items()):
        axes = figure.add_subplot(grid[divmod(k, MAPS_ABREAST)])
        steps, image = _image(of_pairs, pairs)
        extent = (steps[0], max(steps[-1], steps[0] + 1), len(pairs) - 0.5, -0.5)
        drawn = axes.imshow(image, COSINES, aspect="auto", vmin=-1, vmax=1, extent=extent, interpolation="nearest")
        axes.set_title(wrapped(label, MAP_TITLE))
        axes.grid(visible=False)
        axes.set_yticks(range(len(pairs)), [names.get(pair, pair.removeprefix("cosine/")) for pair in pairs])
        axes.tick_params(axis="y", length=0, labelleft=k % MAPS_ABREAST == 0)
        axes.set_xlabel("step" if k + MAPS_ABREAST >= len(maps) else "")
        count_steps(axes.xaxis)
        panels.append(axes)
    inch = figure.dpi / figure.bbox.height
    bar = figure.colorbar(drawn, ax=panels, location="top", aspect=40, shrink=0.5, pad=0.15 * inch)
    bar.set_label("cosine of the gradients (below 0: conflict)")
    bar.outline.set_visible(False)


def _image(of_pairs: Mapping[str, Series], pairs: Sequence[str]) -> Series:
    """Steps, and cosines by pair and step; NaN for a pair that was not logged."""
    ends = [step for steps, _ in of_pairs.values() for step in steps[[0, -1]]]
    steps = np.linspace(min(ends), max(ends), min(POINTS, max(len(steps) for steps, _ in of_pairs.values())))
    image = np.full((len(pairs), len(steps)), math.nan)
    for i, pair in enumerate(pairs):
        if pair in of_pairs:
            image[i] = np.interp(steps, *thinned(*of_pairs[pair]))
    return steps, image


def _lowest(cosines: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """Keys of all pairs in their order, or if they are many those of the lowest mean cosine, lowest first."""
    every = list(dict.fromkeys(key for of_pairs in cosines.values() for key in of_pairs))
    values = {key: np.concatenate([of_pairs[key][1] for of_pairs in cosines.values() if key in of_pairs]) for key in every}
    return every if len(every) <= MOST_PAIRS else sorted(every, key=lambda key: _mean(values[key]))[:MOST_PAIRS]


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.inf


def _remarks(rows: Sequence[Row], cosines: Mapping[str, Mapping[str, Series]], pairs: int, maps: int) -> list[str]:
    """What is not in the heat maps, and why."""
    all_pairs = len({key for of_pairs in cosines.values() for key in of_pairs})
    missing = [row for row in rows if row.label not in cosines]
    plain = ", ".join(row.label for row in missing if not row.gradient_method)
    others = ", ".join(row.label for row in missing if row.gradient_method)
    remarks = {
        f"The {pairs} of {all_pairs} pairs with the lowest mean cosine.": pairs < all_pairs,
        f"The first {maps} of {len(cosines)} methods that have cosines.": maps < len(cosines),
        f"Not measured without a gradient balancer: {plain}.": plain,
        f"No cosines were logged: {others}.": others,
    }
    return [remark for remark, needed in remarks.items() if needed]


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
