"""Changes of vectors towards the vectors that they conflict with, computed on Gramians."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .linear_algebra import STATIONARY, gradient_norms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from .linear_algebra import Array, Indices

    Numbers = TypeVar("Numbers", Array, Tensor)
    Places = Indices | Tensor


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


def align_in_turn(gramian: Array, partners_by_turn: Indices, targets: Array, beta: float) -> tuple[Array, Array]:
    """Turn every vector towards its partner of each turn, up to a target of their cosine, if the cosine is below the target.

    All vectors take a turn in one operation. A target moves towards the cosine before the turn.

    Args:
        gramian: Inner products of the vectors. Shape (K, K), finite.
        partners_by_turn: For each turn the partner of every vector, each other vector once. Shape (K - 1, K).
        targets: Entry (i, j) is the target of the cosine of vector i and its partner j. Shape (K, K), in -1..1.
        beta: Part of a new cosine in its target.

    Returns:
        The coefficients, as in `project_in_turn`, and the new targets. Shape (K, K) each.
    """
    tasks = np.arange(len(gramian))
    norms = gradient_norms(gramian)
    aims, others = targets[tasks, partners_by_turn], norms[partners_by_turn]
    sines = np.sqrt(np.maximum(1 - aims**2, STATIONARY))
    cosines, steps = np.full_like(aims, np.nan), np.zeros_like(aims)  # by turn; a cosine that does not exist is NaN
    products, squares = gramian.copy(), norms**2
    smallest = STATIONARY * squares
    for turn, partners in enumerate(partners_by_turn):
        product = products[tasks, partners]
        defined = ((squares > smallest) & (others[turn] > 0)).nonzero()[0]
        aim, other, size = aims[turn, defined], others[turn, defined], np.sqrt(squares[defined])
        cosine = np.minimum(np.maximum(product[defined] / (size * other), -1.0), 1.0)
        cosines[turn, defined] = cosine
        turned = np.maximum(aim * np.sqrt(1 - cosine**2) / sines[turn, defined] - cosine, 0.0)  # 0 above the target
        step = steps[turn]
        step[defined] = turned * size / other
        change = gramian.take(partners, axis=0)
        change *= step[:, None]
        products += change
        squares = np.maximum(squares + step * (2 * product + step * others[turn] ** 2), 0.0)
    coefficients, moved = np.eye(len(gramian)), targets.copy()
    coefficients[tasks, partners_by_turn] = steps
    moved[tasks, partners_by_turn] = np.where(np.isnan(cosines), aims, (1 - beta) * aims + beta * cosines)
    return coefficients, moved
