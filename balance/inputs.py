"""The door of the stage: what comes in is checked here, once, and brought into one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from balance.graph import unstacked
from balance.loss.domain import values
from balance.registry import unknown

if TYPE_CHECKING:
    from balance.graph import Root
    from balance.shapes import Losses

NanPolicy = Literal["error", "absent"]


class Step(NamedTuple):
    """The losses of one step, of the K tasks that are present."""

    tasks: tuple[str, ...]
    present: Tensor | None  # indices of those tasks among all; None where all are present
    roots: list[Root | None]  # where each is in the graph; None for one without a graph
    losses: Losses  # their values, with their graphs
    host: Losses  # their values, float64

    def not_finite(self) -> dict[str, float]:
        """The losses that are infinite or NaN, by task."""
        pairs = zip(self.tasks, self.host.tolist(), self.host.isfinite().tolist(), strict=True)
        return {task: value for task, value, finite in pairs if not finite}


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


def read_losses(losses: Mapping[str, Tensor] | Tensor, tasks: tuple[str, ...], nan: NanPolicy) -> Step:
    """Losses by name or as a vector, as the losses of one step.

    Args:
        losses: A dict of scalars by task, absent tasks left out; or a tensor of shape (K,).
        tasks: Names of all tasks.
        nan: ``"absent"``: a task whose loss is NaN is absent.
    """
    apart: list[Root | None] | None = None
    if isinstance(losses, Tensor):
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
        apart = unstacked(losses)
        losses = dict(zip(tasks, losses.unbind(), strict=True))
    elif not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a dict by task or a tensor of shape ({len(tasks)},), but got {type(losses).__name__}.")
    for task, loss in losses.items():
        if task not in tasks:
            raise ValueError(unknown("task", task if isinstance(task, str) else f"{task!r} ({type(task).__name__})", tasks))
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"Loss of task '{task}' must be a tensor of floats, but got {loss!r}.")
        if loss.numel() != 1:
            raise ValueError(f"Loss of task '{task}' must be a scalar, but has shape {tuple(loss.shape)}. Use its .mean().")
    if not losses:
        raise ValueError(f"losses must have at least one of the tasks {tasks}, but is empty.")
    given = [k for k, task in enumerate(tasks) if task in losses]
    scalars = [losses[tasks[k]].reshape(()) for k in given]
    stacked = torch.stack(scalars)
    host = values(stacked)
    if nan == "absent" and host.isnan().any():
        kept = (~host.isnan()).nonzero().flatten().tolist()
        if not kept:
            raise ValueError("All losses are NaN. Look at the data and the learning rate.")
        given, scalars, host = [given[k] for k in kept], [scalars[k] for k in kept], host[kept]
        stacked = torch.stack(scalars)
    present = None if len(given) == len(tasks) else torch.tensor(given, device="cpu")
    roots = apart or [scalar if scalar.requires_grad else None for scalar in scalars]
    return Step(tuple(tasks[k] for k in given), present, roots, stacked, host)


def read_shared(shared: Iterable[Tensor] | None, name: str = "shared") -> list[Tensor]:
    """The shared parameters that require a gradient, each once; ``name``: of the argument, for messages."""
    if isinstance(shared, nn.Module | Tensor) or not isinstance(shared, Iterable):
        found = "nothing" if shared is None else type(shared).__name__
        raise TypeError(f"{name} must be an iterable of parameters, but got {found}. Use {name}=model.trunk.parameters().")
    parameters = list({id(p): p for p in shared}.values())
    if not parameters:
        raise ValueError(f"{name} must hold parameters, but is empty. Is it a generator that was used up? Give a list.")
    for parameter in parameters:
        if not isinstance(parameter, Tensor) or not parameter.is_leaf:
            raise TypeError(
                f"{name} must hold parameters, but got {type(parameter).__name__}"
                f"{' that is computed: give it as features' if isinstance(parameter, Tensor) else ''}."
            )
        if parameter.is_complex():
            raise TypeError(f"{name} must hold real parameters, but got a complex one. Keep its real view as the parameter.")
    return [parameter for parameter in parameters if parameter.requires_grad]


def read_features(features: Any, *, computed: bool = True) -> list[Tensor]:
    """The tensors of the shared representation, each once, of a tensor or of sequences or dicts of tensors.

    Args:
        features: What a user gave.
        computed: They must require gradients.

    Raises:
        ValueError: If there is none, or one does not require a gradient.
    """
    tensors = list({id(z): z for z in _flattened(features)}.values())
    if not tensors or not all(isinstance(z, Tensor) and (z.requires_grad or not computed) for z in tensors):
        raise ValueError(
            "features must be one tensor or several that require gradients: the output of the shared trunk, from which the "
            f"losses were computed. But got {_described(features)}."
        )
    return tensors


def _flattened(features: Any) -> list[Any]:
    if isinstance(features, Mapping):
        features = list(features.values())
    if isinstance(features, list | tuple):
        return [tensor for part in features for tensor in _flattened(part)]
    return [] if features is None else [features]


def _described(features: Any) -> str:
    if isinstance(features, Tensor):
        return "one that does not"
    return "nothing" if not _flattened(features) else "others"
