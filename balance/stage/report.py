"""Record of one step of the stage."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Gramian, Losses, WeightedLosses, Weights


@dataclass(frozen=True, eq=False)
class Report:
    """Record of one step of the stage, all detached. K is the number of tasks that were present.

    Attributes:
        tasks: Names of the tasks that were present.
        losses: As given. Shape (K,).
        weighted_losses: Output of the loss balancer. Shape (K,).
        loss_weights: Weight of each loss in the sum of the weighted losses, that is, its derivative. Shape (K,).
        gradient_weights: Weights of the gradients of the weighted losses in the direction. Ones without a gradient
            balancer; None for a rule that sees the Jacobian and has no weights. Shape (K,).
        gramian: Inner products of the gradients of the weighted losses, float64; None without a gradient balancer.
            Shape (K, K).
        unshared: Names of the tasks that reach no shared parameter (or feature). They took no part in the gradient balancer;
            their heads got the gradients of their weighted losses, with gradient weight one.
        total_weights: Weights of the gradients of the raw losses in the direction of the shared parameters: both rules
            together. None for a rule that sees the Jacobian. Shape (K,).
    """

    tasks: tuple[str, ...]
    losses: Losses
    weighted_losses: WeightedLosses
    loss_weights: Weights
    gradient_weights: Weights | None
    gramian: Gramian | None = None
    unshared: tuple[str, ...] = ()
    total_weights: Weights | None = None

    @property
    def cosines(self) -> Tensor | None:
        """Cosines of the angles between the gradients; 0 for a gradient that is zero. Shape (K, K)."""
        if self.gramian is None:
            return None
        norms = self.gramian.diagonal().clamp(min=0).sqrt()
        unit = torch.where(norms > 0, 1 / norms, 0.0)
        return (self.gramian * unit[:, None] * unit).clamp(-1, 1)

    @property
    def conflicts(self) -> int | None:
        """Number of pairs of tasks whose gradients have a negative inner product."""
        return None if self.gramian is None else int((self.gramian.triu(1) < 0).sum())

    def as_metrics(self) -> dict[str, float]:
        """Return the numbers of the record by name.

        Returns:
            ``loss/<task>``, ``weight/<task>``, ``gradient_weight/<task>``, ``cosine/<a>__<b>`` and ``conflicts``.
        """
        groups = {"loss": self.losses, "weight": self.loss_weights, "gradient_weight": self.gradient_weights}
        metrics = {
            f"{group}/{task}": value
            for group, numbers in groups.items()
            if numbers is not None
            for task, value in zip(self.tasks, numbers.tolist(), strict=True)
        }
        cosines, conflicts = self.cosines, self.conflicts
        if cosines is not None and conflicts is not None:
            rows = cosines.tolist()
            pairs = combinations(range(len(self.tasks)), 2)
            metrics |= {f"cosine/{self.tasks[i]}__{self.tasks[j]}": rows[i][j] for i, j in pairs}
            metrics["conflicts"] = float(conflicts)
        return metrics
