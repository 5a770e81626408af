"""Validate and normalise the arguments of `Balancer.backward`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..distributed.wrappers import is_inside_forward
from ..engine.graph import unstacked_roots
from ..engine.passes import LossOutputs, SampleOutputs
from ..messages import unknown
from ..rules.context import Context

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from ..engine.graph import Root
    from ..types import Losses

NanPolicy = Literal["error", "absent"]
ZeroPolicy = Literal["present", "absent"]
Counts: TypeAlias = Mapping[str, "float | Tensor"] | Sequence["float | Tensor"] | Tensor  # samples by task

_HALF = (torch.float16, torch.bfloat16)


class StepLosses(NamedTuple):
    """Losses of one step, of the K tasks that are present."""

    tasks: tuple[str, ...]
    indices: Tensor  # of these tasks among all tasks. Shape (K,)
    num_tasks: int  # of all tasks
    roots: list[Root | None]  # node or tensor of each loss in the graph; None for a loss without a graph
    losses: Losses  # with their graphs; over several ranks their means, detached, float64
    host: Losses  # their values, detached, float64, on the host
    counts: tuple[float, ...]  # numbers of samples that these losses are means of. Length K
    one: Tensor  # the number 1 in the dtype and on the device of the losses of this rank. Shape ()
    shares: tuple[float, ...] | None = None  # this rank's shares of the samples; None: all of them. Length K
    idle: Mapping[int, Root] = MappingProxyType(
        {}
    )  # by index among all tasks, losses in the graph of tasks without samples on this rank
    vector: Tensor | None = None  # with one loss per sample: the losses of all samples, with their graph. Shape (B,)
    present: Tensor | None = None  # indices of the samples that are present; None: all. Shape (K,)

    @property
    def context(self) -> Context:
        """The context of a rule that is applied to these tasks."""
        return Context(self.indices, self.num_tasks, self.host, self.tasks)

    @property
    def starts(self) -> Sequence[Root | None]:
        """Tensors or nodes at which a walk through the graph begins."""
        return self.roots if self.vector is None else self.roots[:2]  # two tasks with one root have all nodes in common

    def outputs(self, unit: Tensor) -> LossOutputs:
        """Return the losses as outputs of backward passes that begin with the gradient ``unit``. Shape ()."""
        if self.vector is None:
            return LossOutputs(self.roots, unit, self.shares)
        return SampleOutputs(self.roots, unit, vector=self.vector, indices=self.present)

    @property
    def is_half(self) -> bool:
        """True if a loss is of half precision, in which the weight of a small loss can overflow."""
        return any(isinstance(root, Tensor) and root.dtype in _HALF for root in self.roots) or self.one.dtype in _HALF

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


@dataclass(frozen=True)
class StepArguments:
    """Arguments of `Balancer.backward` as given.

    Attributes:
        in_forward: Whether they were given inside of the forward pass of DistributedDataParallel.
    """

    losses: Mapping[str, Tensor] | Tensor
    shared: Iterable[Tensor] | None = None
    features: Any = None
    measure: Iterable[Tensor] | None = None
    scaler: GradScaler | None = None
    factor: float = 1.0
    counts: Counts | None = None
    extra: Tensor | None = None
    further: Sequence[Mapping[str, Tensor] | Tensor] | None = None
    in_forward: bool = field(default_factory=is_inside_forward)

    def check(self) -> None:
        """Check the arguments that need no context.

        Raises:
            ValueError: If ``factor`` is not a positive finite number, or ``extra`` is no scalar with a graph.
            TypeError: If ``extra`` is no tensor of floats.
        """
        if not isinstance(self.factor, int | float) or not 0 < self.factor < math.inf:
            raise ValueError(
                f"factor must be a positive number, but got {self.factor!r}. Use for example 1 / num_micro_batches."
            )
        if self.extra is None:
            return
        if not isinstance(self.extra, Tensor) or not self.extra.is_floating_point():
            raise TypeError(f"extra must be a scalar tensor of floats, but got {type(self.extra).__name__}.")
        if self.extra.numel() != 1 or not self.extra.requires_grad:
            raise ValueError(
                f"extra must be a scalar that requires a gradient, but has shape {tuple(self.extra.shape)} and "
                f"requires_grad={self.extra.requires_grad}."
            )

    @property
    def enabled_scaler(self) -> GradScaler | None:
        """The gradient scaler, unless it is switched off."""
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None


def listed(parameters: Iterable[Tensor] | None) -> Iterable[Tensor] | None:
    """Return parameters as a list, since a generator can be read only once; anything else unchanged, to be checked later."""
    if isinstance(parameters, Iterable) and not isinstance(parameters, Tensor | nn.Module):
        return list(parameters)
    return parameters


def read_losses(
    losses: Mapping[str, Tensor] | Tensor,
    tasks: tuple[str, ...],
    nan: NanPolicy,
    zero: ZeroPolicy,
    counts: Counts | None = None,
) -> StepLosses:
    """Return the losses of one step on this rank, given by name or as a vector.

    Args:
        losses: A dict of scalars by task, absent tasks left out; or a tensor of shape (K,).
        tasks: Names of all tasks.
        nan: ``"absent"``: a task whose loss is NaN is absent.
        zero: ``"absent"``: a task whose loss is exactly zero is absent.
        counts: Number of samples that each loss is a mean of; a task with none is absent. None: 1 for each task.

    Returns:
        The losses; possibly of no task, see `require_present`.

    Raises:
        ValueError: If a loss has the wrong shape or name, or a count is wrong.
        TypeError: If a loss is not a tensor of floats.
    """
    by_task, stacked_roots = _by_task(losses, tasks, nan)
    _check_scalars(by_task, tasks)
    indices = [k for k, task in enumerate(tasks) if task in by_task]
    numbers = None if counts is None else _read_counts(counts, tasks, by_task)
    scalars = [by_task[tasks[k]].reshape(()) for k in indices]
    roots = stacked_roots or [scalar if scalar.requires_grad else None for scalar in scalars]
    stacked = torch.stack(scalars) if scalars else torch.zeros(0)
    host = stacked.detach().to("cpu", torch.float64)
    absent, idle = _absent(host, nan, zero), {}
    if numbers is not None:
        idle = {k: root for k, root in zip(indices, roots, strict=True) if numbers[tasks[k]] == 0 and root is not None}
        absent |= torch.tensor([numbers[tasks[k]] == 0 for k in indices], dtype=torch.bool, device="cpu")
    if absent.any():
        present = (~absent).nonzero().flatten().tolist()
        indices, roots, host = [indices[k] for k in present], [roots[k] for k in present], host[present]
        stacked = torch.stack([scalars[k] for k in present]) if present else stacked[:0]
    names = tuple(tasks[k] for k in indices)
    present_counts = tuple(1.0 if numbers is None else numbers[task] for task in names)
    positions = torch.tensor(indices, dtype=torch.int64, device="cpu")
    one = torch.ones((), dtype=stacked.dtype, device=stacked.device)
    return StepLosses(names, positions, len(tasks), roots, stacked, host, present_counts, one, idle=idle)


def require_present(step: StepLosses, losses: object, tasks: tuple[str, ...]) -> None:
    """Check that a step has a task.

    Args:
        step: The step.
        losses: The losses as given.
        tasks: Names of all tasks.

    Raises:
        ValueError: If the step has none.
    """
    if step.tasks:
        return
    if isinstance(losses, Mapping) and not losses:
        raise ValueError(f"losses must have at least one of the tasks {tasks}, but is empty.")
    raise ValueError("All losses are NaN or zero, or are means of no samples. Look at the data and the learning rate.")


def _read_counts(counts: Counts, tasks: tuple[str, ...], losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the number of samples of each task that has a loss."""
    if not isinstance(counts, Mapping):
        if len(counts) != len(tasks):
            raise ValueError(f"counts must have a number for each of {len(tasks)} tasks, but got {len(counts)}.")
        counts = dict(zip(tasks, counts, strict=True))
    numbers = dict.fromkeys(losses, 1.0)
    for task, count in counts.items():
        if task not in tasks:
            raise ValueError(unknown("task in counts", task, tasks))
        number = float(count)
        if not 0 <= number < math.inf:
            raise ValueError(f"counts must be numbers of samples, but the count of task '{task}' is {number}.")
        if number and task not in losses:
            raise ValueError(f"Task '{task}' has a count of {number:g} samples, but no loss. Give both or neither.")
        numbers[task] = number
    return numbers


def _by_task(
    losses: Mapping[str, Tensor] | Tensor, tasks: tuple[str, ...], nan: NanPolicy
) -> tuple[Mapping[str, Tensor], list[Root | None] | None]:
    """Return the losses by task, and for a vector the roots that ``torch.stack`` made it of, where it did."""
    if isinstance(losses, Tensor):
        _check_vector(losses, tasks, nan)
        return dict(zip(tasks, losses.unbind(), strict=True)), unstacked_roots(losses)
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"losses must be a dict by task or a tensor of shape ({len(tasks)},), but got {type(losses).__name__}. "
            "Use torch.stack([loss_a, loss_b]), or {name: loss}."
        )
    return losses, None


def _absent(host: Tensor, nan: NanPolicy, zero: ZeroPolicy) -> Tensor:
    """Return for each loss whether its value marks the task as absent. Shape (K,), bool."""
    absent = torch.zeros_like(host, dtype=torch.bool)
    if nan == "absent":
        absent |= host.isnan()
    if zero == "absent":
        absent |= host == 0
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
