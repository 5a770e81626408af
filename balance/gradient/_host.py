"""Conversion between tensors and the solvers, which work in float64 on the host."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights


def solve(solver: Callable[[Array], Array], gramian: Gramian) -> Weights:
    """Apply a float64 numpy solver to a Gramian of any float type, on any device; one copy of K² numbers to the host.

    Args:
        solver: Function from an array (K, K) to an array (K,).
        gramian: Shape (K, K).

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix.
    """
    G = gramian.detach().to("cpu", torch.float64).numpy()
    if G.ndim != 2 or G.shape[0] != G.shape[1] or G.shape[0] == 0:
        raise ValueError(
            f"gramian must have shape (K, K) with K >= 1, but got {tuple(gramian.shape)}. "
            "From a Jacobian J of shape (K, P) it is J @ J.T."
        )
    if np.count_nonzero(np.isfinite(G)) < G.size:  # on small matrices a quarter of the time of torch's functions
        raise ValueError("gramian must be finite, but has NaN or infinite entries. Check the losses and their gradients.")
    return torch.from_numpy(solver(G)).to(gramian)


def certificate(error: Callable[[Array, Array], float]) -> Callable[[Gramian, Weights], float]:
    """Return an error of weights as a function of tensors.

    Args:
        error: Function of a Gramian (K, K) and weights (K,), as float64 arrays.

    Returns:
        Function of the tensors.
    """

    def error_of_tensors(gramian: Gramian, weights: Weights) -> float:
        G, w = (tensor.detach().to("cpu", torch.float64).numpy() for tensor in (gramian, weights))
        return error(G, w)

    return error_of_tensors


def rounding(gramian: Gramian) -> float:
    """Return the relative rounding error of the entries of a Gramian: the machine epsilon of its dtype."""
    return _epsilon(gramian.dtype)


@functools.cache
def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps


def without_zero_gradients(solver: Callable[[Array], Array], gramian: Array) -> Array:
    """Apply a solver to the tasks whose gradient is not zero; every other task gets weight 0. Shape (K, K) -> (K,)."""
    if gramian.diagonal().min() > 0:
        return solver(gramian)
    nonzero = np.flatnonzero(gramian.diagonal())
    weights = np.zeros(len(gramian))
    if len(nonzero):
        weights[nonzero] = solver(gramian[np.ix_(nonzero, nonzero)])
    return weights
