"""PCD, which serves a primary task first, and CR-MOGM, which smooths the weights of another rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..rules.compose import Smoothed
from ..rules.registry import gradient_balancers
from ..solvers.conflict_averse import nearest_at_level
from ..solvers.linear_algebra import STATIONARY, gradient_norms
from ._host import rounding, solve
from ._state import indices, read, vector, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights


@gradient_balancers.register(
    "pcd",
    heads="unweighted",
    label="PCD",
    paper="Priority-Constrained Descent 2026, https://arxiv.org/abs/2606.29521",
    remedies=("conflict", "gradient length"),
    invariances=("rotation_equivariant", "scales_with_the_gradients"),
)
class PCD(nn.Module):
    r"""Weights of the direction nearest to the primary task's gradient that gives every other task a share of progress.

    .. math:: \min_d \lVert d - \tilde g_p \rVert^2 \quad \text{subject to } \langle \tilde g_k, d \rangle
              \ge \tau \lVert \tilde g_k \rVert^2 \text{ for } k \ne p, \qquad \tilde g_k = g_k / \sqrt{\hat v_k}

    with the bias-corrected average :math:`\hat v_k` of the squared lengths, with decay β. The solution is then scaled to the
    length of :math:`g_p`. So constant factors of the other losses have no effect. The direction conflicts with none of the
    other tasks; it can conflict with the primary task.

    If no direction meets all conditions, as for opposite gradients of two other tasks, the direction is :math:`g_p`. Conditions
    count as impossible if the gradients of the other tasks cancel each other to 1e-6 of their lengths. If :math:`g_p` or the
    solution is zero, all weights are 0. A zero gradient of another task sets no condition. One task has weight 1. With
    dependent gradients the direction is unique, the weights need not be.

    Args:
        num_tasks: Number of tasks, K.
        primary: Index p of the primary task, which must be present at each step.
        beta: β in 0..1, 1 excluded.
        tau: τ in 0..1.

    Raises:
        ValueError: If an option is out of range.

    Source:
        "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective Optimization", TMLR
        2026, as described by TorchJD 0.18. Differs: any task can be the primary one; no epsilon next to v, so that the scale of
        the gradients does not matter.
    """

    squares: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, primary: int = 0, beta: float = 0.999, tau: float = 0.02) -> None:
        super().__init__()
        if not 0 <= primary < num_tasks:
            raise ValueError(f"primary of 'pcd' must be in 0..{num_tasks - 1}, but got {primary}.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta of 'pcd' must be in 0..1, 1 excluded, but got {beta}.")
        if not 0 <= tau <= 1:
            raise ValueError(f"tau of 'pcd' must be in 0..1, but got {tau}.")
        self.primary, self.beta, self.tau = primary, beta, tau
        self.register_buffer("squares", vector(num_tasks))
        self.register_buffer("steps", vector(num_tasks))

    def forward(self, gramian: Gramian, present: Tensor | None = None) -> Weights:
        """Return the weights of the task gradients.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
            present: Indices of the tasks; None for all.

        Returns:
            Non-negative weights. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix, or the primary task is absent.
        """
        tasks = indices(present, self.steps)
        is_primary = (tasks == self.primary).cpu().numpy()
        if not is_primary.any():
            raise ValueError(f"The primary task of 'pcd', number {self.primary}, must be present at each step.")
        p = int(is_primary.argmax())
        return solve(lambda G: self._step(G, p, tasks, rounding(gramian)), gramian)

    def _step(self, G: Array, p: int, tasks: Tensor, precision: float) -> Array:
        norms = gradient_norms(G)
        squares = self.beta * read(self.squares, tasks) + (1 - self.beta) * norms**2
        steps = read(self.steps, tasks) + 1
        write(self.squares, tasks, squares)
        write(self.steps, tasks, steps)
        weights = np.zeros(len(G))
        if norms[p] == 0:
            return weights
        typical = np.sqrt(squares / (1 - self.beta**steps))
        relative = np.divide(norms, typical, out=np.zeros(len(G)), where=norms > 0) / (norms[p] / typical[p])
        nonzero = norms.nonzero()[0]
        C = G[nonzero[:, None], nonzero] / norms[nonzero, None] / norms[nonzero]
        place = int((nonzero == p).argmax())
        x = priority_weights(C, place, self.tau * relative[nonzero], precision)
        weights[nonzero] = x * norms[p] / norms[nonzero]
        return weights


def priority_weights(C: Array, primary: int, levels: Array, precision: float) -> Array:
    """Return coefficients of unit gradients in the unit direction near the primary one that reaches a level for each other.

    The multipliers of the conditions are non-negative. Their combination is the shortest that lifts the primary gradient to all
    levels. This is a problem of non-negative least squares, solved by block pivoting.

    Args:
        C: Cosines between the gradients. Shape (K, K).
        primary: Index of the primary gradient.
        levels: Least inner product with each unit gradient, for a primary gradient of length 1. Shape (K,).
        precision: Relative error of the cosines.

    Returns:
        Coefficients of a combination of length 1, or all zero if the combination cancels. Shape (K,).
    """
    others = np.arange(len(C)) != primary
    weights = np.zeros(len(C))
    weights[primary] = 1
    bounds = levels[others] - C[others, primary]
    if (bounds <= 0).all():
        return weights
    x = nearest_at_level(C[others][:, others], bounds, bounds > 0, 1.0, precision)
    limit = 1 / math.sqrt(max(STATIONARY, precision))
    if x is not None and x.sum() <= limit:
        weights[others] = x
    square = float(weights @ C @ weights)
    if square <= 10 * precision * float(weights.sum()) ** 2:
        return np.zeros(len(C))
    return weights / math.sqrt(square)


@gradient_balancers.register(
    "cr_mogm",
    heads="weighted",
    label="CR-MOGM",
    paper="Zhou et al. 2022, https://proceedings.neurips.cc/paper_files/paper/2022/file/f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf",
    remedies=("conflict", "gradient length"),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
class CRMOGM(Smoothed):
    r"""The weights of another rule, averaged over time, so that they correlate less with the gradients of the batch.

    .. math:: \lambda_t = \alpha_t \lambda_{t-1} + (1 - \alpha_t) \hat\lambda_t, \qquad 1 - \alpha_t = (1 - \alpha) / t^\sigma

    where :math:`\hat\lambda` are the weights of the other rule. σ = 0 keeps α. With learning rates that fall as
    :math:`\eta_t = \eta / \sqrt t`, the paper's condition that :math:`1 - \alpha_t` falls with the learning rate is met by
    α = 0 and σ = ½. The weights have the properties that an average of the rule's weights has, such as a sum of 1. The number t
    counts the steps of a task. An absent task keeps its λ. Zero gradients and stationary points are the other rule's.

    Args:
        num_tasks: Number of tasks, K.
        rule: Name of a registered rule that returns weights.
        alpha: α in 0..1, 1 excluded.
        sigma: σ ≥ 0.
        initial: λ before the first step, K numbers; None: the rule's weights at a task's first step.
        seed: Seed of a rule that draws random numbers.

    Raises:
        ValueError: If an option is out of range, or the rule is unknown or returns no weights.

    Source:
        Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS 2022,
        algorithm 1. The heads are weighted, as for ``mgda``; set the balancer's ``heads=`` for other rules. With σ = 0 and no
        ``initial`` the rule is ``compose.smoothed``.
    """

    counts: Tensor

    def __init__(
        self,
        num_tasks: int,
        rule: str = "mgda",
        alpha: float = 0.9,
        sigma: float = 0.0,
        initial: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha of 'cr_mogm' must be in 0..1, 1 excluded, but got {alpha}.")
        if not sigma >= 0:
            raise ValueError(f"sigma of 'cr_mogm' must not be negative, but got {sigma}.")
        super().__init__(rule, alpha, num_tasks, {"seed": seed} if "seed" in gradient_balancers.options(rule) else {})
        self.sigma = sigma
        self.register_buffer("counts", vector(num_tasks))
        if initial is not None:
            if len(initial) != num_tasks or not np.isfinite(initial).all():
                raise ValueError(f"initial of 'cr_mogm' must have one number for each of {num_tasks} tasks, but got {initial}.")
            self.weights.copy_(torch.tensor(initial, dtype=torch.float64))

    def _average(self, weights: Weights, present: Tensor | None) -> Weights:
        tasks = indices(present, self.weights)
        before, new = read(self.weights, tasks), weights.detach().to("cpu", torch.float64).numpy()
        counts = read(self.counts, tasks) + 1
        share = (1 - self.beta) / counts**self.sigma
        average = np.where(np.isnan(before), new, (1 - share) * before + share * new)
        write(self.weights, tasks, average)
        write(self.counts, tasks, counts)
        return torch.from_numpy(average)
