"""Points inside the domain, on its boundary and at the initial time, and grids with the exact solution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from balance.config import check_settings, setting
from experiments.problems.base import Splits
from experiments.problems.burgers.solution import Array, solution

INTERIOR, BOUNDARY, INITIAL = range(3)  # kinds of points, in the order of the tasks
VALIDATION_GRID = (60, 30)  # numbers of x and t
TEST_GRID = (201, 51)


@dataclass
class DataConfig:
    """Random points, uniform on their part of the domain; each kind of points belongs to one loss."""

    seed: int = setting(0, minimum=0, help="seed of the points")
    interior_points: int = setting(24000, minimum=1, help="points of the residual")
    boundary_points: int = setting(1200, minimum=1, help="points of the boundary condition")
    initial_points: int = setting(1200, minimum=1, help="points of the initial condition")


def load(config: DataConfig) -> Splits:
    """Return random training points, and the points of two grids.

    Args:
        config: Numbers of points, and their seed.

    Returns:
        Data sets of points (x, t), kinds and exact values, see `points_of`. Interior values are for metrics only.
    """
    check_settings(config, "data")
    generator = np.random.default_rng(config.seed)
    counts = (config.interior_points, config.boundary_points, config.initial_points)
    kinds = np.repeat([INTERIOR, BOUNDARY, INITIAL], counts)
    x, t = generator.uniform(-1, 1, len(kinds)), generator.uniform(0, 1, len(kinds))
    x = np.where(kinds == BOUNDARY, np.where(x < 0, -1.0, 1.0), x)
    t = np.where(kinds == INITIAL, 0.0, t)
    return Splits(points_of(x, t, kinds), *(grid(*size) for size in (VALIDATION_GRID, TEST_GRID)))


@cache
def grid(places: int, times: int) -> TensorDataset:
    """Return the points of a regular grid that includes the boundary and the initial time."""
    x, t = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, places), np.linspace(0, 1, times), indexing="ij"))
    kinds = np.where(t == 0, INITIAL, np.where(np.abs(x) == 1, BOUNDARY, INTERIOR))
    return points_of(x, t, kinds)


def points_of(x: Array, t: Array, kinds: NDArray[np.int64]) -> TensorDataset:
    """Return points (x, t), shape (n, 2), their kinds (n,), and the exact solution (n,)."""
    points = torch.tensor(np.stack([x, t], axis=1), dtype=torch.float32)
    return TensorDataset(points, torch.tensor(kinds), torch.tensor(solution(x, t), dtype=torch.float32))
