"""Standard normal inputs and targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

from experiments.problems.base import Splits

POINTS, INPUTS, OUTPUTS = 1000, 20, 100


@dataclass
class DataConfig:
    """The seed of the numbers."""

    seed: int = 0


def load(config: DataConfig) -> Splits:
    """Inputs (20,) and targets (100,) of 1000 points, three times the same."""
    generator = torch.Generator().manual_seed(config.seed)
    points = TensorDataset(torch.randn(POINTS, INPUTS, generator=generator), torch.randn(POINTS, OUTPUTS, generator=generator))
    return Splits(points, points, points)
