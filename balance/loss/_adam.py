"""Adam for one number per task, where tasks can miss steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ._checks import of_tasks, set_of_tasks

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

    def step(self, values: Tensor, present: Tensor | None, gradient: Tensor, lr: float, chosen: Tensor | None = None) -> None:
        """Take one step for some tasks, in place.

        Args:
            values: The numbers that are learned. Shape (K,).
            present: Indices of the tasks that may take the step; None for all. Shape (k,).
            gradient: Their gradient. Shape (k,).
            lr: Learning rate.
            chosen: Whether each of them takes the step; None: all do. Shape (k,).
        """
        before = [of_tasks(state, present) for state in (values, *self)]
        numbers, mean, mean_square, steps = before
        steps = steps + 1
        mean = torch.lerp(mean, gradient, 1 - BETA1)
        mean_square = torch.lerp(mean_square, gradient**2, 1 - BETA2)
        length = (mean_square / (1 - BETA2**steps)).sqrt_().add_(EPSILON).mul_(1 - BETA1**steps)
        numbers = torch.addcdiv(numbers, mean, length, value=-lr)
        for state, old, new in zip((values, *self), before, (numbers, mean, mean_square, steps), strict=True):
            set_of_tasks(state, present, new if chosen is None else torch.where(chosen, new, old))


def register_moments(rule: nn.Module, num_tasks: int) -> None:
    """Register the buffers ``mean``, ``mean_square`` and ``steps`` of a rule."""
    for name in Moments._fields:
        rule.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64, device="cpu"))
