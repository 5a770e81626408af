"""The four tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

TASKS = ("left", "right", "sum", "reconstruction")
HIGHER_IS_BETTER = frozenset({"left/accuracy", "right/accuracy"})


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return by task: labels (B,), labels (B,), sums (B, 1), pixels (B, 64)."""
    _, left, right, clean = batch
    return {"left": left, "right": right, "sum": (left + right).float().unsqueeze(1), "reconstruction": clean}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean losses over the batch, on their raw scales."""
    expected = targets(batch)
    return {
        "left": cross_entropy(outputs["left"], expected["left"]),
        "right": cross_entropy(outputs["right"], expected["right"]),
        "sum": mse_loss(outputs["sum"], expected["sum"]),
        "reconstruction": mse_loss(outputs["reconstruction"], expected["reconstruction"]),
    }


def metrics() -> dict[str, Metric]:
    """Return fresh metrics over samples: accuracies in 0..1, errors in the unit of the task."""
    return {
        "left/accuracy": MulticlassAccuracy(10, average="micro"),
        "right/accuracy": MulticlassAccuracy(10, average="micro"),
        "sum/mae": MeanAbsoluteError(),
        "reconstruction/rmse": MeanSquaredError(squared=False),
    }
