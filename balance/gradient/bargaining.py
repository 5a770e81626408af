"""Fair bargains between the tasks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from balance.gradient._host import certificate, solve, without_zero_gradients
from balance.rules.compose import Every
from balance.rules.options import check_type
from balance.rules.registry import gradient_balancers
from balance.solvers.bargaining import bargaining_error, bargaining_weights

if TYPE_CHECKING:
    from torch import Tensor

    from balance.solvers.linear_algebra import Array
    from balance.types import Gramian, Weights

Solver = Literal["newton", "cvxpy"]


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
class NashMTL(nn.Module):
    r"""The Nash bargaining solution: weights α for which every task gains the same share, :math:`G\alpha = 1/\alpha`.

    The direction conflicts with no task, :math:`\langle g_k, d \rangle = 1/\alpha_k > 0`. Neither its orientation nor its
    length changes when a gradient is multiplied by a positive constant, so loss weights have no effect. Its length is
    :math:`\sqrt K`, which ``max_norm`` shortens. A task whose gradient is zero gets weight 0 and takes no part in the
    bargain. Near a Pareto-stationary point the weights grow without bound; at such a point there is no solution, and all
    weights are 0. A single task gets the weight that brings its gradient to length 1.

    Args:
        num_tasks: K.
        max_norm: Greatest length of the direction; None for the solution itself.
        update_every: The paper code's name for ``compose.every(n, "nashmtl", num_tasks)``, which does exactly the same:
            weights are used for n steps, at least 1. The two cannot be combined.
        solver: ``"newton"``, exact; or ``"cvxpy"``, an independent convex program, far slower, for comparison.

    Raises:
        ValueError: If an option is out of range.
        ImportError: At the first step, if ``solver="cvxpy"`` and cvxpy is not installed.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022. Differs: solved exactly by Newton's method, where
        the paper's code iterates convex approximations, stops early and keeps stale weights when its solver fails; the heads
        are shortened with the direction, where that code clips the shared gradient alone (a constant factor of
        :math:`\sqrt K` at ``max_norm=1``).
    """

    def __init__(self, num_tasks: int, max_norm: float | None = 1.0, update_every: int = 1, solver: Solver = "newton") -> None:
        super().__init__()
        check_type("solver", solver, Solver)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm of 'nashmtl' must be positive or None, but got {max_norm}.")
        self.max_norm = max_norm
        self.solver = solver
        self.kept = Every(update_every, self._bargain, num_tasks)

    @property
    def reuses(self) -> bool:
        """Whether some steps use the weights of earlier steps."""
        return self.kept.reuses

    def forward(self, gramian: Gramian, present: Tensor | None = None) -> Weights:
        """Return the weights of the task gradients.

        Args:
            gramian: Inner products of the gradients of the present tasks. Shape (K, K), positive semi-definite.
            present: Indices of those tasks; None for all.

        Returns:
            Non-negative weights. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
        """
        return self.kept(gramian, present)  # type: ignore[no-any-return]

    def reuse(self, present: Tensor | None = None) -> Weights | None:
        """Return the weights of an earlier step that this step uses again, or None if it is time to solve. Shape (K,)."""
        return self.kept.reuse(present)

    def _bargain(self, gramian: Gramian) -> Weights:
        return solve(lambda G: without_zero_gradients(self._shortened, G), gramian)

    def _shortened(self, gramian: Array) -> Array:
        weights = bargaining_weights(gramian) if self.solver == "newton" else _by_cvxpy(gramian)
        if weights is None:
            return np.zeros(len(gramian))
        length = np.sqrt(len(weights))
        return weights * (1.0 if self.max_norm is None else min(1.0, self.max_norm / length))


def _by_cvxpy(gramian: Array) -> Array | None:
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
