"""Figures of the curves that the runs of a comparison logged during training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from ..tables import direction
from .drawing import (
    POINTS,
    STYLE,
    WIDTH,
    Array,
    Curves,
    RowStyle,
    Series,
    choose_scale,
    downsampled,
    label_steps,
    legend_size,
    row_styles,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from ..run_table import Row, RunTable

Panel = tuple[str, str]  # a key of GROUPS, and a task

GROUPS = {"loss": "loss", "weight": "loss weight", "gradient_weight": "gradient weight"}
COSINES = colormaps["RdBu"].with_extremes(bad="#D9D9D9")
VALIDATION = "val/"  # beginning of the names of validation metrics
MOST_METRICS, COLUMNS_OF_METRICS = 9, 3
MOST_TASKS = 6
MOST_COLUMNS_OF_TASKS = 4
MOST_PAIRS = 30
COLUMNS_OF_MAPS = 3
TITLE_WIDTH = 30  # characters of the title of a heat map


@rc_context(STYLE)
def curves(table: RunTable, logged: Curves) -> Figure | None:
    """Draw losses and weights over training, a panel for each task and quantity; None if nothing was logged.

    Weights of gradients are left out for rows without gradient balancer, where they are one. Of many tasks the first six are
    drawn.

    Returns:
        The figure; None if nothing was logged.
    """
    tasks = _tasks(table, logged)
    shown = tasks[:MOST_TASKS]
    lines = {(group, task): _lines(table.rows, logged, group, task) for group in GROUPS for task in shown}
    layout = _layout(lines, shown)
    if not layout:
        return None
    styles = row_styles(table.rows)
    drawn = {label for of_panel in lines.values() for label in of_panel}
    handles = [style.line for label, style in styles.items() if label in drawn]
    columns, height = legend_size(handles)
    figure = Figure(figsize=(WIDTH, height + 0.4 + 1.35 * len(layout)), layout="constrained")
    grid = figure.subplots(len(layout), len(layout[0]), squeeze=False, sharex=True)
    for (i, j), axes in np.ndenumerate(grid):
        _draw_lines(axes, lines[layout[i][j]], styles)
        _label_panel(axes, layout, i, j)
    if len(shown) < len(tasks):
        figure.suptitle(f"The first {len(shown)} of {len(tasks)} tasks")
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


@rc_context(STYLE)
def validation(table: RunTable, logged: Curves) -> Figure | None:
    """Draw validation metrics over training, a panel for each; of many metrics the first nine.

    Returns:
        The figure; None if nothing was logged.
    """
    of_rows = {label: _validation_metrics(series) for label, series in logged.items()}
    names = list(dict.fromkeys(name for series in of_rows.values() for name in series))
    if not names:
        return None
    styles = row_styles(table.rows)
    handles = [style.line for label, style in styles.items() if of_rows.get(label)]
    columns, height = legend_size(handles)
    shown = names[:MOST_METRICS]
    rows = math.ceil(len(shown) / COLUMNS_OF_METRICS)
    figure = Figure(figsize=(WIDTH, height + 0.4 + 1.6 * rows), layout="constrained")
    for k, name in enumerate(shown):
        axes = figure.add_subplot(rows, min(len(shown), COLUMNS_OF_METRICS), k + 1)
        _draw_lines(axes, {label: series[name] for label, series in of_rows.items() if name in series}, styles)
        axes.set_title(wrapped(f"{name} {direction(name, table.higher_is_better)}", 34))
        axes.set_xlabel("step" if k + COLUMNS_OF_METRICS >= len(shown) else "")
    if len(shown) < len(names):
        figure.suptitle(f"The first {len(shown)} of {len(names)} metrics")
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _validation_metrics(series: Mapping[str, Series]) -> dict[str, Series]:
    """Return the series of validation metrics by the name of the metric."""
    return {key.removeprefix(VALIDATION): of_key for key, of_key in _not_empty(series).items() if key.startswith(VALIDATION)}


def _layout(lines: Mapping[Panel, Mapping[str, Series]], tasks: Sequence[str]) -> list[list[Panel]]:
    """Return the panels in rows: a row for each group with lines, or a column, as a page is higher than wide."""
    groups = [group for group in GROUPS if any(lines[group, task] for task in tasks)]
    if len(tasks) <= MOST_COLUMNS_OF_TASKS:
        return [[(group, task) for task in tasks] for group in groups]
    return [[(group, task) for group in groups] for task in tasks] if groups else []


def _label_panel(axes: Axes, layout: Sequence[Sequence[Panel]], i: int, j: int) -> None:
    group, task = layout[i][j]
    tasks_in_columns = layout[0][0][1] == layout[-1][0][1]
    across, down = (task, GROUPS[group]) if tasks_in_columns else (GROUPS[group], task)
    axes.set_title(wrapped(across, 100 // len(layout[0])) if i == 0 else "")
    axes.set_ylabel(wrapped(down, 20) if j == 0 else "")
    axes.set_xlabel("step" if i == len(layout) - 1 else "")


class _Maps(NamedTuple):
    """Heat maps of cosines: the cosines by row and pair, the pairs, and the tasks."""

    cosines: Mapping[str, Mapping[str, Series]]
    pairs: Sequence[str]
    tasks: Sequence[str]

    @property
    def height(self) -> float:
        """Height in inches."""
        if not self.cosines:
            return 1.0
        title = 0.22 + 0.13 * max(wrapped(label, TITLE_WIDTH).count("\n") + 1 for label in self.cosines)
        return 1.0 + math.ceil(len(self.cosines) / COLUMNS_OF_MAPS) * (title + 0.13 * max(len(self.pairs), 4))


@rc_context(STYLE)
def conflicts(table: RunTable, logged: Curves) -> Figure | None:
    """Draw the share of task pairs in conflict, and cosines of every pair, over training; None if nothing was logged.

    Of many pairs the thirty with the lowest mean cosine are drawn; of many rows the first twelve, or six with many pairs.

    Returns:
        The figure; None if nothing was logged.
    """
    tasks = _tasks(table, logged)
    of_rows = {row.label: _not_empty(logged.get(row.label, {})) for row in table.rows}
    rates = _conflict_rates(of_rows, len(tasks))
    cosines = {label: {key: series[key] for key in series if key.startswith("cosine/")} for label, series in of_rows.items()}
    cosines = {label: pairs for label, pairs in cosines.items() if pairs}
    if not rates and not cosines:
        return None
    pairs = _lowest_pairs(cosines)
    maps = _Maps({label: cosines[label] for label in list(cosines)[: 12 if len(pairs) <= 10 else 6]}, pairs, tasks)
    remarks = _remarks(table.rows, cosines, len(pairs), len(maps.cosines))
    styles = row_styles(table.rows)
    columns, height = legend_size([style.line for label, style in styles.items() if label in rates])
    heights = [height + 1.6, maps.height + 0.14 * len(remarks)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_rates(upper, rates, styles, columns)
    if maps.cosines:
        _draw_maps(lower, maps)
    lower.supxlabel("\n".join(remarks))
    return figure


def _conflict_rates(of_rows: Mapping[str, Mapping[str, Series]], num_tasks: int) -> dict[str, Series]:
    """Return the share of pairs in conflict by row; empty for a single task."""
    counts = {label: series["conflicts"] for label, series in of_rows.items() if "conflicts" in series and num_tasks > 1}
    return {label: (steps, count / math.comb(num_tasks, 2)) for label, (steps, count) in counts.items()}


def _tasks(table: RunTable, logged: Curves) -> list[str]:
    """Return the names of the tasks in the logged losses, or else in the names of the metrics."""
    keys = [key for row in table.rows for key in logged.get(row.label, {}) if key.startswith("loss/")]
    names = [key.removeprefix("loss/") for key in keys] or [name.partition("/")[0] for name in table.metrics]
    return list(dict.fromkeys(names))


def _lines(rows: Sequence[Row], logged: Curves, group: str, task: str) -> dict[str, Series]:
    """Return the series of a panel by label."""
    key = f"{group}/{task}"
    balanced = [row.label for row in rows if row.gradient_method or group != "gradient_weight"]
    series = {label: _not_empty(logged.get(label, {})) for label in balanced}
    return {label: of_row[key] for label, of_row in series.items() if key in of_row}


def _not_empty(of_row: Mapping[str, Series]) -> dict[str, Series]:
    return {key: series for key, series in of_row.items() if len(series[0])}


def _draw_lines(axes: Axes, lines: Mapping[str, Series], styles: Mapping[str, RowStyle]) -> None:
    """Draw a line for each row, the first on top."""
    thin = {label: downsampled(*series) for label, series in lines.items()}
    for k, (label, (steps, values)) in enumerate(thin.items()):
        marker = "." if np.isfinite(values).sum() == 1 else ""  # a line of one point is invisible
        axes.plot(
            steps, values, color=styles[label].color, linestyle=styles[label].dash, marker=marker, zorder=3 - k / len(thin)
        )
    choose_scale(axes, "y", [value for _, values in thin.values() for value in values])
    label_steps(axes.xaxis)


def _draw_rates(figure: SubFigure, rates: Mapping[str, Series], styles: Mapping[str, RowStyle], columns: int) -> None:
    axes = figure.add_subplot()
    _draw_lines(axes, rates, styles)
    axes.set(xlabel="step", ylabel="conflict rate", yscale="linear", ylim=(0, max(0.2, axes.get_ylim()[1])))
    handles = [style.line for label, style in styles.items() if label in rates]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _draw_maps(figure: SubFigure, maps: _Maps) -> None:
    """Draw a heat map of cosines for each row: pairs down, training across."""
    names = {f"cosine/{a}__{b}": f"{_short(a)}, {_short(b)}" for a, b in permutations(maps.tasks, 2)}
    labels = [names.get(pair, pair.removeprefix("cosine/")) for pair in maps.pairs]
    count = len(maps.cosines)
    grid = figure.add_gridspec(math.ceil(count / COLUMNS_OF_MAPS), min(COLUMNS_OF_MAPS, count))
    panels = []
    for k, (label, cosines) in enumerate(maps.cosines.items()):
        axes = figure.add_subplot(grid[divmod(k, COLUMNS_OF_MAPS)])
        steps, image = _image(cosines, maps.pairs)
        extent = (steps[0], max(steps[-1], steps[0] + 1), len(labels) - 0.5, -0.5)
        drawn = axes.imshow(image, COSINES, aspect="auto", vmin=-1, vmax=1, extent=extent, interpolation="nearest")
        axes.set_title(wrapped(label, TITLE_WIDTH))
        axes.grid(visible=False)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0, labelleft=k % COLUMNS_OF_MAPS == 0)
        axes.set_xlabel("step" if k + COLUMNS_OF_MAPS >= count else "")
        label_steps(axes.xaxis)
        panels.append(axes)
    inch = figure.dpi / figure.bbox.height
    bar = figure.colorbar(drawn, ax=panels, location="top", aspect=40, shrink=0.5, pad=0.15 * inch)
    bar.set_label("cosine of the gradients (below 0: conflict)")
    bar.outline.set_visible(False)


def _image(cosines: Mapping[str, Series], pairs: Sequence[str]) -> Series:
    """Return steps, and cosines by pair and step; NaN for a pair that was not logged."""
    ends = [step for steps, _ in cosines.values() for step in steps[[0, -1]]]
    steps = np.linspace(min(ends), max(ends), min(POINTS, max(len(steps) for steps, _ in cosines.values())))
    image = np.full((len(pairs), len(steps)), math.nan)
    for i, pair in enumerate(pairs):
        if pair in cosines:
            image[i] = np.interp(steps, *downsampled(*cosines[pair]))
    return steps, image


def _lowest_pairs(cosines: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """Return the keys of all pairs in their order, or of many pairs those with the lowest mean cosine, lowest first."""
    keys = list(dict.fromkeys(key for of_row in cosines.values() for key in of_row))
    values = {key: np.concatenate([of_row[key][1] for of_row in cosines.values() if key in of_row]) for key in keys}
    return keys if len(keys) <= MOST_PAIRS else sorted(keys, key=lambda key: _mean(values[key]))[:MOST_PAIRS]


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.inf


def _remarks(rows: Sequence[Row], cosines: Mapping[str, Mapping[str, Series]], pairs: int, maps: int) -> list[str]:
    """Return lines that list the contents without a heat map."""
    all_pairs = len({key for of_row in cosines.values() for key in of_row})
    missing = [row for row in rows if row.label not in cosines]
    plain = ", ".join(row.label for row in missing if not row.gradient_method)
    others = ", ".join(row.label for row in missing if row.gradient_method)
    remarks = {
        f"The {pairs} of {all_pairs} pairs with the lowest mean cosine.": pairs < all_pairs,
        f"The first {maps} of {len(cosines)} methods that have cosines.": maps < len(cosines),
        f"Not measured without a gradient balancer: {plain}.": plain,
        f"No cosines were logged: {others}.": others,
    }
    return [line for remark, needed in remarks.items() if needed for line in textwrap.wrap(remark, 115)]


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
