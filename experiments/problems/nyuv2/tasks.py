"""The three tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.datasets.layouts.dense import NYUV2
from experiments.problems.dense.losses import depth_loss, normal_loss, present, segmentation_loss
from experiments.problems.dense.masks import valid_depth, valid_labels, valid_normals
from experiments.problems.dense.metrics import HIGHER_IS_BETTER, depth_metrics, normal_metrics, segmentation_metrics

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch, ProtocolName

__all__ = ["HIGHER_IS_BETTER", "TASKS", "counts", "losses", "metrics", "targets"]

TASKS = ("segmentation", "depth", "normals")


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return by task: classes (B, H, W), -1 = none, depth in metres (B, 1, H, W), unit normals (B, 3, H, W), 0 = none."""
    _, label, depth, normal = batch
    return {"segmentation": label, "depth": depth, "normals": normal}


def losses(outputs: dict[str, Tensor], batch: Batch, protocol: ProtocolName = "sound") -> dict[str, Tensor]:
    """Return mean losses over the pixels that count; a task without such a pixel in this batch is left out."""
    expected = targets(batch)
    return present(
        {
            "segmentation": segmentation_loss(outputs["segmentation"], expected["segmentation"]),
            "depth": depth_loss(outputs["depth"], expected["depth"]),
            "normals": normal_loss(outputs["normals"], expected["normals"], protocol),
        }
    )


def counts(batch: Batch, protocol: ProtocolName = "sound") -> dict[str, int]:
    """Return by task the number of pixels that count."""
    expected = targets(batch)
    return {
        "segmentation": int(valid_labels(expected["segmentation"]).sum()),
        "depth": int(valid_depth(expected["depth"]).sum()),
        "normals": int(valid_normals(expected["normals"], protocol).sum()),
    }


def metrics(protocol: ProtocolName = "sound") -> dict[str, Metric]:
    """Return the nine metrics of the papers, fresh, in the order of their tables: shares in 0..1, metres, a ratio, degrees."""
    return {**segmentation_metrics(NYUV2.num_classes), **depth_metrics(protocol), **normal_metrics(protocol)}
