"""Projection on the simplex of non-negative weights that sum to one."""

from __future__ import annotations

import numpy as np

from .linear_algebra import Array


def project_on_simplex(point: Array) -> Array:
    r"""Return the point of the simplex that is nearest to a point.

    .. math:: \min_w \lVert w - v \rVert \quad \text{subject to } w \ge 0,\ \textstyle\sum_k w_k = 1

    The solution is :math:`\max(v - \theta, 0)` for the one :math:`\theta` at which the sum is 1.

    Args:
        point: v, of shape (K,), finite.

    Returns:
        Shape (K,).

    Source:
        Held, Wolfe & Crowder, "Validation of subgradient optimization", Mathematical Programming 1974.
    """
    shifted = point - point.max()  # so that large numbers leave no rounding in the sum
    descending = np.sort(shifted)[::-1]
    thresholds = (descending.cumsum() - 1) / np.arange(1, len(point) + 1)
    last = np.flatnonzero(descending > thresholds)[-1]
    weights: Array = np.maximum(shifted - thresholds[last], 0.0)
    weights /= weights.sum()
    return weights
