"""The two tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.problems.dense import metrics as dense
from experiments.problems.dense.losses import depth_loss, present, segmentation_loss

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch
    from experiments.problems.dense.masks import Rules

TASKS = ("segmentation", "depth")
NUM_CLASSES = 7
HIGHER_IS_BETTER = frozenset({"segmentation/miou", "segmentation/pixel_accuracy"})


def targets(batch: Batch) -> dict[str, Tensor]:
    """What each task should answer: classes (B, H, W), -1 for none; inverse depth (B, 1, H, W), 0 for none."""
    _, label, depth = batch
    return {"segmentation": label, "depth": depth}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Mean losses over the pixels that count; a task without one in this batch is left out."""
    answers = targets(batch)
    return present(
        {
            "segmentation": segmentation_loss(outputs["segmentation"], answers["segmentation"]),
            "depth": depth_loss(outputs["depth"], answers["depth"]),
        }
    )


def metrics(protocol: Rules = "sound") -> dict[str, Metric]:
    """The four metrics of the papers, fresh, in the order of their tables.

    Shares are in 0..1. The relative error is a ratio, whose mean is far above one, since it is large where the inverse depth is
    near zero.
    """
    return {**dense.segmentation_metrics(NUM_CLASSES), **dense.depth_metrics(protocol)}
