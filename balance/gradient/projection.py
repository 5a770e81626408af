"""PCGrad and GradVac: conflicts repaired pair by pair, by projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from ..rules.generator import SeededGenerator
from ..rules.registry import gradient_balancers
from ..solvers.projection import aligned_weights, projected_weights
from ._host import solve

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array, Indices
    from ..types import Gramian, Weights

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
        return orders_of_visits(num_tasks, self.order, self.random)


@gradient_balancers.register(
    "gradvac",
    heads="unweighted",
    label="GradVac",
    paper="Wang et al. 2021, https://arxiv.org/abs/2010.05874",
    remedies=("conflict",),
    invariances=("rotation_equivariant", "scales_with_the_gradients", "linear_under_scaling"),
)
class GradVac(nn.Module):
    r"""Weights for which every task's gradient is first turned towards gradients with which its cosine is lower than usual.

    For each task i, v starts at :math:`g_i`. Then for every task j ≠ i in random order, with the cosine φ of v and
    :math:`g_j`, if φ is below its target :math:`\hat\varphi_{ij}`,

    .. math:: v \leftarrow v + \frac{\lVert v \rVert \bigl(\hat\varphi_{ij} \sqrt{1 - \varphi^2}
              - \varphi \sqrt{1 - \hat\varphi_{ij}^2}\bigr)}{\lVert g_j \rVert \sqrt{1 - \hat\varphi_{ij}^2}} \, g_j ,

    after which the cosine is :math:`\hat\varphi_{ij}`. In both cases the target moves to :math:`(1 - \beta) \hat\varphi_{ij}
    + \beta \varphi`. The direction is the sum of all v. Targets start at 0, so that the first step is PCGrad's. As there, the
    rule is a function of the Gramian, of the orders and of the targets.

    No weight is below 1. One task gets weight 1. A gradient that is zero, or that cancels to 1e-6 of its length, has no
    cosines: its targets stay. Targets above :math:`1 - 5 \cdot 10^{-13}` count as that number.

    Args:
        num_tasks: Number of tasks, K.
        beta: β in 0..1, the part of a new cosine in its target.
        order: ``"random"``: new orders at each step for each task. ``"fixed"``: ascending.
        seed: Seed of the orders; the generator is saved in the state_dict.

    Raises:
        ValueError: If ``beta`` is out of range.

    Source:
        Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models",
        ICLR 2021, algorithm 1, on whole gradients. As in LibMTL and TorchJD, all targets move at every step. Differs: no
        epsilons in the denominators.
    """

    targets: Tensor

    def __init__(self, num_tasks: int, beta: float = 0.5, order: Order = "random", seed: int = 0) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta of 'gradvac' must be in 0..1, but got {beta}.")
        self.beta = beta
        self.order = order
        self.random = SeededGenerator(seed)
        self.register_buffer("targets", torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device="cpu"))

    def forward(self, gramian: Gramian, present: Tensor | None = None) -> Weights:
        """Return the weights of the task gradients, in sum convention, and move the targets.

        Args:
            gramian: Inner products of the present tasks' gradients. Shape (K, K), positive semi-definite.
            present: Indices of those tasks; None for all.

        Returns:
            Weights, each at least 1. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
        """

        def weights(G: Array) -> Array:
            tasks = np.arange(len(G)) if present is None else present.cpu().numpy()
            places = np.ix_(tasks, tasks)
            targets = self.targets.cpu().numpy().copy()
            orders = orders_of_visits(len(G), self.order, self.random)
            total, targets[places] = aligned_weights(G, orders, targets[places], self.beta)
            self.targets.copy_(torch.from_numpy(targets))
            return total

        return solve(weights, gramian)


def orders_of_visits(num_tasks: int, order: Order, random: SeededGenerator) -> Indices:
    """Return for every task the order in which it visits the other tasks. Shape (K, K - 1)."""
    if order == "random":
        return random.orders_of_others(num_tasks).numpy()
    tasks = np.tile(np.arange(num_tasks), (num_tasks, 1))
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
    return projected_weights(gramian, orders)
