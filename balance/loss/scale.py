"""Scale-invariant losses: their logarithms, and their geometric mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..rules.checks import beside
from ..rules.registry import loss_balancers
from ._checks import ADD_CONSTANT, GIVE_BOUNDS, LOGARITHM, lower_bounds, require_above, stays_on_device, values, weigh, widened

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses


@loss_balancers.register(
    "scaleinvls",
    label="SI",
    paper="Navon et al. 2022, https://arxiv.org/abs/2202.01017",
    remedies=("loss scale",),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "gradient_unchanged_by_scaling_a_loss", "separable"),
)
@stays_on_device
def scaleinvls(losses: Losses, *, min_losses: list[float] | None = None, present: Tensor | None = None) -> WeightedLosses:
    r"""Take the logarithm of every loss: scale-invariant linear scalarisation.

    .. math:: \tilde L_k = \log (L_k - b_k), \qquad \nabla \tilde L_k = \nabla L_k / (L_k - b_k)

    With b = 0 the gradient does not change when a loss is multiplied by a positive constant. Gradient norms can still differ.
    A loss that approaches its bound gets an unlimited weight, so a task that is fitted perfectly ends in an error. A bound
    slightly below all reachable losses, such as -1e-6, limits the weight.

    Args:
        losses: Values above ``min_losses``. Shape (K,).
        min_losses: Lower bound b of the loss of every task, present or not; None for zeros.
        present: Indices of the tasks whose losses are given; None for all.

    Returns:
        Shape (K,).

    Raises:
        ValueError: If ``min_losses`` does not have one number per task.
        TaskError: If a loss is not above its bound.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, section 5 (baseline SI).
    """
    bounds = lower_bounds(min_losses, len(losses), present)
    require_above(values(losses), bounds, "scaleinvls", LOGARITHM, GIVE_BOUNDS)
    if not min_losses:
        return losses.log()
    wide = widened(losses)
    return (wide - beside(bounds, wide)).log().to(losses.dtype)


@loss_balancers.register(
    "gls",
    label="GLS",
    paper="Chennupati et al. 2019, https://arxiv.org/abs/1904.08492",
    remedies=("loss scale",),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "gradient_unchanged_by_scaling_a_loss", "separable"),
)
@stays_on_device
def gls(losses: Losses) -> WeightedLosses:
    r"""Minimise the geometric mean of the losses.

    .. math:: \tilde L_k = \frac{M}{K} \log L_k, \qquad M = \Bigl( \prod_j L_j \Bigr)^{1/K}

    with M as a constant, so that the gradient of the sum is the gradient of M. The weights are :math:`M / (K L_k)`. The
    direction is the direction of the logarithms. Multiplying a loss by a constant
    changes the length of the direction only. One task keeps the gradient of its loss. A loss that approaches zero gets an
    unlimited weight relative to the other losses.

    Args:
        losses: Positive values. Shape (K,).

    Returns:
        Shape (K,).

    Raises:
        TaskError: If a loss is not positive.

    Source:
        Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
        CVPR Workshops 2019. Differs: M is the exponential of the mean logarithm, where LibMTL multiplies all losses
        first, which underflows. The value of the sum is M log M, not M.
    """
    L = values(losses)
    require_above(L, 0, "gls", LOGARITHM, ADD_CONSTANT)
    mean = L.log().mean().exp()
    return weigh(widened(losses).log(), (mean / len(L)).expand_as(L)).to(losses.dtype)
