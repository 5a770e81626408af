"""Figure of the metrics of all rows for each value of a setting: over training, and on the test data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.figure import Figure

from .drawing import (
    STYLE,
    WIDTH,
    Array,
    RowStyle,
    Series,
    label_logarithms,
    label_steps,
    legend_size,
    row_styles,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from ..run_table import Row, RunTable

Validation = Mapping[str, Mapping[str, Series]]  # by id of the run, then by name, "val/<task>/<metric>"

MOST_PANELS = 6
LABEL_WIDTH = 24  # characters
SMALLEST_ERROR = 0.01  # per cent; the position of no error at all on a logarithmic axis
BASELINE: Any = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 0.9}


class Panel(NamedTuple):
    """A column of the figure: a metric of the comparison for one value of the setting."""

    table: RunTable
    metric: str
    setting: str

    @property
    def is_error(self) -> bool:
        """True for accuracies, which are drawn as errors in per cent on a logarithmic axis."""
        return self.metric.endswith("accuracy")

    @property
    def quantity(self) -> str:
        """Label of the axis."""
        return "error (%)" if self.is_error else self.metric.partition("/")[2]

    @property
    def title(self) -> str:
        """Task and value of the setting."""
        return f"{self.metric.partition('/')[0]}\n{self.setting}"

    @property
    def baseline(self) -> float | None:
        """Position of the single-task networks; None without baselines."""
        baselines = self.table.baselines or {}
        return float(self.drawn(baselines[self.metric])) if self.metric in baselines else None

    def drawn(self, values: Array | Sequence[float] | float) -> Array:
        """Return the positions on the axis for values of the metric."""
        numbers = np.asarray(values, dtype=float)
        return np.maximum(100 * (1 - numbers), SMALLEST_ERROR) if self.is_error else numbers


@rc_context(STYLE)
def metrics_per_setting(key: str, comparisons: Mapping[str, RunTable], validation: Validation) -> Figure:
    """Draw metrics on validation data over training, above, and on test data, below; a column per comparison and metric.

    Above, lines are means over seeds and bands their range. Below, dots are seeds and bars their means. Dotted lines are the
    single-task networks. Of many metrics the first are drawn.

    Args:
        key: The setting, such as ``data.imbalance``.
        comparisons: RunTable for each value of the setting.
        validation: Validation metrics by run.

    Returns:
        The figure.
    """
    panels = _panels(key.rpartition(".")[2], comparisons)
    styles = row_styles(list({row.label: row for compared in comparisons.values() for row in compared.rows}.values()))
    handles = [style.line for style in styles.values()]
    columns, legend_height = legend_size(handles)
    lower_height = 0.5 + 0.17 * len(styles)
    figure = Figure(figsize=(WIDTH, 2.4 + lower_height + legend_height), layout="constrained")
    alike = all(panel.is_error for panel in panels)
    ratios = {"height_ratios": [1.9, lower_height]}
    grid = figure.subplots(2, len(panels), squeeze=False, sharey="row" if alike else False, gridspec_kw=ratios)
    for k, panel in enumerate(panels):
        _draw_training(grid[0, k], panel, styles, validation)
        _draw_test(grid[1, k], panel, styles, with_labels=k == 0)
        grid[0, k].set_ylabel("" if alike and k > 0 else f"validation {panel.quantity}")
    if alike:
        _share_limits(grid[1])
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _panels(name: str, comparisons: Mapping[str, RunTable]) -> list[Panel]:
    metrics = next(iter(comparisons.values())).metrics[: max(1, MOST_PANELS // len(comparisons))]
    return [
        Panel(compared, metric, f"{name}={value.removesuffix('.0')}")
        for value, compared in comparisons.items()
        for metric in metrics
    ]


def _draw_training(axes: Axes, panel: Panel, styles: Mapping[str, RowStyle], validation: Validation) -> None:
    axes.set(title=panel.title, yscale="log" if panel.is_error else "linear")
    axes.set_xlabel("step", labelpad=1)
    for row in panel.table.rows:
        steps, values = _validation_values(row, panel.metric, validation)
        if len(steps):
            _draw_band(axes, steps, panel.drawn(values), styles[row.label])
    if panel.baseline is not None:
        axes.axhline(panel.baseline, **BASELINE)
    if panel.is_error:
        _label_errors(axes.yaxis, most=9)
    label_steps(axes.xaxis)


def _validation_values(row: Row, metric: str, validation: Validation) -> Series:
    """Return steps (T,) and the metric of each run (seeds, T)."""
    series = [validation[run.run_id][f"val/{metric}"] for run in row.runs if f"val/{metric}" in validation.get(run.run_id, {})]
    length = min((len(steps) for steps, _ in series), default=0)
    steps = series[0][0][:length] if series else np.empty(0)
    return steps, np.array([values[:length] for _, values in series])


def _draw_band(axes: Axes, steps: Array, values: Array, style: RowStyle) -> None:
    """Draw mean and range of values with shape (seeds, T)."""
    marker = "." if len(steps) == 1 else ""  # a line of one point is invisible
    axes.plot(steps, values.mean(axis=0), color=style.color, linestyle=style.dash, marker=marker)
    if len(values) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style.color, alpha=0.15, linewidth=0)


def _draw_test(axes: Axes, panel: Panel, styles: Mapping[str, RowStyle], *, with_labels: bool) -> None:
    """Draw a line of dots for each row, with a bar for the mean of several seeds."""
    labels = list(styles)
    axes.set(xscale="log" if panel.is_error else "linear", ylim=(len(labels) - 0.5, -0.5))
    axes.set_xlabel(f"test {panel.quantity}", labelpad=1)
    axes.set_yticks(range(len(labels)), [wrapped(label, LABEL_WIDTH) for label in labels])
    axes.tick_params(axis="y", labelleft=with_labels)
    for row in panel.table.rows:
        values = panel.drawn(list(row.metrics[panel.metric].values.values()))
        y, color, several = labels.index(row.label), styles[row.label].color, len(values) > 1
        axes.plot(values, np.full(len(values), y), "o", color=color, markersize=4, alpha=0.7 if several else 1, mec="none")
        if several:
            axes.plot([values.mean()], [y], "|", color=color, markersize=10, mew=1.6, zorder=3)
    if panel.baseline is not None:
        axes.axvline(panel.baseline, **BASELINE)
    if panel.is_error:
        _label_errors(axes.xaxis, most=4)


def _label_errors(axis: Axis, most: int) -> None:
    """Label a logarithmic axis of errors with few numbers."""
    decades = np.ptp(np.log10(axis.get_view_interval()))
    if decades < 1:
        axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ticker.ScalarFormatter())
    else:
        label_logarithms(axis, few=bool(decades > 2), most=most)
    axis.set_minor_locator(ticker.NullLocator())


def _share_limits(row: Sequence[Axes]) -> None:
    """Give all axes the widest limits of errors, so that no small difference looks large."""
    limits = [axes.get_xlim() for axes in row]
    for axes in row:
        axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        _label_errors(axes.xaxis, most=4)
