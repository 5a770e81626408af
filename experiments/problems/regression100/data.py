"""Standard normal inputs and targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

from balance.config import check_settings, setting
from experiments.problems.base import Splits

POINTS, INPUTS, OUTPUTS = 1000, 20, 100


@dataclass
class DataConfig:
    """Random inputs and targets."""

    seed: int = setting(0, minimum=0, help="seed of inputs and targets")


def load(config: DataConfig) -> Splits:
    """Return inputs (20,) and targets (100,) of 1000 points; the three splits are one data set."""
    check_settings(config, "data")
    generator = torch.Generator().manual_seed(config.seed)
    points = TensorDataset(torch.randn(POINTS, INPUTS, generator=generator), torch.randn(POINTS, OUTPUTS, generator=generator))
    return Splits(points, points, points)
