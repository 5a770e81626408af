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
    """Of predictions of standardised targets, in the units in which they are reported."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Standardised. Shape (B,).
            target: The standardised target, and how much one of its standard deviations is. Shape (B, 2).
        """
        standardised, deviations = target.unbind(1)
        super().update(preds * deviations, standardised * deviations)


def targets(batch: Batch) -> dict[str, Tensor]:
    """Standardised targets, each beside the size of a standard deviation in the unit of its metric. Shape (B, 2)."""
    graphs, standardised = batch
    pairs = torch.stack([standardised, graphs.deviations.expand_as(standardised)], dim=2)
    return dict(zip(TASKS, pairs.unbind(1), strict=True))


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Mean squared errors over the batch, of standardised targets."""
    return {task: mse_loss(outputs[task], target) for task, target in zip(TASKS, batch[1].unbind(1), strict=True)}


def metrics() -> dict[str, Metric]:
    """Fresh metrics: mean absolute errors over molecules.

    In D (mu), a0^3 (alpha), a0^2 (r2), cal / mol K (cv), and meV (all others).
    """
    return {f"{task}/mae": ReportedMeanAbsoluteError() for task in TASKS}
