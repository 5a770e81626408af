"""Validate and normalise the arguments of `Balancer.backward`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from balance.engine.graph import unstacked_roots
from balance.messages import unknown
from balance.rules.protocol import Context

if TYPE_CHECKING:
    from balance.engine.graph import Root
    from balance.types import Losses

NanPolicy = Literal["error", "absent"]
ZeroPolicy = Literal["present", "absent"]

_HALF = (torch.float16, torch.bfloat16)


class StepLosses(NamedTuple):
    """Losses of one step, of the K tasks that are present."""

    tasks: tuple[str, ...]
    indices: Tensor  # of these tasks among all tasks. Shape (K,)
    num_tasks: int  # of all tasks
    roots: list[Root | None]  # node or tensor of each loss in the graph; None for a loss without a graph
    losses: Losses  # with their graphs
    host: Losses  # their values, detached, float64, on the host

    @property
    def context(self) -> Context:
        """The context of a rule that is applied to these tasks."""
        return Context(self.indices, self.num_tasks, self.host, self.tasks)

    @property
    def is_half(self) -> bool:
        """True if a loss is of half precision, in which the weight of a small loss can overflow."""
        return any(isinstance(root, Tensor) and root.dtype in _HALF for root in self.roots) or self.losses.dtype in _HALF

    def not_finite(self) -> dict[str, float]:
        """Return the losses that are infinite or NaN, by task."""
        pairs = zip(self.tasks, self.host.tolist(), self.host.isfinite().tolist(), strict=True)
        return {task: value for task, value, finite in pairs if not finite}

    def context_of(self, positions: Tensor) -> Context:
        """Return the context of a rule that is applied to some of these tasks, given by their positions. Shape (k,)."""
        if len(positions) == len(self.tasks):
            return self.context
        tasks = tuple(self.tasks[k] for k in positions.tolist())
        return Context(self.indices[positions], self.num_tasks, self.host[positions], tasks)


def task_names(tasks: Sequence[str] | int) -> tuple[str, ...]:
    """Return the names of the tasks; their number K gives "0" to "K-1".

    Raises:
        ValueError: If there is no name, or two names are equal.
        TypeError: If a name is not a non-empty string.
    """
    if isinstance(tasks, Integral):
        tasks = [str(k) for k in range(int(tasks))]
    names = tuple(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else None
    if names is None or not all(isinstance(task, str) and task for task in names):
        raise TypeError(f"tasks must be names or their number, but got {tasks!r}. Use for example ('depth', 'normals').")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be at least one name, all distinct, but got {names}.")
    return names


def read_losses(losses: Mapping[str, Tensor] | Tensor, tasks: tuple[str, ...], nan: NanPolicy, zero: ZeroPolicy) -> StepLosses:
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
    by_task, stacked_roots = _by_task(losses, tasks, nan)
    _check_scalars(by_task, tasks)
    indices = [k for k, task in enumerate(tasks) if task in by_task]
    scalars = [by_task[tasks[k]].reshape(()) for k in indices]
    roots = stacked_roots or [scalar if scalar.requires_grad else None for scalar in scalars]
    stacked = torch.stack(scalars)
    host = stacked.detach().to("cpu", torch.float64)
    absent = _absent(host, nan, zero)
    if absent.any():
        present = (~absent).nonzero().flatten().tolist()
        indices, roots, host = [indices[k] for k in present], [roots[k] for k in present], host[present]
        stacked = torch.stack([scalars[k] for k in present])
    names = tuple(tasks[k] for k in indices)
    return StepLosses(names, torch.tensor(indices, dtype=torch.int64, device="cpu"), len(tasks), roots, stacked, host)


def _by_task(
    losses: Mapping[str, Tensor] | Tensor, tasks: tuple[str, ...], nan: NanPolicy
) -> tuple[Mapping[str, Tensor], list[Root | None] | None]:
    """Return the losses by task, and for a vector the roots that ``torch.stack`` made it of, where it did."""
    if isinstance(losses, Tensor):
        _check_vector(losses, tasks, nan)
        return dict(zip(tasks, losses.unbind(), strict=True)), unstacked_roots(losses)
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a dict by task or a tensor of shape ({len(tasks)},), but got {type(losses).__name__}.")
    return losses, None


def _absent(host: Tensor, nan: NanPolicy, zero: ZeroPolicy) -> Tensor:
    """Return for each loss whether its value marks the task as absent. Shape (K,), bool."""
    absent = torch.zeros_like(host, dtype=torch.bool)
    if nan == "absent":
        absent |= host.isnan()
    if zero == "absent":
        absent |= host == 0
    if absent.all():
        values = "NaN" if host.isnan().all() else "NaN or zero"
        raise ValueError(f"All losses are {values}. Look at the data and the learning rate.")
    return absent


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
