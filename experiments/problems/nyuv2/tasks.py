"""The three tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.problems.dense.losses import depth_loss, normal_loss, present, segmentation_loss
from experiments.problems.dense.metrics import HIGHER_IS_BETTER, depth_metrics, normal_metrics, segmentation_metrics

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch
    from experiments.problems.dense.masks import Rules

__all__ = ["CLASSES", "HIGHER_IS_BETTER", "TASKS", "losses", "metrics", "targets"]

TASKS = ("segmentation", "depth", "normals")
CLASSES = (
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "painting",
    "sofa",
    "table",
    "tv",
    "wall",
    "window",
)


def targets(batch: Batch) -> dict[str, Tensor]:
    """What each task should answer.

    Classes (B, H, W), -1 for none; depth in metres (B, 1, H, W), 0 for none; unit normals (B, 3, H, W), 0 for none.
    """
    _, label, depth, normal = batch
    return {"segmentation": label, "depth": depth, "normals": normal}


def losses(outputs: dict[str, Tensor], batch: Batch, protocol: Rules = "sound") -> dict[str, Tensor]:
    """Mean losses over the pixels that count; a task without one in this batch is left out."""
    answers = targets(batch)
    return present(
        {
            "segmentation": segmentation_loss(outputs["segmentation"], answers["segmentation"]),
            "depth": depth_loss(outputs["depth"], answers["depth"]),
            "normals": normal_loss(outputs["normals"], answers["normals"], protocol),
        }
    )


def metrics(protocol: Rules = "sound") -> dict[str, Metric]:
    """The nine metrics of the papers, fresh, in the order of their tables: shares in 0..1, metres, a ratio, degrees."""
    return {**segmentation_metrics(len(CLASSES)), **depth_metrics(protocol), **normal_metrics(protocol)}
