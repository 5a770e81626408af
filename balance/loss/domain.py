"""Where a loss rule is defined, and how it reads losses: checks name the task and come before any change of state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from balance.shapes import Losses, WeightedLosses


class TaskError(ValueError):
    """A value of one task lies outside a rule's domain.

    A rule knows tasks by index; the stage catches this error and raises it again with the task's name.

    Args:
        task: Index of the task among the losses that the rule was given.
        complaint: What is wrong, with ``{task}`` where the task is to be named.
    """

    def __init__(self, task: int, complaint: str) -> None:
        self.task = task
        self.complaint = complaint
        super().__init__(self.naming(str(task)))

    def naming(self, name: str) -> str:
        """The message with the task called ``name``."""
        return self.complaint.replace("{task}", f"'{name}'")


def values(losses: Losses) -> Tensor:
    """Values of the losses, for a rule's weights and state: detached, float64, on the host. Shape (K,)."""
    return losses.detach().to("cpu", torch.float64)


def weigh(losses: Losses, weights: Tensor) -> WeightedLosses:
    """Losses times constant weights, in the losses' dtype and on their device. Shape (K,)."""
    return losses * weights.to(losses)


def require_above(losses: Tensor, minimum: Tensor | float, method: str, reason: str) -> None:
    """Check that every loss lies strictly above its minimum.

    Args:
        losses: Shape (K,).
        minimum: Scalar, or shape (K,).
        method: The rule that asks, for the message.
        reason: Why it asks and what to do, for the message.

    Raises:
        TaskError: For the first task whose loss does not (NaN included).
    """
    bounds = torch.as_tensor(minimum).expand_as(losses)
    for task, (loss, bound) in enumerate(zip(losses.tolist(), bounds.tolist(), strict=True)):
        if not loss > bound:
            raise TaskError(task, f"Loss of task {{task}} is {loss:.6g}, but '{method}' needs it above {bound:g}: {reason}")


LOGARITHM = 'it takes the logarithm. Give lower bounds: loss_options={"min_losses": ...}.'


def lower_bounds(min_losses: list[float] | None, count: int, present: Tensor | None) -> Tensor:
    """Lower bounds of the losses that are given, float64. Shape (count,).

    Args:
        min_losses: One number for every task, present or not; None for zeros.
        count: Number of losses given.
        present: Indices of their tasks; None for all.

    Raises:
        ValueError: If there are not as many numbers as tasks.
    """
    if not min_losses:
        return torch.zeros(count, dtype=torch.float64)
    bounds = torch.tensor(min_losses, dtype=torch.float64)
    if (
        len(bounds) < count
        or (present is None and len(bounds) != count)
        or (present is not None and len(bounds) <= present.max())
    ):
        raise ValueError(f"min_losses must have one number for each task, but got {min_losses}.")
    return bounds if present is None else bounds[present]
