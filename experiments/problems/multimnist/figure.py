"""Results of the comparison -> a figure: errors over training, and on the test pairs, of each task at each imbalance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.analysis.figures.drawing import COLORS, DASHES, STYLE, WIDTH, Array, Dash
from experiments.problems.multimnist.comparison import CONFIGURATIONS, Result, Settings, summary
from experiments.problems.multimnist.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


@rc_context(STYLE)
def draw(results: Sequence[Result], settings: Settings) -> Figure:
    """Above, means over seeds with the range of the seeds; below, a dot for each seed and a bar for their mean."""
    names = list(dict.fromkeys(shown_name(result.configuration) for result in results))
    imbalances = list(dict.fromkeys(result.imbalance for result in results))
    panels = [(imbalance, task) for imbalance in imbalances for task in TASKS]
    styles = {name: (COLORS[k % len(COLORS)], DASHES[k % len(DASHES)]) for k, name in enumerate(names)}
    figure = Figure(figsize=(WIDTH, 3.0 + 0.17 * len(names) + 0.16 * -(-len(names) // 4)), layout="constrained")
    grid = figure.subplots(
        2, len(panels), squeeze=False, sharey="row", gridspec_kw={"height_ratios": [1.9, 0.5 + 0.17 * len(names)]}
    )
    tested = summary(results)
    for k, (imbalance, task) in enumerate(panels):
        upper, lower = grid[0, k], grid[1, k]
        factor = imbalance if task == TASKS[1] else 1
        upper.set_title(f"{task}, loss x {factor:g}\n({'balanced' if imbalance == 1 else 'imbalanced'})")
        for result_name in dict.fromkeys(result.configuration for result in results):
            if task not in CONFIGURATIONS[result_name].trained:
                continue
            name = shown_name(result_name)
            runs = [r for r in results if r.configuration == result_name and r.imbalance == imbalance]
            color, dash = styles[name]
            _draw_errors(upper, np.array([r.validation_accuracy[task] for r in runs]), color, dash)
            _draw_tested(lower, names.index(name), tested[result_name, imbalance, task], color)
        upper.set_xlabel("epoch", labelpad=1)
        lower.set_xlabel("test error (%)", labelpad=1)
        upper.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        lower.set(xscale="log", xlim=_limits(tested))
        _count_in_logarithms(lower.xaxis, most=4)
    grid[0, 0].set(yscale="log", ylabel=f"{'test' if settings.data.protocol == 'paper' else 'validation'} error (%)")
    for axes in grid[0]:
        _count_in_logarithms(axes.yaxis, most=9)
    grid[1, 0].set_yticks(range(len(names)), names)
    grid[1, 0].set_ylim(len(names) - 0.5, -0.5)
    handles = [Line2D([], [], color=color, linestyle=dash, label=name) for name, (color, dash) in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    seeds = len({result.seed for result in results})
    source = "digits of scikit-learn, 10 x 12 pixels" if settings.data.path is None else "MNIST, 28 x 28 pixels"
    figure.suptitle(f"Two overlapping digits ({source}), {settings.epochs} epochs, {seeds} seed{'s' if seeds > 1 else ''}")
    return figure


def shown_name(configuration: str) -> str:
    """The two single tasks share a line and a row."""
    return "single-task" if configuration.startswith("single-") else configuration


def _percent(accuracies: Sequence[float] | Array) -> Array:
    """Errors in per cent; no error at all is drawn as a hundredth of one."""
    errors: Array = 100 * np.maximum(1 - np.asarray(accuracies, dtype=float), 1e-4)
    return errors


def _limits(tested: Mapping[Any, Sequence[float]]) -> tuple[float, float]:
    """Of the test errors of all panels, so that no small difference looks large."""
    errors = _percent([value for values in tested.values() for value in values])
    return float(errors.min()) / 1.3, float(errors.max()) * 1.3


def _count_in_logarithms(axis: Axis, most: int) -> None:
    wide = np.ptp(np.log10(axis.get_view_interval())) > 2
    axis.set_major_locator(ticker.LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=most))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _draw_errors(axes: Axes, accuracies: Array, color: str, dash: Dash) -> None:
    """Mean and range over the seeds. Shape (seeds, epochs)."""
    errors = _percent(accuracies)
    epochs = np.arange(1, errors.shape[1] + 1)
    axes.plot(epochs, errors.mean(axis=0), color=color, linestyle=dash, marker="." if len(epochs) == 1 else "")
    if len(errors) > 1:
        axes.fill_between(epochs, errors.min(axis=0), errors.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _draw_tested(axes: Axes, row: int, accuracies: Sequence[float], color: str) -> None:
    """A dot for each seed, and a bar for their mean where there are several."""
    errors = _percent(accuracies)
    axes.plot(
        errors, np.full(len(errors), row), "o", color=color, markersize=4, alpha=0.7 if len(errors) > 1 else 1, mec="none"
    )
    if len(errors) > 1:
        axes.plot([errors.mean()], [row], "|", color=color, markersize=10, mew=1.6, zorder=3)
