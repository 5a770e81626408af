"""UPGrad and DualProj: projections on the dual cone, the set of directions that conflict with no task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..rules.registry import gradient_balancers
from ..solvers.dual_cone import projection_error, projection_of_sum, sum_of_projections, sum_of_projections_error
from ..solvers.linear_algebra import cosines, gradient_norms, share_between_equals
from ._host import certificate, solve
from ._preference import preferences

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights

PAPER = "Quinton & Rey 2024, https://arxiv.org/abs/2406.16232"


@gradient_balancers.register(
    "upgrad",
    label="UPGrad",
    paper=PAPER,
    remedies=("conflict",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients", "linear_under_scaling"),
    certificate=certificate(sum_of_projections_error),
)
def upgrad(
    gramian: Gramian, *, preference: list[float] | None = None, reg_eps: float = 0.0, present: Tensor | None = None
) -> Weights:
    r"""Return weights for which every task gradient is first projected on the dual cone, and the projections are added.

    .. math:: w = \sum_i \operatorname*{arg\,min}_{v \ge p_i e_i} v^\top G v

    The direction conflicts with no task. It is linear in the gradients' lengths: twice the length of one gradient doubles its
    part of the direction. Every weight is at least :math:`p_k`, and equal to it if no two gradients conflict. At a
    Pareto-stationary point at which the gradients span no common ascent, the direction is zero. Where the gradients are
    dependent, the weights are not unique, but the direction is. A task whose gradient is zero keeps the weight
    :math:`p_k`, and does not change the remaining weights. One task gets its preference, 1 by default.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        preference: p, positive, one number for each task; 1/K by default, so that the direction has the scale of the mean.
        reg_eps: Multiple of the trace of G that is added to its diagonal. TorchJD and LibMTL use 1e-4, with which a small
            conflict can remain. 0 is exact.
        present: Indices of the present tasks, for ``preference``; the stage passes them.

    Returns:
        Positive weights. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range.

    Source:
        Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, section 4. Differs: solved exactly at any
        scale. The published codes add ``reg_eps=1e-4``, and return the mean for gradients shorter than about 0.01.
    """

    def weights(G: Array) -> Array:
        p = preferences("upgrad", preference, len(G), present, 1 / len(G))
        return _project(sum_of_projections, _regularised("upgrad", G, reg_eps), p)

    return solve(weights, gramian)


@gradient_balancers.register(
    "dualproj",
    label="DualProj",
    paper=f"{PAPER}; Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840",
    remedies=("conflict",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
    certificate=certificate(projection_error),
)
def dualproj(
    gramian: Gramian, *, preference: list[float] | None = None, reg_eps: float = 0.0, present: Tensor | None = None
) -> Weights:
    r"""Return weights for which the direction is the projection of the mean gradient on the dual cone.

    .. math:: w = \operatorname*{arg\,min}_{v \ge p} v^\top G v

    Of all directions that conflict with no task, it is the direction nearest to :math:`J^\top p`. It is :math:`J^\top p`
    itself if that conflicts with no task. Every weight is at least :math:`p_k`. Where the gradients are dependent, the weights
    are not unique, but the direction is. A task whose gradient is zero keeps the weight :math:`p_k`. One task gets its
    preference, 1 by default.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        preference: p, positive, one number for each task; 1/K by default.
        reg_eps: Multiple of the trace of G that is added to its diagonal, as in `upgrad`.
        present: Indices of the present tasks, for ``preference``; the stage passes them.

    Returns:
        Positive weights. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range.

    Source:
        Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, eq. (11), with the mean as the
        projected gradient, as in Quinton & Rey 2024, section 4. Differs as in `upgrad`.
    """

    def weights(G: Array) -> Array:
        p = preferences("dualproj", preference, len(G), present, 1 / len(G))
        return _project(projection_of_sum, _regularised("dualproj", G, reg_eps), p)

    return solve(weights, gramian)


def _regularised(rule: str, G: Array, reg_eps: float) -> Array:
    if not reg_eps >= 0:
        raise ValueError(f"reg_eps of '{rule}' must not be negative, but got {reg_eps}.")
    return np.asarray(G + reg_eps * np.trace(G) * np.eye(len(G))) if reg_eps > 0 else G


def _project(coefficients: Callable[[Array, Array], Array], G: Array, p: Array) -> Array:
    """Return p plus the weights of the projection, which ``coefficients`` computes on unit gradients. Shape (K,)."""
    norms = gradient_norms(G)
    if norms.min() > 0:
        lengths = norms / norms.max()
        return np.asarray(p + share_between_equals(coefficients(cosines(G, norms), p * lengths) / lengths, G))
    nonzero = norms.nonzero()[0]
    weights: Array = p.copy()
    if len(nonzero):
        lengths = norms[nonzero] / norms.max()
        C = cosines(G[np.ix_(nonzero, nonzero)], norms[nonzero])
        extra = np.zeros(len(G))
        extra[nonzero] = coefficients(C, p[nonzero] * lengths) / lengths
        weights += share_between_equals(extra, G)
    return weights
