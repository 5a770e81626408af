"""The hundred tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import mse_loss
from torchmetrics import MeanSquaredError

from experiments.problems.regression100.data import OUTPUTS

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

TASKS = tuple(f"y{k:02d}" for k in range(OUTPUTS))
HIGHER_IS_BETTER: frozenset[str] = frozenset()


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return by task the targets of the batch. Shape (B,)."""
    return dict(zip(TASKS, batch[1].unbind(dim=1), strict=True))


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean squared errors over the batch."""
    return {task: mse_loss(outputs[task], target) for task, target in targets(batch).items()}


def metrics() -> dict[str, Metric]:
    """Return fresh mean squared errors over samples."""
    return {f"{task}/mse": MeanSquaredError() for task in TASKS}
