"""Changes of vectors towards the vectors that they conflict with, computed on Gramians."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .linear_algebra import STATIONARY, cosines, gradient_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from .linear_algebra import Array, Indices

    Numbers = TypeVar("Numbers", Array, Tensor)
    Places = Indices | Tensor

FEW_VECTORS = 8  # up to so many, numbers are faster than arrays
SOME_VECTORS = 40  # up to so many, it is faster to gather the inner products of all pairs of partners before the first turn


def project_in_turn(gramians: Numbers, partners_by_turn: Iterable[Places], tasks: Places, coefficients: Numbers) -> Numbers:
    """Project every vector off its partner of each turn, if the two conflict; all vectors take a turn in one operation.

    The function accepts numpy arrays and tensors.

    Args:
        gramians: Inner products of the vectors, with or without leading dimensions. Shape (..., K, K), finite.
        partners_by_turn: For each turn the partner of every vector. Shape (K,) each.
        tasks: Indices 0..K-1. Shape (K,).
        coefficients: Identity matrices, changed in place. Shape (..., K, K).

    Returns:
        The coefficients: entry (..., i, j) is the coefficient of vector j in the projected vector i. Shape (..., K, K).
    """
    products = gramians + 0  # row i: inner products of the projected vector i with every vector
    squares = gramians[..., tasks, tasks]
    for partners in partners_by_turn:
        product, square = products[..., tasks, partners], squares[..., partners]
        conflict = (product < 0) & (square > 0)
        step = product * conflict / (square + ~conflict)
        coefficients[..., tasks, partners] -= step
        products -= step[..., None] * gramians[..., partners, :]
    return coefficients


def projected_weights(gramian: Array, orders: Indices) -> Array:
    """Return the coefficients of the vectors in the sum of all vectors, each projected off the others in its order.

    The result is the sum over the first index of `project_in_turn`.

    Args:
        gramian: Inner products of the vectors. Shape (K, K), finite.
        orders: Row i lists the vectors other than i. Shape (K, K - 1).

    Returns:
        Shape (K,).
    """
    if len(gramian) <= FEW_VECTORS:
        return _project_few(gramian.tolist(), orders.tolist())
    norms, divisors = _lengths(gramian)
    partners_by_turn, zeros = np.ascontiguousarray(orders.T), np.zeros(len(norms))
    steps = _visit(cosines(gramian, divisors), partners_by_turn, lambda _, products: np.maximum(-products, zeros))
    return _total(steps, partners_by_turn, norms, divisors)


def _project_few(G: list[list[float]], orders: list[list[int]]) -> Array:
    """Return the result of `projected_weights` from numbers, which is faster than arrays for a few vectors. Shape (K,)."""
    weights = [1.0] * len(G)
    for start, order in zip(G, orders, strict=True):
        products = start  # of the projected vector with all vectors
        for j in order:
            product, square = products[j], G[j][j]
            if product < 0 < square:
                step = product / square
                weights[j] -= step
                products = [a - step * b for a, b in zip(products, G[j], strict=True)]
    return np.array(weights)


def aligned_weights(gramian: Array, orders: Indices, targets: Array, beta: float) -> tuple[Array, Array]:
    """Turn every vector towards each other in its order, up to a target of their cosine, if the cosine is below the target.

    A target moves towards the cosine before the turn.

    Args:
        gramian: Inner products of the vectors. Shape (K, K), finite.
        orders: Row i lists the vectors other than i. Shape (K, K - 1).
        targets: Entry (i, j) is the target of the cosine of vector i and its partner j. Shape (K, K), in -1..1.
        beta: Part of a new cosine in its target.

    Returns:
        The coefficients of the vectors in the sum of the turned vectors, of shape (K,), and the new targets, of shape (K, K).
    """
    if len(gramian) <= FEW_VECTORS:
        return _align_few(gramian.tolist(), orders.tolist(), targets.tolist(), beta)
    return _align_in_turn(gramian, np.ascontiguousarray(orders.T), targets, beta)


def _align_few(G: list[list[float]], orders: list[list[int]], targets: list[list[float]], beta: float) -> tuple[Array, Array]:
    """Return the result of `aligned_weights` from numbers, which is faster than arrays for a few vectors."""
    weights = [1.0] * len(G)
    norms = [math.sqrt(max(row[k], 0.0)) for k, row in enumerate(G)]
    for i, order in enumerate(orders):
        products, length = G[i], norms[i]
        for j in order:
            if not (length * length > STATIONARY * norms[i] * norms[i] and norms[j] > 0):
                continue  # no cosine exists
            aim = targets[i][j]
            cosine = min(max(products[j] / (length * norms[j]), -1.0), 1.0)
            targets[i][j] = (1 - beta) * aim + beta * cosine
            turned = aim * math.sqrt((1 - cosine * cosine) / max(1 - aim * aim, STATIONARY)) - cosine
            if turned > 0:
                step = turned * length / norms[j]
                weights[j] += step
                length = math.sqrt(max(length * length + step * (2 * products[j] + step * G[j][j]), 0.0))
                products = [a + step * b for a, b in zip(products, G[j], strict=True)]
    return np.array(weights), np.array(targets)


def _align_in_turn(gramian: Array, partners_by_turn: Indices, targets: Array, beta: float) -> tuple[Array, Array]:
    """Return the result of `aligned_weights`; ``partners_by_turn``, of shape (K - 1, K), contains the orders as columns."""
    tasks = np.arange(len(gramian))
    norms, divisors = _lengths(gramian)
    aims, nonzero = targets[tasks, partners_by_turn], (norms > 0)[partners_by_turn]
    slopes = nonzero * aims / np.sqrt(np.maximum(1 - aims**2, STATIONARY))
    found, squares = np.zeros((2, *aims.shape))  # cosines, and squared lengths relative to the start
    square = (norms > 0).astype(np.float64)

    def turn(number: int, products: Array) -> Array:
        nonlocal square
        squares[number] = square
        length = np.sqrt(np.maximum(square, STATIONARY))
        cosine = np.divide(products, length, out=found[number])
        sine = np.sqrt(np.maximum(1 - cosine * cosine, 0.0))
        step: Array = np.maximum(slopes[number] * sine - cosine, 0.0) * length * (square > STATIONARY)  # 0 above the target
        square = np.maximum(square + step * (2 * products + step), 0.0)
        return step

    steps = _visit(cosines(gramian, divisors), partners_by_turn, turn)
    moved, defined = targets.copy(), nonzero & (squares > STATIONARY)
    moved[tasks, partners_by_turn] = np.where(defined, (1 - beta) * aims + beta * found.clip(-1, 1), aims)
    return _total(steps, partners_by_turn, norms, divisors), moved


def _lengths(gramian: Array) -> tuple[Array, Array]:
    """Return the lengths of the vectors, and divisors that turn vectors into unit vectors, and zero vectors into zero."""
    norms = gradient_norms(gramian)
    return norms, norms if norms.min() > 0 else np.where(norms > 0, norms, np.inf)


def _visit(C: Array, partners_by_turn: Indices, step: Callable[[int, Array], Array]) -> Array:
    """Add multiples of the partners of each turn to every unit vector, and return the multiples.

    Args:
        C: Inner products of the unit vectors. Shape (K, K).
        partners_by_turn: Shape (K - 1, K).
        step: Function of the number of a turn and of the inner products of every changed vector with its partner, of shape
            (K,). It returns the multiples of the unit partners that are added, of shape (K,).

    Returns:
        Shape (K - 1, K).
    """
    K, steps = len(C), np.empty(partners_by_turn.shape)
    if K <= SOME_VECTORS:
        starts = partners_by_turn * K
        products, pairs = C.take(starts + np.arange(K)), C.take(starts[:, None] + partners_by_turn)
        for turn in range(K - 1):
            steps[turn] = multiples = step(turn, products[turn])
            products[turn + 1 :] += multiples * pairs[turn, turn + 1 :]
        return steps
    tasks, coefficients = np.arange(K), np.eye(K)
    for turn, partners in enumerate(partners_by_turn):
        multiples = step(turn, np.einsum("ij,ij->i", coefficients, C.take(partners, axis=0)))
        steps[turn] = coefficients[tasks, partners] = multiples
    return steps


def _total(steps: Array, partners_by_turn: Indices, norms: Array, divisors: Array) -> Array:
    """Return the coefficients of the vectors in the sum of the changed vectors. Shape (K,)."""
    added = np.bincount(partners_by_turn.ravel(), (steps * norms).ravel(), minlength=len(norms))
    return np.asarray(1 + added / divisors)
