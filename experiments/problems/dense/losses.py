"""Task losses: means over the pixels that count.

Where a task has no such pixel in a batch the functions return None, and `present` leaves the task out of the step, as absent. A
loss of zero would end every method that takes its logarithm, and would count as perfect in methods that use past losses. The
published codes divide by zero there.

Source:
    Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019, section 4, and its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import nll_loss

from experiments.problems.dense.masks import IGNORED, valid_depth, valid_labels, valid_normals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from experiments.problems.base import ProtocolName


def segmentation_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor | None:
    """Return the cross-entropy, in nats, over the pixels with a class.

    Args:
        log_probabilities: Shape (B, C, H, W).
        labels: 0 to C - 1, or -1 for none. Shape (B, H, W).

    Returns:
        A scalar; None if no pixel has a class.
    """
    return nll_loss(log_probabilities, labels, ignore_index=IGNORED) if valid_labels(labels).any() else None


def depth_loss(depth: Tensor, target: Tensor) -> Tensor | None:
    """Return the mean absolute error, in the unit of the depth, over the pixels with a depth. Shape (B, 1, H, W) twice."""
    return masked_mean((depth - target).abs(), valid_depth(target))


def normal_loss(normals: Tensor, target: Tensor, protocol: ProtocolName = "sound") -> Tensor | None:
    """Return one minus the cosine, over the pixels with a normal.

    The target is not scaled to length one: where resizing has blended two normals it is shorter, and weighs less.

    Args:
        normals: Vectors of length one. Shape (B, 3, H, W).
        target: Shape (B, 3, H, W).
        protocol: Definition of the pixels with a normal, see `valid_normals`.

    Returns:
        A scalar; None if no pixel has a normal.
    """
    return masked_mean(1 - (normals * target).sum(dim=1), valid_normals(target, protocol))


def masked_mean(values: Tensor, valid: Tensor) -> Tensor | None:
    """Return the mean of the values that count; None if none does. Two tensors of one shape."""
    count = valid.sum()
    return values.masked_fill(~valid, 0).sum() / count if count else None


def present(losses: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the losses of the tasks that have one in this batch."""
    return {task: loss for task, loss in losses.items() if loss is not None}
