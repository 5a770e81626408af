"""The Nash bargaining solution: Nash-MTL's problem."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import lapack

from balance.solvers.linear_algebra import MAX_STEPS, STATIONARY, Array
from balance.solvers.min_norm import any_min_norm_weights


def bargaining_weights(gramian: Array) -> Array | None:
    r"""Return weights α > 0 with :math:`G\alpha = 1/\alpha`: the Nash bargaining solution.

    They minimise :math:`\tfrac12 \alpha^\top G \alpha - \sum_k \log \alpha_k`, by Newton's method, after G is scaled to unit
    diagonal. The function is self-concordant. So steps shortened by 1 / (1 + Newton decrement) keep α positive and reach the
    region of quadratic convergence. `bargaining_error` is the certificate.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.

    Returns:
        Shape (K,). None if no solution exists to working precision, because a convex combination of the unit gradients is
        shorter than 1e-6.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1.
    """
    norms = np.sqrt(gramian.diagonal())
    C = np.asfortranarray(gramian / norms[:, None] / norms)
    K = len(C)
    diagonal = np.diag_indices(K)
    x = np.full(K, 1 / np.sqrt(max(1.0, float(np.abs(C).sum(axis=1).max()))))
    previous = np.inf
    for _ in range(MAX_STEPS):
        gradient = C @ x - 1 / x
        hessian = C.copy(order="F")
        hessian[diagonal] += x**-2.0
        _, step, info = lapack.dposv(hessian, gradient, lower=1, overwrite_a=1)
        decrement = float(np.sqrt(max(gradient @ step, 0.0)))
        x = x - step / (1 + decrement if decrement > 0.25 else 1)
        # x Cx = K, so the convex combination x / sum(x) has squared length K / sum(x)^2
        if info != 0 or STATIONARY * x.sum() ** 2 >= K:
            return None
        if decrement < 1e-14 or 0.5 * previous <= decrement < 1e-7:  # converged, or down to rounding
            weights: Array = x / norms
            return weights
        previous = decrement
    return None


def bargaining_error(gramian: Array, weights: Array, length: float | None = None) -> float:
    r"""Return the greatest relative residual of :math:`\alpha_k (G\alpha)_k = \text{length}^2 / K` over the tasks k.

    Tasks whose gradient is zero are left out; K counts the remaining tasks.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: Shape (K,). If all are zero, the error is 0 where no bargain exists, and infinite elsewhere.
        length: Length of the direction; None for :math:`\sqrt K`, which belongs to the solution itself.
    """
    nonzero = np.flatnonzero(gramian.diagonal() > 0)
    G, alpha = gramian[np.ix_(nonzero, nonzero)], weights[nonzero]
    if not alpha.any():
        return 0.0 if _stationary(G) else math.inf
    share = 1.0 if length is None else length**2 / len(alpha)
    return float(np.abs(alpha * (G @ alpha) / share - 1).max())


def _stationary(gramian: Array) -> bool:
    """Return whether 0 lies in the convex hull of the unit gradients, to working precision."""
    if len(gramian) == 0:
        return True
    norms = np.sqrt(gramian.diagonal())
    C = gramian / norms[:, None] / norms
    shortest = any_min_norm_weights(C)
    return float(shortest @ C @ shortest) <= 10 * STATIONARY
