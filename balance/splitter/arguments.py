"""Validate and normalise the arguments of `Splitter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..engine.trees import leaves_of
from ..messages import unknown
from ..rules.options import check_type

Projection = Literal["none", "after_norm", "shortest", "before_norm"]
ProjectionNumber = Literal[0, 1, 2, 3]  # of the published code, in the order of the names


def read_projection(projection: object, num_tasks: int) -> Projection:
    """Return the name of a projection, given by its name or number.

    Raises:
        ValueError: If it is unknown, or not for this number of tasks.
        TypeError: If it has the wrong type.
    """
    names = get_args(Projection)
    if isinstance(projection, int) and not isinstance(projection, bool) and 0 <= projection < len(names):
        projection = names[projection]
    check_type("projection", projection, Projection)
    if projection == "shortest" and num_tasks != 2:
        raise ValueError(f"projection='shortest' is for two tasks, but got {num_tasks}. Use gradient='mgda' for more.")
    return cast("Projection", projection)


def check_beta(beta: float) -> None:
    """Check the memory of the moving averages.

    Raises:
        ValueError: If it is out of range.
        TypeError: If it is not a number.
    """
    check_type("beta", beta, float)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in 0..1, 1 excluded, but got {beta}.")


def check_scaler(scaler: object) -> None:
    """Check a gradient scaler; None is accepted.

    Raises:
        TypeError: If it is not a gradient scaler.
    """
    if scaler is None:
        return
    if isinstance(scaler, type) or not (hasattr(scaler, "get_scale") and hasattr(scaler, "is_enabled")):
        raise TypeError(f"scaler must be a GradScaler, but got {type(scaler).__name__}. Use torch.amp.GradScaler.")


def tensors_of(features: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and mappings.

    Raises:
        ValueError: If there is no tensor.
        TypeError: If an entry is not a tensor of floats.
    """
    tensors = leaves_of(features)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"features must be a tensor, or tuples, lists or dicts of tensors, but got {type(tensor).__name__}. "
                "Hand anything else to the heads directly."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"features must be floats, but got {tensor.dtype}. Hand such a tensor to the heads directly.")
    if not tensors:
        raise ValueError("features must hold at least one tensor, but got none.")
    return tensors


def read_weights(weights: Mapping[str, float] | Sequence[float] | None, tasks: tuple[str, ...]) -> Tensor:
    """Return the weights of the tasks, given by name or in order. Shape (K,), float64.

    Raises:
        ValueError: If a weight is missing, unknown, infinite, NaN or negative, or all weights are zero.
    """
    if weights is None:
        return torch.ones(len(tasks), dtype=torch.float64, device="cpu")
    if isinstance(weights, Mapping):
        for task in weights:
            if task not in tasks:
                raise ValueError(unknown("task in weights", task, tasks))
        if missing := [task for task in tasks if task not in weights]:
            raise ValueError(f"weights must have a number for every task, but has none for {', '.join(missing)}.")
        weights = [weights[task] for task in tasks]
    values = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if values.shape != (len(tasks),):
        raise ValueError(f"weights must have a number for each of {len(tasks)} tasks, but got {weights!r}.")
    if not (values.isfinite() & (values >= 0)).all() or not values.sum() > 0:
        raise ValueError(f"weights must be finite, not negative, and not all zero, but got {values.tolist()}.")
    return values.clone()
