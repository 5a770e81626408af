"""Task losses: means over the pixels that count.

A batch in which a task has no such pixel has no loss of that task: the functions return None, and `present` leaves the task out
of the step, so that a balancer takes it for absent. A loss of zero instead would end every method that takes its logarithm, and
would count as perfect in those that remember how losses fell. The published codes divide by zero there.

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

    from experiments.problems.dense.masks import Rules


def segmentation_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor | None:
    """Cross-entropy, in nats, over the pixels with a class.

    Args:
        log_probabilities: Shape (B, C, H, W).
        labels: 0 to C - 1, or -1 for none. Shape (B, H, W).
    """
    return nll_loss(log_probabilities, labels, ignore_index=IGNORED) if valid_labels(labels).any() else None


def depth_loss(depth: Tensor, target: Tensor) -> Tensor | None:
    """Absolute error, in the unit of the depth, over the pixels with a depth. Both of shape (B, 1, H, W)."""
    return masked_mean((depth - target).abs(), valid_depth(target))


def normal_loss(normals: Tensor, target: Tensor, protocol: Rules = "sound") -> Tensor | None:
    """One minus the cosine, over the pixels with a normal.

    The target is taken as it is: where resizing has blended two normals it is shorter than one, and weighs less.

    Args:
        normals: Of length one. Shape (B, 3, H, W).
        target: Shape (B, 3, H, W).
        protocol: Which pixels have a normal, see `valid_normals`.
    """
    return masked_mean(1 - (normals * target).sum(dim=1), valid_normals(target, protocol))


def masked_mean(values: Tensor, valid: Tensor) -> Tensor | None:
    """Mean of the values that count; None if none does. Two tensors of one shape."""
    count = valid.sum()
    return values.masked_fill(~valid, 0).sum() / count if count else None


def present(losses: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The tasks that have a loss in this batch."""
    return {task: loss for task, loss in losses.items() if loss is not None}
