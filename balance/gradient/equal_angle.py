"""IMTL-G: a direction with equal projections onto all task gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balance.gradient._host import certificate, rounding, solve, without_zero_gradients
from balance.rules.registry import gradient_balancers
from balance.solvers.linear_algebra import DEPENDENT, equal_projection_error, equal_projection_weights

if TYPE_CHECKING:
    from balance.solvers.linear_algebra import Array
    from balance.types import Gramian, Weights


@gradient_balancers.register(
    "imtl",
    heads="weighted",
    label="IMTL-G",
    paper="Liu et al. 2021, https://openreview.net/forum?id=IMPnRXEWpvr",
    remedies=("gradient length", "domination"),
    invariances=(
        "permutation_equivariant",
        "rotation_equivariant",
        "unchanged_by_scaling_one_task",
        "scales_with_the_gradients",
    ),
    certificate=certificate(equal_projection_error),
)
def imtl_g(gramian: Gramian, *, official: bool = False) -> Weights:
    r"""Return weights for IMTL-G, with which the direction has the same projection onto every task gradient.

    .. math:: \langle J^\top w, g_k / \lVert g_k \rVert \rangle \text{ equal for all } k, \qquad |\textstyle\sum_k w_k| = 1

    The common projection is positive, so the direction conflicts with no task. The sum of the weights is 1, or -1 if 1 would
    mean ascent for every task. Where the weights cancel each other, to 1e-5 of their absolute values, the sum of the absolute
    values is 1 instead. The direction does not change when a gradient is multiplied by a positive constant. Weights can be
    negative. A task whose gradient is zero gets weight 0 and has no effect on the remaining tasks. At G = 0, and for opposite
    gradients, which have no common projection, all weights are 0. One task gets weight 1.

    If the gradients are dependent, the projections are equal in the least-squares sense, and the direction can conflict.
    Gradients count as dependent if an eigenvalue of their cosines, relative to the largest, is below 1e-10 or the rounding of
    ``gramian``. The order of the tasks does not matter.

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
        cutoff = max(DEPENDENT, len(G) ** 0.5 * rounding(gramian))
        w = equal_projection_weights(G, cutoff) / G.diagonal() ** 0.5
        total, size = float(w.sum()), float(abs(w).sum())
        if abs(total) <= cutoff**0.5 * size:  # a sum that is mostly rounding would make the weights arbitrarily large
            total = size or 1.0
        scaled: Array = w / (total if official else abs(total))
        return scaled

    return solve(lambda G: without_zero_gradients(weights, G), gramian)
