"""Facts about one step that a rule may use, and errors of a rule that name a task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses


@lru_cache(maxsize=8)
def all_indices(num_tasks: int) -> Tensor:
    """Return the indices of all tasks, one tensor for all steps, which nobody changes. Shape (K,), int64, on the host."""
    with torch.inference_mode(mode=False):  # it is used in later steps too
        return torch.arange(num_tasks, device="cpu")


class TaskError(ValueError):
    """A value of one task that lies outside a rule's domain.

    A rule identifies tasks by index; the error is raised again with the task's name where names are available.

    Args:
        task: Index of the task among the losses that the rule got.
        complaint: Message, with ``{task}`` in place of the name of the task.
    """

    def __init__(self, task: int, complaint: str) -> None:
        self.task = task
        self.complaint = complaint
        super().__init__(self.naming(str(task)))

    def naming(self, name: str) -> str:
        """Return the message with the task called ``name``."""
        return self.complaint.replace("{task}", f"'{name}'")


@dataclass(frozen=True)
class Context:
    """Facts about one step that a rule may use. K is the number of tasks that are present.

    Attributes:
        indices: Indices of these tasks among all tasks. Shape (K,), int64, on the host.
        num_tasks: Number of all tasks.
        losses: Their raw losses, detached, float64, on the host; None where nobody has them. Shape (K,).
        tasks: Their names, for messages; None where nobody has them.
        cross: Inner products of their gradients on two further batches; None where nobody has them. Shape (K, K).
    """

    indices: Tensor
    num_tasks: int
    losses: Losses | None = None
    tasks: tuple[str, ...] | None = None
    cross: Tensor | None = None

    @classmethod
    def of_all(cls, num_tasks: int, losses: Losses | None = None) -> Context:
        """Return the context of a step at which all tasks are present."""
        return cls(all_indices(num_tasks), num_tasks, losses)

    @classmethod
    def of(cls, present: Tensor | None, num_tasks: int, losses: Losses | None = None) -> Context:
        """Return the context for the keywords that an author's rule gets; ``present`` is None if all tasks are present."""
        return cls.of_all(num_tasks, losses) if present is None else cls(present, num_tasks, losses)

    @property
    def present(self) -> Tensor | None:
        """Indices of the present tasks, for the keyword of an author's rule; None if all tasks are present."""
        return None if len(self.indices) == self.num_tasks else self.indices


@lru_cache(maxsize=8)
def context_of_all(tasks: tuple[str, ...]) -> Context:
    """Return the context of a loss balancer at a step of all tasks, one for all steps."""
    return Context(all_indices(len(tasks)), len(tasks), None, tasks)
