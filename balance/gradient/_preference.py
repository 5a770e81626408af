"""Preferences between tasks, as several rules take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..solvers.linear_algebra import Array


def preferences(rule: str, preference: Sequence[float] | None, num_tasks: int, present: Tensor | None, default: float) -> Array:
    """Return the preferences of the present tasks.

    Args:
        rule: Name of the rule, for messages.
        preference: One positive number for each task, absent tasks included; None for ``default``.
        num_tasks: Number of present tasks.
        present: Indices of the present tasks; None if all tasks are present.
        default: Preference of every task if none are given.

    Returns:
        Shape (number of present tasks,).

    Raises:
        ValueError: If ``preference`` has the wrong length or a number that is not positive and finite.
    """
    if preference is None:
        return np.full(num_tasks, default)
    numbers = np.asarray(preference, dtype=np.float64)
    if numbers.ndim != 1 or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(f"preference of '{rule}' must be a list of positive numbers, but got {list(preference)}.")
    if present is None and len(numbers) == num_tasks:
        return numbers
    if present is None or len(numbers) <= int(present.max()):
        raise ValueError(f"preference of '{rule}' must have one number for each task, but got {list(preference)}.")
    return np.asarray(numbers[present.cpu().numpy()])
