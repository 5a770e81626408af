"""The tasks: squared errors of the critics, and rates of success."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from torchmetrics import MeanMetric

from experiments.problems.metaworld.data import ALL, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

SUMMARIES = ("success", "best_success", "last_success", "area")
HIGHER_IS_BETTER = frozenset(f"{task}/success" for tasks in ALL.values() for task in tasks) | {
    f"all/{name}" for name in SUMMARIES
}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return by task the mean over its rows of the squared errors of both critics, added up.

    Args:
        outputs: Estimates of both critics by task. Shape (2, rows of the task).
        batch: Inputs, and target values. Shape (B,).
    """
    parts = zip(outputs.items(), batch[1].split(batch[0].counts), strict=True)
    return {task: (estimates - target).square().sum(0).mean() for (task, estimates), target in parts if len(target)}


def metrics(tasks: Sequence[str] = TASKS) -> dict[str, Metric]:
    """Return fresh rates of success: the share of episodes that were a success at any of their steps."""
    return {f"{task}/success": MeanMetric() for task in tasks}


def score(values: Mapping[str, float]) -> float:
    """Return minus the mean rate of success, by which the best epoch is chosen."""
    return -statistics.fmean(values.values())


def summarize(final: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return rates of success of all tasks together: as reported, at best, at last, and on average over all evaluations.

    Args:
        final: Reported rates by task.
        history: Rates of all evaluations, in their order. The highest one is optimistic, as it is chosen by what it measures.
    """
    course = [-score(values) for values in history]
    values = (-score(final), max(course), course[-1], statistics.fmean(course))
    return {f"all/{name}": value for name, value in zip(SUMMARIES, values, strict=True)}
