"""One linear layer; each of its outputs is a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from experiments.problems.base import Network
from experiments.problems.regression100.data import INPUTS, OUTPUTS
from experiments.problems.regression100.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor


class Columns(nn.Module):
    """Separate the outputs of the layer; no parameters."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return outputs by task. Shape (B, 100) -> (B,)."""
        return dict(zip(TASKS, features.unbind(dim=1), strict=True))


def build_model() -> Network:
    """Return a freshly initialised layer. All tasks share its weight, but each task reaches only one row."""
    return Network(nn.Linear(INPUTS, OUTPUTS), Columns())
