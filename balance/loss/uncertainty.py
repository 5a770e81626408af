"""Uncertainty weighting: losses divided by a noise level that is trained with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from balance.rules.registry import loss_balancers

if TYPE_CHECKING:
    from torch import Tensor

    from balance.types import Losses, WeightedLosses


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
        num_tasks: K.
        init: Initial log-variance of every task.

    Source:
        Kendall, Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, eq. (10). As in every
        published code, all tasks have the regression form; the paper has no factor 1/2 before a classification loss.
    """

    def __init__(self, num_tasks: int, init: float = 0.0) -> None:
        super().__init__()
        # One scalar for each task, so that no optimizer changes the log-variance of an absent task.
        # The default dtype, as of every other parameter, but never a default device such as "meta", which stores no values.
        dtype = torch.get_default_dtype()
        self.log_variances = nn.ParameterList(torch.tensor(float(init), dtype=dtype, device="cpu") for _ in range(num_tasks))

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Return the losses divided by their learned variances, plus the log-variances.

        Args:
            losses: Finite values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Differentiable in the losses and in the log-variances. Shape (K,).
        """
        tasks = range(len(self.log_variances)) if present is None else present.tolist()
        s = torch.stack([self.log_variances[k] for k in tasks]).to(losses)
        return 0.5 * ((-s).exp() * losses + s)
