"""Fronts of two costs, and the numbers that describe them. A cost is a metric of which lower is better."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class Point(NamedTuple):
    """The result of training with one preference.

    Attributes:
        preference: Share of the first task, in 0..1.
        costs: Means over seeds of the two costs.
        errors: Their standard errors; NaN for one seed.
    """

    preference: float
    costs: tuple[float, float]
    errors: tuple[float, float]


class Front(NamedTuple):
    """The results of one method with a fan of preferences."""

    label: str
    points: tuple[Point, ...]

    @property
    def costs(self) -> Array:
        """Costs of all points. Shape (points, 2)."""
        return np.array([point.costs for point in self.points])


class Indicators(NamedTuple):
    """Numbers that describe a front, as the LibMOON library defines them; the spread is the maximum spread of Zitzler et al.

    Attributes:
        hypervolume: Area between the front and a reference point; larger is better.
        spacing: Standard deviation of the distance of each point to its nearest neighbour; 0 for an even front.
        sparsity: Mean squared gap between neighbours on the front, summed over the costs; smaller is better.
        uniformity: Least distance between two points; larger is better.
        spread: Greatest distance between two points; larger is better.
        num_on_front: Number of points that no other point beats.
    """

    hypervolume: float
    spacing: float
    sparsity: float
    uniformity: float
    spread: float
    num_on_front: int


def indicators(costs: Array, reference: tuple[float, float]) -> Indicators:
    """Describe the points of one method.

    Args:
        costs: Shape (points, 2), finite.
        reference: Costs that every point should beat; points beyond it add no area.

    Returns:
        The numbers.
    """
    distances = cdist(costs, costs)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(axis=1)
    front = costs[on_front(costs)]
    alone = len(costs) < 2
    return Indicators(
        hypervolume=hypervolume(costs, reference),
        spacing=0.0 if alone else float(nearest.std()),
        sparsity=0.0 if len(front) < 2 else float(np.square(np.diff(np.sort(front, axis=0), axis=0)).sum()) / (len(front) - 1),
        uniformity=0.0 if alone else float(nearest.min()),
        spread=0.0 if alone else float(distances[np.isfinite(distances)].max()),
        num_on_front=len(front),
    )


def hypervolume(costs: Array, reference: tuple[float, float]) -> float:
    """Return the area that some point beats, within the rectangle of a reference point.

    Args:
        costs: Shape (points, 2).
        reference: Greatest costs of the area.
    """
    area, height = 0.0, reference[1]
    for x, y in sorted(map(tuple, costs)):
        if x < reference[0] and y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area


def on_front(costs: Array) -> NDArray[np.bool_]:
    """Return for each point whether no other point beats it. Shape (points,)."""
    no_worse = (costs[:, None] <= costs[None]).all(axis=2)
    better = (costs[:, None] < costs[None]).any(axis=2)
    beaten = np.asarray(no_worse & better).any(axis=0)
    return np.logical_not(beaten)


def common_reference(fronts: Sequence[Front]) -> tuple[float, float]:
    """Return a reference point for the hypervolumes of several fronts: a tenth of the range beyond the worst costs."""
    costs = np.concatenate([front.costs for front in fronts])
    worst, best = costs.max(axis=0), costs.min(axis=0)
    x, y = worst + 0.1 * np.where(worst > best, worst - best, np.abs(worst) + 1e-12)
    return float(x), float(y)
