"""The networks of `experiments.problems.dense`, with a head for each of the three tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.datasets.layouts.dense import NYUV2
from experiments.problems.dense.model import ModelConfig, build

if TYPE_CHECKING:
    from experiments.problems.base import Network

__all__ = ["ModelConfig", "build_model"]

OUTPUTS = {"segmentation": NYUV2.num_classes, "depth": 1, "normals": 3}


def build_model(config: ModelConfig) -> Network:
    """Return a freshly initialised network for images (B, 3, H, W).

    Args:
        config: Name of the network: ``small`` (267 553 parameters), ``segnet`` (25 055 185) or ``mtan`` (44 229 073).

    Returns:
        The network.
    """
    return build(config, OUTPUTS)
