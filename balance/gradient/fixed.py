"""Weights that ignore the gradients: mean, sum and random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ..rules.generator import SeededGenerator
from ..rules.registry import gradient_balancers
from ._host import solve

if TYPE_CHECKING:
    from ..types import Gramian, Weights

INVARIANCES = ("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients", "linear_under_scaling")


@gradient_balancers.register("mean", heads="unweighted", label="Mean", invariances=INVARIANCES)
def mean(gramian: Gramian) -> Weights:
    """Return the weight 1/K for every task: the direction is the mean of the task gradients.

    Args:
        gramian: Inner products of the task gradients; only its shape matters. Shape (K, K).

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix.

    Source:
        The baseline of every paper, as a gradient balancer. Task-specific heads keep weight 1.
    """
    return solve(lambda G: np.full(len(G), 1 / len(G)), gramian)


@gradient_balancers.register("sum", heads="unweighted", label="Sum", invariances=INVARIANCES)
def sum_(gramian: Gramian) -> Weights:
    """Return the weight 1 for every task: the direction is the gradient of the sum of the losses.

    Args:
        gramian: Inner products of the task gradients; only its shape matters. Shape (K, K).

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix.

    Source:
        The baseline of every paper, as a gradient balancer.
    """
    return solve(lambda G: np.ones(len(G)), gramian)


@gradient_balancers.register(
    "random",
    heads="unweighted",
    label="RGW",
    paper="Lin et al. 2021, https://arxiv.org/abs/2111.10603",
    remedies=("local minima",),
    invariances=("rotation_equivariant", "scales_with_the_gradients", "linear_under_scaling"),
)
class RandomGradientWeighting(nn.Module):
    """Random weights, drawn at each step: a softmax of standard normal numbers.

    The weights are positive and sum to 1, and do not depend on the gradients. Absent tasks take no part in the softmax. One
    task gets weight 1.

    Args:
        seed: Seed of the draws; the generator is saved in the state_dict.

    Source:
        Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022, algorithm 2. Differs: draws come from a
        separate generator, on the host.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = SeededGenerator(seed)

    def forward(self, gramian: Gramian) -> Weights:
        """Return random weights.

        Args:
            gramian: Inner products of the task gradients; only its shape matters. Shape (K, K).

        Returns:
            Positive weights that sum to one. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
        """
        return solve(lambda G: self.random.normal(len(G)).softmax(dim=0).numpy(), gramian)
