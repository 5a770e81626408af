"""Weighted losses of one step: the output of the loss balancer, checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..rules.protocol import LossBalancer
    from ..types import Losses, WeightedLosses
    from .arguments import StepLosses
    from .delayed import DelayedCall


def weighted_losses(rule: LossBalancer, step: StepLosses, losses: Losses, delayed: DelayedCall | None = None) -> WeightedLosses:
    """Apply a loss balancer and check its output.

    Args:
        rule: The loss balancer.
        step: The tasks of the step.
        losses: Finite losses that require a gradient. Shape (K,).
        delayed: The call, if its checks are delayed.

    Returns:
        The weighted losses. Shape (K,).

    Raises:
        ValueError: If the rule does not return one finite value per task that depends on the losses.
    """
    if torch.is_grad_enabled():
        weighted = rule(losses, step.context)
    else:
        with torch.enable_grad():
            weighted = rule(losses, step.context)
    if weighted is losses:
        return weighted
    if not isinstance(weighted, torch.Tensor) or weighted.shape != losses.shape:
        actual = tuple(weighted.shape) if isinstance(weighted, torch.Tensor) else type(weighted).__name__
        raise ValueError(f"The loss balancer must return shape {tuple(losses.shape)}, one value per task, but got {actual}.")
    if not weighted.requires_grad:
        raise ValueError("The loss balancer must return losses that depend on the given ones, but they are detached.")
    if delayed is not None:
        values, given, tasks = weighted.detach(), losses.detach(), step.tasks  # no graph outlives the step
        delayed.checks.add(values.isfinite(), lambda: ValueError(_message(values, given, tasks)))
    elif not all(map(math.isfinite, weighted.tolist())):
        raise ValueError(_message(weighted, losses, step.tasks))
    return weighted


def _message(weighted: Tensor, losses: Losses, tasks: tuple[str, ...]) -> str:
    numbers = f"{weighted.tolist()} from the losses {losses.tolist()} of {tasks}"
    return f"The loss balancer must return finite losses, but got {numbers}."
