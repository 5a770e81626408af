"""Fair bargains between tasks: the problems of Nash-MTL and FairGrad."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import lapack

from .linear_algebra import EPSILON, STATIONARY, Array, cosines
from .min_norm import any_min_norm_weights

MAX_BARGAINING_STEPS = 500  # for small α, weights that grow without bound grow by the factor 1 + α in a step
NEGLIGIBLE = 1e-100  # weights of unit gradients are at least so large, relative to the largest


def bargaining_weights(gramian: Array, alpha: float = 1.0) -> Array | None:
    r"""Return weights w > 0 with :math:`Gw = w^{-1/\alpha}`: α-fair weights, for α = 1 the Nash bargaining solution.

    With p = 1/α they minimise the convex function :math:`\tfrac12 w^\top G w - \sum_k w_k^{1-p} / (1-p)`, or
    :math:`\tfrac12 w^\top G w - \sum_k \log w_k` for p = 1. G is scaled to unit diagonal first. Newton's method solves for
    the relative changes of the weights, so that weights of very different size are equally accurate. The factorisation of a
    step also gives its correction of second order. A step that is not much smaller than the step before is halved until the
    function decreases. `bargaining_error` is the certificate.

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
    C = cosines(gramian, norms)
    p = 1 / alpha
    logarithms = np.log(norms)
    middle = float(logarithms.sum()) / len(norms)  # gradients of this length and no conflict have weights near 1
    prices = (p - 1) * (logarithms - middle)  # logarithms of r in Cx = r / x^p, for the weights x of the unit gradients
    x = _start(C, prices, p)
    ones = np.ones(len(x))
    previous = math.inf
    for _ in range(MAX_BARGAINING_STEPS):
        products, shares = C.dot(x), ones if p == 1 else _shares(x, prices, p)
        if float(x.dot(products)) <= STATIONARY * float(x.dot(ones)) ** 2:
            return None
        changes = _relative_changes(C, x, products, shares / x, p)
        if changes is None:
            return None
        change, corrected = changes
        size = _size(change, x)
        accuracy = math.inf
        if size < 1e-3 or size < min(0.3, 0.5 * previous):
            x, accuracy = x + x * corrected, _error_after(size, shares, p)
        else:
            x = x + x * change * _step_length(C, x, change, prices, p)
            x = np.maximum(x, NEGLIGIBLE * x.max())
        if accuracy < EPSILON or size < 1e-14 or 0.5 * previous <= size < 1e-7:  # converged, or down to rounding
            break
        previous = size
    # Gw = w^-p for lengths relative to the unit; the true weights are shorter by unit^(-2/(1+p))
    weights: Array = x / norms * math.exp((p - 1) / (p + 1) * middle)
    return weights


def _start(C: Array, prices: Array, p: float) -> Array:
    """Return the solution for orthogonal gradients, scaled, after a step of each task towards its own equation. Shape (K,)."""
    x = np.exp(prices / (1 + p))
    shares, products = _shares(x, prices, p), C.dot(x)
    scale = (float(shares.sum()) / max(float(x.dot(products)), 1e-3 * float(x.dot(x)))) ** (1 / (1 + p))
    quotients = x * products / shares  # at x times the scale all quotients times scale^(1+p) would be 1
    start: Array = x * np.maximum(quotients, 0.1 * scale ** (-1 - p)) ** (-1 / (1 + p))
    return start


def _shares(x: Array, prices: Array, p: float) -> Array:
    """Return r x^(1-p), without overflow of the factors: the task's part of the direction's squared length. Shape (K,)."""
    return np.ones(len(x)) if p == 1 else np.exp(prices + (1 - p) * np.log(x))


def _relative_changes(C: Array, x: Array, products: Array, targets: Array, p: float) -> tuple[Array, Array] | None:
    """Return Newton's relative change of x for Cx = r / x^p, and the change corrected by the terms of second order.

    The error after the second is of third order.

    Args:
        C: Shape (K, K).
        x: Shape (K,).
        products: Cx, of shape (K,).
        targets: r / x^p, of shape (K,).
        p: Exponent.

    Returns:
        Two arrays of shape (K,), or None if rounding makes the system indefinite.
    """
    inverse = 1 / x
    slopes = p * targets * inverse
    hessian = C.copy()
    hessian.ravel()[:: len(x) + 1] += slopes
    residual = targets - products
    factor, step, info = lapack.dposv(hessian.T, residual, lower=1, overwrite_a=1)
    if info != 0:
        return None
    change = step * inverse
    corrected, _ = lapack.dpotrs(factor, residual + (0.5 * p + 0.5) * slopes * step * change, lower=1)
    return change, corrected * inverse


def _size(change: Array, x: Array) -> float:
    """Return the length of a relative change, or its greatest entry at a weight that is not negligible if it is long."""
    length = math.sqrt(float(change.dot(change)))
    return length if length < 1e-3 else float(abs(change)[x > NEGLIGIBLE * x.max()].max())


def _error_after(size: float, shares: Array, p: float) -> float:
    """Return a bound of the relative error of the weights after a corrected step of that size, to leading order."""
    if size > 1e-4:
        return math.inf
    spread = len(shares) if p == 1 else float(shares.sum()) / float(shares.min())
    return (p + 1) * (p + 2) * size**3 * math.sqrt(spread)


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
