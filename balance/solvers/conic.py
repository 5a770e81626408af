"""The direction in a cone around the mean with the greatest gain for the task that gains least: ConicGrad's problem."""

from __future__ import annotations

import math

import numpy as np

from .conflict_averse import climb, pivot
from .linear_algebra import EPSILON, STATIONARY, Array, cosines, gradient_norms, share_between_equals
from .min_norm import any_min_norm_weights, min_norm_weights


def conic_weights(gramian: Array, c: float, rounding: float = EPSILON) -> Array:
    r"""Return the weights of ConicGrad's direction, as long as the mean gradient :math:`g_0`.

    .. math:: \max_d \min_k \langle g_k, d \rangle \quad
              \text{subject to } \cos(d, g_0) \ge c,\ \lVert d \rVert = \lVert g_0 \rVert

    If the shortest vector in the convex hull of the gradients is in the cone, its direction is the solution. Otherwise the
    solution is on the boundary of the cone: :math:`d \sim g_0 / \lVert g_0 \rVert + y` with y orthogonal to :math:`g_0` and of
    length :math:`\sqrt{1 - c^2} / c`. The smallest gain is greatest for the y that solves CAGrad's problem on the parts of the
    gradients that are orthogonal to :math:`g_0`. `conic_error` is the certificate.

    If 0 lies in the convex hull of the gradients, no direction helps every task, and the mean is returned.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.
        c: Cosine of the half-angle of the cone, in 0..1 without 0.
        rounding: Relative error of the entries of ``gramian``.

    Returns:
        Shape (K,), non-negative; all zero where the mean gradient is zero to working precision.
    """
    K = len(gramian)
    norms = gradient_norms(gramian)
    lengths = norms / norms.max()
    G = gramian / norms.max() / norms.max()
    products = G.mean(axis=1)  # with the mean gradient
    mean = math.sqrt(max(float(products.mean()), 0.0))
    if mean**2 <= rounding * lengths.mean() ** 2:
        return np.zeros(K)
    shortest = share_between_equals(any_min_norm_weights(G), G)
    square = float(shortest.dot(G).dot(shortest))
    if c == 1 or square <= max(STATIONARY, rounding) * float(shortest.dot(lengths)) ** 2:
        return np.full(K, 1 / K)
    if float(shortest.dot(products)) >= c * math.sqrt(square) * mean:
        return np.asarray(shortest * mean / math.sqrt(square))
    return _on_the_boundary(G, lengths, products / mean, mean, c, rounding)


def _on_the_boundary(G: Array, lengths: Array, h: Array, mean: float, c: float, rounding: float) -> Array:
    """Return the weights of the direction at the greatest angle to the mean gradient, of the length ``mean``.

    Args:
        G: Inner products. Shape (K, K).
        lengths: Lengths of the gradients. Shape (K,).
        h: Inner products with the unit mean gradient. Shape (K,).
        mean: Length of the mean gradient.
        c: Cosine of the half-angle.
        rounding: Relative error of the inner products.
    """
    products = h / lengths  # of the unit gradients
    C = cosines(G, lengths) - products[:, None] * products
    inverse = lengths.min() / lengths
    lowest, highest = float((products / inverse).min()), mean / float(lengths.min())  # levels of the mean, and of no direction
    radius = math.sqrt(1 - c**2) / c
    level, x = pivot(C, products, inverse, radius, rounding)
    if x is None or not lowest < level < highest:
        worst = products <= lowest * inverse
        x = climb(C, products, inverse, radius, (lowest, highest), np.zeros(len(h)), worst, rounding)
    weights = max(1 - float(x.dot(products)), 0.0) / (len(h) * mean) + x / lengths  # negative by rounding only
    return np.asarray(weights * mean / math.sqrt(1 + max(float(x.dot(C).dot(x)), 0.0)))


def conic_error(gramian: Array, weights: Array, c: float) -> float:
    r"""Return the relative duality gap of ConicGrad's weights, or the violation of a constraint if it is greater.

    For any v on the simplex, the smallest gain of a direction is at most the inner product of the direction with
    :math:`J^\top v`. The greatest such product in the cone is a bound of all smallest gains. The gap is between this bound and
    the smallest gain of the weights, relative to :math:`\lVert g_0 \rVert \max_k \lVert g_k \rVert`. The bounds tried are
    for the min-norm weights, for the task that gains least, and for the multipliers in the weights.

    Tasks whose gradient is zero are left out. Where 0 lies in the convex hull of the gradients, the error is the distance of
    the weights from the mean's.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: Shape (K,).
        c: Cosine of the half-angle of the cone.
    """
    nonzero = np.flatnonzero(gramian.diagonal() > 0)
    if len(nonzero) == 0:
        return float(np.abs(weights).max())
    gramian, weights = gramian[np.ix_(nonzero, nonzero)], weights[nonzero]
    products, norms = gramian.mean(axis=1), gradient_norms(gramian)
    mean = math.sqrt(max(float(products.mean()), 0.0))
    if mean**2 <= 10 * EPSILON * norms.mean() ** 2:
        return float(np.abs(weights).max())
    shortest = min_norm_weights(gramian)
    if float(shortest @ gramian @ shortest) <= STATIONARY * float(shortest @ norms) ** 2:
        return float(np.abs(weights * len(weights) - 1).max())
    gains = gramian @ weights
    length = math.sqrt(max(float(weights @ gains), 0.0))
    multipliers = weights - weights.min()
    worst = np.arange(len(gains)) == gains.argmin()
    candidates = [shortest, 1.0 * worst, *([multipliers / multipliers.sum()] if multipliers.any() else [])]
    bound = min(_greatest_gain(gramian, products / mean, v, c) for v in candidates)
    relative_gap = (mean * bound - float(gains.min())) / (mean * float(norms.max()))
    angle = c - float(weights @ products) / (mean * length) if length > 0 else 1.0
    return max(relative_gap, angle, abs(length / mean - 1), 0.0)


def _greatest_gain(gramian: Array, h: Array, v: Array, c: float) -> float:
    """Return the greatest inner product of the combination v with a unit vector in the cone. Shapes (K, K), (K,), (K,)."""
    square, along = float(v @ gramian @ v), float(v @ h)
    if along >= c * math.sqrt(max(square, 0.0)):
        return math.sqrt(max(square, 0.0))
    return c * along + math.sqrt(1 - c**2) * math.sqrt(max(square - along**2, 0.0))
