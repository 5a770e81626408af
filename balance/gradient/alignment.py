"""Aligned-MTL: task gradients made orthogonal and equally long, without turning them more than needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from ..rules.registry import gradient_balancers
from ._host import rounding, solve
from ._preference import preferences

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights

ScaleMode = Literal["min", "median", "rmse"]


@gradient_balancers.register(
    "aligned_mtl",
    heads="unweighted",
    label="Aligned-MTL",
    paper="Senushkin et al. 2023, https://arxiv.org/abs/2305.19000",
    remedies=("conflict", "gradient length", "domination"),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
def aligned_mtl(
    gramian: Gramian,
    *,
    scale_mode: ScaleMode = "min",
    preference: list[float] | None = None,
    present: Tensor | None = None,
) -> Weights:
    r"""Return weights for which the gradients are first replaced by the nearest orthogonal gradients of equal length.

    .. math:: w = \sqrt{\lambda} \, G^{+1/2} p, \qquad G^{+1/2} = \sum_{\lambda_i > 0} \lambda_i^{-1/2} u_i u_i^\top

    with the eigenvalues :math:`\lambda_i` and eigenvectors :math:`u_i` of G. The replaced gradients :math:`\sqrt{\lambda}
    G^{+1/2} J` have the stability number 1. Weights can be negative, and the direction can conflict with tasks. A task whose
    gradient is zero gets weight 0. Dependent gradients contribute through their span; at opposite gradients and at G = 0 all
    weights are 0. One task gets its preference, 1 by default.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        scale_mode: λ is the smallest positive eigenvalue (``"min"``), their lower median (``"median"``) or their mean
            (``"rmse"``). An eigenvalue counts as zero below K times the rounding of ``gramian``, relative to the largest.
        preference: p, positive, one number for each task; 1/K by default.
        present: Indices of the present tasks, for ``preference``; the stage passes them.

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or ``preference`` is not as described.

    Source:
        Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, algorithm 1. Differs:
        preferences of 1/K, where the authors' code and LibMTL have 1, a factor of K. At G = 0 their code returns the
        preferences.
    """

    def weights(G: Array) -> Array:
        p = preferences("aligned_mtl", preference, len(G), present, 1 / len(G))
        values, vectors = np.linalg.eigh(G)  # ascending
        first = int(np.count_nonzero(values <= max(float(values[-1]), 0.0) * len(G) * rounding(gramian)))
        if first == len(G):
            return np.zeros(len(G))
        values, vectors = values[first:], vectors[:, first:]
        balanced: Array = vectors.dot(np.sqrt(_scale(values, scale_mode) / values) * p.dot(vectors))
        return balanced

    return solve(weights, gramian)


def _scale(values: Array, mode: ScaleMode) -> float:
    """Return the common eigenvalue of the replaced gradients, given the positive eigenvalues in ascending order."""
    if mode == "rmse":
        return float(values.mean())
    return float(values[0 if mode == "min" else (len(values) - 1) // 2])
