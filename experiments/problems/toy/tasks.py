"""The landscape as a problem for the trainer: the trunk is the point, and the heads are the two losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanAbsoluteError

from balance.config import check_settings, setting
from experiments.problems.base import Network, Splits
from experiments.problems.toy import landscape
from experiments.problems.toy.landscape import LOWER_BOUND, SCALE, STARTS, TASKS, above_bounds

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

    from experiments.problems.base import Batch

HIGHER_IS_BETTER: frozenset[str] = frozenset()


@dataclass
class DataConfig:
    """Constant samples; the landscape is the only thing to learn from."""

    steps: int = setting(1000, minimum=1, help="steps of an epoch, in batches of one")
    scale: float = setting(SCALE, above=0, help="scale of the first loss")


@dataclass
class ModelConfig:
    """First point."""

    a: float = setting(STARTS[0][0], help="first coordinate")
    b: float = setting(STARTS[0][1], help="second coordinate")


class Point(nn.Module):
    """The point (a, b), as a linear map of the constant input 1."""

    def __init__(self, start: tuple[float, float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([start]))

    def forward(self, ones: Tensor) -> Tensor:
        """Return the point once for each sample. Shape (B, 1) -> (B, 2)."""
        return ones @ self.theta


class Landscape(nn.Module):
    """The two losses of points, the first without its scale; no parameters."""

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        """Return losses by task. Shape (B, 2) -> (B,)."""
        return landscape.losses(points)


def load(config: DataConfig) -> Splits:
    """Return constant inputs and the scale: ``steps`` samples for training, one for validation and one for testing.

    Args:
        config: Number of samples, and the scale.

    Returns:
        Splits whose samples are all equal.
    """
    check_settings(config, "data")
    sets = [TensorDataset(torch.ones(n, 1), torch.full((n,), float(config.scale))) for n in (config.steps, 1, 1)]
    return Splits(*sets)


def build_model(config: ModelConfig | None = None) -> Network:
    """Return a network whose trunk is the point."""
    config = config or ModelConfig()
    return Network(Point((float(config.a), float(config.b))), Landscape())


def targets(batch: Batch) -> dict[str, Tensor]:
    """Return the lower bounds of the losses. Shape (B,)."""
    bound = torch.full_like(batch[1], LOWER_BOUND)
    return {"f1": bound, "f2": bound}


def losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return the two losses above their lower bounds, the first times its scale."""
    return {task: loss.mean() for task, loss in above_bounds(outputs, batch[1]).items()}


def metrics() -> dict[str, Metric]:
    """Return fresh metrics: the distance of each loss, without its scale, above its lower bound; at least 1."""
    return {f"{task}/above_bound": MeanAbsoluteError() for task in TASKS}
