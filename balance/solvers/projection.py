"""Changes of vectors towards the vectors that they conflict with, computed on Gramians."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from balance.solvers.linear_algebra import STATIONARY, gradient_norms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from balance.solvers.linear_algebra import Array, Indices

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


def align_in_turn(gramian: Array, partners_by_turn: Iterable[Indices], targets: Array, beta: float) -> tuple[Array, Array]:
    """Turn every vector towards its partner of each turn, up to a target of their cosine, if the cosine is below the target.

    All vectors take a turn in one operation. A target moves towards the cosine before the turn.

    Args:
        gramian: Inner products of the vectors. Shape (K, K), finite.
        partners_by_turn: For each turn the partner of every vector. Shape (K,) each.
        targets: Entry (i, j) is the target of the cosine of vector i and its partner j. Shape (K, K), in -1..1.
        beta: Part of a new cosine in its target.

    Returns:
        The coefficients, as in `project_in_turn`, and the new targets. Shape (K, K) each.
    """
    tasks = np.arange(len(gramian))
    norms = gradient_norms(gramian)
    coefficients, products, squares = np.eye(len(gramian)), gramian.copy(), norms**2
    smallest, targets = STATIONARY * squares, targets.copy()
    for partners in partners_by_turn:
        product, size, other = products[tasks, partners], np.sqrt(squares), norms[partners]
        defined = (squares > smallest) & (other > 0)
        lengths = np.where(defined, size * other, 1.0)
        cosine = np.clip(np.where(defined, product, 0.0) / lengths, -1.0, 1.0)
        target = targets[tasks, partners]
        low = defined & (cosine < target)
        # v + step g, with the step in units of the quotient of the lengths
        sine = np.sqrt(np.maximum(1 - target**2, STATIONARY))
        turn = np.where(low, target * np.sqrt(1 - cosine**2) / sine - cosine, 0.0)
        step = turn * size / np.where(defined, other, 1.0)
        coefficients[tasks, partners] += step
        products += step[:, None] * gramian[partners]
        squares = np.maximum(squares + 2 * step * product + (step * other) ** 2, 0.0)
        targets[tasks, partners] = np.where(defined, (1 - beta) * target + beta * cosine, target)
    return coefficients, targets
