"""State and options by task: the part of the present tasks, and numbers that the user gives for every task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..rules.context import TaskError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..solvers.linear_algebra import Array


def vector(num_tasks: int, value: float = 0.0) -> Tensor:
    """Return a buffer with one number for each task. Shape (num_tasks,), float64, on the host."""
    return torch.full((num_tasks,), value, dtype=torch.float64, device="cpu")


def read(buffer: Tensor, tasks: Tensor) -> Array:
    """Return a copy of the numbers of some tasks. Shapes (all tasks,), (K,) -> (K,)."""
    numbers: Array = buffer[tasks.to(buffer.device)].detach().to("cpu", torch.float64).numpy().copy()
    return numbers


def write(buffer: Tensor, tasks: Tensor, numbers: Array) -> None:
    """Store the numbers of some tasks. Shapes (all tasks,), (K,), (K,)."""
    buffer[tasks.to(buffer.device)] = torch.from_numpy(np.asarray(numbers, dtype=np.float64)).to(buffer)


def indices(present: Tensor | None, buffer: Tensor) -> Tensor:
    """Return the indices of the present tasks; all tasks of the buffer if ``present`` is None. Shape (K,)."""
    return torch.arange(len(buffer), device="cpu") if present is None else present


def share_of(weights: Array) -> tuple[Array, float]:
    """Return the weights of the present tasks scaled to sum 1, and their sum before; equal weights if the sum is 0.

    The rule solves the problem of the present tasks, and stores its solution times that sum. So the stored weights of all tasks
    keep their sum. Shape (K,) -> (K,).
    """
    total = float(weights.sum())
    return (weights / total if total > 0 else np.full(len(weights), 1 / len(weights))), total


def numbers_by_task(numbers: Sequence[float] | None, name: str, method: str, num_present: int, present: Tensor | None) -> Array:
    """Return an option that is one positive number for every task, for the present tasks; None for ones.

    Args:
        numbers: The option; a number for every task, present or not.
        name: Name of the option, for messages.
        method: Name of the rule, for messages.
        num_present: Number of present tasks, K.
        present: Indices of the present tasks; None for all.

    Returns:
        Shape (K,).

    Raises:
        ValueError: If there is not one number for every task, or one is not positive and finite.
    """
    if numbers is None:
        return np.ones(num_present)
    array = np.asarray(numbers, dtype=np.float64)
    fits = len(array) == num_present if present is None else len(array) > int(present.max())
    if not (fits and np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} of '{method}' must be one positive number for each task, but got {list(numbers)}.")
    return array if present is None else array[present.cpu().numpy()]


def loss_values(losses: Tensor | None, num_present: int, method: str, reason: str, *, zero: bool = False) -> Array:
    """Return the values of the losses of the present tasks, checked.

    Args:
        losses: Shape (K,); None for ones, for callers that have no losses.
        num_present: Number of present tasks, K.
        method: Name of the rule, for messages.
        reason: Operation of the rule on a loss, for messages.
        zero: Whether a loss may be zero.

    Returns:
        Shape (K,).

    Raises:
        TaskError: If a loss is negative or NaN, or zero where it must not be.
        ValueError: If there is not one loss for each present task.
    """
    if losses is None:
        return np.ones(num_present)
    L: Array = losses.detach().to("cpu", torch.float64).numpy().copy()
    if L.shape != (num_present,):
        raise ValueError(f"losses must have shape ({num_present},), but got {L.shape}.")
    for task, loss in enumerate(L.tolist()):
        if not (loss >= 0 if zero else loss > 0):
            rule = f"must {'not be negative' if zero else 'be positive'}, because '{method}' {reason}"
            raise TaskError(task, f"Loss of task {{task}} is {loss:.6g}, but {rule}. Add a constant to the loss.")
    return L
