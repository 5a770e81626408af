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
    """F1 of the answers whose probability is above 0.5, from true and false positives over all samples.

    `BinaryF1Score` takes logits for probabilities whenever all of a batch lie in 0..1. Without any positive, in labels and
    answers, F1 is 0.

    Source:
        As in the FAMO repository, without the 1e-8 that it adds to each denominator.
    """

    def __init__(self) -> None:
        super().__init__(validate_args=False)  # checks that would take as long as the metric itself; labels are 0 or 1

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch. Shapes (B,) and (B,)."""
        super().update((logits > 0).long(), labels)


def targets(batch: Batch) -> dict[str, Tensor]:
    """Labels by task, 0 or 1. Shape (B,)."""
    return dict(zip(TASKS, batch[1].long().unbind(1), strict=True))


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Mean binary cross-entropies over the batch.

    One call for each task, not one for all: of a loss that came out of a common tensor every gradient would run through all
    40 heads.

    Source:
        As in the FAMO repository. Differs: of logits, where that takes logarithms of probabilities and cuts these at -100.
    """
    return {
        task: binary_cross_entropy_with_logits(outputs[task], labels)
        for task, labels in zip(TASKS, batch[1].unbind(1), strict=True)
    }


def score(found: Mapping[str, float]) -> float:
    """Minus the mean F1: the epoch in which it is largest on validation is the one that the papers report."""
    return -sum(found.values()) / len(found)


def metrics() -> dict[str, Metric]:
    """A fresh F1 score (0..1) for each attribute."""
    return {f"{task}/f1": F1OfLogits() for task in TASKS}
