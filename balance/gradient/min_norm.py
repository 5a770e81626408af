"""MGDA and CAGrad: short vectors in the convex hull of the task gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.optimize import nnls

from ..rules.registry import gradient_balancers
from ..solvers.conflict_averse import conflict_averse_error, conflict_averse_weights
from ..solvers.linear_algebra import square_root
from ..solvers.min_norm import min_norm_error, min_norm_weights
from ._host import certificate, rounding, solve

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights

Normalization = Literal["none", "l2", "loss", "loss+"]
Rescale = Literal["none", "paper", "bound", 0, 1, 2]
Solver = Literal["exact", "cvxpy"]

RADIUS = 0.4  # CAGrad's default c
_RESCALE_BY_NUMBER: dict[Any, Any] = {0: "none", 1: "paper", 2: "bound"}  # in the authors' code


@gradient_balancers.register(
    "mgda",
    heads="weighted",
    label="MGDA",
    paper="Désidéri 2012, https://doi.org/10.1016/j.crma.2012.03.014; Sener & Koltun 2018, https://arxiv.org/abs/1810.04650",
    remedies=("conflict", "gradient length"),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
    certificate=certificate(min_norm_error),
)
def mgda(gramian: Gramian, *, normalization: Normalization = "none", losses: Tensor | None = None) -> Weights:
    r"""Return weights for which the direction is the shortest vector in the convex hull of the task gradients.

    .. math:: \min_w \lVert J^\top w \rVert^2 \quad \text{subject to } w \ge 0,\ \textstyle\sum_k w_k = 1

    The direction d conflicts with no task: :math:`\langle g_k, d \rangle \ge \lVert d \rVert^2` for every k. It is zero exactly
    at Pareto-stationary points. Small gradients get large weights. A task whose gradient is zero takes all weight and stops
    the shared parameters, so do not pair the rule with ``stl``. One task gets weight 1. Tasks with the same gradient share
    their weight equally. The weights do not change when all gradients are multiplied by one constant.

    With a normalization, the weights of the shortest vector between *normalised* gradients are applied to the gradients
    themselves, and the guarantees above are lost.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        normalization: Divisor of a gradient before the search: 1 (``"none"``), its length (``"l2"``), its loss (``"loss"``)
            or the product of both (``"loss+"``).
        losses: Values of the losses, for ``"loss"`` and ``"loss+"``; the stage passes them. Shape (K,), positive.

    Returns:
        Non-negative weights that sum to one. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or losses are needed and missing or not positive.

    Source:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Acad. Sci. Paris 2012;
        Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018. Differs: solved exactly,
        where their code iterates (projected gradient or Frank-Wolfe) and stops early.
    """
    if normalization in ("loss", "loss+") and (losses is None or not (losses > 0).all()):
        value = None if losses is None else losses.tolist()
        raise ValueError(f"losses must be positive for normalization='{normalization}' of 'mgda', but got {value}.")

    if normalization == "none":
        return solve(min_norm_weights, gramian)

    def weights(G: Array) -> Array:
        divisor = np.ones(len(G))
        if normalization in ("l2", "loss+"):
            norms = np.sqrt(np.diag(G))
            divisor *= np.where(norms > 0, norms, 1)
        if normalization in ("loss", "loss+") and losses is not None:
            divisor *= losses.detach().cpu().double().numpy()
        return min_norm_weights(G / divisor[:, None] / divisor)

    return solve(weights, gramian)


def _cagrad_error(gramian: Array, weights: Array) -> float:
    """Return the error of CAGrad's weights under its default options. Shapes (K, K), (K,)."""
    return conflict_averse_error(gramian, weights * (1 + RADIUS**2) - 1 / len(weights), RADIUS)


@gradient_balancers.register(
    "cagrad",
    heads="unweighted",
    label="CAGrad",
    paper="Liu et al. 2021, https://arxiv.org/abs/2110.14048",
    remedies=("conflict",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
    certificate=certificate(_cagrad_error),
)
def cagrad(gramian: Gramian, *, c: float = RADIUS, rescale: Rescale = "paper", solver: Solver = "exact") -> Weights:
    r"""Return the weights of CAGrad's direction, near the mean gradient, whose smallest gain of a task is greatest.

    .. math:: \max_d \min_k \langle g_k, d \rangle \quad \text{subject to } \lVert d - g_0 \rVert \le c \lVert g_0 \rVert

    with the mean :math:`g_0`. The solution is :math:`d = g_0 + c \lVert g_0 \rVert \, g_w / \lVert g_w \rVert`, where w on the
    simplex solves the dual problem. c = 0 gives the mean. For c ≥ 1 the direction conflicts with no task, to rounding; for
    smaller c it can. Before rescaling every weight is at least 1/K. The weights do not change when all gradients are multiplied
    by one constant. One task has the direction (1 + c) g, rescaled.

    If 0 lies in the convex hull of the gradients, no direction helps every task. Causes are opposite gradients, a zero
    gradient, or more tasks than parameters. The problem still has one solution, unless some direction within the radius
    conflicts with no task, which is always true for c ≥ 1. Then all these directions are solutions, and the nearest to the mean
    is returned: the projection of the mean on the dual cone. It is the mean itself if the mean conflicts with no task. 0 counts
    as inside the hull if the gradients cancel each other to 1e-6 of their lengths. In this case a conflict of that size can
    remain. A mean of zero gives d = 0.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        c: Radius of the search, relative to the length of the mean gradient; not negative.
        rescale: Divisor of the direction. ``"none"``: 1. ``"paper"``: 1 + c², the default of the authors' code. ``"bound"``:
            1 + c, so that the direction is no longer than the mean gradient. The numbers 0, 1 and 2 of the authors' code are
            aliases.
        solver: ``"exact"``, or ``"cvxpy"``, an independent convex program, far slower, for comparison.

    Returns:
        Positive weights, in mean convention. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range.

    Source:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, algorithm 1. Differs: solved
        exactly, where the code's solver returns the mean for gradients shorter than about 1e-3. No epsilons are added, with
        which the code returns the mean if 0 is in the convex hull.
    """
    if not c >= 0:
        raise ValueError(f"c of 'cagrad' must not be negative, but got {c}.")

    def weights(G: Array) -> Array:
        total = np.full(len(G), 1 / len(G))
        if c > 0:
            total += conflict_averse_weights(G, c, rounding(gramian)) if solver == "exact" else _beyond_the_mean_by_cvxpy(G, c)
        divisor: float = {"none": 1, "paper": 1 + c**2, "bound": 1 + c}[_RESCALE_BY_NUMBER.get(rescale, rescale)]
        return total / divisor

    return solve(weights, gramian)


def _beyond_the_mean_by_cvxpy(gramian: Array, c: float) -> Array:
    """Return the result of `conflict_averse_weights`, from the primal problem."""
    import cvxpy as cp  # noqa: PLC0415 - an option, not a dependency

    largest = np.diag(gramian).max()
    if largest <= 0:
        return np.zeros(len(gramian))
    R = square_root(gramian / largest)
    mean = R.mean(axis=1)
    radius = c * float(np.linalg.norm(mean))
    if radius <= 1e-9:
        return np.zeros(len(gramian))
    step = cp.Variable(len(R))  # from the mean to the direction, in units of the radius
    gains = R.T @ (mean + radius * step)
    worst = cp.Problem(cp.Maximize(cp.min(gains)), [cp.norm(step) <= 1])
    worst.solve(solver=cp.CLARABEL)
    best = step.value
    if abs(worst.value) <= 1e-7 * radius:  # no direction helps every task: take the nearest that harms none, if within reach
        cp.Problem(cp.Minimize(cp.norm(step)), [gains >= 0]).solve(solver=cp.CLARABEL)
        if step.value is not None and np.linalg.norm(step.value) <= 1 + 1e-6:
            best = step.value
    return np.asarray(nnls(R, radius * best)[0])
