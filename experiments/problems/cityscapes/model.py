"""The networks of `experiments.problems.dense`, with a head for each of the two tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.problems.cityscapes.tasks import NUM_CLASSES
from experiments.problems.dense.model import ModelConfig, build

if TYPE_CHECKING:
    from experiments.problems.base import Network

__all__ = ["ModelConfig", "build_model"]

OUTPUTS = {"segmentation": NUM_CLASSES, "depth": 1}


def build_model(config: ModelConfig) -> Network:
    """A freshly initialised network for images (B, 3, H, W).

    Parameters: 265 080 (``small``), 25 017 672 (``segnet``), 41 206 984 (``mtan``).

    Raises:
        ValueError: If there is no network of that name.
    """
    return build(config, OUTPUTS)
