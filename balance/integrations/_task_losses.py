"""Task losses of a batch, as a function of the user returns them to a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..messages import unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..stage.arguments import Counts


class TaskLosses(dict[str, "Tensor"]):
    """Task losses by name, with further arguments of `Balancer.loss`. A plain dict is enough where none is needed.

    Args:
        losses: One scalar per task that is present in the batch.
        counts: Number of samples or tokens that each loss is a mean of, by task.
        features: The shared representation.
        measure: Parameters on which conflict is measured.
        extra: A further loss that no rule sees.

    Attributes:
        arguments: The further arguments that are given, by name.
    """

    def __init__(
        self,
        losses: Mapping[str, Tensor],
        *,
        counts: Counts | None = None,
        features: Any = None,
        measure: Iterable[Tensor] | None = None,
        extra: Tensor | None = None,
    ) -> None:
        super().__init__(losses)
        given = {"counts": counts, "features": features, "measure": measure, "extra": extra}
        self.arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}

    @property
    def counts(self) -> Counts | None:
        """Number of samples of each loss; None if it is not given."""
        counts: Counts | None = self.arguments.get("counts")
        return counts

    def total(self, device: torch.device) -> Tensor:
        """Return the plain sum of all losses, the extra loss included. Shape ()."""
        extra = self.arguments.get("extra")
        terms = [loss.reshape(()) for loss in (*self.values(), *(() if extra is None else (extra,)))]
        return torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)


def read_task_losses(returned: object, tasks: Sequence[str], source: str) -> TaskLosses:
    """Return what a function of the user has returned as task losses, checked.

    Args:
        returned: Task losses by name.
        tasks: Names of the tasks.
        source: Name of the function, for messages.

    Returns:
        The losses, with the further arguments if there are any.

    Raises:
        TypeError: If it is not a dict.
        ValueError: If a name is unknown.
    """
    if not isinstance(returned, Mapping):
        example = ", ".join(f'"{task}": ...' for task in list(tasks)[:2])
        raise TypeError(
            f"{source} must return the task losses by name, but got {type(returned).__name__}. "
            f"Return {{{example}}}, and leave the sum of the losses to the balancer."
        )
    for task in returned:
        if task not in tasks:
            raise ValueError(unknown("task", str(task), tasks))
    return returned if isinstance(returned, TaskLosses) else TaskLosses(returned)
