"""A small shared convolutional trunk and four linear heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from experiments.problems.base import Network

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 16
FEATURES = 64
OUTPUTS = {"left": 10, "right": 10, "sum": 1, "reconstruction": 64}


class LinearHeads(nn.ModuleDict):
    """One linear head per task, on the shared features."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Outputs by task. Shape (B, FEATURES) -> (B, outputs of the task)."""
        return {task: head(features) for task, head in self.items()}


def build_model() -> Network:
    """A freshly initialised network for canvases (B, 1, 12, 12).

    The trunk has 23 296 parameters, few enough that the four tasks compete for it.
    """
    trunk = nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * 9, FEATURES),
        nn.ReLU(),
    )
    return Network(trunk, LinearHeads({task: nn.Linear(FEATURES, size) for task, size in OUTPUTS.items()}))
