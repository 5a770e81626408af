"""Conflicts repaired pair by pair, by projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from balance.gradient._host import solve
from balance.rules.generator import SeededGenerator
from balance.rules.registry import gradient_balancers

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
    r"""Weights for which every task's gradient is first projected off those that it conflicts with.

    For each task i, :math:`v \leftarrow g_i`; then for the other tasks j in random order, where
    :math:`\langle v, g_j \rangle < 0`,

    .. math:: v \leftarrow v - \frac{\langle v, g_j \rangle}{\lVert g_j \rVert^2} g_j ,

    and the direction is the sum of the v. Every v is a combination of task gradients, so the rule is a function of the
    Gramian and the orders: it keeps K coefficient vectors instead of K gradients.

    The weights are at least 1, and are 1 where no two gradients conflict, at K = 1 and at G = 0. For two tasks the direction
    conflicts with neither; for more it can. A zero gradient conflicts with nobody. Duplicate gradients need no care.

    Args:
        order: ``"random"``: orders drawn anew at each step for each task; ``"fixed"``: ascending.
        seed: Seed of the orders; the generator is saved in the state_dict.

    Source:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. As there, and unlike several
        published codes, a gradient is never projected off itself, and the direction is the sum.
    """

    def __init__(self, order: Order = "random", seed: int = 0) -> None:
        super().__init__()
        self.order = order
        self.random = SeededGenerator(seed)

    def forward(self, gramian: Gramian) -> Weights:
        """Weights of the task gradients, in sum convention.

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
            everyone = np.tile(np.arange(num_tasks), (num_tasks, 1))
        else:
            everyone = self.random.permutations(num_tasks, num_tasks).numpy()
        others: Indices = everyone[everyone != np.arange(num_tasks)[:, None]].reshape(num_tasks, num_tasks - 1)
        return others


def project_conflicts(gramian: Array, orders: Indices) -> Array:
    """PCGrad's weights for given orders; all tasks take their t-th projection together.

    Args:
        gramian: Shape (K, K).
        orders: Row i lists the other tasks in the order in which task i meets them. Shape (K, K - 1).

    Returns:
        Shape (K,).
    """
    K = len(gramian)
    tasks = np.arange(K)
    coefficients = np.eye(K)  # row i: v of task i as a combination of the task gradients
    products = gramian.copy()  # row i: inner products of that v with every task gradient
    squared_norms = np.diag(gramian)
    for met in orders.T:
        product = products[tasks, met]
        conflict = (product < 0) & (squared_norms[met] > 0)
        step = np.where(conflict, product / np.where(conflict, squared_norms[met], 1), 0)
        coefficients[tasks, met] -= step
        products -= step[:, None] * gramian[met]
    weights: Array = coefficients.sum(axis=0)
    return weights
