"""The networks of dense prediction by name: a trunk, and one head per task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from balance.config import check_settings, setting
from experiments.problems.base import Heads, Network
from experiments.problems.dense.mtan import MTAN
from experiments.problems.dense.segnet import WIDTHS, SegNet, initialise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

SMALL_WIDTHS = (16, 32, 64, 64)
SMALL_DEPTHS = (2, 2, 2, 2)
SHORTEST = 1e-6


@dataclass
class ModelConfig:
    """The network: ``small`` (a SegNet of four narrow stages, for a CPU), ``segnet`` or ``mtan`` (as published)."""

    name: str = setting("small", choices=("small", "segnet", "mtan"), help="network")


def build(config: ModelConfig, outputs: Mapping[str, int]) -> Network:
    """Return a freshly initialised network.

    Args:
        config: Name of the network.
        outputs: Channels of each task's output, by task, in the order of the tasks.

    Returns:
        The network.
    """
    check_settings(config, "model")
    if config.name == "small":
        return Network(SegNet(SMALL_WIDTHS, SMALL_DEPTHS), build_heads(SMALL_WIDTHS[0], outputs))
    trunk = SegNet() if config.name == "segnet" else MTAN(len(outputs))
    return Network(trunk, build_heads(WIDTHS[0], outputs))


def build_heads(width: int, outputs: Mapping[str, int]) -> Heads:
    """Return two convolutions per task, on the map that all tasks share or on the task's map.

    Args:
        width: Channels of the maps.
        outputs: Channels of each task's output, by task.

    Returns:
        Heads whose outputs are log-probabilities (B, C, H, W) for ``segmentation``, vectors of length one (B, 3, H, W) for
        ``normals``, and unbounded values (B, 1, H, W) for ``depth``.
    """
    last: dict[str, nn.Module] = {"segmentation": nn.LogSoftmax(dim=1), "normals": UnitLength()}
    heads = Heads(
        {
            task: nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, channels, 1), last.get(task, nn.Identity())
            )
            for task, channels in outputs.items()
        }
    )
    initialise(heads)
    return heads


class UnitLength(nn.Module):
    """Divide vectors by their length over the channels; a vector shorter than 1e-6 has no direction and becomes zero.

    Differs from the published codes, which divide zero by zero there. Neither value nor gradient is ever NaN.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors of length one, or zero. Shape (B, 3, H, W) -> (B, 3, H, W)."""
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        unit: Tensor = vectors.masked_fill(lengths < SHORTEST, 0) / lengths.clamp_min(SHORTEST)
        return unit
