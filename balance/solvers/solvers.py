"""Exact solvers for the small problems in task space: numpy, float64, K up to a few hundred.

Each solver takes and returns numpy arrays; the rules in `balance.gradient` and `balance.loss` convert them from and to tensors.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.optimize import nnls

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Mask: TypeAlias = NDArray[np.bool_]

STATIONARY = 1e-12  # squared length of a convex combination, relative to the gradients' own, that counts as zero
# Eigenvalue of the cosines, relative to the largest, that counts as zero. Float32 gradients turn a zero into up to 1e-13, and
# the rounding of a float64 Gramian changes a solution by up to 1e-16 / DEPENDENT.
DEPENDENT = 1e-10
EPSILON = float(np.finfo(np.float64).eps)
_MOST_STEPS = 200


def min_norm_weights(gramian: Array) -> Array:
    r"""Return the weights of the shortest vector in the convex hull of the task gradients.

    .. math:: \min_w w^\top G w \quad \text{subject to } w \ge 0,\ \textstyle\sum_k w_k = 1

    For w = t u with u on the simplex, :math:`w^\top G w + (1 - \mathbf{1}^\top w)^2 = t^2 u^\top G u + (1 - t)^2`, whose
    minimum over t grows with :math:`u^\top G u`. So the problem is one of non-negative least squares, on a square root of G
    with a row of ones below; it is solved for gradients of unit length, which makes it indifferent to their scales: by block
    pivoting, or where dependent gradients forbid that, by the active-set method of Lawson and Hanson.
    The certificate: :math:`(Gw)_k \ge w^\top G w` for every task k, with equality wherever :math:`w_k > 0`.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.

    Returns:
        Shape (K,), non-negative, sum 1. Where several weights give the shortest vector: tasks with the same gradient
        share theirs equally, and zero gradients, where there are any, share all weight.

    Source:
        Désidéri, "Multiple-gradient descent algorithm", C. R. Acad. Sci. Paris 2012; least-distance programming as
        in Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23.
    """
    weights = share_between_equals(_min_norm(gramian), gramian)
    weights /= weights.sum()
    return weights


def _min_norm(gramian: Array, start: Mask | None = None) -> Array:
    """Return any optimum of `min_norm_weights`; ``start`` is a guess of the tasks that have weight, by default all tasks."""
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    shortest = norms.min()
    if shortest == 0:
        zero = norms == 0
        return np.asarray(zero / zero.sum())
    C = gramian / norms[:, None] / norms
    ones = shortest / norms
    cosine_weights = _by_pivoting(C + ones[:, None] * ones, ones, np.ones(len(C), dtype=bool) if start is None else start)
    if cosine_weights is None:
        root = square_root(C)
        target = np.zeros(len(root) + 1)
        target[-1] = 1
        cosine_weights = np.asarray(nnls(np.vstack([root, ones]), target, maxiter=100 * len(C))[0])
    weights: Array = cosine_weights / norms
    weights /= weights.sum()
    return weights


def _by_pivoting(M: Array, b: Array, passive: Mask) -> Array | None:
    """Return the x ≥ 0 that minimises ½ xᵀMx - bᵀx, by block principal pivoting, or None if M is nearly singular.

    All variables that are infeasible change sides at once, while that lowers their number; else, after a few more tries, only
    the last of them does. It takes a handful of dense solves where an active-set method takes one step for each variable.

    Source:
        Portugal, Júdice & Vicente, "A comparison of block pivoting and interior-point algorithms for linear least squares
        problems with nonnegative variables", Mathematics of Computation 1994.
    """
    passive = passive.copy()
    fewest, grace = len(b) + 1, 3
    for _ in range(_MOST_STEPS):
        free = passive.nonzero()[0]
        x = b[:0]
        if len(free):
            factor, x, info = lapack.dposv(M[free[:, None], free], b[free], lower=1)
            if info != 0 or factor.diagonal().min() < 1e-4:
                return None
        infeasible = M[:, free] @ x < b - 1e-14
        infeasible[free] = x < 0
        count = int(np.count_nonzero(infeasible))
        if count == 0:
            solution = np.zeros(len(b))
            solution[free] = x
            return solution
        if count < fewest:
            fewest, grace = count, 3
        elif grace > 0:
            grace -= 1
        else:
            infeasible[: infeasible.nonzero()[0][-1]] = False
        passive ^= infeasible
    return None


def share_between_equals(weights: Array, gramian: Array) -> Array:
    """Give tasks with exactly the same gradient equal weights, without changing the direction. Shapes (K,), (K, K)."""
    lengths = gramian.diagonal()
    equal = (gramian == lengths[:, None]) & (gramian == lengths)
    first = equal.argmax(axis=1)  # the first task with that gradient stands for all of them
    total = np.bincount(first, weights, minlength=len(first))
    count = np.bincount(first, minlength=len(first))
    return np.asarray((total / count.clip(min=1))[first])


def square_root(gramian: Array, cutoff: float = -1.0) -> Array:
    """Return a matrix R of full row rank with RᵀR = G, to rounding. Shape (rank, K); pivoted Cholesky, G semi-definite.

    Args:
        gramian: Shape (K, K).
        cutoff: Greatest pivot that counts as zero; K times the machine epsilon times the largest pivot if negative.
    """
    factor, pivots, rank, _ = lapack.dpstrf(gramian, tol=cutoff)
    root = np.zeros((rank, len(gramian)))
    root[:, pivots - 1] = np.triu(factor)[:rank]
    return root


def bargaining_weights(gramian: Array) -> Array | None:
    r"""Return weights α > 0 with :math:`G\alpha = 1/\alpha`: the Nash bargaining solution.

    They minimise :math:`\tfrac12 \alpha^\top G \alpha - \sum_k \log \alpha_k`, which Newton's method does after G is scaled to
    unit diagonal. The function is self-concordant: steps shortened by 1 / (1 + Newton decrement) keep α positive and reach the
    region of quadratic convergence. The certificate: :math:`\alpha_k (G\alpha)_k = 1` for every task k.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.

    Returns:
        Shape (K,). None where there is no solution to working precision, that is, where a convex combination of the
        gradients, brought to unit length, is shorter than 1e-6 (`STATIONARY`).

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1.
    """
    norms = np.sqrt(gramian.diagonal())
    C = np.asfortranarray(gramian / norms[:, None] / norms)
    K = len(C)
    diagonal = np.diag_indices(K)
    x = np.full(K, 1 / np.sqrt(max(1.0, float(np.abs(C).sum(axis=1).max()))))
    previous = np.inf
    for _ in range(_MOST_STEPS):
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


def conflict_averse_weights(gramian: Array, c: float, rounding: float = EPSILON) -> Array:
    r"""Return the weights x that CAGrad adds to the mean: its direction is :math:`d = g_0 + J^\top x`.

    .. math:: \max_d \min_k \langle g_k, d \rangle \quad \text{subject to } \lVert d - g_0 \rVert \le c \lVert g_0 \rVert

    Let d(t) be the point nearest to :math:`g_0` with :math:`\langle g_k, d \rangle \ge t` for every task k. It is a
    combination :math:`g_0 + J^\top x(t)` with :math:`x(t) \ge 0`, and its distance from :math:`g_0` grows with t. d(0) is the
    projection of :math:`g_0` on the dual cone, at most :math:`\lVert g_0 \rVert` away. The solution is the d(t) at distance
    :math:`c \lVert g_0 \rVert`. If no t is high enough, 0 lies in the convex hull of the gradients, d(0) is one of several
    solutions, and d(0) is returned. The certificate, with :math:`r = G(b + x)`, :math:`b = \mathbf{1}/K` and
    :math:`t = \min_k r_k`: :math:`x \ge 0`; :math:`x_k (r_k - t) = 0` for every task k; and
    :math:`\lVert J^\top x \rVert = c \lVert g_0 \rVert`, or t = 0 and :math:`\lVert J^\top x \rVert \le c \lVert g_0 \rVert`.

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
    weights = np.zeros(K)
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    nonzero = norms.nonzero()[0]
    C = gramian[nonzero[:, None], nonzero] / norms[nonzero, None] / norms[nonzero]
    lengths = norms[nonzero] / norms.max()
    products = C @ lengths / K  # of the unit gradients with the mean gradient
    mean_square = float(lengths @ products) / K
    if mean_square <= rounding * (lengths.sum() / K) ** 2:
        return weights
    mean = math.sqrt(mean_square)
    highest = 0.0 if len(nonzero) < K else 2 + 2 * c  # no direction increases a zero gradient's gain
    weights[nonzero] = mean / lengths * _beyond_the_mean(C, products / mean, lengths, c, highest, rounding)
    return weights


def _beyond_the_mean(C: Array, h: Array, lengths: Array, c: float, highest: float, rounding: float) -> Array:
    """Return the coefficients of the *unit* gradients in d - g_0, relative to the length of the mean gradient g_0.

    C contains the cosines between the gradients that are not zero, h their cosines with g_0, and ``lengths`` their lengths.
    Levels are relative to the shortest of these lengths, and at most ``highest``.
    """
    inverse = lengths.min() / lengths
    lowest = float((h / inverse).min())  # the level of the mean gradient itself
    level_0 = _project_on_dual_cone(C, h, lengths, rounding)
    if c < 1 and level_0 @ C @ level_0 > c**2 * (1 + 1e-12):
        return _climb(C, h, inverse, c, (lowest, 0.0), np.zeros(len(h)), level_0 > 0, rounding)
    shortest = _min_norm(C * lengths[:, None] * lengths) * lengths
    if highest <= 0 or shortest @ C @ shortest <= max(STATIONARY, rounding) * shortest.sum() ** 2:
        return level_0
    return _climb(C, h, inverse, c, (max(0.0, lowest), highest), level_0, shortest > 0, rounding)


def _climb(
    C: Array, h: Array, inverse: Array, c: float, bracket: tuple[float, float], x_low: Array, active: Mask, rounding: float
) -> Array:
    """Find the level in a bracket whose nearest point is at distance c, and return the coefficients of that point.

    While the active tasks stay the same, the coefficients are affine in the level, and the distance is a quadratic equation.
    So the level and the active tasks are computed in turn, until the active tasks stay. Coefficients that cancel each other
    count as too high a level: to be exact, they would have to be added with more digits than float32 has.
    """
    low, high = bracket
    limit = c / math.sqrt(max(STATIONARY, rounding))
    for _ in range(_MOST_STEPS):
        level = _level_at_distance(C, h, inverse, c, active)
        inside = low < level < high
        if not inside:
            level = (low + high) / 2
        bounds = level * inverse - h
        x = _nearest_at_level(C, bounds, active, max(1.0, c), rounding)
        if x is None or x.sum() > limit:
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


def _level_at_distance(C: Array, h: Array, inverse: Array, c: float, active: Mask) -> float:
    """Return the level at distance c, if exactly the active tasks are at the level; NaN where their gradients are dependent."""
    free = active.nonzero()[0]
    if len(free) == 0:
        return math.nan
    a, b = right = np.array([inverse[free], h[free]])
    _, solution, info = lapack.dposv(C[free[:, None], free], right.T, lower=1)
    if info != 0:
        return math.nan
    # x = level p - q at squared distance level^2 a.p - 2 level a.q + b.q, and the distance grows with the level
    p, q = solution.T
    square, half, rest = float(a @ p), float(a @ q), float(b @ q) - c**2
    root = math.sqrt(max(half**2 - square * rest, 0.0))
    return (half + root) / square if half >= 0 else rest / (half - root)


def _project_on_dual_cone(C: Array, h: Array, lengths: Array, rounding: float) -> Array:
    """Return an x ≥ 0 for which g_0 plus the combination x of the unit gradients is the projection of g_0 on the dual cone."""
    x = _by_pivoting(C, -h, h < 0)
    if x is None:
        root = square_root(C, len(C) * rounding)
        mean = root @ lengths
        x = np.asarray(nnls(root, -mean / np.linalg.norm(mean), maxiter=100 * len(C))[0])
    limit = 1 / math.sqrt(max(STATIONARY, rounding))
    # nearly opposite gradients leave a thin cone: a little outside it is a point for which the sum is at most limit / 4
    relaxed = _nearest_at_level(C, -h - 1 / limit, h < 0, 1.0, rounding) if x.sum() > limit else None
    if relaxed is None or not relaxed.any():
        return x if relaxed is None else relaxed
    free = relaxed.nonzero()[0]
    _, solution, info = lapack.dposv(C[free[:, None], free], -h[free], lower=1)
    if info == 0 and solution.min() >= 0 and solution.sum() <= limit and (C[:, free] @ solution + h).min() >= -1 / limit:
        relaxed[free] = solution  # no conflict with these tasks at least
    return relaxed


def _nearest_at_level(C: Array, bounds: Array, start: Mask, scale: float, rounding: float) -> Array | None:
    """Return an x ≥ 0 for which Cx ≥ bounds and xᵀCx is least, or None if none exists.

    Least-distance programming as in Lawson & Hanson, as in `min_norm_weights`; ``scale`` is the magnitude of the distance.
    """
    x = _by_pivoting(C, bounds, start)
    if x is not None:
        return x
    root = square_root(C, len(C) * rounding)
    target = np.zeros(len(root) + 1)
    target[-1] = 1
    y: Array = np.asarray(nnls(np.vstack([root, bounds / scale]), target, maxiter=100 * len(C))[0])
    slack = scale - float(bounds @ y)
    return scale**2 / slack * y if slack > 1e-14 * scale else None


def equal_projection_weights(gramian: Array, cutoff: float = DEPENDENT) -> Array:
    r"""Return coefficients x of the *unit* gradients for which every unit gradient has inner product 1 with the combination.

    .. math:: C x = \mathbf{1}, \qquad C_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}

    The certificate is the equation itself. Where C is singular, the shortest least-squares solution. Both are the same for
    every order of the tasks: the Cholesky factorisation, whose pivots depend on the order, is used for regular C only.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.
        cutoff: Eigenvalues of C below this part of the largest count as zero.

    Returns:
        Shape (K,), of either sign; all zero where no combination has equal projections, as for opposite gradients.
    """
    norms = np.sqrt(gramian.diagonal())
    C = gramian / norms[:, None] / norms
    ones = np.ones(len(C))
    factor, solution, info = lapack.dposv(C, ones, lower=1)
    if info == 0:
        reciprocal_condition, _ = lapack.dpocon(factor, float(len(C)), uplo="L")  # K is an upper bound of the 1-norm of C
        if reciprocal_condition > max(1e-6, 10 * cutoff):  # an estimate, seldom wrong by more than a factor of 3
            return np.asarray(solution)
    values, vectors = np.linalg.eigh(C)
    kept = values > cutoff * values[-1]
    basis = vectors[:, kept]
    projections = basis.T @ ones
    if projections @ projections <= cutoff * len(C):
        return np.zeros(len(C))
    return np.asarray(basis @ (projections / values[kept]))


def k_means_1d(points: Array, num_clusters: int) -> Indices:
    """Return the clusters of numbers with the least sum of squared distances to their cluster's mean: the exact optimum.

    In one dimension the clusters are runs of the sorted points, so a dynamic programme over the last run finds them, in
    O(num_clusters K²). Equal numbers stay together; between equally good clusterings the one with the smallest last
    split is taken. The result is deterministic and does not depend on the order of the points.

    Args:
        points: Shape (K,), finite.
        num_clusters: At least 1. More clusters than distinct numbers are never used.

    Returns:
        Cluster of every point, counted from the smallest mean. Shape (K,).
    """
    values, inverse, counts = np.unique(points, return_inverse=True, return_counts=True)
    m = len(values)
    values = values / max(float(np.abs(values).max()), 1e-300)  # against under- and overflow of the squares
    error = _spreads(values, counts)  # [a, j]: squared distances within the run values[a..j]

    best = error[0]  # [j]: least error of values[0..j] in as many clusters as so far
    splits: list[Indices] = []
    for _ in range(min(num_clusters, m) - 1):
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + error  # [a, j]: the last run starts at a
        splits.append(total.argmin(axis=0))
        best = total.min(axis=0)

    labels, end = np.zeros(m, dtype=np.intp), m
    for split in reversed(splits):
        begin = split[end - 1]
        labels[begin:end] = len(splits)
        splits = splits[:-1]
        end = begin
    return labels[inverse]


def _spreads(values: Array, counts: Indices) -> Array:
    """Return the sums of squared distances to the mean in every run a..j of the values, infinite for j < a. Shape (m, m).

    By Welford's update, one value more at a time for all starts at once: sums of squares would cancel.
    """
    m = len(values)
    spreads = np.full((m, m), np.inf)
    size, mean, spread = np.zeros(m), np.zeros(m), np.zeros(m)  # of the runs that start at a
    for j, (value, count) in enumerate(zip(values, counts, strict=True)):
        size[: j + 1] += count
        distance = value - mean[: j + 1]
        mean[: j + 1] += distance * count / size[: j + 1]
        spread[: j + 1] += count * distance * (value - mean[: j + 1])
        spreads[: j + 1, j] = spread[: j + 1]
    return spreads
