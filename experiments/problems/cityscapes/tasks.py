"""The two tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.datasets.layouts.dense import CITYSCAPES
from experiments.problems.dense import metrics as dense
from experiments.problems.dense.losses import depth_loss, present, segmentation_loss
from experiments.problems.dense.masks import valid_depth, valid_labels

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch, ProtocolName

TASKS = ("segmentation", "depth")
HIGHER_IS_BETTER = frozenset({"segmentation/miou", "segmentation/pixel_accuracy"})


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return classes (B, H, W), -1 for none, and inverse depth (B, 1, H, W), 0 for none."""
    _, label, depth = batch
    return {"segmentation": label, "depth": depth}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean losses over the pixels that count; a task without such a pixel in this batch is left out."""
    expected = targets(batch)
    return present(
        {
            "segmentation": segmentation_loss(outputs["segmentation"], expected["segmentation"]),
            "depth": depth_loss(outputs["depth"], expected["depth"]),
        }
    )


def counts(batch: Batch) -> dict[str, int]:
    """Return by task the number of pixels that count."""
    expected = targets(batch)
    return {
        "segmentation": int(valid_labels(expected["segmentation"]).sum()),
        "depth": int(valid_depth(expected["depth"]).sum()),
    }


def metrics(protocol: ProtocolName = "sound") -> dict[str, Metric]:
    """Return the four metrics of the papers, fresh, in the order of their tables.

    Shares are in 0..1. The relative error is a ratio, whose mean is far above one, since it is large where the inverse depth is
    near zero.

    Args:
        protocol: ``sound`` or ``paper``, see `experiments.problems.dense.metrics`.

    Returns:
        Metrics by name.
    """
    return {**dense.segmentation_metrics(CITYSCAPES.num_classes), **dense.depth_metrics(protocol)}
