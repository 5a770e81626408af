"""The networks by name: a trunk, and one head per task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from balance.messages import unknown
from experiments.problems.base import Network
from experiments.problems.dense.mtan import MTAN
from experiments.problems.dense.segnet import WIDTHS, SegNet, initialise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

SMALL_WIDTHS = (16, 32, 64, 64)
SMALL_DEPTHS = (2, 2, 2, 2)
NAMES = ("small", "segnet", "mtan")
SHORTEST = 1e-6


@dataclass
class ModelConfig:
    """Which network: ``small`` (a SegNet of four narrow stages, for a CPU), ``segnet`` or ``mtan`` (as published)."""

    name: str = "small"


def build(config: ModelConfig, outputs: Mapping[str, int]) -> Network:
    """A freshly initialised network.

    Args:
        config: Its name.
        outputs: Channels that each task answers with, by task, in the order of the tasks.

    Raises:
        ValueError: If there is no network of that name.
    """
    if config.name == "small":
        return Network(SegNet(SMALL_WIDTHS, SMALL_DEPTHS), Heads(SMALL_WIDTHS[0], outputs))
    if config.name == "segnet":
        return Network(SegNet(), Heads(WIDTHS[0], outputs))
    if config.name == "mtan":
        return Network(MTAN(len(outputs)), Heads(WIDTHS[0], outputs))
    raise ValueError(unknown("model.name", config.name, NAMES))


class Heads(nn.ModuleDict):
    """Two convolutions per task, on the map that all tasks share or on the map of its own.

    Answers are log-probabilities (B, C, H, W) for ``segmentation``, vectors of length one (B, 3, H, W) for ``normals``, and the
    bare values (B, 1, H, W) for ``depth``.
    """

    def __init__(self, width: int, outputs: Mapping[str, int]) -> None:
        answers: dict[str, nn.Module] = {"segmentation": nn.LogSoftmax(dim=1), "normals": UnitLength()}
        super().__init__(
            {
                task: nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, channels, 1), answers.get(task, nn.Identity())
                )
                for task, channels in outputs.items()
            }
        )
        initialise(self)

    def forward(self, features: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Answers by task."""
        maps = features if isinstance(features, tuple) else (features,) * len(self)
        return {task: head(own) for (task, head), own in zip(self.items(), maps, strict=True)}


class UnitLength(nn.Module):
    """Divide by the length over the channels; what is shorter than 1e-6 has no direction and becomes zero.

    Differs from the published codes, which divide zero by zero there. Neither value nor gradient is ever NaN.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        """Shape (B, 3, H, W) -> (B, 3, H, W)."""
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        unit: Tensor = vectors.masked_fill(lengths < SHORTEST, 0) / lengths.clamp_min(SHORTEST)
        return unit
