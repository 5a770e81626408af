"""Checks and conversions of a rule's losses. Errors name the task, and are raised before any change of state."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from ..rules.checks import are_delayed, beside, delay
from ..rules.context import TaskError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..types import Losses, WeightedLosses

Rule = TypeVar("Rule", bound="Callable[..., Tensor]")

# Reasons and remedies of `require_above`
LOGARITHM = "takes its logarithm"
DIVISION = "divides by it"
ADD_CONSTANT = "add a constant that keeps the loss positive."
GIVE_BOUNDS = 'give lower bounds: loss_options={"min_losses": ...}.'

_WIDE = (torch.float32, torch.float64)
_REMEDY_OF_ZERO = (
    "A loss of exactly 0 often means that the task has no labels in this batch. "
    'Leave the task out of the dict, or set zero="absent". Otherwise '
)


def values(losses: Losses) -> Tensor:
    """Return the values of the losses, for a rule's weights and state: detached, float64. Shape (K,).

    They are on the host, or on the device of the losses if the checks of the rule are delayed.
    """
    losses = losses.detach()
    return losses.to(torch.float64) if are_delayed() else losses.to("cpu", torch.float64)


def widened(losses: Losses) -> Losses:
    """Return the losses in at least float32, since constants such as 1e-8 are zero in half precision. Shape (K,)."""
    return losses if losses.dtype in _WIDE else losses.to(torch.promote_types(losses.dtype, torch.float32))


def weigh(losses: Losses, weights: Tensor) -> WeightedLosses:
    """Multiply losses by constant weights, in the losses' dtype and on their device. Shape (K,)."""
    wide = widened(losses)  # weights of small losses exceed the range of float16
    return (wide * beside(weights, wide)).to(losses.dtype)


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return the softmax of logits / temperature, without overflow for small temperatures. Shape (K,) -> (K,)."""
    return ((logits - logits.max()) / temperature).softmax(dim=0)


def masked_softmax(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the softmax over the chosen numbers only; zero for other numbers, and NaN if none is chosen. Shape (K,)."""
    return torch.where(chosen, logits, -torch.inf).softmax(dim=0)


def of_tasks(state: Tensor, present: Tensor | None) -> Tensor:
    """Return the entries of the present tasks in a state by task, or the whole state. Shapes (..., tasks), (..., K)."""
    return state if present is None else state[..., beside(present, state, present.dtype)]


def set_of_tasks(state: Tensor, present: Tensor | None, entries: Tensor) -> None:
    """Set the entries of the present tasks in a state by task, in place. Shapes (..., tasks), (K,), (..., K)."""
    if present is None:
        state.copy_(entries)
    else:
        state[..., beside(present, state, present.dtype)] = entries.to(state)


def stays_on_device(rule: Rule) -> Rule:
    """Declare that a function of losses never waits for their device, see `balance.rules.checks`; return it unchanged."""
    vars(rule)["stays_on_device"] = True
    return rule


def numbers_by_task(
    numbers: list[float] | None, num_tasks: int, option: str, method: str, *, non_negative: bool = True
) -> Tensor | None:
    """Return an option with one number for each task as a tensor.

    Args:
        numbers: One number for every task, present or not; None: the option is not given.
        num_tasks: Number of tasks, K.
        option: Name of the option, for messages.
        method: Name of the rule, for messages.
        non_negative: Whether negative numbers, and zeros only, are errors.

    Returns:
        Shape (K,), float64, on the host; None if the option is not given.

    Raises:
        ValueError: If there is not one finite number for each task, or a number is out of range.
    """
    if numbers is None:
        return None
    given = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if given.shape != (num_tasks,):
        raise ValueError(f"{option} of '{method}' must have one number for each of {num_tasks} tasks, but got {numbers}.")
    if not given.isfinite().all():
        raise ValueError(f"{option} of '{method}' must be finite numbers, but got {numbers}.")
    if non_negative and ((given < 0).any() or not given.any()):
        raise ValueError(f"{option} of '{method}' must not be negative, nor all zero, but got {numbers}.")
    return given


def require_above(
    losses: Tensor, minimum: Tensor | float, method: str, reason: str, remedy: str, *, quantity: str = "Loss"
) -> None:
    """Check that every loss lies strictly above its minimum.

    Args:
        losses: Shape (K,).
        minimum: Scalar, or shape (K,).
        method: Name of the rule, for the message.
        reason: Operation of the rule on a loss, for the message.
        remedy: Remedy, for the message: a sentence that begins with a lower-case verb.
        quantity: Name of the values, for the message.

    Raises:
        TaskError: For the first task whose loss is not above its minimum, or is NaN. For a loss of exactly 0 the message
            also names the likely cause.
    """

    def error() -> TaskError | None:
        limits = minimum.expand_as(losses).tolist() if isinstance(minimum, torch.Tensor) else [minimum] * len(losses)
        for task, (loss, bound) in enumerate(zip(losses.tolist(), limits, strict=True)):
            if not loss > bound:
                advice = _REMEDY_OF_ZERO + remedy if loss == 0 else remedy[0].upper() + remedy[1:]
                rule = f"must be above {bound:g}, because '{method}' {reason}"
                return TaskError(task, f"{quantity} of task {{task}} is {loss:.6g}, but {rule}. {advice}")
        return None

    if are_delayed():
        delay(losses > (beside(minimum, losses) if isinstance(minimum, torch.Tensor) else minimum), error)
    elif (found := error()) is not None:
        raise found


def lower_bounds(min_losses: list[float] | None, count: int, present: Tensor | None) -> Tensor:
    """Return the lower bounds of the losses of one step.

    Args:
        min_losses: One number for every task, present or not; None for zeros.
        count: Number of losses in this step.
        present: Indices of the tasks of these losses; None for all tasks.

    Returns:
        Shape (count,), float64, on the host.

    Raises:
        ValueError: If ``min_losses`` does not have one number per task.
    """
    if not min_losses:
        return torch.zeros(count, dtype=torch.float64, device="cpu")
    bounds = torch.tensor(min_losses, dtype=torch.float64, device="cpu")
    if (
        len(bounds) < count
        or (present is None and len(bounds) != count)
        or (present is not None and len(bounds) <= present.max())
    ):
        raise ValueError(f"min_losses must have one number for each task, but got {min_losses}.")
    return bounds if present is None else bounds[present]
