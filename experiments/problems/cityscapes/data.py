"""Images with 7 classes and inverse depth: CityScapes, or procedural scenes in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.datasets.layouts.dense import CITYSCAPES
from experiments.problems.dense.splits import ON_DISK, DenseDataConfig, Scenes, load_dense

if TYPE_CHECKING:
    from experiments.problems.base import Splits

__all__ = ["ON_DISK", "SCENES", "DataConfig", "load"]

SCENES = Scenes(height=64, width=128)


@dataclass
class DataConfig(DenseDataConfig):
    """See `DenseDataConfig`. Scenes have 64 x 128 pixels by default; the files of CityScapes 128 x 256.

    Enlarging an image by s brings everything nearer by s, which multiplies inverse depth by s. The official codes divide it, as
    if it were depth; ``protocol: paper`` does so too.
    """


def load(config: DenseDataConfig) -> Splits:
    """Return train, validation and test data; an item, for a list of indices, is ``(image, label, depth)``.

    Args:
        config: Source and size of the data.

    Returns:
        The three splits: image (B, 3, H, W) in 0..1, label (B, H, W), -1 = unknown, and inverse depth (B, 1, H, W), 0 to about
        0.49, 0 = unknown.
    """
    return load_dense(config, CITYSCAPES, SCENES)
