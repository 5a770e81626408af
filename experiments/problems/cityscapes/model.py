"""The networks of `experiments.problems.dense`, with a head for each of the two tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.datasets.layouts.dense import CITYSCAPES
from experiments.problems.dense.model import ModelConfig, build

if TYPE_CHECKING:
    from experiments.problems.base import Network

__all__ = ["ModelConfig", "build_model"]

OUTPUTS = {"segmentation": CITYSCAPES.num_classes, "depth": 1}


def build_model(config: ModelConfig) -> Network:
    """Return a freshly initialised network for images (B, 3, H, W).

    Args:
        config: Name of the network: ``small`` (265 080 parameters), ``segnet`` (25 017 672) or ``mtan`` (41 206 984).

    Returns:
        The network.
    """
    return build(config, OUTPUTS)
