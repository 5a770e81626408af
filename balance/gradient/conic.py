"""ConicGrad: the fairest direction in a cone around the mean gradient."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..rules.registry import gradient_balancers
from ..solvers.conic import conic_error, conic_weights
from ._host import certificate, rounding, solve, without_zero_gradients

if TYPE_CHECKING:
    from ..types import Gramian, Weights

COSINE = 0.5  # ConicGrad's default c


@gradient_balancers.register(
    "conicgrad",
    heads="unweighted",
    label="ConicGrad",
    paper="Hassanpour et al. 2025, https://arxiv.org/abs/2502.00217",
    remedies=("conflict",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
    certificate=certificate(partial(conic_error, c=COSINE)),
)
def conicgrad(gramian: Gramian, *, c: float = COSINE) -> Weights:
    r"""Return the weights of the direction near the mean gradient in angle, whose smallest gain of a task is greatest.

    .. math:: \max_d \min_k \langle g_k, d \rangle \quad
              \text{subject to } \cos(d, g_0) \ge c,\ \lVert d \rVert = \lVert g_0 \rVert

    with the mean :math:`g_0`. CAGrad bounds the distance from the mean, ConicGrad the angle. If the orientation of `mgda`
    lies in the cone, it is the solution, and conflicts with no task. Otherwise the direction has the angle arccos c to the
    mean, and can conflict. c = 1 gives the mean. One task gets weight 1.

    If 0 lies in the convex hull of the gradients, no direction helps every task, and the direction is the mean. 0 counts as
    inside if the gradients cancel each other to 1e-6 of their lengths. A mean of zero gives d = 0. A task whose gradient is
    zero gets weight 0 and takes no part in the mean.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        c: Smallest cosine between the direction and the mean gradient, above 0 and at most 1.

    Returns:
        Non-negative weights, in mean convention. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or ``c`` is out of range.

    Source:
        Hassanpour et al., "Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone", 2025, section 3. Differs:
        the max-min problem is solved exactly at every step. The paper keeps the task weights between steps, moves them by one
        gradient step on the Lagrangian with a fixed multiplier, and inverts a matrix of the parameters by the
        Sherman-Morrison-Woodbury formula. As in the paper, the direction then gets the length of the mean gradient.
    """
    if not 0 < c <= 1:
        raise ValueError(f"c of 'conicgrad' must be above 0 and at most 1, but got {c}.")
    return solve(lambda G: without_zero_gradients(lambda C: conic_weights(C, c, rounding(gramian)), G), gramian)
