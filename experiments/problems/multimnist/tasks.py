"""The two tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

TASKS = ("left", "right")
HIGHER_IS_BETTER = frozenset({"left/accuracy", "right/accuracy"})


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return labels, which have the highest probability after smoothing too. Shape (B,)."""
    return {"left": batch[1].argmax(dim=1), "right": batch[2].argmax(dim=1)}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean cross-entropies with smoothed labels; the right one is multiplied by the imbalance."""
    _, left, right, imbalance = batch
    return {
        "left": cross_entropy(outputs["left"], left),
        "right": (imbalance * cross_entropy(outputs["right"], right, reduction="none")).mean(),
    }


def metrics() -> dict[str, Metric]:
    """Return fresh accuracies over samples, in 0..1."""
    return {f"{task}/accuracy": MulticlassAccuracy(10, average="micro") for task in TASKS}
