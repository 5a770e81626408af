"""Priorities of the tasks, which multiply the losses under any pair of rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ..messages import unknown
from .checks import beside
from .compose import names_inside
from .protocol import AdaptedGradientBalancer, AdaptedLossBalancer
from .registry import gradient_balancers

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Gramian, Losses, WeightedLosses, Weights
    from .context import Context
    from .protocol import GradientBalancer, JacobianBalancer, LossBalancer


def read_priorities(weights: Mapping[str, float] | Sequence[float] | None, tasks: tuple[str, ...]) -> Tensor | None:
    """Return one priority for each task; None if none was given.

    Args:
        weights: Priorities by task, 1 for tasks that are left out; or one number for each task.
        tasks: Names of all tasks.

    Returns:
        Shape (tasks,), float64.

    Raises:
        ValueError: If a task is unknown, or a priority is not a positive finite number.
    """
    if weights is None:
        return None
    by_task: Mapping[Any, Any]
    if isinstance(weights, Mapping):
        by_task = weights
    elif isinstance(weights, list | tuple) and len(weights) == len(tasks):
        by_task = dict(zip(tasks, weights, strict=True))
    else:
        raise ValueError(f"weights must be a dict by task, or {len(tasks)} numbers, but got {weights!r}.")
    for task, weight in by_task.items():
        if task not in tasks:
            raise ValueError(unknown("task in weights", str(task), tasks))
        if not isinstance(weight, int | float) or not 0 < float(weight) < math.inf:
            raise ValueError(f"weights must be positive numbers, but the weight of task '{task}' is {weight!r}.")
    numbers = [float(by_task.get(task, 1.0)) for task in tasks]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def prioritised_loss_balancer(rule: AdaptedLossBalancer, priorities: Tensor) -> LossBalancer:
    """Return a loss balancer whose weighted losses are multiplied by priorities.

    Of the losses themselves many rules would remove the priorities, since they remove differences of scale.

    Args:
        rule: The loss balancer.
        priorities: One positive number for each task. Shape (tasks,).
    """
    return _PrioritisedLosses(rule, priorities)


def prioritised_gradient_balancer(
    rule: GradientBalancer | JacobianBalancer, given: object, priorities: Tensor
) -> GradientBalancer | JacobianBalancer:
    """Return a gradient balancer that does not take priorities for differences between the gradients.

    A rule that removes differences of length gets the gradients without the priorities. Its weights then apply to the
    gradients with them. Other rules are returned unchanged.

    Args:
        rule: The gradient balancer.
        given: The rule as the user gave it.
        priorities: One positive number for each task. Shape (tasks,).

    Raises:
        ValueError: If the rule removes differences of length and returns a direction.
    """
    if not _equalises_lengths(given):
        return rule
    if rule.sees == "jacobian":
        raise ValueError(
            f"weights have no lasting effect with '{given}', which makes all gradients equally long and returns a direction. "
            "Use a rule that returns weights, or leave weights out."
        )
    return _PrioritisedGradients(cast("AdaptedGradientBalancer", rule), priorities)


class _PrioritisedLosses(AdaptedLossBalancer):
    """A loss balancer with priorities; see `prioritised_loss_balancer`."""

    def __init__(self, rule: AdaptedLossBalancer, priorities: Tensor) -> None:
        super().__init__(rule.rule)
        self.priorities = priorities

    def forward(self, losses: Losses, context: Context) -> WeightedLosses:
        """Return the weighted losses with priorities. Shape (K,) -> (K,)."""
        weighted = super().forward(losses, context)
        priorities = self.priorities if context.present is None else self.priorities[context.present]
        return weighted * beside(priorities, weighted)


class _PrioritisedGradients(AdaptedGradientBalancer):
    """A gradient balancer with priorities; see `prioritised_gradient_balancer`."""

    def __init__(self, rule: AdaptedGradientBalancer, priorities: Tensor) -> None:
        super().__init__(rule.rule, rule.given_heads, fixed_length=rule.given_fixed_length)
        self.priorities = priorities

    def forward(self, gramian: Gramian, context: Context) -> Weights:
        """Return the rule's weights of the gradients without priorities. Shape (K, K) -> (K,)."""
        priorities = self.priorities[context.indices].to(gramian)
        without = gramian / priorities[:, None] / priorities
        weights = super().forward(without, context)
        if not self.fixed_length:
            return weights
        length, intended = _length(weights, gramian), _length(weights, without)
        return weights * (intended / length) if length > 0 else weights


def _length(weights: Weights, gramian: Gramian) -> float:
    """Return the length of a direction. Shapes (K,), (K, K)."""
    return math.sqrt(max(float(weights @ gramian @ weights), 0.0))


def _equalises_lengths(given: object) -> bool:
    """Return whether a rule, or a rule that it is composed of, is registered as a remedy for different gradient lengths."""
    names = [name for name in names_inside(given) if name in gradient_balancers]
    return any("gradient length" in gradient_balancers.traits(name).remedies for name in names)
