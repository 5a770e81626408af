"""Linear programs of the rules that follow a preference between the tasks: EPO and PMGDA."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

from .linear_algebra import Array, gradient_norms
from .min_norm import min_norm_weights


def highest_product(objective: Array, rows: Array, bounds: Array) -> Array | None:
    r"""Return weights on the simplex with the highest product with an objective, under linear conditions.

    .. math:: \max_w \langle c, w \rangle \quad \text{subject to } A w \ge b,\ w \ge 0,\ \textstyle\sum_k w_k = 1

    Args:
        objective: c, of shape (K,).
        rows: A, of shape (conditions, K). Each condition is scaled, so that the solver's tolerance is relative.
        bounds: b, of shape (conditions,); minus infinity for no condition.

    Returns:
        Shape (K,); None if no weights meet the conditions.
    """
    finite = np.isfinite(bounds) & rows.any(axis=1)
    rows, bounds = rows[finite], bounds[finite]
    scale = np.abs(rows).max(axis=1, initial=0.0)
    solution = linprog(
        -objective / (float(np.abs(objective).max()) or 1.0),
        A_ub=-rows / scale[:, None],
        b_ub=-bounds / scale,
        A_eq=np.ones((1, len(objective))),
        b_eq=[1.0],
        method="highs",
    )
    if solution.status != 0:
        return None
    weights: Array = np.maximum(solution.x, 0.0)
    weights /= weights.sum()
    return weights


def correction_weights(gramian: Array, slope: Array, sigma: float) -> Array:
    r"""Return the weights of the direction that lowers a function of the losses, and harms the tasks least.

    With unit gradients :math:`\hat g_k` and the unit gradient :math:`\hat h` of the function,

    .. math:: \max_\mu \min_k \langle g_k, d \rangle, \quad d = \sum_k \mu_k \hat g_k + \mu_h \hat h, \quad
              \langle \hat h, d \rangle \ge \sigma, \quad \mu \text{ on the simplex}

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.
        slope: Derivatives e of the function with respect to the losses, so that its gradient is :math:`\sum_k e_k g_k`, which
            must not be zero. Shape (K,).
        sigma: σ in 0..1.

    Returns:
        Coefficients of the gradients in d, of either sign. Shape (K,).
    """
    K = len(gramian)
    norms = gradient_norms(gramian)
    products = gramian @ slope
    length = np.sqrt(float(slope @ products))
    # columns: unit gradients, then the unit gradient of the function
    gains = np.column_stack([gramian / norms, products / length]) / norms.max()
    rise = np.append(products / norms / length, 1.0)
    A = np.vstack([np.column_stack([-gains, np.ones(K)]), np.append(-rise, 0.0)])
    solution = linprog(
        np.append(np.zeros(K + 1), -1.0),
        A_ub=A,
        b_ub=np.append(np.zeros(K), -sigma),
        A_eq=np.append(np.ones(K + 1), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * (K + 1) + [(None, None)],
        method="highs",
    )
    mu = solution.x[:-1] if solution.status == 0 else np.append(np.zeros(K), 1.0)  # which meets the condition
    return np.asarray(mu[:K] / norms + mu[K] / length * slope)


def tangent_weights(gramian: Array, slope: Array) -> Array:
    r"""Return the weights of the shortest vector in the convex hull of the gradients' parts along a level set.

    The parts are orthogonal to the gradient :math:`\sum_k e_k g_k` of a function of the losses.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        slope: e, of shape (K,).

    Returns:
        Coefficients of the gradients, of either sign. Shape (K,).
    """
    products = gramian @ slope
    square = float(slope @ products)
    if square <= 1e-12 * float(np.abs(slope) @ gradient_norms(gramian)) ** 2:
        return min_norm_weights(gramian)
    parts = gramian - products[:, None] * products / square
    squares = gramian.diagonal()
    vanish = parts.diagonal() <= 1e-12 * squares  # but for rounding
    parts[vanish] = 0.0
    parts[:, vanish] = 0.0
    mu = min_norm_weights(parts)
    return np.asarray(mu - float(products @ mu) / square * slope)
