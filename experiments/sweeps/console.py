"""Printed plan, progress and results of a sweep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.sweeps.job import balancer_warnings
from experiments.sweeps.runtime import estimate_seconds
from experiments.training.console import metrics_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console

    from experiments.sweeps.job import Job
    from experiments.sweeps.worker import Outcome

Item = TypeVar("Item")

START = 10  # seconds until a worker process has imported its modules, about


def show_plan(jobs: Sequence[Job], workers: int, console: Console) -> None:
    """Print the runs of a plan, and the time that they will take."""
    seconds = estimate_seconds([job.config for job in jobs if not job.finished], workers)
    console.print(_table(jobs, seconds))
    for warning in balancer_warnings(jobs):
        console.print(f"note: {warning}", markup=False)
    total = sum(number for number in seconds.values() if not math.isnan(number)) / min(workers, max(len(seconds), 1))
    duration = in_words(total + (START if seconds else 0))
    before = len(jobs) - len(seconds)
    console.print(f"{len(seconds)} runs to do, {before} are finished already; about {duration} with {workers} at a time")


def _table(jobs: Sequence[Job], seconds: Mapping[str, float]) -> Table:
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.label, []).append(job)
    table = Table("methods", "seeds", "to run", "finished", "time of a run", title=f"sweep of {jobs[0].config.experiment}")
    for label, of_row in rows.items():
        unfinished = [seconds[job.fingerprint] for job in of_row if not job.finished]
        seeds = ", ".join(str(job.config.seed) for job in of_row)
        each = "-" if not unfinished or math.isnan(unfinished[0]) else in_words(unfinished[0])
        table.add_row(label, seeds, str(len(unfinished)), str(len(of_row) - len(unfinished)), each)
    return table


def progress(items: Iterable[Item], total: int, console: Console) -> Iterator[Item]:
    """Yield the items under a progress bar."""
    columns = (TextColumn("runs"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total)


def result_line(job: Job, outcome: Outcome) -> str:
    """Return label and metrics of a run; for a single-task network, the metrics of its task."""
    metrics = {name: value for name, value in outcome.metrics.items() if name.partition("/")[0] in job.tasks}
    return f"{job.label}, seed {job.config.seed}: {outcome.error or metrics_line(metrics)} ({outcome.seconds:.0f} s)"


def in_words(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
