"""ExcessMTL: larger weights for tasks that are far from their optimum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import logsumexp
from torch import nn

from ..rules.registry import gradient_balancers
from ._memory import GradientMemory
from ._state import indices, read, vector, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Direction, Jacobian


@gradient_balancers.register(
    "excess_mtl",
    sees="jacobian",
    heads="unweighted",
    label="ExcessMTL",
    paper="He et al. 2024, https://arxiv.org/abs/2402.02009",
    remedies=("training pace", "domination"),
    needs=("parameters",),
    invariances=("permutation_equivariant",),
)
class ExcessMTL(nn.Module):
    r"""Weights that grow with an estimate of how far each task is from its optimum.

    .. math:: S_k \leftarrow S_k + g_k^2, \qquad r_k = \sum_p \frac{g_{kp}^2}{\sqrt{S_{kp} + 10^{-7}}}, \qquad
              w_k \leftarrow w_k \exp(\eta\, r_k / r_k^0)

    entry by entry, and then w is scaled to sum K. :math:`r^0` is the excess at a task's first step, at which its weight stays.
    All weights are 1 at first, so that the first direction is the sum. A task whose gradient has always been zero has no
    :math:`r^0` yet, and its factor is 1. One task has weight 1. Weights are positive. An absent task keeps its weight, and the
    present tasks keep their sum while their weights in the direction sum to their number.

    The rule stores K gradients. It is no function of the Gramian.

    Args:
        num_tasks: Number of tasks, K.
        lr: η, positive.

    Raises:
        ValueError: If ``lr`` is not positive.

    Source:
        He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, algorithm 1, as in LibMTL. Differs from LibMTL: an
        excess of zero at the first step is no division by zero; heads get the plain sum, where LibMTL weights them. TorchJD's
        weights sum to 1, its η is 1, and its first step has the factor :math:`\exp(\eta r)` of the raw excess.
    """

    first_excess: Tensor
    log_weights: Tensor

    def __init__(self, num_tasks: int, lr: float = 1e-2) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr of 'excess_mtl' must be positive, but got {lr}.")
        self.lr = lr
        self.squares = GradientMemory(num_tasks, "excess_mtl")
        self.register_buffer("first_excess", vector(num_tasks, torch.nan))
        self.register_buffer("log_weights", vector(num_tasks))

    def forward(self, jacobian: Jacobian, present: Tensor | None = None) -> Direction:
        """Return the direction of one step.

        Args:
            jacobian: Rows are task gradients. Shape (K, P).
            present: Indices of the tasks; None for all.

        Returns:
            Shape (P,), dtype and device of ``jacobian``.

        Raises:
            ValueError: If ``jacobian`` is not a matrix, or P has changed.
        """
        squares = self.squares.like(jacobian)
        tasks = indices(present, self.log_weights)
        rows = tasks.to(squares.device)
        new = jacobian.to(squares).square()
        squares[rows] += new
        excess = (new / (squares[rows] + 1e-7).sqrt()).sum(dim=1, dtype=torch.float64).cpu().numpy()
        weights = self._weights(excess, tasks)
        return torch.from_numpy(weights).to(jacobian) @ jacobian

    def _weights(self, excess: Array, tasks: Tensor) -> Array:
        """Learn from the excess, and return weights that sum to their number. Shapes (K,), (K,) -> (K,)."""
        first = read(self.first_excess, tasks)
        known = ~np.isnan(first)
        factors = np.zeros(len(excess))
        factors[known] = self.lr * excess[known] / first[known]
        write(self.first_excess, tasks, np.where(~known & (excess > 0), excess, first))
        before = read(self.log_weights, tasks)
        shares = before + factors
        shares = shares - logsumexp(shares)
        write(self.log_weights, tasks, shares + logsumexp(before))
        weights: Array = len(shares) * np.exp(shares)
        return weights
