"""Adam for one number per task, where tasks can miss steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Moments(NamedTuple):
    """State of Adam, which an absent task keeps: buffers of the rule, changed in place.

    Attributes:
        mean: Average of the gradients. Shape (K,).
        mean_square: Average of their squares. Shape (K,).
        steps: Number of steps of each task. Shape (K,).
    """

    mean: Tensor
    mean_square: Tensor
    steps: Tensor

    def step(self, values: Tensor, tasks: Tensor | slice, gradient: Tensor, lr: float, chosen: Tensor | None = None) -> None:
        """Take one step for some tasks, in place.

        Args:
            values: The numbers that are learned. Shape (K,).
            tasks: Index of the tasks that may take the step.
            gradient: Their gradient. Shape (k,).
            lr: Learning rate.
            chosen: Whether each of them takes the step; None: all do. Shape (k,).
        """
        steps = self.steps[tasks] + 1
        mean = self.mean[tasks] + (1 - BETA1) * (gradient - self.mean[tasks])
        mean_square = self.mean_square[tasks] + (1 - BETA2) * (gradient**2 - self.mean_square[tasks])
        unbiased, unbiased_square = mean / (1 - BETA1**steps), mean_square / (1 - BETA2**steps)
        moved = values[tasks] - lr * unbiased / (unbiased_square.sqrt() + EPSILON)
        for state, new in zip((values, *self), (moved, mean, mean_square, steps), strict=True):
            state[tasks] = new if chosen is None else torch.where(chosen, new, state[tasks])


def register_moments(rule: nn.Module, num_tasks: int) -> None:
    """Register the buffers ``mean``, ``mean_square`` and ``steps`` of a rule."""
    for name in Moments._fields:
        rule.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64, device="cpu"))
