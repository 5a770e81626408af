"""Terminal output of a run: its progress and its result, in short for many tasks."""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from experiments.config.schema import last_epoch
from experiments.recording.run_log import MANY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.progress import Task

    from balance import Report
    from experiments.training.checkpoint import Selection
    from experiments.training.run import Run


class ProgressBar:
    """A bar with the epoch, the number of steps and the losses of the last logged step."""

    def __init__(self, progress: Progress, epochs: int, steps: int) -> None:
        self.progress = progress
        self.bar = progress.add_task("", total=steps, losses="", epoch=1, epochs=epochs)

    def resume(self, step: int) -> None:
        """Begin at a step."""
        self.progress.update(self.bar, completed=step)

    def show_losses(self, report: Report) -> None:
        """Show the losses of a step."""
        self.progress.update(self.bar, losses=losses_line(report))

    def advance(self, epoch: int) -> None:
        """Count a step of an epoch."""
        self.progress.update(self.bar, advance=1, epoch=epoch)

    def print_metrics(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Print the validation metrics of an epoch above the bar."""
        self.progress.console.print(f"epoch {epoch:3d}  {metrics_line(metrics)}", soft_wrap=True)


class Speed(ProgressColumn):
    """The number of steps in a second, as an average over the last steps."""

    def render(self, task: Task) -> Text:
        """Return the number, and no text before the first two steps."""
        return Text(f"{task.speed:.3g} steps/s" if task.speed else "")


@contextmanager
def progress_bar(run: Run) -> Iterator[ProgressBar]:
    """Show a progress bar of the run, and remove it on exit."""
    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    train = run.config.train
    with Progress(*columns, console=run.console, transient=True) as progress:
        yield ProgressBar(progress, last_epoch(train), train.epochs * len(run.batches) + train.lbfgs_steps)


def losses_line(report: Report) -> str:
    """Return the losses of a step in one line."""
    losses = report.losses.tolist()
    if len(losses) > MANY:
        return f"losses {statistics.fmean(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})"
    return " ".join(f"{task} {loss:.3g}" for task, loss in zip(report.tasks, losses, strict=True))


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Return metrics named ``<task>/<metric>`` in one line."""
    if len({name.partition("/")[0] for name in metrics}) <= MANY:
        return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return "  ".join(
        f"{kind} {statistics.fmean(values.values()):.4f} ({min(values.values()):.4f} to {max(values.values()):.4f})"
        for kind, values in by_kind(metrics).items()
    )


def by_kind(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return metrics named ``<task>/<metric>`` as a dict from metrics to values by task."""
    kinds: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        task, _, kind = name.partition("/")
        kinds.setdefault(kind, {})[task] = value
    return kinds


def print_result(run: Run, selection: Selection, final: Mapping[str, float]) -> None:
    """Print a table of test metrics next to the single-task numbers, and delta_m."""
    metrics = {name: value for name, value in final.items() if "/" in name}
    table = _table_of_all if len(run.problem.TASKS) <= MANY else _table_of_means
    run.console.print(table(run, selection, metrics))
    if selection.origin is not None:
        run.console.print(f"delta_m {final['delta_m']:+.2f} % against {selection.origin} (lower is better)", soft_wrap=True)
    else:
        run.console.print("No delta_m: there are no single-task networks with these settings to compare with.", soft_wrap=True)


def _title(run: Run, selection: Selection) -> str:
    """Return problem, methods and the tested epochs."""
    config, last = run.config, run.config.train.report_last
    methods = " + ".join(filter(None, (config.loss_method, config.gradient_method)))
    epochs = f"epoch {selection.epoch}" if last is None else f"mean of the last {last} epochs" if last > 1 else "last epoch"
    return f"{config.experiment}: {methods}, {epochs}"


def _table_of_all(run: Run, selection: Selection, metrics: Mapping[str, float]) -> Table:
    """Return a table with a row for each metric of each task."""
    table = Table("task", "metric", "test", "single-task", title=_title(run, selection))
    for name, value in metrics.items():
        task, _, metric = name.partition("/")
        baseline = selection.baselines.get(name)
        untrained = "" if task in selection.trained or task not in run.problem.TASKS else " (not trained)"
        row = (f"{metric} {_arrow(run, name)}", f"{value:.4f}{untrained}", "-" if baseline is None else f"{baseline:.4f}")
        table.add_row(task, *row)
    return table


def _table_of_means(run: Run, selection: Selection, metrics: Mapping[str, float]) -> Table:
    """Return a table with a row for each kind of metric: mean and extremes over the tasks."""
    columns = ("metric", "mean of tasks", "least", "largest", "single-task mean")
    table = Table(*columns, title=_title(run, selection))
    for kind, values in by_kind(selection.trained_only(metrics)).items():
        extremes = (min(values, key=values.__getitem__), max(values, key=values.__getitem__))
        least, largest = (f"{values[task]:.4f} {task}" for task in extremes)
        baselines = [selection.baselines[f"{task}/{kind}"] for task in values] if selection.baselines else []
        baseline = f"{statistics.fmean(baselines):.4f}" if baselines else "-"
        arrow = _arrow(run, f"{next(iter(values))}/{kind}")
        table.add_row(f"{kind} {arrow}", f"{statistics.fmean(values.values()):.4f}", least, largest, baseline)
    return table


def _arrow(run: Run, name: str) -> str:
    """Return the direction in which a metric improves."""
    return "↑" if name in run.problem.HIGHER_IS_BETTER else "↓"
