"""The 11 tasks: losses and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Batch as Graphs
    from torchmetrics import Metric

    Batch = tuple[Graphs, Tensor]

TASKS = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "u", "h", "g", "cv")
HIGHER_IS_BETTER: frozenset[str] = frozenset()


class ReportedMeanAbsoluteError(MeanAbsoluteError):
    """Mean absolute error of predictions of standardised targets, in the reported units."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Standardised predictions. Shape (B,).
            target: The standardised target, and its standard deviation in the reported unit. Shape (B, 2).
        """
        standardised, deviations = target.unbind(1)
        super().update(preds * deviations, standardised * deviations)


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return by task: standardised target, and its standard deviation in the reported unit. Shape (B, 2)."""
    graphs, standardised = batch
    pairs = torch.stack([standardised, graphs.deviations.expand_as(standardised)], dim=2)
    return dict(zip(TASKS, pairs.unbind(1), strict=True))


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return mean squared errors over the batch, of standardised targets."""
    return {task: mse_loss(outputs[task], target) for task, target in zip(TASKS, batch[1].unbind(1), strict=True)}


def metrics() -> dict[str, Metric]:
    """Return fresh mean absolute errors over molecules: in D (mu), a0^3 (alpha), a0^2 (r2), cal / mol K (cv), meV (others)."""
    return {f"{task}/mae": ReportedMeanAbsoluteError() for task in TASKS}
