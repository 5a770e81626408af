"""A convolutional trunk and 40 linear heads, in the size of the papers and in one for CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from experiments.problems.base import Network
from experiments.problems.celeba.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ModelConfig:
    """``official``: 5 197 160 parameters; ``small``: 126 072, for drawn images on a CPU."""

    name: Literal["small", "official"] = "small"


class Shape(NamedTuple):
    """What differs between the networks."""

    stages: tuple[tuple[int, ...], ...]  # channels of the convolutions; images are halved between stages
    stride: int  # of the first convolution
    pooled: int  # side of what the last stage is averaged to
    hidden: tuple[int, ...]  # widths of the fully connected layers


SHAPES = {
    "official": Shape(((64,), (128, 128), (256, 256), (512, 512)), 1, 1, (512, 512)),
    "small": Shape(((16,), (32,), (64,)), 2, 4, (96,)),
}


class Heads(nn.ModuleDict):
    """One linear head per task, each of its own, so that a task's gradient does not touch the other heads."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits by task. Shape (B, F) -> (B,)."""
        return {task: head(features).squeeze(1) for task, head in self.items()}


def build_model(config: ModelConfig | None = None) -> Network:
    """A freshly initialised network for images (B, 3, 64, 64).

    Raises:
        ValueError: If there is no network of that name.

    Source:
        The 9 layers of the FAMO repository (Liu et al., NeurIPS 2023), seven of them convolutions. Differs: heads give logits,
        of which the loss takes the sigmoid.
    """
    name = (config or ModelConfig()).name
    if name not in SHAPES:
        raise ValueError(f"model.name must be one of {', '.join(SHAPES)}, but got '{name}'.")
    shape = SHAPES[name]
    width = shape.hidden[-1]
    return Network(_trunk(shape), Heads({task: nn.Linear(width, 1) for task in TASKS}))


def _trunk(shape: Shape) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels, stride = 3, shape.stride
    for stage in shape.stages:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels, stride = width, 1
    layers += [nn.AdaptiveAvgPool2d(shape.pooled), nn.Flatten()]
    features = channels * shape.pooled**2
    for width in shape.hidden:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers)
