"""Rules that lead to a chosen point of the Pareto front: EPO and PMGDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..rules.registry import gradient_balancers
from ..solvers.linear_algebra import gradient_norms, share_between_equals
from ..solvers.min_norm import min_norm_weights
from ..solvers.preference import correction_weights, highest_product, tangent_weights
from ._host import solve, without_zero_gradients
from ._state import loss_values, numbers_by_task

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights


@gradient_balancers.register(
    "epo",
    heads="weighted",
    label="EPO",
    paper="Mahapatra & Rajan 2020, https://proceedings.mlr.press/v119/mahapatra20a.html",
    remedies=("loss scale", "conflict"),
    needs=("positive losses",),
    invariances=("permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"),
)
def epo(
    gramian: Gramian,
    *,
    losses: Tensor | None = None,
    present: Tensor | None = None,
    preference: list[float] | None = None,
    tolerance: float = 1e-4,
) -> Weights:
    r"""Return weights that lead to the Pareto-optimal point at which preference times loss is equal for all tasks.

    With preferences p, shares :math:`s_k = p_k L_k / \sum_j p_j L_j`, their distance from equality
    :math:`\mu = \sum_k s_k \log(K s_k)`, and the anchor :math:`a_k = p_k (\log(K s_k) - \mu)`, the weights solve one of two
    linear programs on the simplex. While μ is above ``tolerance``, the step **balances**:

    .. math:: \max_w w^\top G a \quad \text{subject to } (G w)_k \ge b_k

    where tasks with :math:`(Ga)_k > 0` have no bound, the other tasks have :math:`b_k = (Ga)_k`, and the tasks with the largest
    share have :math:`b_k = 0`. If no task has :math:`(Ga)_k > 0`, all b are 0. So losses may rise on the way to the ray. Below
    the tolerance the step **descends**:

    .. math:: \max_w \textstyle\sum_k (G w)_k \quad \text{subject to } (G w)_k \ge 0,\ w^\top G a \ge \min(0, \max_k (G a)_k)

    and without the last condition if no weights meet all conditions. A task with a larger preference ends with a smaller loss.

    The weights need not be unique, for example for equal gradients, which share their weight. A task whose gradient is zero
    gets weight 0 and sets no condition. At G = 0 all weights are 0. One task has weight 1. Use the rule without a loss
    balancer, since the losses are the raw ones.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        losses: Values of the losses, positive; None for ones. Shape (K,).
        present: Indices of the tasks; None for all.
        preference: p, a positive number for every task; None for ones.
        tolerance: Greatest μ at which a step descends, positive.

    Returns:
        Non-negative weights that sum to one. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range.
        TaskError: If a loss is not positive.

    Source:
        Mahapatra & Rajan, "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in Pareto
        Optimization", ICML 2020, algorithm 1, with the programs of the authors' code. Differs: zero gradients are left out.
        LibMOON has the same programs for p = 1 / preference, so that losses become proportional to the preference.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance of 'epo' must be positive, but got {tolerance}.")
    p = numbers_by_task(preference, "preference", "epo", len(gramian), present)

    def weights(G: Array) -> Array:
        L = loss_values(losses, len(G), "epo", "takes its logarithm")
        nonzero = G.diagonal() > 0
        return without_zero_gradients(lambda C: _epo_weights(C, p[nonzero], L[nonzero], tolerance), G)

    return solve(weights, gramian)


def _epo_weights(G: Array, p: Array, L: Array, tolerance: float) -> Array:
    """Return EPO's weights of gradients that are not zero. Shapes (K, K), (K,), (K,) -> (K,)."""
    K = len(G)
    shares = p * L / (p @ L)
    logarithms = np.log(K * shares)
    logarithms[np.abs(logarithms) <= 1e-12] = 0.0  # on the ray but for rounding, which would be a condition
    mu = float(shares @ logarithms)
    gains = G @ (p * (logarithms - mu))
    weights = _balancing_weights(G, gains, shares) if mu > tolerance else None
    return share_between_equals(_descending_weights(G, gains) if weights is None else weights, G)


def _balancing_weights(G: Array, gains: Array, shares: Array) -> Array | None:
    """Return the weights of a step towards the ray. Shapes (K, K), (K,), (K,) -> (K,)."""
    rising = gains > 0
    bounds = np.where(rising, -np.inf, gains) if rising.any() else np.zeros(len(G))
    bounds[shares == shares.max()] = 0
    return highest_product(gains, G, bounds)


def _descending_weights(G: Array, gains: Array) -> Array:
    """Return the weights of a step along the ray. Shapes (K, K), (K,) -> (K,)."""
    total, zeros = G.sum(axis=1), np.zeros(len(G))
    weights = highest_product(total, np.vstack([G, gains]), np.append(zeros, min(0.0, float(gains.max()))))
    if weights is None:
        weights = highest_product(total, G, zeros)
    return min_norm_weights(G) if weights is None else weights


@gradient_balancers.register(
    "pmgda",
    heads="weighted",
    label="PMGDA",
    paper="Zhang et al. 2024, https://arxiv.org/abs/2402.09492",
    remedies=("loss scale", "conflict"),
    needs=("positive losses",),
    invariances=("permutation_equivariant", "rotation_equivariant"),
)
def pmgda(
    gramian: Gramian,
    *,
    losses: Tensor | None = None,
    present: Tensor | None = None,
    preference: list[float] | None = None,
    tolerance: float = 1e-2,
    sigma: float = 0.8,
) -> Weights:
    r"""Return weights that lead to the Pareto-optimal point at which preference times loss is equal for all tasks.

    Let h be the distance of the losses from the ray on which :math:`p_k L_k` is equal for all k, in the units of the losses.
    Its gradient is :math:`\nabla h = \sum_k e_k g_k`, with the unit vector e that leads from the ray to the losses. While h is
    above ``tolerance``, a step **corrects**: with :math:`\hat g_k` and :math:`\hat h` of unit length,

    .. math:: \max_\mu \min_k \langle g_k, d \rangle, \quad d = \sum_k \mu_k \hat g_k + \mu_h \hat h, \quad
              \langle \hat h, d \rangle \ge \sigma, \quad \mu \text{ on the simplex}

    a linear program. The length of this d is at most 1, whatever the lengths of the gradients. Below the tolerance a
    step **predicts**. Then d is the shortest vector in the convex hull of the parts of the gradients that are orthogonal to
    :math:`\nabla h`. If :math:`\nabla h` is zero, this is ``mgda``. A task with a larger preference ends with a smaller loss.

    Weights can be negative. A task whose gradient is zero gets weight 0 and sets no condition, but its loss counts in h. At
    G = 0 all weights are 0. One task has weight 1. Use the rule without a loss balancer, since the losses are the raw ones.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        losses: Values of the losses, not negative; None for ones. Shape (K,).
        present: Indices of the tasks; None for all.
        preference: p, a positive number for every task; None for ones.
        tolerance: Greatest h at which a step predicts, positive.
        sigma: σ in 0..1, the least part of a correction that lowers h.

    Returns:
        Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range.
        TaskError: If a loss is negative.

    Source:
        Zhang, Lin & Zhang, "PMGDA: A Preference-based Multiple Gradient Descent Algorithm", 2024, eq. (11) for predictions and
        eq. (20) for corrections. There the losses become proportional to the preference vector, which is 1 / p here. LibMOON
        predicts with ``mgda`` itself, and adds 1e-4 to the lengths.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance of 'pmgda' must be positive, but got {tolerance}.")
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma of 'pmgda' must be in 0..1, but got {sigma}.")
    p = numbers_by_task(preference, "preference", "pmgda", len(gramian), present)

    def weights(G: Array) -> Array:
        distance, slope = _distance_from_ray(loss_values(losses, len(G), "pmgda", "follows a ray of them", zero=True), p)
        nonzero = G.diagonal() > 0
        e = slope[nonzero]
        return without_zero_gradients(lambda C: _pmgda_weights(C, e, sigma if distance > tolerance else None), G)

    return solve(weights, gramian)


def _pmgda_weights(G: Array, slope: Array, sigma: float | None) -> Array:
    """Return PMGDA's weights of gradients that are not zero; ``sigma`` is None for a prediction."""
    length = float(slope @ G @ slope) ** 0.5 if slope @ G @ slope > 0 else 0.0
    if sigma is None or length <= 1e-6 * float(np.abs(slope) @ gradient_norms(G)):
        return tangent_weights(G, slope)
    return correction_weights(G, slope, sigma)


def _distance_from_ray(L: Array, p: Array) -> tuple[float, Array]:
    """Return the distance of losses from the ray, and its derivatives; zeros on the ray. Shapes (K,), (K,) -> (), (K,)."""
    ray = 1 / p
    ray /= np.linalg.norm(ray)
    offset = L - float(L @ ray) * ray
    distance = float(np.linalg.norm(offset))
    is_on_ray = distance <= 1e-12 * float(np.linalg.norm(L))  # but for rounding
    return (0.0, np.zeros(len(L))) if is_on_ray else (distance, offset / distance)
