"""A small shared convolutional trunk and four linear heads."""

from __future__ import annotations

from torch import nn

from experiments.problems.base import Heads, Network

WIDTH = 16
FEATURES = 64
OUTPUTS = {"left": 10, "right": 10, "sum": 1, "reconstruction": 64}


def build_model() -> Network:
    """Return a freshly initialised network for canvases (B, 1, 12, 12), with outputs (B, outputs of the task).

    The trunk has 23 296 parameters, so few that the four tasks compete for them.

    Returns:
        The network.
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
    return Network(trunk, Heads({task: nn.Linear(FEATURES, size) for task, size in OUTPUTS.items()}))
