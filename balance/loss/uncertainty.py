"""Losses multiplied by a scale that is trained with the model: uw and imtl_l."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.registry import loss_balancers
from ..rules.snapshot import parameters_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses


def scalars(num_tasks: int, value: float = 0.0) -> nn.ParameterList:
    """Return one scalar parameter for each task, so that no optimizer changes the scalar of an absent task."""
    # The default dtype, as of every other parameter, but never a default device such as "meta", which stores no values
    dtype = torch.get_default_dtype()
    return nn.ParameterList(torch.tensor(float(value), dtype=dtype, device="cpu") for _ in range(num_tasks))


def stacked(parameters: nn.ParameterList, present: Tensor | None) -> Tensor:
    """Return the scalars of the present tasks as one tensor, differentiable. Shape (K,)."""
    scalars: list[Tensor] = [*parameters_of(parameters)]
    return torch.stack(scalars if present is None else [scalars[k] for k in present.tolist()])


@loss_balancers.register(
    "uw",
    label="UW",
    paper="Kendall et al. 2018, https://arxiv.org/abs/1705.07115",
    remedies=("loss scale",),
    needs=("optimizer",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class UncertaintyWeighting(nn.Module):
    r"""Uncertainty weighting: every task has a learned log-variance s.

    .. math:: \tilde L_k = \tfrac12 \left( e^{-s_k} L_k + s_k \right)

    The weight of a task is :math:`\tfrac12 e^{-s_k}`, at the optimum :math:`1 / (2 L_k)`. The log-variances are parameters, so
    the optimizer needs ``balancer.parameters()``, without weight decay, which would pull every weight to one half. A loss
    that stays negative drives its s to minus infinity.

    Args:
        num_tasks: Number of tasks, K.
        init: Initial log-variance of every task.

    Source:
        Kendall, Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, eq. (10). As in every
        published code, all tasks have the regression form; the paper has no factor 1/2 before a classification loss.
    """

    stays_on_device = True

    def __init__(self, num_tasks: int, init: float = 0.0) -> None:
        super().__init__()
        self.log_variances = scalars(num_tasks, init)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Return the losses divided by their learned variances, plus the log-variances.

        Args:
            losses: Finite values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Differentiable in the losses and in the log-variances. Shape (K,).
        """
        s = stacked(self.log_variances, present).to(losses)
        return 0.5 * torch.addcmul(s, (-s).exp(), losses)


@loss_balancers.register(
    "imtl_l",
    label="IMTL-L",
    paper="Liu et al. 2021, https://openreview.net/forum?id=IMPnRXEWpvr",
    remedies=("loss scale",),
    needs=("optimizer",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class ImpartialLosses(nn.Module):
    r"""Impartial loss weighting: every task has a learned log-scale s, which brings all weighted losses to one.

    .. math:: \tilde L_k = e^{s_k} L_k - s_k

    The weight of a task is :math:`e^{s_k}`, at the optimum :math:`1 / L_k`. The rule is uncertainty weighting with the opposite
    sign of s, times two. The log-scales are parameters, so the optimizer needs ``balancer.parameters()``, without weight decay,
    which would pull every weight to one. A loss that stays negative drives its s to infinity. One task is weighted too. An
    absent task keeps its s.

    Args:
        num_tasks: Number of tasks, K.
        init: Initial log-scale of every task.

    Source:
        Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, on loss balance. The paper allows any base above one; as
        in its experiments the base is e. The published method IMTL is this rule with the gradient balancer imtl.
    """

    stays_on_device = True

    def __init__(self, num_tasks: int, init: float = 0.0) -> None:
        super().__init__()
        self.log_scales = scalars(num_tasks, init)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Return the losses times their learned scales, minus the log-scales.

        Args:
            losses: Finite values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Differentiable in the losses and in the log-scales. Shape (K,).
        """
        s = stacked(self.log_scales, present).to(losses)
        return s.exp() * losses - s
