"""Weights that ignore the losses: ls, constant, linear_schedule, stl, rlw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.generator import SeededGenerator
from ..rules.registry import loss_balancers
from ._checks import numbers_by_task, stays_on_device, weigh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses


@loss_balancers.register(
    "ls",
    label="LS",
    invariances=("loss_permutation_equivariant", "separable"),
)
@stays_on_device
def ls(losses: Losses) -> WeightedLosses:
    """Return the losses as they are: linear scalarisation with equal weights, which minimises their plain sum.

    Args:
        losses: Any finite values. Shape (K,).

    Returns:
        The losses. Shape (K,).

    Source:
        The baseline of every paper. As in Nash-MTL's code and LibMTL the sum, not the mean.
    """
    return losses


@loss_balancers.register(
    "constant",
    label="Constant",
    invariances=("loss_permutation_equivariant", "separable"),
)
class ConstantWeights:
    """Fixed weights: linear scalarisation, whose weights a sweep can tune.

    A task of weight zero is switched off. A gradient balancer then gets a zero gradient, and mgda gives it all weight.

    Args:
        num_tasks: Number of tasks, K.
        weights: One finite number for each task, not negative and not all zero; None for ones.

    Raises:
        ValueError: If ``weights`` is not such a list.

    Source:
        The weighted sum of losses, as tuned by hand or by a grid search in most papers before 2018.
    """

    stays_on_device = True

    def __init__(self, num_tasks: int, weights: list[float] | None = None) -> None:
        given = numbers_by_task(weights, num_tasks, "weights", "constant")
        self.weights = torch.ones(num_tasks, dtype=torch.float64, device="cpu") if given is None else given

    def __call__(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights.

        Args:
            losses: Any finite values, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        return weigh(losses, self.weights if present is None else self.weights[present])


@loss_balancers.register(
    "linear_schedule",
    label="Linear schedule",
    invariances=("loss_permutation_equivariant", "separable"),
)
class LinearSchedule(nn.Module):
    r"""Weights that go from one vector to another along a line, and then stay.

    .. math:: w(t) = a + \min(t / T, 1) \, (b - a)

    at step t, counted from 0. Steps from which a task is absent count for it too. One task follows its own line. A
    task of weight zero is switched off, as with constant weights.

    Args:
        num_tasks: Number of tasks, K.
        start: First weights a, finite and not negative, not all zero; None for ones.
        end: Last weights b, finite and not negative, not all zero; None for ones.
        steps: Number T of steps until the last weights, at least 1.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Curricula by hand, such as the warm-up of an auxiliary loss or the annealing of a KL term.
    """

    stays_on_device = True

    step: Tensor

    def __init__(
        self, num_tasks: int, start: list[float] | None = None, end: list[float] | None = None, steps: int = 1000
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps of 'linear_schedule' must be at least 1, but got {steps}.")
        ones = torch.ones(num_tasks, dtype=torch.float64, device="cpu")
        first = numbers_by_task(start, num_tasks, "start", "linear_schedule")
        last = numbers_by_task(end, num_tasks, "end", "linear_schedule")
        self.steps = steps
        self.start, self.end = ones if first is None else first, ones if last is None else last
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))  # steps so far

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights of this step, and count the step.

        Args:
            losses: Any finite values, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        weights = torch.lerp(self.start, self.end, min(int(self.step) / self.steps, 1.0))
        weighted = weigh(losses, weights if present is None else weights[present])
        self.step += 1
        return weighted


@loss_balancers.register(
    "stl",
    label="STL",
    invariances=("gradient_unchanged_by_scaling_a_loss", "separable"),
)
class SingleTask:
    """Single-task learning: one task keeps its loss, and every other task gets weight zero.

    Args:
        num_tasks: Number of tasks, K.
        main_task: Index of the task that is trained. A step from which it is absent trains nothing.

    Raises:
        ValueError: If ``main_task`` is not in 0..K-1.

    Source:
        The baseline against which delta_m is measured.
    """

    stays_on_device = True

    def __init__(self, num_tasks: int, main_task: int = 0) -> None:
        if not 0 <= main_task < num_tasks:
            raise ValueError(f"main_task of 'stl' must be in 0..{num_tasks - 1}, but got {main_task}.")
        self.weights = torch.zeros(num_tasks, dtype=torch.float64, device="cpu")
        self.weights[main_task] = 1

    def __call__(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply each loss by 0 or 1.

        Args:
            losses: Any finite values, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        return weigh(losses, self.weights if present is None else self.weights[present])


@loss_balancers.register(
    "rlw",
    label="RLW",
    paper="Lin et al. 2021, https://arxiv.org/abs/2111.10603",
    remedies=("local minima",),
    invariances=("separable",),
)
class RandomLossWeighting(nn.Module):
    r"""Random weights, drawn at each step: a softmax of standard normal numbers, times ``scale``.

    Positive, sum ``scale``, mean ``scale`` / K. Absent tasks take no part in the softmax.

    Args:
        scale: Sum of the weights: 1 as in the paper; K keeps the learning rate of an unweighted sum.
        seed: Seed of the draws; the generator is saved in the state_dict.

    Raises:
        ValueError: If ``scale`` is not positive.

    Source:
        Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022, section 3.1. Differs: draws come from a
        separate generator, on the host.
    """

    stays_on_device = True

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale of 'rlw' must be positive, but got {scale}.")
        self.scale = scale
        self.random = SeededGenerator(seed)

    def forward(self, losses: Losses) -> WeightedLosses:
        """Multiply the losses by random weights.

        Args:
            losses: Any finite values. Shape (K,).

        Returns:
            Shape (K,).
        """
        return weigh(losses, self.scale * self.random.normal(len(losses)).softmax(dim=0))
