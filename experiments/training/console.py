"""What a run shows on the terminal and logs of its steps; in short where there are many tasks."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from balance import Report
    from experiments.trainer import Run
    from experiments.training.checkpoint import Selection

MANY = 12  # tasks; with more, lines and tables hold means and extremes


def progress_bar(console: Console) -> Progress:
    """A bar with the losses of the last logged step."""
    return Progress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
        transient=True,
    )


def losses_line(report: Report) -> str:
    """The losses of a step."""
    losses = report.losses.tolist()
    if len(losses) > MANY:
        return f"losses {statistics.fmean(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})"
    return " ".join(f"{task} {loss:.3g}" for task, loss in zip(report.tasks, losses, strict=True))


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Metrics named ``<task>/<metric>``."""
    if len({name.partition("/")[0] for name in metrics}) <= MANY:
        return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return "  ".join(
        f"{kind} {statistics.fmean(values.values()):.4f} ({min(values.values()):.4f} to {max(values.values()):.4f})"
        for kind, values in by_kind(metrics).items()
    )


def by_kind(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Metrics named ``<task>/<metric>`` as values by task, by the name of the metric."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        task, _, kind = name.partition("/")
        found.setdefault(kind, {})[task] = value
    return found


def logged(report: Report) -> dict[str, float]:
    """`Report.as_metrics`; of the cosines of more than 12 tasks mean and least alone, since 100 tasks have 4950."""
    cosines, conflicts = report.cosines, report.conflicts
    if len(report.tasks) <= MANY or cosines is None or conflicts is None:
        return report.as_metrics()
    rows, columns = (~cosines.isnan()).triu(1).nonzero(as_tuple=True)
    pairs = cosines[rows, columns]
    several = {"cosine/mean": pairs.mean().item(), "cosine/min": pairs.min().item()} if len(pairs) else {}
    return dataclasses.replace(report, gramian=None).as_metrics() | several | {"conflicts": float(conflicts)}


def show(run: Run, selection: Selection, final: Mapping[str, float]) -> None:
    """The table of test metrics beside the single-task numbers."""
    config = run.config
    title = " + ".join(filter(None, (config.loss_method, config.gradient_method)))
    last = config.train.report_last
    which = f"epoch {selection.epoch}" if last is None else f"mean of the last {last} epochs" if last > 1 else "last epoch"
    metrics = {name: value for name, value in final.items() if "/" in name}
    shown = _long if len(run.experiment.TASKS) <= MANY else _short
    run.console.print(shown(run, selection, metrics, f"{config.experiment}: {title}, {which}"))
    if selection.against is not None:
        run.console.print(f"delta_m {final['delta_m']:+.2f} % against {selection.against} (lower is better)", soft_wrap=True)
    else:
        run.console.print("No delta_m: there are no single-task networks with these settings to compare with.", soft_wrap=True)


def _long(run: Run, selection: Selection, metrics: Mapping[str, float], title: str) -> Table:
    table = Table("task", "metric", "test", "single-task", title=title)
    for name, value in metrics.items():
        task, _, metric = name.partition("/")
        baseline = selection.baselines.get(name)
        untrained = "" if task in selection.trained else " (not trained)"
        row = (f"{metric} {_arrow(run, name)}", f"{value:.4f}{untrained}", "-" if baseline is None else f"{baseline:.4f}")
        table.add_row(task, *row)
    return table


def _short(run: Run, selection: Selection, metrics: Mapping[str, float], title: str) -> Table:
    table = Table("metric", "mean of tasks", "least", "largest", "single-task mean", title=title)
    for kind, values in by_kind(selection.of_trained(metrics)).items():
        least, largest = (f"{values[task]:.4f} {task}" for task in (min(values, key=values.__getitem__), _largest(values)))
        alone = [selection.baselines[f"{task}/{kind}"] for task in values] if selection.baselines else []
        baseline = f"{statistics.fmean(alone):.4f}" if alone else "-"
        arrow = _arrow(run, f"{next(iter(values))}/{kind}")
        table.add_row(f"{kind} {arrow}", f"{statistics.fmean(values.values()):.4f}", least, largest, baseline)
    return table


def _largest(values: Mapping[str, float]) -> str:
    return max(values, key=values.__getitem__)


def _arrow(run: Run, name: str) -> str:
    return "↑" if name in run.experiment.HIGHER_IS_BETTER else "↓"
