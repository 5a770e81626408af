"""Forty binary attributes: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryF1Score

from experiments.datasets.layouts.celeba import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

TASKS = tuple(name.lower() for name in ATTRIBUTES)
HIGHER_IS_BETTER = frozenset(f"{task}/f1" for task in TASKS)


class F1OfLogits(BinaryF1Score):
    """F1 of predictions whose probability is above 0.5, from true and false positives over all samples.

    `BinaryF1Score` treats logits as probabilities whenever all of a batch lie in 0..1. Without any positive, in labels and
    predictions, F1 is 0.

    Source:
        The FAMO repository. Differs: no 1e-8 is added to each denominator.
    """

    def __init__(self) -> None:
        super().__init__(validate_args=False)  # checks would take as long as the metric itself

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch. Shapes (B,) and (B,)."""
        super().update((logits > 0).long(), labels)


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return labels by task, 0 or 1. Shape (B,)."""
    return dict(zip(TASKS, batch[1].long().unbind(1), strict=True))


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean binary cross-entropies over the batch.

    Every task has a separate call: if all losses came from one tensor, every gradient would pass through all 40 heads.

    Args:
        outputs: Logits by task. Shape (B,).
        batch: Images and labels (B, 40).

    Returns:
        Scalars by task.

    Source:
        The FAMO repository. Differs: computed from logits, where the repository cuts logarithms of probabilities at -100.
    """
    return {
        task: binary_cross_entropy_with_logits(outputs[task], labels)
        for task, labels in zip(TASKS, batch[1].unbind(1), strict=True)
    }


def score(metrics: Mapping[str, float]) -> float:
    """Return minus the mean F1: the papers report the epoch with the highest mean F1 on validation."""
    return -sum(metrics.values()) / len(metrics)


def metrics() -> dict[str, Metric]:
    """Return a fresh F1 score (0..1) for each attribute."""
    return {f"{task}/f1": F1OfLogits() for task in TASKS}
