"""The transitions that the agent has seen, in a buffer for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


class Transitions(NamedTuple):
    """Steps of environments, one in each row."""

    observations: Tensor  # (..., D)
    actions: Tensor  # (..., A)
    rewards: Tensor  # (...)
    following: Tensor  # (..., D), the observations after the steps


class Replay:
    """Buffers of the last transitions of K tasks. All tasks have equally many, since they are stepped together.

    Args:
        tasks: Number of tasks.
        capacity: Largest number of transitions of a task; then new ones replace the oldest.
        observation: Number of entries of an observation.
        action: Number of entries of an action.
    """

    def __init__(self, tasks: int, capacity: int, observation: int, action: int) -> None:
        sizes = ((observation,), (action,), (), (observation,))
        self.stored = Transitions(*(torch.empty(tasks, capacity, *size) for size in sizes))
        self.added = 0  # transitions of each task so far

    @property
    def capacity(self) -> int:
        """Largest number of transitions of a task."""
        return self.stored.rewards.shape[1]

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, transitions: Transitions) -> None:
        """Add one transition of each task. Shapes (K, ...)."""
        for stored, new in zip(self.stored, transitions, strict=True):
            stored[:, self.added % self.capacity] = new
        self.added += 1

    def draw(self, tasks: Tensor) -> Transitions:
        """Return random transitions of these tasks, from the global generator. Shape (B,) -> (B, ...)."""
        places = torch.randint(len(self), tasks.shape)
        return Transitions(*(stored[tasks, places] for stored in self.stored))

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the buffers that is filled."""
        return {"added": self.added, "stored": [stored[:, : len(self)].clone() for stored in self.stored]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the transitions of `state_dict`."""
        self.added = state["added"]
        for stored, saved in zip(self.stored, state["stored"], strict=True):
            stored[:, : len(self)] = saved
