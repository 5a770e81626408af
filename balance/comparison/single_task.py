"""Metrics of recorded networks that were trained on one task only."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from .grouping import newest_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .recorded_run import RecordedRun, Settings


class Baselines(NamedTuple):
    """Single-task value of each metric, and its origin in words."""

    metrics: dict[str, float]
    origin: str


def single_task_means(runs: Iterable[RecordedRun], common: Settings, tasks: Sequence[str]) -> dict[str, float]:
    """Return mean test metrics of the finished single-task runs with these settings; empty unless every task has a run.

    Args:
        runs: Any runs, newest first.
        common: Settings that do not belong to the methods.
        tasks: Names of the tasks, in the order of ``loss.main_task`` for runs that do not declare their task.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for run in newest_runs([run for run in runs if run.finished and run.is_single_task and run.common == common]):
        task = run.task or tasks[int(run.settings["loss.main_task"])]
        for name, value in run.metrics.items():
            if name.partition("/")[0] == task:
                values[name].append(value)
    trained = {name.partition("/")[0] for name in values}
    return {name: statistics.fmean(numbers) for name, numbers in values.items()} if trained == set(tasks) else {}


def most_common_settings(runs: Iterable[RecordedRun]) -> list[Settings]:
    """Return the different `RecordedRun.common` of the finished runs, the most frequent first."""
    return [common for common, _ in Counter(run.common for run in runs if run.finished).most_common()]
