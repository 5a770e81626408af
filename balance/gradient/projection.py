"""PCGrad: conflicts repaired pair by pair, by projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from balance.gradient._host import solve
from balance.rules.generator import SeededGenerator
from balance.rules.registry import gradient_balancers
from balance.solvers.projection import project_in_turn

if TYPE_CHECKING:
    from balance.solvers.linear_algebra import Array, Indices
    from balance.types import Gramian, Weights

Order = Literal["random", "fixed"]


@gradient_balancers.register(
    "pcgrad",
    heads="unweighted",
    label="PCGrad",
    paper="Yu et al. 2020, https://arxiv.org/abs/2001.06782",
    remedies=("conflict",),
    invariances=("rotation_equivariant", "scales_with_the_gradients", "linear_under_scaling"),
)
class PCGrad(nn.Module):
    r"""Weights for which every task's gradient is first projected off the gradients that it conflicts with.

    For each task i, v starts at :math:`g_i`. Then for every task j ≠ i in random order, if
    :math:`\langle v, g_j \rangle < 0`,

    .. math:: v \leftarrow v - \frac{\langle v, g_j \rangle}{\lVert g_j \rVert^2} g_j ,

    and the direction is the sum of all v. Every v is a combination of task gradients. So the rule is a function of the Gramian
    and of the orders, and computes K coefficient vectors instead of K gradients.

    The weights are at least 1, and are 1 if no two gradients conflict, at K = 1 and at G = 0. For two tasks the direction
    conflicts with neither; for more tasks it can. A zero gradient conflicts with no gradient.

    Args:
        order: ``"random"``: new orders at each step for each task. ``"fixed"``: ascending.
        seed: Seed of the orders; the generator is saved in the state_dict.

    Source:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. As in the paper, and unlike several
        published codes, a gradient is never projected off itself, and the direction is the sum.
    """

    def __init__(self, order: Order = "random", seed: int = 0) -> None:
        super().__init__()
        self.order = order
        self.random = SeededGenerator(seed)

    def forward(self, gramian: Gramian) -> Weights:
        """Return the weights of the task gradients, in sum convention.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.

        Returns:
            Weights, each at least 1. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
        """
        return solve(lambda G: project_conflicts(G, self._orders(len(G))), gramian)

    def _orders(self, num_tasks: int) -> Indices:
        if self.order == "fixed":
            tasks = np.tile(np.arange(num_tasks), (num_tasks, 1))
        else:
            tasks = self.random.permutations(num_tasks, num_tasks).numpy()
        orders: Indices = tasks[tasks != np.arange(num_tasks)[:, None]].reshape(num_tasks, num_tasks - 1)
        return orders


def project_conflicts(gramian: Array, orders: Indices) -> Array:
    """Return PCGrad's weights for given orders; the t-th projections of all tasks are computed in one operation.

    Args:
        gramian: Shape (K, K).
        orders: Row i lists the tasks other than i in the order of the projections. Shape (K, K - 1).

    Returns:
        Shape (K,).
    """
    K = len(gramian)
    weights: Array = project_in_turn(gramian, orders.T, np.arange(K), np.eye(K)).sum(axis=0)
    return weights
