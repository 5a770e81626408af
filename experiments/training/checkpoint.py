"""Which epoch's network is kept, and what it is measured against."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

from balance.metrics import delta_m
from experiments.analysis import baselines as reference
from experiments.recording.store import common_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from experiments.trainer import Run


class Selection:
    """Keeps the epoch with the best validation metrics, in memory and in ``best.pt`` of the run's folder.

    The best has the least score, which looks at the tasks that are trained alone. It is the experiment's own if it has one,
    else delta_m if there are single-task numbers to compare with, else `change` since the first epoch.

    With ``train.report_last`` nothing is selected: the last epoch is kept.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trained = set(run.experiment.TASKS)
        if run.config.loss_method == "stl":
            self.trained = {run.experiment.TASKS[run.config.loss.main_task]}
        found = reference.for_run(run.config.experiment, common_of(run.config))
        self.against = None if found is None else found.origin
        self.baselines: Mapping[str, float] = {} if found is None else found.metrics
        self.first: dict[str, float] = {}  # of each metric, the first value other than zero
        self.epoch = 0
        self.best = math.inf
        self.state: dict[str, Any] = {}

    def offer(self, epoch: int, metrics: Mapping[str, float], state: Mapping[str, Any]) -> float:
        """Keep the state if this epoch is the best so far; the first is kept whatever it is.

        Args:
            epoch: From 1.
            metrics: On validation.
            state: What is kept of it; copied.

        Returns:
            The score.
        """
        score = self.score(metrics)
        last = self.run.config.train.report_last is not None and epoch == self.run.config.train.epochs
        better = self.run.config.train.report_last is None and (score < self.best or not self.state)
        if last or better:
            self.epoch, self.best = epoch, score
            self.state = copy.deepcopy(dict(state))
            torch.save(self.state, self.run.folder / "best.pt")
        return score

    def score(self, metrics: Mapping[str, float]) -> float:
        """What is least for the best epoch."""
        own = getattr(self.run.experiment, "score", None)
        if own is not None:
            return float(own(self.of_trained(metrics)))
        drop = self.drop(metrics)
        if drop is not None:
            return drop
        self.first = {name: value for name, value in metrics.items() if value and math.isfinite(value)} | self.first
        return change(self.of_trained(metrics), self.first, self.run.experiment.HIGHER_IS_BETTER)

    def drop(self, metrics: Mapping[str, float]) -> float | None:
        """delta_m of the tasks that are trained; None without single-task numbers."""
        if not self.baselines:
            return None
        return delta_m(self.of_trained(metrics), self.baselines, self.run.experiment.HIGHER_IS_BETTER)

    def of_trained(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the tasks that are trained."""
        return {name: value for name, value in metrics.items() if name.partition("/")[0] in self.trained}


def change(metrics: Mapping[str, float], first: Mapping[str, float], higher_is_better: Collection[str]) -> float:
    r"""Mean symmetric relative change of metrics, in percent; the lower, the better.

    .. math::
        \frac{100}{M} \sum_j s_j \frac{m_j - r_j}{(|m_j| + |r_j|) / 2}, \qquad
        s_j = -1 \text{ where higher is better, else } 1

    Like delta_m where the changes are small. But every metric counts at most 200, however small its first value was, and zero
    is no exception: it is what is worst where higher is better and best where lower is, whatever the first value.

    Args:
        metrics: M values, none of them negative. One that is no finite number counts 200.
        first: What to compare with; lacks a metric that has always been zero.
        higher_is_better: Names of the metrics that should be large.
    """
    total = 0.0
    for name, value in metrics.items():
        sign = -1 if name in higher_is_better else 1
        begin = first.get(name, 1.0)
        total += sign * 200 * (value - begin) / (abs(value) + abs(begin)) if math.isfinite(value) else 200
    return total / len(metrics)
