"""The same projection on every task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from balance.gradient.task_space import solve, without_zero_gradients
from balance.registry import gradient_balancers
from balance.solvers import equal_projection_weights

if TYPE_CHECKING:
    from balance.shapes import Gramian, Weights
    from balance.solvers import Array


@gradient_balancers.register("imtl", heads="weighted")
def imtl_g(gramian: Gramian, *, official: bool = False) -> Weights:
    r"""IMTL-G: weights for which the direction has the same projection onto every task gradient.

    .. math:: \langle J^\top w, g_k / \lVert g_k \rVert \rangle \text{ equal for all } k, \qquad |\textstyle\sum_k w_k| = 1

    The common projection is positive, so the direction conflicts with no task, and the sum is 1 except where that would turn it
    into ascent for every task; then it is -1. Its direction does not change when a gradient is multiplied by a positive
    constant. Weights can be negative. A task whose gradient is zero gets weight 0 and the others are solved without it; at
    G = 0, and where opposite gradients leave no common projection, all weights are 0. Where the gradients are dependent, the
    projections are equal in the least-squares sense. One task gets weight 1.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        official: Keep the sum at +1 whatever the sign of the projection, as the paper's formula does.

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix.

    Source:
        Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, eq. (6). Differs: the sign, see ``official``; dependent
        gradients are no error.
    """

    def weights(G: Array) -> Array:
        w = equal_projection_weights(G) / G.diagonal() ** 0.5
        total, size = float(w.sum()), float(abs(w).sum())
        if size * min(G.diagonal()) ** 0.5 <= 1e-9:  # no weights give every gradient the same projection but zero
            return np.zeros(len(G))
        # a sum that is zero but for rounding would make the weights infinite
        total = total if abs(total) > 1e-12 * size else size
        scaled: Array = w / (total if official else abs(total))
        return scaled

    return solve(lambda G: without_zero_gradients(weights, G), gramian)
