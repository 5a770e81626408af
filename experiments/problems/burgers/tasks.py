"""The three tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

from experiments.problems.burgers.data import BOUNDARY, INITIAL, INTERIOR

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.problems.base import Batch

TASKS = ("residual", "boundary", "initial")
KINDS = dict(zip(TASKS, (INTERIOR, BOUNDARY, INITIAL), strict=True))
HIGHER_IS_BETTER: frozenset[str] = frozenset()
SINGLE_TASK_BASELINES = False


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return by task: the exact solution (B,), and for the two conditions NaN at points of other kinds."""
    _, kinds, exact = batch
    nan = torch.full_like(exact, torch.nan)
    conditions = {task: torch.where(kinds == KINDS[task], exact, nan) for task in ("boundary", "initial")}
    return {"residual": exact, **conditions}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean squares over the points of each kind; a task without points in the batch is absent."""
    _, kinds, exact = batch
    errors = {
        "residual": outputs["residual"][:, 1],
        "boundary": outputs["boundary"] - exact,
        "initial": outputs["initial"] - exact,
    }
    own = {task: error[kinds == KINDS[task]] for task, error in errors.items()}
    return {task: error.square().mean() for task, error in own.items() if len(error)}


def count_points(batch: Batch) -> dict[str, int]:
    """Return the number of points of each kind."""
    return {task: int((batch[1] == kind).sum()) for task, kind in KINDS.items()}


class RelativeError(Metric):
    """Length of the error of the solution, relative to the length of the exact solution."""

    higher_is_better = False
    error: Tensor
    length: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("error", "length"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, fields: Tensor, exact: Tensor) -> None:
        """Add points. Shape (B, 2), the first column the solution, and (B,)."""
        self.error += (fields[:, 0] - exact).double().square().sum()
        self.length += exact.double().square().sum()

    def compute(self) -> Tensor:
        """Return the relative error."""
        return (self.error / self.length).sqrt()


class ConditionError(Metric):
    """Root mean squared error at the points of a condition, where the target is not NaN."""

    higher_is_better = False
    square: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("square", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add points. Shape (B,) each."""
        errors = (values - targets)[~targets.isnan()].double()
        self.square += errors.square().sum()
        self.count += len(errors)

    def compute(self) -> Tensor:
        """Return the root of the mean square."""
        return (self.square / self.count).sqrt()


def metrics() -> dict[str, Metric]:
    """Return fresh metrics: the relative error of the solution, and the errors of the two conditions."""
    return {
        "residual/relative_l2": RelativeError(),
        "boundary/rmse": ConditionError(),
        "initial/rmse": ConditionError(),
    }
