"""Validate and normalise the arguments of `Balancer.backward`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..distributed.wrappers import is_inside_forward
from ..engine.graph import unstacked_roots
from ..engine.passes import LossOutputs, SampleOutputs
from ..messages import unknown
from ..rules.context import Context, all_indices, context_of_all

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from ..engine.graph import Root
    from ..types import Losses

NanPolicy = Literal["error", "absent"]
ZeroPolicy = Literal["present", "absent"]
Counts: TypeAlias = Mapping[str, "float | Tensor"] | Sequence["float | Tensor"] | Tensor  # samples by task

_HALF = frozenset((torch.float16, torch.bfloat16))


@dataclass(eq=False)
class StepLosses:
    """Losses of one step, of the K tasks that are present.

    Most steps need few of the properties, so that each is computed when it is first used.

    Attributes:
        tasks: Their names.
        num_tasks: Number of all tasks.
        losses: With their graphs; over several ranks their means, detached, float64.
        given: The losses one by one, or the vector of losses, with their graphs; not used where ``roots`` is known.
        known: Values of the properties below that are at hand, by name.
        shares: This rank's shares of the samples; None: all of them. Length K.
        vector: With one loss per sample: the losses of all samples, with their graph. Shape (B,).
        present: Indices of the samples that are present; None: all. Shape (K,).
    """

    tasks: tuple[str, ...]
    num_tasks: int
    losses: Losses
    given: Sequence[Tensor] | Tensor = ()
    known: InitVar[Mapping[str, Any] | None] = None
    shares: tuple[float, ...] | None = None
    vector: Tensor | None = None
    present: Tensor | None = None

    def __post_init__(self, known: Mapping[str, Any] | None) -> None:
        if known:
            vars(self).update(known)

    @cached_property
    def indices(self) -> Tensor:
        """Indices of these tasks among all tasks; given unless all are present. Shape (K,), int64, on the host."""
        return all_indices(self.num_tasks)

    @cached_property
    def roots(self) -> list[Root | None]:
        """Node or tensor of each loss in the graph; None for a loss without a graph."""
        # Views, so that no root is a leaf tensor, and two tasks with one loss have two roots
        given = self.given
        return list(map(_root, (unstacked_roots(given) or given.unbind()) if isinstance(given, Tensor) else given))

    @cached_property
    def host(self) -> Losses:
        """Values of the losses, detached, float64, on the host. Shape (K,)."""
        return self.losses.detach().to("cpu", torch.float64)

    @cached_property
    def counts(self) -> tuple[float, ...]:
        """Numbers of samples that these losses are means of. Length K."""
        return (1.0,) * len(self.tasks)

    @cached_property
    def idle(self) -> Mapping[int, Root]:
        """By index among all tasks, losses in the graph of tasks without samples on this rank."""
        return {}

    @cached_property
    def one(self) -> Tensor:
        """The number 1 in the dtype and on the device of the losses of this rank. Shape ()."""
        return torch.ones((), dtype=self.losses.dtype, device=self.losses.device)

    @property
    def context(self) -> Context:
        """The context of a loss balancer that is applied to these tasks."""
        if len(self.tasks) == self.num_tasks:
            return context_of_all(self.tasks)
        return Context(self.indices, self.num_tasks, None, self.tasks)

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
        known = vars(self)
        given = known.get("roots", () if isinstance(self.given, Tensor) else self.given)
        dtypes = {root.dtype for root in given if isinstance(root, Tensor)}
        return not _HALF.isdisjoint(dtypes) or known.get("one", self.losses).dtype in _HALF

    def not_finite(self) -> dict[str, float]:
        """Return the losses that are infinite or NaN, by task."""
        values = self.losses.tolist()
        if all(map(math.isfinite, values)):
            return {}
        return {task: value for task, value in zip(self.tasks, values, strict=True) if not math.isfinite(value)}

    def context_of(self, positions: Tensor) -> Context:
        """Return the context of a gradient balancer that is applied to some tasks, given by their positions. Shape (k,)."""
        if len(positions) == len(self.tasks):
            return replace(self.context, losses=self.host)
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


@dataclass(eq=False)
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
        if not isinstance(self.factor, (float, int)) or not 0 < self.factor < math.inf:
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
    if parameters is None or isinstance(parameters, (list, Tensor, nn.Module)) or not isinstance(parameters, Iterable):
        return parameters
    return list(parameters)


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
    if isinstance(losses, Tensor):
        _check_vector(losses, tasks, nan)
        if counts is None and zero == "present":
            return StepLosses(tasks, len(tasks), losses.view_as(losses), losses)  # a tensor that only this step can change
        losses = dict(zip(tasks, losses.unbind(), strict=True))
    present = _checked_tasks(losses, tasks)
    scalars = [loss if loss.ndim == 0 else loss.reshape(()) for loss in map(losses.__getitem__, present)]
    numbers = None if counts is None else _read_counts(counts, tasks, losses)
    if numbers is None and nan == "error" and zero == "present":
        return _step(tasks, present, scalars)
    host = torch.stack(scalars).tolist() if scalars else []
    absent = [(nan == "absent" and math.isnan(x)) or (zero == "absent" and x == 0) for x in host]
    idle = {}
    if numbers is not None:
        idle = {
            tasks.index(task): root
            for task, scalar in zip(present, scalars, strict=True)
            if numbers[task] == 0 and (root := _root(scalar)) is not None
        }
        absent = [is_absent or numbers[task] == 0 for task, is_absent in zip(present, absent, strict=True)]
    scalars = [scalar for scalar, is_absent in zip(scalars, absent, strict=True) if not is_absent]
    present = tuple(task for task, is_absent in zip(present, absent, strict=True) if not is_absent)
    step = _step(tasks, present, scalars)
    if numbers is not None:
        step.counts, step.idle = tuple(map(numbers.__getitem__, present)), idle
    return step


def _step(tasks: tuple[str, ...], present: tuple[str, ...], scalars: list[Tensor]) -> StepLosses:
    """Return the step of the present tasks, given their losses."""
    stacked = torch.stack(scalars) if scalars else torch.zeros(0)
    if len(present) == len(tasks):
        return StepLosses(tasks, len(tasks), stacked, scalars)
    indices = torch.tensor([tasks.index(task) for task in present], dtype=torch.int64, device="cpu")
    return StepLosses(present, len(tasks), stacked, scalars, {"indices": indices})


def _root(loss: Root | None) -> Root | None:
    """Return the place at which the backward pass of one loss begins; None for a loss without a graph."""
    if not isinstance(loss, Tensor):
        return loss
    return loss.reshape(()) if loss.requires_grad else None


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


def _checked_tasks(losses: Any, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks that have a loss, in the order of all tasks, after a check of the losses by task."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"losses must be a dict by task or a tensor of shape ({len(tasks)},), but got {type(losses).__name__}. "
            "Use torch.stack([loss_a, loss_b]), or {name: loss}."
        )
    for task, loss in losses.items():
        if task not in tasks:
            raise ValueError(unknown("task", task if isinstance(task, str) else f"{task!r} ({type(task).__name__})", tasks))
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            absent = not isinstance(loss, Tensor) and loss == 0
            hint = " Leave a task that has no labels in this batch out of the dict." if absent else ""
            raise TypeError(f"Loss of task '{task}' must be a tensor of floats, but got {loss!r}.{hint}")
        if loss.numel() != 1:
            raise ValueError(f"Loss of task '{task}' must be a scalar, but has shape {tuple(loss.shape)}. Use its .mean().")
    return tasks if len(losses) == len(tasks) else tuple(task for task in tasks if task in losses)
