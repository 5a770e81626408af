"""The networks of `experiments.problems.dense`, with a head for each of the three tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.problems.dense.model import ModelConfig, build
from experiments.problems.nyuv2.tasks import CLASSES

if TYPE_CHECKING:
    from experiments.problems.base import Network

__all__ = ["ModelConfig", "build_model"]

OUTPUTS = {"segmentation": len(CLASSES), "depth": 1, "normals": 3}


def build_model(config: ModelConfig) -> Network:
    """A freshly initialised network for images (B, 3, H, W).

    Parameters: 267 553 (``small``), 25 055 185 (``segnet``), 44 229 073 (``mtan``).

    Raises:
        ValueError: If there is no network of that name.
    """
    return build(config, OUTPUTS)
