"""Validate and normalise the arguments of `Balancer.backward`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from balance.engine.graph import unstacked
from balance.messages import unknown

if TYPE_CHECKING:
    from balance.engine.graph import Root
    from balance.types import Losses

NanPolicy = Literal["error", "absent"]
ZeroPolicy = Literal["present", "absent"]

_HALF = (torch.float16, torch.bfloat16)


class Step(NamedTuple):
    """The losses of one step, of the K tasks that are present."""

    tasks: tuple[str, ...]
    present: Tensor | None  # indices of those tasks among all; None where all are present
    roots: list[Root | None]  # where each is in the graph; None for one without a graph
    losses: Losses  # their values, with their graphs
    host: Losses  # their values, float64

    @property
    def is_half(self) -> bool:
        """Whether a loss is of half precision, in which the weight of a small loss can overflow."""
        return any(isinstance(root, Tensor) and root.dtype in _HALF for root in self.roots) or self.losses.dtype in _HALF

    def not_finite(self) -> dict[str, float]:
        """Return the losses that are infinite or NaN, by task."""
        pairs = zip(self.tasks, self.host.tolist(), self.host.isfinite().tolist(), strict=True)
        return {task: value for task, value, finite in pairs if not finite}

    def at(self, places: Tensor) -> Step:
        """Return the step of the tasks at some places, for a rule that concerns these alone."""
        if len(places) == len(self.tasks):
            return self
        at = places.tolist()
        present = places if self.present is None else self.present[places]
        losses = self.losses[places.to(self.losses.device)]
        return Step(tuple(self.tasks[k] for k in at), present, [self.roots[k] for k in at], losses, self.host[places])


def task_names(tasks: Sequence[str] | int) -> tuple[str, ...]:
    """Names of the tasks, which must be distinct and not empty; K gives "0" to "K-1"."""
    if isinstance(tasks, Integral):
        tasks = [str(k) for k in range(int(tasks))]
    names = tuple(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else None
    if names is None or not all(isinstance(task, str) and task for task in names):
        raise TypeError(f"tasks must be names or their number, but got {tasks!r}. Use for example ('depth', 'normals').")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be at least one name, all distinct, but got {names}.")
    return names


def read_losses(losses: Mapping[str, Tensor] | Tensor, tasks: tuple[str, ...], nan: NanPolicy, zero: ZeroPolicy) -> Step:
    """Return the losses of one step, given by name or as a vector.

    Args:
        losses: A dict of scalars by task, absent tasks left out; or a tensor of shape (K,).
        tasks: Names of all tasks.
        nan: ``"absent"``: a task whose loss is NaN is absent.
        zero: ``"absent"``: a task whose loss is exactly zero is absent.

    Raises:
        ValueError: If a loss has the wrong shape or name, or no task is left.
        TypeError: If a loss is not a tensor of floats.
    """
    apart: list[Root | None] | None = None
    if isinstance(losses, Tensor):
        _check_vector(losses, tasks, nan)
        apart = unstacked(losses)
        losses = dict(zip(tasks, losses.unbind(), strict=True))
    elif not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a dict by task or a tensor of shape ({len(tasks)},), but got {type(losses).__name__}.")
    _check_scalars(losses, tasks)
    given = [k for k, task in enumerate(tasks) if task in losses]
    scalars = [losses[tasks[k]].reshape(()) for k in given]
    roots = apart or [scalar if scalar.requires_grad else None for scalar in scalars]
    stacked = torch.stack(scalars)
    host = stacked.detach().to("cpu", torch.float64)
    absent = (host.isnan() if nan == "absent" else torch.zeros_like(host, dtype=torch.bool)) | (
        (host == 0) & (zero == "absent")
    )
    if absent.any():
        kept = (~absent).nonzero().flatten().tolist()
        if not kept:
            raise ValueError(
                f"All losses are {'NaN' if host.isnan().all() else 'NaN or zero'}. Look at the data and the learning rate."
            )
        given, roots, host = [given[k] for k in kept], [roots[k] for k in kept], host[kept]
        stacked = torch.stack([scalars[k] for k in kept])
    present = None if len(given) == len(tasks) else torch.tensor(given, dtype=torch.int64, device="cpu")
    return Step(tuple(tasks[k] for k in given), present, roots, stacked, host)


def _check_vector(losses: Tensor, tasks: tuple[str, ...], nan: NanPolicy) -> None:
    if losses.shape != (len(tasks),):
        raise ValueError(
            f"losses must have shape ({len(tasks)},) for {len(tasks)} tasks, but got {tuple(losses.shape)}. "
            "Use torch.stack([loss_a, loss_b]), or a dict by task."
        )
    if nan == "absent" and losses.isnan().any():
        raise ValueError(
            "Absent tasks must be given by a dict, but losses is a tensor with NaN entries, and its backward pass would "
            "carry the NaN to all tasks. Use {name: loss}."
        )


def _check_scalars(losses: Mapping[str, Any], tasks: tuple[str, ...]) -> None:
    for task, loss in losses.items():
        if task not in tasks:
            raise ValueError(unknown("task", task if isinstance(task, str) else f"{task!r} ({type(task).__name__})", tasks))
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            absent = not isinstance(loss, Tensor) and loss == 0
            hint = " Leave a task that has no labels in this batch out of the dict." if absent else ""
            raise TypeError(f"Loss of task '{task}' must be a tensor of floats, but got {loss!r}.{hint}")
        if loss.numel() != 1:
            raise ValueError(f"Loss of task '{task}' must be a scalar, but has shape {tuple(loss.shape)}. Use its .mean().")
    if not losses:
        raise ValueError(f"losses must have at least one of the tasks {tasks}, but is empty.")


def check_factor(factor: float) -> None:
    """Check the factor of `Balancer.backward`.

    Raises:
        ValueError: If it is not a positive finite number.
    """
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"factor must be a positive number, but got {factor!r}. Use for example 1 / num_micro_batches.")
