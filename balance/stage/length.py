"""Length of a direction: the option ``scale``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.task_gradients import TaskGradients
    from ..types import Gramian, Scale, Weights
    from .loss_weighting import Weighting

_ROUNDING = 1e-13  # of the squared length of a direction, relative to the largest that its terms could add up to


def stretch_to_sum(weights: Weights) -> float:
    """Return the factor that makes weights sum to their number; 1 if their sum is not positive."""
    total = float(weights.sum())
    return len(weights) / total if total > 0 else 1.0


def stretch_of_weights(scale: Scale, gramian: Gramian, weights: Weights) -> float:
    """Return the factor on the weights of a direction.

    Args:
        scale: Length of the direction.
        gramian: Shape (k, k).
        weights: Shape (k,).
    """
    if scale != "norm":
        return 1.0
    rounding = float(weights.abs() @ gramian.diagonal().clamp(min=0).sqrt()) ** 2 * _ROUNDING
    return stretch_of_direction(scale, gramian, float(weights @ gramian @ weights), rounding)


def stretch_of_direction(scale: Scale, gramian: Gramian, square: float, rounding: float = 0.0) -> float:
    """Return the factor from a direction's length to the length of the summed gradient, with ``scale="norm"``; else 1.

    Args:
        scale: Length of the direction.
        gramian: Shape (k, k).
        square: Squared length of the direction.
        rounding: A squared length that is zero but for rounding.
    """
    if scale != "norm" or square <= rounding:  # a direction that is zero but for rounding stays zero
        return 1.0
    return math.sqrt(max(float(gramian.sum()), 0.0) / square)


def stretch_of_trunk(
    gradients: TaskGradients,
    weighting: Weighting,
    weights: Weights,
    gramian: Gramian,
    unit: float,
    stretch: float,
    *,
    fixed: bool,
) -> float:
    """Return the factor where only some of the shared parameters were measured, so that all get the intended length.

    For a rule of fixed length it is the length of the measured direction, else the length of the summed gradient. Costs one
    or two backward passes.

    Args:
        gradients: The tasks' gradients.
        weighting: Map to the balanced tasks.
        weights: Their weights. Shape (k,).
        gramian: Shape (k, k).
        unit: Factor of mixed precision in the gradients.
        stretch: Factor if a length is zero or not finite.
        fixed: Whether the length of the rule's direction is fixed.
    """
    length = gradients.trunk_length(weighting.pull_back(weights).tolist()) / unit
    if fixed:
        target = math.sqrt(max(float(weights @ gramian @ weights), 0.0))
    else:
        target = gradients.trunk_length(weighting.sums.tolist()) / unit
    return target / length if 0 < length < math.inf and math.isfinite(target) else stretch
