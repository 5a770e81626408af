"""Linear algebra of Gramians, as the solvers need it: numpy, float64, K up to a few hundred."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.optimize import nnls

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Mask: TypeAlias = NDArray[np.bool_]

STATIONARY = 1e-12  # a convex combination counts as zero where its square is this part of the gradients' squared lengths
# Eigenvalue of the cosines, relative to the largest, that counts as zero. Float32 gradients turn a zero into up to 1e-13, and
# the rounding of a float64 Gramian changes a solution by up to 1e-16 / DEPENDENT.
DEPENDENT = 1e-10
EPSILON = float(np.finfo(np.float64).eps)
MAX_STEPS = 200  # limit of every iteration
MAX_PIVOTS = 20  # of block pivoting, which seldom needs ten and otherwise cycles
SMALLEST_PIVOT = 1e-6  # of a Cholesky factor of cosines, below which block pivoting gives up


def gradient_norms(gramian: Array) -> Array:
    """Return the lengths of the gradients, zero where rounding made a square negative. Shape (K, K) -> (K,)."""
    return np.sqrt(np.maximum(gramian.diagonal(), 0.0))


def cosines(gramian: Array, norms: Array) -> Array:
    """Return the inner products of the unit gradients, given lengths that are not zero. Shapes (K, K), (K,) -> (K, K)."""
    products = norms[:, None] * norms
    return np.divide(gramian, products, out=products)


def square_root(gramian: Array, cutoff: float = -1.0) -> Array:
    """Return a matrix R of full row rank with RᵀR = G, to rounding: a pivoted Cholesky factor.

    Args:
        gramian: Shape (K, K), positive semi-definite.
        cutoff: Greatest pivot that counts as zero; if negative, K times the machine epsilon times the largest pivot.

    Returns:
        Shape (rank, K).
    """
    factor, pivots, rank, _ = lapack.dpstrf(gramian, tol=cutoff)
    root = np.zeros((rank, len(gramian)))
    root[:, pivots - 1] = np.triu(factor)[:rank]
    return root


def share_between_equals(weights: Array, gramian: Array) -> Array:
    """Give tasks with exactly the same gradient equal weights, without changing the direction. Shapes (K,), (K, K)."""
    squares = gramian.diagonal()
    if len(set(squares.tolist())) == len(squares):
        return weights  # equal gradients have equal squares
    equal = (gramian == squares[:, None]) & (gramian == squares)
    first = equal.argmax(axis=1)  # the first task with that gradient represents all of them
    total = np.bincount(first, weights, minlength=len(first))
    count = np.bincount(first, minlength=len(first))
    return np.asarray((total / count.clip(min=1))[first])


def non_negative_minimum(M: Array, b: Array, passive: Mask) -> Array | None:
    """Return the x ≥ 0 that minimises ½ xᵀMx - bᵀx, by block principal pivoting.

    All infeasible variables change sides at once while that lowers their number. After a few tries in vain, only the last
    infeasible variable does. A handful of dense solves is enough, where an active-set method takes a step per variable.

    Args:
        M: Shape (K, K), positive semi-definite.
        b: Shape (K,).
        passive: Guess of the variables that are positive. Shape (K,).

    Returns:
        Shape (K,). None if M is nearly singular.

    Source:
        Portugal, Júdice & Vicente, "A comparison of block pivoting and interior-point algorithms for linear least squares
        problems with nonnegative variables", Mathematics of Computation 1994.
    """
    passive = passive.copy()
    fewest, grace = len(b) + 1, 3
    for _ in range(MAX_PIVOTS):
        free = passive.nonzero()[0]
        solution = solve_on(M, b, free)
        if solution is None:
            return None
        infeasible = solution < 0
        if len(free) < len(b):
            infeasible |= (M.dot(solution) < b - 1e-14 * max(1.0, float(solution.sum()))) & ~passive
        count = int(np.count_nonzero(infeasible))
        if count == 0:
            return solution
        if count < fewest:
            fewest, grace = count, 3
        elif grace > 0:
            grace -= 1
        else:
            infeasible[: infeasible.nonzero()[0][-1]] = False
        passive ^= infeasible
    return None


def solve_on(M: Array, b: Array, free: Indices) -> Array | None:
    """Return the x with (Mx)_k = b_k on the indices in ``free``, and x_k = 0 elsewhere; None if M is nearly singular there."""
    if len(free) == len(b):
        factor, x, info = lapack.dposv(M.T, b, lower=1)
    elif len(free):
        factor, x, info = lapack.dposv(M.take(free, axis=0).take(free, axis=1).T, b.take(free), lower=1, overwrite_a=1)
    else:
        return np.zeros(len(b))
    if info != 0 or factor.diagonal().min() < SMALLEST_PIVOT:
        return None
    solution = np.zeros(len(b))
    solution[free] = x
    return solution


def least_distance(root: Array, row: Array) -> Array:
    """Return the y ≥ 0 that minimises ‖Ry‖² + (row · y - 1)², by the active-set method of Lawson and Hanson.

    Args:
        root: R, of shape (rank, K).
        row: Shape (K,).

    Returns:
        Shape (K,).

    Source:
        Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23.
    """
    target = np.zeros(len(root) + 1)
    target[-1] = 1
    return np.asarray(nnls(np.vstack([root, row]), target, maxiter=100 * len(row))[0])


def equal_projection_weights(gramian: Array, cutoff: float = DEPENDENT, projections: Array | None = None) -> Array:
    r"""Return coefficients x of the *unit* gradients for which every unit gradient has inner product 1 with the combination.

    .. math:: C x = \mathbf{1}, \qquad C_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}

    Other inner products than 1 can be given.

    Where C is singular, x is the shortest least-squares solution. Both solutions are equivariant to the order of the tasks.
    The pivots of a Cholesky factorisation depend on that order, so it is used for regular C only.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, with a positive diagonal.
        cutoff: Eigenvalues of C below this part of the largest count as zero.
        projections: Inner products in place of 1, positive. Shape (K,).

    Returns:
        Shape (K,), of either sign; all zero where no combination has equal projections, as for opposite gradients.
    """
    ones = np.ones(len(gramian)) if projections is None else projections
    return equal_projections(cosines(gramian, np.sqrt(gramian.diagonal())), cutoff, ones)


def equal_projections(C: Array, cutoff: float, ones: Array) -> Array:
    """Return the result of `equal_projection_weights`, given the cosines and the inner products. Shapes (K, K), (K,)."""
    factor, solution, info = lapack.dposv(C, ones, lower=1)
    if info == 0:
        reciprocal_condition, _ = lapack.dpocon(factor, float(len(C)), uplo="L")  # K is an upper bound of the 1-norm of C
        if reciprocal_condition > max(1e-6, 10 * cutoff):  # an estimate, seldom wrong by more than a factor of 3
            return np.asarray(solution)
    values, vectors = np.linalg.eigh(C)
    independent = values > cutoff * values[-1]
    basis = vectors[:, independent]
    components = basis.T @ ones
    if components @ components <= cutoff * (ones @ ones):
        return np.zeros(len(C))
    return np.asarray(basis @ (components / values[independent]))


def equal_projection_error(gramian: Array, weights: Array) -> float:
    """Return the spread of the direction's projections onto the task gradients, relative to the largest projection.

    Args:
        gramian: Shape (K, K), positive semi-definite, finite, of linearly independent gradients; zero gradients are left out.
        weights: Coefficients of the gradients. Shape (K,).
    """
    norms = gradient_norms(gramian)
    nonzero = norms > 0
    projections = (gramian @ weights)[nonzero] / norms[nonzero]
    largest = np.abs(projections).max(initial=0.0)
    return float(np.ptp(projections) / largest) if largest > 0 else 0.0
