"""Rules with weights that descend on gradients of independent batches: SDMGrad and MoDo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..rules.registry import gradient_balancers
from ..solvers.simplex import project_on_simplex
from ._host import solve
from ._state import indices, read, share_of, vector, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights


@gradient_balancers.register(
    "sdmgrad",
    heads="unweighted",
    label="SDMGrad",
    paper="Xiao et al. 2023, https://arxiv.org/abs/2305.18409",
    remedies=("conflict",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
class SDMGrad(nn.Module):
    r"""Weights of the shortest vector near the mean gradient, found by a few steps from the weights of the last step.

    .. math:: d = \frac{\sum_k w_k g_k + \lambda \bar g}{1 + \lambda}, \qquad
              \min_w \tfrac12 \Bigl\lVert \sum_k w_k g_k + \lambda \bar g \Bigr\rVert^2 \text{ on the simplex}

    The gradient of this problem at w is :math:`A (w + \lambda / K)`. The entry :math:`A_{ij}` is the inner product of gradient
    i on a second batch and gradient j on a third batch. The g of d are from the first batch. With independent batches the
    estimate is unbiased. A is divided by the square of the mean length of the gradients, so that ``lr`` does not depend on
    their scale. Each step of the balancer takes ``steps`` steps of gradient descent with momentum, and projects w on the
    simplex after each.

    λ = 0 approaches ``mgda``; large λ gives the mean gradient. All weights are equal before the first step, and keep their
    values while all gradients are zero. One task has weight 1. The present tasks keep their sum of weights while others are
    absent.

    Args:
        num_tasks: Number of tasks, K.
        lam: λ ≥ 0.
        lr: Learning rate of w, positive.
        steps: Steps of descent at each step of the balancer, at least 1.
        momentum: In 0..1, 1 excluded.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Xiao, Ban & Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms", NeurIPS 2023,
        algorithm 1. The number of steps, momentum and division are from the authors' code, ``lr`` from LibMTL (10 in the code).
        Differs: no epsilon in the divisor.
    """

    weights: Tensor

    def __init__(self, num_tasks: int, lam: float = 0.3, lr: float = 5.0, steps: int = 20, momentum: float = 0.5) -> None:
        super().__init__()
        if not lam >= 0:
            raise ValueError(f"lam of 'sdmgrad' must not be negative, but got {lam}.")
        if not lr > 0:
            raise ValueError(f"lr of 'sdmgrad' must be positive, but got {lr}.")
        if steps < 1:
            raise ValueError(f"steps of 'sdmgrad' must be at least 1, but got {steps}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum of 'sdmgrad' must be in 0..1, 1 excluded, but got {momentum}.")
        self.lam, self.lr, self.steps, self.momentum = lam, lr, steps, momentum
        self.register_buffer("weights", vector(num_tasks, 1 / num_tasks))

    def forward(self, gramian: Gramian, cross: Tensor | None = None, present: Tensor | None = None) -> Weights:
        """Return the weights of the task gradients on the first batch.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
            cross: Inner products of the gradients on a second batch (rows) and a third batch (columns). None: ``gramian``, as
                if all batches were the same. Shape (K, K).
            present: Indices of the tasks; None for all.

        Returns:
            Non-negative weights that sum to one. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix, or ``cross`` does not have its shape.
        """
        tasks = indices(present, self.weights)
        return solve(lambda G: self._step(_products(G, cross), tasks), gramian)

    def _step(self, A: Array, tasks: Tensor) -> Array:
        w, total = share_of(read(self.weights, tasks))
        length = float(np.sqrt(np.maximum(A.diagonal(), 0)).mean())
        if length > 0:
            w = self._descend(A / length / length, w)
        write(self.weights, tasks, total * w)
        return (w + self.lam / len(w)) / (1 + self.lam)

    def _descend(self, A: Array, w: Array) -> Array:
        towards_mean = self.lam * A.mean(axis=1)
        velocity = np.zeros(len(w))
        for _ in range(self.steps):
            velocity = self.momentum * velocity + A @ w + towards_mean
            w = project_on_simplex(w - self.lr * velocity)
        return w


@gradient_balancers.register(
    "modo",
    heads="unweighted",
    label="MoDo",
    paper="Chen et al. 2023, https://arxiv.org/abs/2305.20057",
    remedies=("conflict",),
    invariances=("permutation_equivariant", "rotation_equivariant"),
)
class MoDo(nn.Module):
    r"""Weights that take one step of projected gradient descent on the length of the direction, at each step.

    .. math:: w \leftarrow \Pi_\Delta \bigl( w - \gamma (A w + \rho w) \bigr), \qquad d = \sum_k w_k g_k

    The entry :math:`A_{ij}` is the inner product of gradient i on a second batch and gradient j on a third batch. The g of d
    are from the first batch. With independent batches the step is unbiased. All weights are equal before the first step, and
    keep their values while they are equal and all gradients are zero. One task has weight 1. The step depends on the scale of
    the gradients: short gradients hardly move the weights. The present tasks keep their sum of weights while others are absent.

    Args:
        num_tasks: Number of tasks, K.
        lr: γ, positive.
        rho: ρ ≥ 0, the pull towards equal weights.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Chen, Fernando, Ying & Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
        Conflict-Avoidance", NeurIPS 2023, algorithm 1. Defaults are from LibMTL. Differs: the direction has the weights
        after the step, as in LibMTL and TorchJD.
    """

    weights: Tensor

    def __init__(self, num_tasks: int, lr: float = 1e-3, rho: float = 0.1) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr of 'modo' must be positive, but got {lr}.")
        if not rho >= 0:
            raise ValueError(f"rho of 'modo' must not be negative, but got {rho}.")
        self.lr, self.rho = lr, rho
        self.register_buffer("weights", vector(num_tasks, 1 / num_tasks))

    def forward(self, gramian: Gramian, cross: Tensor | None = None, present: Tensor | None = None) -> Weights:
        """Return the weights of the task gradients on the first batch.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
            cross: Inner products of the gradients on a second batch (rows) and a third batch (columns). None: ``gramian``, as
                if all batches were the same. Shape (K, K).
            present: Indices of the tasks; None for all.

        Returns:
            Non-negative weights that sum to one. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix, or ``cross`` does not have its shape.
        """
        tasks = indices(present, self.weights)
        return solve(lambda G: self._step(_products(G, cross), tasks), gramian)

    def _step(self, A: Array, tasks: Tensor) -> Array:
        w, total = share_of(read(self.weights, tasks))
        w = project_on_simplex(w - self.lr * (A @ w + self.rho * w))
        write(self.weights, tasks, total * w)
        return w


def _products(gramian: Array, cross: Tensor | None) -> Array:
    if cross is None:
        return gramian
    if cross.shape != gramian.shape or not cross.isfinite().all():
        raise ValueError(f"cross must be finite with shape {gramian.shape}, but got {tuple(cross.shape)}: {cross}.")
    A: Array = cross.detach().to("cpu", torch.float64).numpy()
    return A
