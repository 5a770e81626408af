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
    """What each task should answer. Shape (B,)."""
    return dict(zip(TASKS, batch[1].unbind(dim=1), strict=True))


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Mean squared errors over the batch."""
    return {task: mse_loss(outputs[task], answer) for task, answer in targets(batch).items()}


def metrics() -> dict[str, Metric]:
    """Fresh mean squared errors over samples."""
    return {f"{task}/mse": MeanSquaredError() for task in TASKS}
