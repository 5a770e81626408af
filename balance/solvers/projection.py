"""Projections of vectors off the vectors that they conflict with, computed on Gramians."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

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
