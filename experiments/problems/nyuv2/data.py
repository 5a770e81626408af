"""Images of rooms with 13 classes, depth in metres and surface normals: NYUv2, or procedural scenes in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.datasets.layouts.dense import NYUV2
from experiments.problems.dense.splits import ON_DISK, DenseDataConfig, Scenes, load_dense

if TYPE_CHECKING:
    from experiments.problems.base import Splits

__all__ = ["ON_DISK", "SCENES", "DataConfig", "load"]

SCENES = Scenes(height=64, width=96)


@dataclass
class DataConfig(DenseDataConfig):
    """See `DenseDataConfig`. Scenes have 64 x 96 pixels by default; the files of NYUv2 as preprocessed for MTAN 288 x 384."""


def load(config: DenseDataConfig) -> Splits:
    """Return train, validation and test data; an item, for a list of indices, is ``(image, label, depth, normal)``.

    Args:
        config: Source and size of the data.

    Returns:
        The three splits: image (B, 3, H, W) in 0..1, label (B, H, W), -1 = unknown, and depth (B, 1, H, W) in metres, 0 =
        unknown. The unit normal (B, 3, H, W) is x to the right, y up, z towards the viewer, 0 = unknown.
    """
    return load_dense(config, NYUV2, SCENES)
