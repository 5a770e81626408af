"""Projections on the dual cone, the set of directions that conflict with no task: UPGrad's and DualProj's problem."""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack
from scipy.optimize import nnls

from .linear_algebra import Array, Indices, Mask, gradient_norms, square_root

PROXIMAL = 1e-12  # added to the diagonal of singular cosines; its effect on the result is removed again
ROUNDS = 8  # of the guess
FEW_TASKS = 16  # up to so many, a guess costs more than the solves that it saves
PIVOTS = 12  # steps of block pivoting, before the active-set method


def dual_cone_coefficients(cosines: Array, vectors: Array | None = None) -> Array:
    r"""Return the combinations of unit gradients that project vectors on the dual cone.

    The dual cone contains the directions that conflict with no task. Let U contain the unit gradients as rows. The projection
    of the vector :math:`U^\top b` is :math:`U^\top (b + x)`, with the solution x of

    .. math:: x \ge 0, \qquad C (b + x) \ge 0, \qquad x^\top C (b + x) = 0, \qquad C = U U^\top

    All vectors are solved together. A guess of the positive coefficients comes from conjugate gradients in single precision,
    in one matrix product for all vectors. One dense solve for each vector then confirms the guess, and block principal pivoting
    corrects it. Where C is singular, the diagonal is raised by 1e-12, and proximal steps remove the effect. Block pivoting can
    cycle on dependent gradients. Then the active-set method of Lawson and Hanson takes over.

    Args:
        cosines: C, of shape (K, K): positive semi-definite with unit diagonal.
        vectors: Columns b, of shape (K, m); None for the unit gradients themselves, m = K.

    Returns:
        Columns x, of shape (K, m). For dependent gradients x is not unique, but the projection is.

    Source:
        Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, section 4; block principal pivoting as in
        `non_negative_minimum`; Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23.
    """
    Q = cosines if vectors is None else cosines @ vectors
    if not (Q < 0).any():
        return np.zeros_like(Q)
    proximal = 0.0 if _is_regular(cosines) else PROXIMAL
    M = cosines + proximal * np.eye(len(cosines)) if proximal else cosines
    X, stubborn = _complementary(M, Q, Q < 0 if len(cosines) <= FEW_TASKS or Q.shape[1] == 1 else _guess(cosines, Q))
    if proximal:
        for _ in range(2):
            closer, more = _complementary(M, Q - proximal * X, X > 0)
            solved = np.setdiff1d(np.arange(Q.shape[1]), more)
            X[:, solved] = closer[:, solved]
    if len(stubborn):
        root = square_root(cosines, len(cosines) * np.finfo(np.float64).eps)
        targets = root if vectors is None else root @ vectors
        for column in stubborn:
            X[:, column] = nnls(root, -targets[:, column], maxiter=100 * len(X))[0]
    return X


def sum_of_projections(cosines: Array, lengths: Array) -> Array:
    """Return coefficients x of the unit gradients: their sum with ``lengths`` is UPGrad's direction. Shapes (K, K), (K,)."""
    return np.asarray(dual_cone_coefficients(cosines) @ lengths)


def projection_of_sum(cosines: Array, lengths: Array) -> Array:
    """Return coefficients x of the unit gradients: their sum with ``lengths`` is DualProj's direction. Shapes (K, K), (K,)."""
    total = lengths.sum()
    return np.asarray(total * dual_cone_coefficients(cosines, lengths[:, None] / total)[:, 0])


def sum_of_projections_error(gramian: Array, weights: Array) -> float:
    """Return the distance of a direction from UPGrad's direction with equal preferences, relative to the mean length.

    The reference projects every gradient by the active-set method of Lawson and Hanson, independently of
    `dual_cone_coefficients`.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: Shape (K,).
    """
    norms = gradient_norms(gramian)
    nonzero = np.flatnonzero(norms)
    if len(nonzero) == 0:
        return 0.0
    lengths = norms[nonzero] / norms.max()
    C = gramian[np.ix_(nonzero, nonzero)] / norms[nonzero, None] / norms[nonzero]
    root = square_root(C)
    combination = np.zeros(len(nonzero))
    for task, length in enumerate(lengths):
        combination += length * nnls(root, -root[:, task], maxiter=100 * len(root.T))[0]
    excess = weights[nonzero] * lengths - (lengths + combination) / len(norms)
    return float(np.linalg.norm(root @ excess) / lengths.mean())


def projection_error(gramian: Array, weights: Array) -> float:
    r"""Return the greatest relative violation of the optimality conditions of DualProj with equal preferences.

    With p = 1/K the conditions are :math:`w \ge p`, :math:`Gw \ge 0` and :math:`(w - p)^\top G w = 0`. Lengths are relative
    to the mean length of the gradients.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite.
        weights: Shape (K,).
    """
    norms = gradient_norms(gramian)
    nonzero = np.flatnonzero(norms)
    if len(nonzero) == 0:
        return 0.0
    lengths = norms[nonzero] / norms[nonzero].mean()
    C = gramian[np.ix_(nonzero, nonzero)] / norms[nonzero, None] / norms[nonzero]
    excess = (weights[nonzero] - 1 / len(norms)) * lengths
    products = C @ (weights[nonzero] * lengths)
    return float(max(0.0, -excess.min(), -products.min(), abs(excess @ products)))


def _is_regular(C: Array) -> bool:
    """Return whether every principal submatrix of the cosines can be factorised with at least six correct digits."""
    factor, info = lapack.dpotrf(C, lower=1)
    if info != 0:
        return False
    reciprocal_condition, _ = lapack.dpocon(factor, float(len(C)), uplo="L")  # K is an upper bound of the 1-norm of C
    return bool(reciprocal_condition > 1e-10)


def _guess(C: Array, Q: Array) -> Mask:
    """Return a guess of the positive coefficients of every column, by block pivoting with inexact solves. Shape (K, m)."""
    C, Q = C.astype(np.float32), Q.astype(np.float32)
    passive = Q < 0
    X = np.zeros_like(Q)
    for turn in range(ROUNDS):
        X = _conjugate_gradients(C, Q, passive, X, steps=3 + turn)
        infeasible = np.where(passive, X < 0, C @ X + Q < -1e-6)
        passive ^= infeasible
        if int(infeasible.sum()) <= Q.shape[1] // 10:
            break
    return passive


def _conjugate_gradients(C: Array, Q: Array, passive: Mask, X: Array, steps: int) -> Array:
    """Return X with CX + Q ≈ 0 where ``passive`` is true, and X = 0 elsewhere; the columns are separate problems."""
    X = X * passive
    residual = -(C @ X + Q) * passive
    search = residual.copy()
    square = np.einsum("kc,kc->c", residual, residual)
    for _ in range(steps):
        image = (C @ search) * passive
        curvature = np.einsum("kc,kc->c", search, image)
        flat = curvature <= 1e-5 * np.einsum("kc,kc->c", search, search)  # a step along it would be mostly rounding
        step = np.where(flat, 0, square) / np.where(flat, 1, curvature)
        X += step * search
        residual -= step * image
        previous, square = square, np.einsum("kc,kc->c", residual, residual)
        search = residual + square / np.where(previous > 0, previous, 1) * search
    return X


def _complementary(M: Array, Q: Array, passive: Mask) -> tuple[Array, Indices]:
    """Return the X ≥ 0 for which MX + Q ≥ 0 is zero where X is positive, and the columns that were not solved.

    Args:
        M: Shape (K, K), positive definite.
        Q: Shape (K, m).
        passive: Guess of the positive coefficients. Shape (K, m).
    """
    rows = np.zeros(Q.T.shape)
    for row, q, free in zip(rows, Q.T, passive.T, strict=True):
        places = free.nonzero()[0]
        row[places] = _solve(M, q, places)
    X = rows.T
    infeasible = np.where(passive, X < 0, -1e-14 * np.maximum(1, X.sum(axis=0)) > M @ X + Q)
    stubborn: list[int] = []
    for column in infeasible.any(axis=0).nonzero()[0].tolist():
        x = _pivot(M, Q[:, column], passive[:, column] ^ infeasible[:, column])
        X[:, column] = 0 if x is None else x
        stubborn += [column] if x is None else []
    return X, np.array(stubborn, dtype=np.intp)


def _pivot(M: Array, q: Array, passive: Mask) -> Array | None:
    """Return the x ≥ 0 for which Mx + q ≥ 0 is zero where x is positive, or None if block pivoting does not find it."""
    for _ in range(PIVOTS):
        free = passive.nonzero()[0]
        x = np.zeros(len(q))
        x[free] = _solve(M, q, free)
        infeasible = np.where(passive, x < 0, M @ x + q < -1e-14 * max(1.0, x.sum()))
        if not infeasible.any():
            return x
        passive = passive ^ infeasible
    return None


def _solve(M: Array, q: Array, free: Indices) -> Array:
    """Return the solution of Mx + q = 0 on the indices in ``free``, infeasible where M is not positive definite."""
    if len(free) == 0:
        return q[:0]
    if len(free) == 1:
        return -q[free] / M[free, free]
    part = M.take(free, axis=0).take(free, axis=1)
    _, x, info = lapack.dposv(part.T, -q.take(free), lower=1, overwrite_a=1, overwrite_b=1)
    return np.asarray(x) if info == 0 else np.full(len(free), -1.0)
