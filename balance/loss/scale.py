"""Scale-invariant losses: the logarithm of every loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balance.loss._checks import GIVE_BOUNDS, LOGARITHM, lower_bounds, require_above, values, widened
from balance.rules.registry import loss_balancers

if TYPE_CHECKING:
    from torch import Tensor

    from balance.types import Losses, WeightedLosses


@loss_balancers.register(
    "scaleinvls",
    label="SI",
    paper="Navon et al. 2022, https://arxiv.org/abs/2202.01017",
    remedies=("loss scale",),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "gradient_unchanged_by_scaling_a_loss", "separable"),
)
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
    return (wide - bounds.to(wide)).log().to(losses.dtype)
