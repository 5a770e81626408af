"""The shortest vector in the convex hull of the task gradients: MGDA's problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .linear_algebra import (
    STATIONARY,
    Array,
    cosines,
    gradient_norms,
    least_distance,
    non_negative_minimum,
    share_between_equals,
    square_root,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def min_norm_weights(gramian: Array) -> Array:
    r"""Return the weights of the shortest vector in the convex hull of the task gradients.

    .. math:: \min_w w^\top G w \quad \text{subject to } w \ge 0,\ \textstyle\sum_k w_k = 1

    Write w = t u with u on the simplex. Then :math:`w^\top G w + (1 - \mathbf{1}^\top w)^2 = t^2 u^\top G u + (1 - t)^2`, and
    the minimum over t grows with :math:`u^\top G u`. So this is a problem of non-negative least squares, on a square root of G
    with a row of ones below. It is solved for gradients of unit length, so that their scales do not matter. The method is
    block pivoting, or for dependent gradients the active-set method of Lawson and Hanson. `min_norm_error` is the certificate.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.

    Returns:
        Shape (K,), non-negative, sum 1. Where several weights give the shortest vector, tasks with the same gradient have
        equal weights, and zero gradients share all weight.

    Source:
        Désidéri, "Multiple-gradient descent algorithm", C. R. Acad. Sci. Paris 2012; least-distance programming as
        in Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23.
    """
    return share_between_equals(any_min_norm_weights(gramian), gramian)


def any_min_norm_weights(gramian: Array) -> Array:
    """Return one of the optima of `min_norm_weights`. Shape (K, K) -> (K,)."""
    norms = gradient_norms(gramian)
    if norms.min() == 0:
        zero = norms == 0
        return np.asarray(zero / zero.sum())
    if len(gramian) == 2:
        return np.array(_weights_of_two(*gramian.ravel().tolist()))
    products, shortest = norms[:, None] * norms, norms.min()
    M = np.divide(gramian + shortest**2, products, out=products)  # for large K a pass over memory less than by the cosines
    return _min_norm_weights(M, shortest / norms, norms, lambda: cosines(gramian, norms))


def _weights_of_two(square: float, product: float, _: float, other_square: float) -> tuple[float, float]:
    """Return the weights of the shortest vector between two gradients, which are not zero."""
    scale = max(square, other_square)  # against overflow of the sum below
    first, second = max((other_square - product) / scale, 0.0), max((square - product) / scale, 0.0)
    total = first + second
    return (first / total, second / total) if total > 0 else (0.5, 0.5)


def unit_min_norm_weights(C: Array, norms: Array) -> Array:
    """Return one of the optima of `min_norm_weights`, given cosines and lengths that are not zero. Shapes (K, K), (K,)."""
    ones = norms.min() / norms
    M = ones[:, None] * ones
    M += C
    return _min_norm_weights(M, ones, norms, lambda: C)


def _min_norm_weights(M: Array, ones: Array, norms: Array, cosines_of_gradients: Callable[[], Array]) -> Array:
    """Return the weights for the lengths ``norms``, given :math:`C + 1 1^T` in units of the cosines C. Shape (K,)."""
    unit_weights = non_negative_minimum(M, ones, np.ones(len(M), dtype=bool))
    if unit_weights is None:
        unit_weights = least_distance(square_root(cosines_of_gradients()), ones)
    weights: Array = unit_weights / norms
    weights /= weights.sum()
    return weights


def min_norm_error(gramian: Array, weights: Array) -> float:
    r"""Return the relative duality gap of weights, or their distance from the simplex if it is greater.

    The weights are optimal exactly if :math:`(Gw)_k \ge w^\top G w` for every task k. The gap
    :math:`w^\top G w - \min_k (Gw)_k` is relative to :math:`w^\top G w`. Where the gradients cancel each other to 1e-6 of
    their lengths, it is relative to the squared lengths.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: Shape (K,).
    """
    products = gramian @ weights
    square = float(weights @ products)
    gap = square - float(products.min())
    longest = float(np.abs(weights) @ gradient_norms(gramian)) ** 2
    size = square if square > STATIONARY * longest else longest
    infeasible = max(abs(float(weights.sum()) - 1), -float(weights.min()))
    return max(gap / size if size > 0 else gap, infeasible)
