"""IMTL-G and ConFIG: directions with equal projections onto all task gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..rules.registry import gradient_balancers
from ..solvers.linear_algebra import DEPENDENT, cosines, equal_projection_error, equal_projections
from ._host import certificate, rounding, solve, without_zero_gradients
from ._preference import preferences

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..solvers.linear_algebra import Array, Indices
    from ..types import Gramian, Weights

Length = Literal["projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric"]


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
        norms = np.sqrt(G.diagonal())
        w = equal_projections(cosines(G, norms), cutoff, np.ones(len(G))) / norms
        total, size = float(w.sum()), float(abs(w).sum())
        if abs(total) <= cutoff**0.5 * size:  # a sum that is mostly rounding would make the weights arbitrarily large
            total = size or 1.0
        scaled: Array = w / (total if official else abs(total))
        return scaled

    return solve(lambda G: without_zero_gradients(weights, G), gramian)


@gradient_balancers.register(
    "config",
    heads="unweighted",
    label="ConFIG",
    paper="Liu et al. 2024, https://arxiv.org/abs/2408.11104",
    remedies=("conflict", "gradient length", "domination"),
    invariances=(
        "permutation_equivariant",
        "rotation_equivariant",
        "unchanged_by_scaling_one_task",
        "scales_with_the_gradients",
        "linear_under_scaling",
    ),
    certificate=certificate(equal_projection_error),
)
def config(
    gramian: Gramian,
    *,
    preference: list[float] | None = None,
    length: Length | int = "projection",
    present: Tensor | None = None,
) -> Weights:
    r"""Return weights for ConFIG, with which the direction has the same angle to every task gradient.

    .. math:: d = \ell \, \hat d, \qquad \hat d \text{ in the direction of } U^+ p, \qquad
              \ell = \textstyle\sum_k \langle g_k, \hat d \rangle

    with the unit gradients as rows of U. For linearly independent gradients the direction conflicts with no task, and its
    cosine with :math:`g_k` is proportional to :math:`p_k`. It has the orientation of `imtl_g`, and its length is the sum of
    the projections. Weights can be negative. For dependent gradients, as defined in `imtl_g`, the cosines agree in the
    least-squares sense, and the direction can conflict. A task whose gradient is zero gets weight 0. At G = 0, and for
    opposite gradients, all weights are 0. One task gets weight 1.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        preference: p, positive, one number for each task; 1 by default. A common factor has no effect.
        length: Length that every gradient has in the sum ℓ. ``"projection"``: its own. ``"minimum"``, ``"maximum"``,
            ``"harmonic"``, ``"arithmetic"``, ``"geometric"``: the smallest, the greatest or a mean of the lengths that are not
            zero. An index: the length of that task's gradient. If that task is absent or its gradient is zero, the length
            is ``"projection"``.
        present: Indices of the present tasks, for ``preference`` and ``length``; the stage passes them.

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range.

    Source:
        Liu, Chu & Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025, eq. (2),
        and the length models of the authors' package. Differs: tasks with a zero gradient are left out.
    """
    if isinstance(length, int) and length < 0:
        raise ValueError(f"length of 'config' must be a name or the index of a task, but got {length}.")

    def weights(G: Array) -> Array:
        p = preferences("config", preference, len(G), present, 1.0)
        if G.diagonal().min() > 0 and isinstance(length, str):
            return _equal_angles(G, p, length, max(DEPENDENT, len(G) ** 0.5 * rounding(gramian)))
        tasks = np.arange(len(G)) if present is None else present.cpu().numpy()
        nonzero = np.flatnonzero(G.diagonal())
        w = np.zeros(len(G))
        if len(nonzero):
            cutoff = max(DEPENDENT, len(nonzero) ** 0.5 * rounding(gramian))
            w[nonzero] = _equal_angles(G[np.ix_(nonzero, nonzero)], p[nonzero], _place(length, tasks[nonzero]), cutoff)
        return w

    return solve(weights, gramian)


def _place(length: Length | int, tasks: Indices) -> Length | int:
    """Return the name in ``length``, or the place of its task among ``tasks``, ``"projection"`` if it is not among them."""
    if isinstance(length, str):
        return length
    places = np.flatnonzero(tasks == length)
    return int(places[0]) if len(places) else "projection"


def _equal_angles(G: Array, p: Array, length: Length | int, cutoff: float) -> Array:
    """Return ConFIG's weights for gradients that are not zero; ``length`` is a name or an index of them. Shape (K,)."""
    norms = np.sqrt(G.diagonal())
    C = cosines(G, norms)
    x = equal_projections(C, cutoff, p / p.max())
    products = C.dot(x)  # of the unit gradients with the direction x of the unit gradients
    square = float(x.dot(products))
    if square <= 0:
        return np.zeros(len(G))
    total: float = float(_lengths(norms, length).dot(products)) / square  # relative to the length of that direction
    weights: Array = x / norms * total
    return weights


def _lengths(norms: Array, length: Length | int) -> Array:
    """Return the length of each gradient in the sum of projections. Shape (K,)."""
    if length == "projection":
        return norms
    if isinstance(length, int):
        return np.full(len(norms), norms[length])
    models: dict[Length, Callable[[], float]] = {
        "minimum": norms.min,
        "maximum": norms.max,
        "harmonic": lambda: float(1 / (1 / norms).mean()),
        "arithmetic": norms.mean,
        "geometric": lambda: math.exp(float(np.log(norms).mean())),
    }
    return np.full(len(norms), models[length]())
