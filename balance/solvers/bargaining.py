"""Fair bargains between tasks: the problems of Nash-MTL and FairGrad."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import lapack

from .linear_algebra import STATIONARY, Array
from .min_norm import any_min_norm_weights

MAX_BARGAINING_STEPS = 500  # for small α, weights that grow without bound grow by the factor 1 + α in a step
NEGLIGIBLE = 1e-100  # weights of unit gradients are at least so large, relative to the largest


def bargaining_weights(gramian: Array, alpha: float = 1.0) -> Array | None:
    r"""Return weights w > 0 with :math:`Gw = w^{-1/\alpha}`: α-fair weights, for α = 1 the Nash bargaining solution.

    With p = 1/α they minimise the convex function :math:`\tfrac12 w^\top G w - \sum_k w_k^{1-p} / (1-p)`, or
    :math:`\tfrac12 w^\top G w - \sum_k \log w_k` for p = 1. G is scaled to unit diagonal first. Newton's method solves for
    the relative changes of the weights, so that weights of very different size are equally accurate. A step is halved until
    the function decreases. `bargaining_error` is the certificate.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.
        alpha: α, positive.

    Returns:
        Shape (K,). None if no solution exists to working precision, because a convex combination of the unit gradients is
        shorter than 1e-6. Where lengths differ by many decades and α is far from 1, a product :math:`(Gw)_k` can be
        smaller than the rounding of its terms. The equation then holds to that rounding only.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1; Ban & Ji, "Fair Resource Allocation in
        Multi-Task Learning", ICML 2024, eq. (6).
    """
    norms = np.sqrt(gramian.diagonal())
    C = np.asfortranarray(gramian / norms[:, None] / norms)
    p = 1 / alpha
    unit = math.exp(float(np.log(norms).mean()))  # gradients of this length and no conflict have weights near 1
    prices = (p - 1) * np.log(norms / unit)  # logarithms of r in Cx = r / x^p, for the weights x of the unit gradients
    x = np.exp(prices / (1 + p))  # the solution for orthogonal gradients
    x *= (_shares(x, prices, p).sum() / max(float(x @ C @ x), 1e-3 * float(x @ x))) ** (1 / (1 + p))
    previous = np.inf
    for _ in range(MAX_BARGAINING_STEPS):
        change = _relative_change(C, x, _shares(x, prices, p), p)
        if change is None or float(x @ C @ x) <= STATIONARY * float(x.sum()) ** 2:
            return None
        size = float(np.abs(change)[x > NEGLIGIBLE * x.max()].max())
        x = x * (1 + change * (1.0 if size < 1e-3 else _step_length(C, x, change, prices, p)))
        x = np.maximum(x, NEGLIGIBLE * x.max())
        if size < 1e-14 or 0.5 * previous <= size < 1e-7:  # converged, or down to rounding
            break
        previous = size
    # Gw = w^-p for lengths relative to the unit; the true weights are shorter by unit^(-2/(1+p))
    weights: Array = x * (unit / norms) * unit ** (-2 / (1 + p))
    return weights


def _shares(x: Array, prices: Array, p: float) -> Array:
    """Return r x^(1-p), without overflow of the factors: the task's part of the direction's squared length. Shape (K,)."""
    return np.asarray(np.exp(prices + (1 - p) * np.log(x)))


def _relative_change(C: Array, x: Array, shares: Array, p: float) -> Array | None:
    """Return Newton's relative change of x for Cx = r / x^p, or None if rounding makes the system indefinite. Shape (K,)."""
    scale = x / np.sqrt(shares)
    hessian = np.asfortranarray(C * scale[:, None] * scale)
    hessian[np.diag_indices(len(x))] += p
    _, solution, info = lapack.dposv(hessian, np.sqrt(shares) - scale * (C @ x), lower=1, overwrite_a=1)
    return None if info != 0 else np.asarray(solution / np.sqrt(shares))


def _step_length(C: Array, x: Array, change: Array, prices: Array, p: float) -> float:
    """Return a step that keeps x positive and decreases the function, at most 1."""

    def value(y: Array) -> float:
        gain = float(np.exp(prices) @ np.log(y)) if p == 1 else float(_shares(y, prices, p).sum()) / (1 - p)
        return 0.5 * float(y @ C @ y) - gain

    slope = float((x * change) @ (C @ x) - _shares(x, prices, p) @ change)
    step = min(1.0, 0.9 / max(float(-change.min()), 0.9))
    start = value(x)
    while step > 1e-6 and value(x * (1 + step * change)) > start + 0.1 * step * slope:
        step /= 2
    return step


def bargaining_error(gramian: Array, weights: Array, length: float | None = None, alpha: float = 1.0) -> float:
    r"""Return the greatest relative residual of :math:`w_k^{1/\alpha} (Gw)_k = \text{length}^2 / K` over the tasks k.

    Tasks whose gradient is zero are left out; K counts the remaining tasks.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: Shape (K,). If all are zero, the error is 0 where no bargain exists, and infinite elsewhere.
        length: Length of the direction, for α = 1; None for :math:`\sqrt K`, which belongs to the solution itself.
        alpha: α of `bargaining_weights`.
    """
    nonzero = np.flatnonzero(gramian.diagonal() > 0)
    G, w = gramian[np.ix_(nonzero, nonzero)], weights[nonzero]
    if not w.any():
        return 0.0 if _stationary(G) else math.inf
    share = 1.0 if length is None else length**2 / len(w)
    return float(np.abs(w ** (1 / alpha) * (G @ w) / share - 1).max())


def _stationary(gramian: Array) -> bool:
    """Return whether 0 lies in the convex hull of the unit gradients, to working precision."""
    if len(gramian) == 0:
        return True
    norms = np.sqrt(gramian.diagonal())
    C = gramian / norms[:, None] / norms
    shortest = any_min_norm_weights(C)
    return float(shortest @ C @ shortest) <= 10 * STATIONARY
