"""Exact solvers for the small problems in task space: numpy, float64, K up to a few hundred.

Each takes and returns numpy arrays; the rules in `balance.gradient` and `balance.loss` dress them as tensors.
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
_MOST_STEPS = 200


def min_norm_weights(gramian: Array) -> Array:
    r"""Weights of the shortest vector in the convex hull of the task gradients.

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
    """Any of the optima of `min_norm_weights`.

    Args:
        gramian: As there.
        start: Tasks that may have weight, as a first guess; None for all.
    """
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    shortest = norms.min()
    if shortest == 0:
        zero = norms == 0
        shared: Array = zero / zero.sum()
        return shared
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
    """The x ≥ 0 that minimises ½ xᵀMx - bᵀx, by block principal pivoting; None where M is too close to singular for it.

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
        factor, x, info = lapack.dposv(M[free[:, None], free], b[free], lower=1)
        if info != 0 or (len(free) and factor.diagonal().min() < 1e-4):
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
    shared: Array = (total / count.clip(min=1))[first]
    return shared


def square_root(gramian: Array) -> Array:
    """A matrix R of full row rank with RᵀR = G, to rounding. Shape (rank, K); pivoted Cholesky, G semi-definite."""
    factor, pivots, rank, _ = lapack.dpstrf(gramian)
    root = np.zeros((rank, len(gramian)))
    root[:, pivots - 1] = np.triu(factor)[:rank]
    return root


def bargaining_weights(gramian: Array) -> Array | None:
    r"""Weights α > 0 with :math:`G\alpha = 1/\alpha`: the Nash bargaining solution.

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


def conflict_averse_weights(gramian: Array, c: float) -> Array | None:
    r"""Weights on the simplex that solve CAGrad's dual problem.

    .. math:: \min_w \; w^\top G b + c \lVert g_0 \rVert \sqrt{w^\top G w}, \qquad b = \mathbf{1}/K,\ g_0 = J^\top b

    For the right s > 0, w gives the shortest point in the convex hull of the shifted gradients :math:`g_k + s g_0`: the one
    with :math:`\lVert J^\top w \rVert = s c \lVert g_0 \rVert`. While the active tasks stay the same, w is affine in s, and the
    condition is a quadratic equation. So the two are solved in turn, within a shrinking bracket for s, until the active tasks
    stay. The certificate: with :math:`r = Gb + c \lVert g_0 \rVert Gw / \lVert J^\top w \rVert`, :math:`r_k \ge w^\top r` for
    every task k.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        c: Radius of the search relative to the mean gradient, positive.

    Returns:
        Shape (K,), non-negative, sum 1. None at a Pareto-stationary point, to working precision (`STATIONARY`).

    Source:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, eq. (4).
    """
    largest = gramian.diagonal().max()
    if largest <= 0:
        return None
    G = gramian / largest
    Gb = G.sum(axis=1) / len(G)
    mean_square = float(Gb.sum()) / len(G)
    w = _min_norm(G)
    square = float(w @ G @ w)
    if min(square, mean_square) <= STATIONARY * G.trace() / len(G):
        return None
    shift = Gb[:, None] + Gb
    radius = c * math.sqrt(mean_square)
    low, high, s = 0.0, 1 / radius, math.sqrt(square) / radius
    for _ in range(_MOST_STEPS):
        active = (w > 0).nonzero()[0]
        GS = G[active[:, None], active]
        p, q = _affine_minimum(GS, Gb[active])
        # |p + s q|^2 = s^2 radius^2 as a s^2 + 2 b s + d = 0
        GSq = GS @ q
        a, b, d = float(q @ GSq) - radius**2, float(p @ GSq), float(p @ GS @ p)
        turn = -(b + math.copysign(math.sqrt(max(b * b - a * d, 0.0)), b))
        roots = [root for root in (_quotient(turn, a), _quotient(d, turn)) if low <= root <= high]
        s = min(roots, key=lambda root: abs(root - s), default=(low + high) / 2)
        candidate = np.zeros(len(G))
        candidate[active] = p + s * q
        if candidate.min() >= -1e-12 and _is_optimal(G, Gb, radius, candidate):
            w = np.maximum(candidate, 0.0)
            break
        if not low < s < high:
            s = (low + high) / 2
        w = _min_norm(G + (s * shift + s**2 * mean_square), w > 0)
        low, high = (s, high) if w @ G @ w > (s * radius) ** 2 else (low, s)
        if high - low <= 1e-15 * high:
            break
    weights: Array = w / w.sum()
    return weights


def _is_optimal(G: Array, Gb: Array, radius: float, w: Array) -> bool:
    """Whether the certificate of `conflict_averse_weights` holds, to rounding."""
    Gw = G @ w
    r = Gb + radius / math.sqrt(max(float(w @ Gw), 1e-300)) * Gw
    return bool(w @ r - r.min() <= 1e-12 * (np.abs(w) @ np.abs(r)))


def _affine_minimum(G: Array, shift: Array) -> tuple[Array, Array]:
    """Vectors p, q for which w = p + s q minimises ½ wᵀGw + s shiftᵀw over weights that sum to 1."""
    regular = G + G.diagonal().sum() / len(G)  # a multiple of 1 1ᵀ changes nothing where the sum is fixed
    right = np.empty((len(G), 2), order="F")
    right[:, 0] = 1
    right[:, 1] = shift
    _, solution, info = lapack.dposv(regular, right, lower=1)
    if info != 0:  # dependent gradients: any of the minima
        solution = np.linalg.lstsq(regular, right, rcond=None)[0]
    one, other = solution.T
    p: Array = one / one.sum()
    q: Array = other.sum() * p - other
    return p, q


def _quotient(a: float, b: float) -> float:
    return a / b if b else np.inf


def equal_projection_weights(gramian: Array) -> Array:
    r"""Coefficients x of the *unit* gradients for which every unit gradient has inner product 1 with the combination.

    .. math:: C x = \mathbf{1}, \qquad C_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}

    The certificate is the equation itself. Where C is singular, the shortest least-squares solution.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.

    Returns:
        Shape (K,), of either sign.
    """
    norms = np.sqrt(gramian.diagonal())
    C = gramian / norms[:, None] / norms
    ones = np.ones(len(C))
    factor, solution, info = lapack.dposv(C, ones, lower=1)
    if info == 0 and factor.diagonal().min() ** 2 > 1e-14 * len(C):  # the last pivots of a singular C are rounding
        regular: Array = solution
        return regular
    shortest: Array = np.asarray(np.linalg.lstsq(C, ones, rcond=1e-12)[0], dtype=np.float64)
    return shortest


def k_means_1d(points: Array, num_clusters: int) -> Indices:
    """Clusters of numbers with the least sum of squared distances to their cluster's mean: the exact optimum.

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
    """Sums of squared distances to the mean within every run a..j of the values, infinite for j < a. Shape (m, m).

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
