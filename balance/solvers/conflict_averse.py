"""The direction near the mean gradient with the greatest gain for the task that gains least: CAGrad's problem."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import lapack
from scipy.optimize import nnls

from .linear_algebra import (
    EPSILON,
    MAX_STEPS,
    SMALLEST_PIVOT,
    STATIONARY,
    Array,
    Mask,
    cosines,
    gradient_norms,
    least_distance,
    non_negative_minimum,
    square_root,
)
from .min_norm import min_norm_weights, unit_min_norm_weights

FEW_PIVOTS = 8  # of the search that is tried first; it seldom needs more than four


def conflict_averse_weights(gramian: Array, c: float, rounding: float = EPSILON) -> Array:
    r"""Return the weights x that CAGrad adds to the mean: its direction is :math:`d = g_0 + J^\top x`.

    .. math:: \max_d \min_k \langle g_k, d \rangle \quad \text{subject to } \lVert d - g_0 \rVert \le c \lVert g_0 \rVert

    Let d(t) be the point nearest to :math:`g_0` with :math:`\langle g_k, d \rangle \ge t` for every task k. It is a
    combination :math:`g_0 + J^\top x(t)` with :math:`x(t) \ge 0`, and its distance from :math:`g_0` grows with t. The
    solution is the d(t) at distance :math:`c \lVert g_0 \rVert`. d(0) is the projection of :math:`g_0` on the dual cone, at
    most :math:`\lVert g_0 \rVert` away. If no t is high enough, 0 lies in the convex hull of the gradients. Then several
    directions are solutions, and d(0) is returned. `conflict_averse_error` is the certificate.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        c: Radius of the search relative to the mean gradient, positive.
        rounding: Relative error of the entries of ``gramian``.

    Returns:
        Shape (K,), non-negative; all zero where the mean gradient is zero to working precision.

    Source:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, eq. (2) and (4).
    """
    K = len(gramian)
    norms = gradient_norms(gramian)
    if norms.min() > 0:
        return _unit_problem(gramian, norms, K, c, 2 + 2 * c, rounding)
    weights = np.zeros(K)
    nonzero = norms.nonzero()[0]
    if len(nonzero):
        part = gramian[nonzero[:, None], nonzero]
        highest = 0.0  # no direction increases a zero gradient's gain
        weights[nonzero] = _unit_problem(part, norms[nonzero], K, c, highest, rounding)
    return weights


def _unit_problem(gramian: Array, norms: Array, num_tasks: int, c: float, highest: float, rounding: float) -> Array:
    """Return the weights of `conflict_averse_weights` for the tasks whose gradient is not zero.

    Args:
        gramian: Shape (tasks, tasks).
        norms: Lengths of the gradients. Shape (tasks,).
        num_tasks: Number of all tasks, of which the mean is taken.
        c: Radius of the search.
        highest: A level that no direction reaches.
        rounding: Relative error of the entries of ``gramian``.
    """
    C = cosines(gramian, norms)
    lengths = norms / norms.max()
    products = C.dot(lengths) / num_tasks  # of the unit gradients with the mean gradient
    mean_square = float(lengths.dot(products)) / num_tasks
    if mean_square <= rounding * (float(lengths.sum()) / num_tasks) ** 2:
        return np.zeros(len(norms))
    mean = math.sqrt(mean_square)
    weights: Array = mean / lengths * _beyond_the_mean(C, products / mean, lengths, c, highest, rounding)
    return weights


def conflict_averse_error(gramian: Array, weights: Array, c: float) -> float:
    r"""Return the relative duality gap of the weights x of `conflict_averse_weights`.

    With :math:`b = \mathbf{1}/K`, no direction within the radius has a smallest gain above
    :math:`w^\top G b + c \lVert g_0 \rVert \lVert J^\top w \rVert`, for any w on the simplex. The gap is between the lower of
    two such bounds, for :math:`w = x / \sum_k x_k` and for the min-norm weights, and the smallest gain of x. It is relative to
    :math:`\max(1, c) \lVert g_0 \rVert \max_k \lVert g_k \rVert`. If a negative weight or the excess over the radius is greater
    in relative terms, that error is returned.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: x, of shape (K,).
        c: Radius of the search relative to the mean gradient, positive.
    """
    mean_gains = gramian.mean(axis=1)
    mean = math.sqrt(max(float(mean_gains.mean()), 0.0))
    scale = max(1.0, c) * mean * float(gradient_norms(gramian).max())
    if scale == 0:
        return float(np.abs(weights).max())
    candidates = [min_norm_weights(gramian), *([weights / weights.sum()] if weights.any() else [])]
    bound = min(float(w @ mean_gains) + c * mean * math.sqrt(max(float(w @ gramian @ w), 0.0)) for w in candidates)
    gap = bound - float((mean_gains + gramian @ weights).min())
    excess = math.sqrt(max(float(weights @ gramian @ weights), 0.0)) / (c * mean) - 1
    negative = -float(weights.min()) / max(float(np.abs(weights).max()), 1.0)
    return max(gap / scale, excess, negative, 0.0)


def _beyond_the_mean(C: Array, h: Array, lengths: Array, c: float, highest: float, rounding: float) -> Array:
    """Return the coefficients of the *unit* gradients in d - g_0, relative to the length of the mean gradient g_0.

    C contains the cosines between the gradients that are not zero, h their cosines with g_0, and ``lengths`` their lengths.
    Levels are relative to the shortest of these lengths, and at most ``highest``.
    """
    inverse = lengths.min() / lengths
    smallest = max(STATIONARY, rounding)
    level, x = pivot(C, h, inverse, c, rounding)
    # no point of the convex hull is shorter than level * inverse.min() / (1 + c), relative to the lengths that it combines
    if x is not None and level < highest and abs(level) * float(inverse.min()) > (1 + c) * math.sqrt(smallest):
        return x
    lowest = float((h / inverse).min())  # the level of the mean gradient itself
    level_0 = _project_on_dual_cone(C, h, lengths, rounding) if h.min() < 0 else np.zeros(len(h))
    if c < 1 and level_0.dot(C).dot(level_0) > c**2 * (1 + 1e-12):
        return climb(C, h, inverse, c, (lowest, 0.0), np.zeros(len(h)), level_0 > 0, rounding)
    shortest = unit_min_norm_weights(C, lengths) * lengths
    if highest <= 0 or shortest.dot(C).dot(shortest) <= smallest * float(shortest.sum()) ** 2:
        return level_0
    return climb(C, h, inverse, c, (max(0.0, lowest), highest), level_0, shortest > 0, rounding)


def pivot(C: Array, h: Array, inverse: Array, c: float, rounding: float) -> tuple[float, Array | None]:
    """Return the highest level of any direction at the distance c from the mean gradient, and its coefficients.

    The active tasks are guessed: the task that gains least, and the tasks below its level in the best direction for it. Then
    all tasks that violate the optimality conditions change sides, until no task does. The conditions are sufficient.

    Args:
        C: As in `climb`, like all arguments.
        h: Shape (K,).
        inverse: Shape (K,).
        c: Distance.
        rounding: Relative error of the cosines.

    Returns:
        The level and the coefficients, of shape (K,). The coefficients are None if the conditions are not met after a few
        changes, as at Pareto-stationary points.
    """
    limit = c / math.sqrt(max(STATIONARY, rounding))
    worst = int((h / inverse).argmin())
    gains = h + c / math.sqrt(max(float(C[worst, worst]), EPSILON)) * C[worst]
    active = gains < float(gains[worst]) / float(inverse[worst]) * inverse
    active[worst] = True
    for _ in range(FEW_PIVOTS):
        level, x, infeasible = _at_distance(C, h, inverse, c, active, limit)
        if x is None:
            return level, None
        if not np.count_nonzero(infeasible):
            return level, x
        active ^= infeasible
    return math.nan, None


def climb(
    C: Array, h: Array, inverse: Array, c: float, bracket: tuple[float, float], x_low: Array, active: Mask, rounding: float
) -> Array:
    """Return the coefficients of the nearest point at the level in ``bracket`` whose distance is c.

    While the active tasks stay the same, the coefficients are affine in the level, and the distance is a quadratic equation.
    So the level and the active tasks are computed in turn, until the active tasks stay. A level is too high if its
    coefficients cancel each other: their exact sum would need more digits than float32 has.

    Args:
        C: Cosines between the gradients. Shape (K, K).
        h: Cosines between the gradients and the mean gradient. Shape (K,).
        inverse: Lengths relative to the shortest gradient, inverted. Shape (K,).
        c: Distance of the point from the mean gradient, relative to its length.
        bracket: Two levels, the first too low and the second too high.
        x_low: Coefficients at the lower level. Shape (K,).
        active: Guess of the tasks with positive coefficients. Shape (K,).
        rounding: Relative error of the cosines.

    Returns:
        Shape (K,), non-negative.
    """
    low, high = bracket
    limit = c / math.sqrt(max(STATIONARY, rounding))
    for _ in range(MAX_STEPS):
        level, x, infeasible = _at_distance(C, h, inverse, c, active, limit)
        inside = low < level < high
        if abs(level - low) <= EPSILON * x_low.sum() and ((x_low > 0) == active).all():
            return x_low  # no level between them differs from both
        if inside and x is not None and not np.count_nonzero(infeasible):
            return x
        if not inside:
            level = (low + high) / 2
        bounds = level * inverse - h
        x = nearest_at_level(C, bounds, active, max(1.0, c), rounding)
        if x is None or x.sum() > limit * (1 + 1e-6):
            high = level
        elif inside and ((x > 0) == active).all():
            return x
        else:
            active = x > 0
            if x @ bounds > c**2:  # equal to x @ C @ x
                high = level
            else:
                low, x_low = level, x
        if high - low <= 1e-15 * max(abs(low), abs(high)):
            break
    return x_low


def _at_distance(C: Array, h: Array, inverse: Array, c: float, active: Mask, limit: float) -> tuple[float, Array | None, Mask]:
    """Return the level at distance c if exactly the active tasks are at the level, the coefficients, and the infeasible tasks.

    Active tasks are infeasible if their coefficient is not positive, and all other tasks if they are below the level. If the
    sum of the coefficients reaches ``limit`` at a lower level, the level is that level. If the gradients of the active tasks
    are dependent, the level is NaN. If they are nearly dependent, the coefficients are None, and the mask has no meaning.
    """
    free = active.nonzero()[0]
    if len(free) == 0:
        return math.nan, None, active
    a, b = right = np.array([inverse[free], h[free]])
    part = C if len(free) == len(h) else C.take(free, axis=0).take(free, axis=1)
    factor, solution, info = lapack.dposv(part.T, right.T, lower=1)
    if info != 0:
        return math.nan, None, active
    # x = level p - q at squared distance level^2 a.p - 2 level a.q + b.q, and the distance grows with the level
    p, q = solution.T
    square, half, rest = float(a.dot(p)), float(a.dot(q)), float(b.dot(q)) - c**2
    root = math.sqrt(max(half**2 - square * rest, 0.0))
    level = (half + root) / square if half >= 0 else rest / (half - root)
    growth = float(p.sum())
    level = min(level, (limit + float(q.sum())) / growth) if growth > 0 else level
    if factor.diagonal().min() < SMALLEST_PIVOT:
        return level, None, active
    x = np.zeros(len(h))
    x[free] = level * p - q
    infeasible = C.dot(x) < level * inverse - h - 1e-14 * max(1.0, float(x.sum()))
    infeasible[free] = x[free] <= 0
    return level, x, infeasible


def _project_on_dual_cone(C: Array, h: Array, lengths: Array, rounding: float) -> Array:
    """Return an x ≥ 0 for which g_0 plus the combination x of the unit gradients is the projection of g_0 on the dual cone."""
    x = non_negative_minimum(C, -h, h < 0)
    if x is None:
        root = square_root(C, len(C) * rounding)
        mean = root @ lengths
        x = np.asarray(nnls(root, -mean / np.linalg.norm(mean), maxiter=100 * len(C))[0])
    limit = 1 / math.sqrt(max(STATIONARY, rounding))
    # nearly opposite gradients leave a thin cone: a little outside it is a point for which the sum is at most limit / 4
    relaxed = nearest_at_level(C, -h - 1 / limit, h < 0, 1.0, rounding) if x.sum() > limit else None
    if relaxed is None or not relaxed.any():
        return x if relaxed is None else relaxed
    free = relaxed.nonzero()[0]
    _, solution, info = lapack.dposv(C[free[:, None], free], -h[free], lower=1)
    if info == 0 and solution.min() >= 0 and solution.sum() <= limit and (C[:, free] @ solution + h).min() >= -1 / limit:
        relaxed[free] = solution  # no conflict with these tasks at least
    return relaxed


def nearest_at_level(C: Array, bounds: Array, start: Mask, scale: float, rounding: float) -> Array | None:
    """Return an x ≥ 0 for which Cx ≥ bounds and xᵀCx is least, or None if none exists.

    This is least-distance programming, as in `min_norm_weights`; ``scale`` is the magnitude of the distance.
    """
    x = non_negative_minimum(C, bounds, start)
    if x is not None:
        return x
    root = square_root(C, len(C) * rounding)
    y = least_distance(root, bounds / scale)
    slack = scale - float(bounds @ y)
    return scale**2 / slack * y if slack > 1e-14 * scale else None
