"""Selection of the epoch whose network is tested, and the states that are saved."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

from balance import metrics as balance_metrics
from experiments.analysis import baselines as reference
from experiments.config.schema import last_epoch
from experiments.recording.fingerprint import common_of
from experiments.training import ranks
from experiments.training.checkpoint_files import write_file

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.optim import Optimizer

    from experiments.training.run import Run


def checkpoint(run: Run, epoch: int, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Return the states of network and balancer after an epoch, and the optimizer's state if it is given."""
    state = {"model": run.model.state_dict(), "balancer": run.balancer.state_dict(), "epoch": epoch}
    return state if optimizer is None else state | {"optimizer": optimizer.state_dict()}


class Selection:
    """The epoch with the best validation metrics, kept in memory and in ``best.pt`` of the run's folder.

    The best epoch has the smallest score, over the tasks that are trained. The score is the problem's ``score`` if it has one,
    else delta_m if single-task numbers exist, else `symmetric_change` since the first epoch.

    With ``train.report_last`` nothing is selected: the last epoch is kept.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        tasks = run.problem.TASKS
        self.trained = {tasks[run.config.loss.main_task]} if run.config.loss_method == "stl" else set(tasks)
        single_task = reference.for_run(run.config.experiment, common_of(run.config))
        self.origin = None if single_task is None else single_task.origin  # of the single-task numbers, in words
        self.baselines: Mapping[str, float] = {} if single_task is None else single_task.metrics
        self.first: dict[str, float] = {}  # of each metric, the first value other than zero
        self.epoch = 0
        self.best = math.inf
        self.state: dict[str, Any] = {}

    def update(self, epoch: int, metrics: Mapping[str, float], state: Mapping[str, Any]) -> float:
        """Keep the state of an epoch if it is the best one so far; the first epoch is always kept.

        Args:
            epoch: Number of the epoch, from 1.
            metrics: Validation metrics.
            state: State to keep; copied.

        Returns:
            The score of the epoch.
        """
        score = self.score(metrics)
        if self.selects(epoch, score):
            self.epoch, self.best = epoch, score
            self.state = copy.deepcopy(dict(state))
            self.save()
        return score

    def save(self) -> None:
        """Save the state of the best epoch."""
        if ranks.is_first():
            write_file(self.run.folder / "best.pt", lambda file: torch.save(self.state, file))

    def state_dict(self) -> dict[str, Any]:
        """Return the selection so far."""
        return {"epoch": self.epoch, "best": self.best, "first": self.first, "state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier selection; ``best.pt`` is written again, since it may be of a later epoch."""
        self.epoch, self.best, self.first, self.state = (state[key] for key in ("epoch", "best", "first", "state"))
        if self.state:
            self.save()

    def selects(self, epoch: int, score: float) -> bool:
        """Return whether an epoch is kept: the last one with ``train.report_last``, else the best one so far."""
        train = self.run.config.train
        if train.report_last is not None:
            return epoch == last_epoch(train)
        return score < self.best or not self.state

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return the score of an epoch; a smaller one is better."""
        if self.run.problem.score is not None:
            return float(self.run.problem.score(self.trained_only(metrics)))
        delta_m = self.delta_m(metrics)
        if delta_m is not None:
            return delta_m
        self.first = {name: value for name, value in metrics.items() if value and math.isfinite(value)} | self.first
        return symmetric_change(self.trained_only(metrics), self.first, self.run.problem.HIGHER_IS_BETTER)

    def delta_m(self, metrics: Mapping[str, float]) -> float | None:
        """Return delta_m of the tasks that are trained; None without single-task numbers."""
        if not self.baselines:
            return None
        return balance_metrics.delta_m(self.trained_only(metrics), self.baselines, self.run.problem.HIGHER_IS_BETTER)

    def trained_only(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the tasks that are trained."""
        return {name: value for name, value in metrics.items() if name.partition("/")[0] in self.trained}


def symmetric_change(metrics: Mapping[str, float], first: Mapping[str, float], higher_is_better: Collection[str]) -> float:
    r"""Return the mean symmetric relative change of metrics, in percent; a smaller one is better.

    .. math::
        \frac{100}{M} \sum_j s_j \frac{m_j - r_j}{(|m_j| + |r_j|) / 2}, \qquad
        s_j = -1 \text{ where higher is better, else } 1

    Small changes give about delta_m. Every metric counts at most 200, however small its first value was. A metric of zero
    counts 200 where higher is better and -200 where lower is better, whatever its first value was.

    Args:
        metrics: M values, none of them negative. A value that is not a finite number counts 200.
        first: Values to compare with; a metric that has always been zero is not in it.
        higher_is_better: Names of the metrics that should be large.
    """
    total = 0.0
    for name, value in metrics.items():
        sign = -1 if name in higher_is_better else 1
        begin = first.get(name, 1.0)
        total += sign * 200 * (value - begin) / (abs(value) + abs(begin)) if math.isfinite(value) else 200
    return total / len(metrics)
