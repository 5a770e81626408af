"""Nash-MTL and FairGrad: fair bargains between the tasks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..rules.registry import gradient_balancers
from ..solvers.bargaining import bargaining_error, bargaining_weights
from ._host import certificate, solve, without_zero_gradients

if TYPE_CHECKING:
    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights

Solver = Literal["newton", "cvxpy"]
ALPHA = 2.0  # FairGrad's default α


@gradient_balancers.register(
    "nashmtl",
    heads="weighted",
    ignores_weights=True,
    label="Nash-MTL",
    paper="Navon et al. 2022, https://arxiv.org/abs/2202.01017",
    remedies=("conflict", "gradient length", "domination"),
    invariances=("permutation_equivariant", "rotation_equivariant", "unchanged_by_scaling_one_task"),
    certificate=certificate(partial(bargaining_error, length=1.0)),
)
def nashmtl(gramian: Gramian, *, max_norm: float | None = 1.0, solver: Solver = "newton") -> Weights:
    r"""Return the weights α of the Nash bargaining solution: every task gains the same share, :math:`G\alpha = 1/\alpha`.

    The direction conflicts with no task, :math:`\langle g_k, d \rangle = 1/\alpha_k > 0`. Neither its orientation nor its
    length changes when a gradient is multiplied by a positive constant, so loss weights have no effect. Its length is
    :math:`\sqrt K`, which ``max_norm`` shortens. A task whose gradient is zero gets weight 0 and takes no part in the
    bargain. Near a Pareto-stationary point the weights grow without bound. At such a point no solution exists, and all
    weights are 0. A single task gets the weight that brings its gradient to length 1.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        max_norm: Greatest length of the direction; None for the solution itself.
        solver: ``"newton"``, exact; or ``"cvxpy"``, an independent convex program, far slower, for comparison.

    Returns:
        Non-negative weights. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or ``max_norm`` is not positive.
        ImportError: If ``solver="cvxpy"`` and cvxpy is not installed.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022. Differs: solved exactly by Newton's method, where
        the paper's code iterates convex approximations, stops early and keeps stale weights when its solver fails. The heads
        are shortened with the direction, where that code clips only the shared gradient, a constant factor of
        :math:`\sqrt K` at ``max_norm=1``. The code's ``update_weights_every=n`` is ``compose.every(n, "nashmtl", num_tasks)``.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm of 'nashmtl' must be positive or None, but got {max_norm}.")

    def weights(G: Array) -> Array:
        alpha = bargaining_weights(G) if solver == "newton" else _by_cvxpy(G)
        if alpha is None:
            return np.zeros(len(G))
        return alpha * (1.0 if max_norm is None else min(1.0, max_norm / np.sqrt(len(alpha))))

    return solve(lambda G: without_zero_gradients(weights, G), gramian)


@gradient_balancers.register(
    "fairgrad",
    heads="unweighted",
    label="FairGrad",
    paper="Ban & Ji 2024, https://arxiv.org/abs/2402.15638",
    remedies=("conflict", "domination", "training pace"),
    invariances=("permutation_equivariant", "rotation_equivariant"),
    certificate=certificate(partial(bargaining_error, alpha=ALPHA)),
)
def fairgrad(gramian: Gramian, *, alpha: float = ALPHA) -> Weights:
    r"""Return the weights of the α-fair direction, in which tasks that gain least count most: :math:`Gw = w^{-1/\alpha}`.

    The direction maximises :math:`\sum_k \langle g_k, d \rangle^{1-\alpha} / (1-\alpha)` among the directions of its length.
    It conflicts with no task. α near 0 gives the mean gradient, α = 1 is Nash-MTL, and large α raises the smallest gain.
    Multiplied by s, the gradients give a direction of length :math:`s^{(1-\alpha)/(1+\alpha)}` times as great. A task whose
    gradient is zero gets weight 0. Near a Pareto-stationary point the weights grow without bound. At such a point no solution
    exists, and all weights are 0. One task gets weight :math:`\lVert g \rVert^{-2\alpha/(1+\alpha)}`.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        alpha: α, in 0.1..100. 2 is the value in the run scripts of the authors.

    Returns:
        Non-negative weights. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or ``alpha`` is out of range.

    Source:
        Ban & Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, eq. (6). Differs: solved exactly by Newton's
        method. The published codes use a solver that depends on the scale of the gradients, and can stop far from a solution.
        The authors' code multiplies the direction by K and clips it to length 1, which is left to the stage and the optimizer.
    """
    if not 0.1 <= alpha <= 100:
        raise ValueError(f"alpha of 'fairgrad' must be in 0.1..100, but got {alpha}.")

    def weights(G: Array) -> Array:
        fair = bargaining_weights(G, alpha)
        return np.zeros(len(G)) if fair is None else fair

    return solve(lambda G: without_zero_gradients(weights, G), gramian)


def _by_cvxpy(gramian: Array) -> Array | None:
    """Return the result of `bargaining_weights`, from a convex program. Shape (K, K) -> (K,)."""
    import cvxpy as cp  # noqa: PLC0415 - an option, not a dependency

    norms = np.sqrt(np.diag(gramian))
    C = gramian / norms[:, None] / norms
    x = cp.Variable(len(C), pos=True)
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(C)) - cp.sum(cp.log(x))))
    try:
        problem.solve(solver=cp.CLARABEL)
    except cp.SolverError:
        return None
    return None if x.value is None or x.value.sum() > 1e6 * np.sqrt(len(C)) else x.value / norms
