"""One linear layer, each of whose outputs is a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from experiments.problems.base import Network
from experiments.problems.regression100.data import INPUTS, OUTPUTS
from experiments.problems.regression100.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ModelConfig:
    """There is nothing to choose."""


class Columns(nn.Module):
    """The outputs one by one; no parameters."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Outputs by task. Shape (B, 100) -> (B,)."""
        return dict(zip(TASKS, features.unbind(dim=1), strict=True))


def build_model(config: ModelConfig | None = None) -> Network:  # noqa: ARG001 - every experiment is asked the same way
    """A freshly initialised layer. Its weight is shared by all tasks, each of which reaches a row of its own."""
    return Network(nn.Linear(INPUTS, OUTPUTS), Columns())
