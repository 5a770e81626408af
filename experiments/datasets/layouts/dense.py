"""The layouts of NYUv2 and CityScapes as preprocessed for MTAN.

    FOLDER/{train,val[,test]}/{image,label,depth,normal}/{i}.npy    nyuv2
    FOLDER/{train,val[,test]}/{image,label_7,depth}/{i}.npy         cityscapes

i = 0..n-1. Images and normals have shape (H, W, 3), labels (H, W), depths (H, W, 1). The archives have only train and val, and
their val is the test set.

Source:
    Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """Folders of a data set and the content of their files."""

    name: str
    channels: dict[str, int | None]  # by folder, in the order of a batch; None for arrays (H, W)
    labels: str  # folder of the labels
    num_classes: int
    inverse_depth: bool


NYUV2 = Layout("nyuv2", {"image": 3, "label": None, "depth": 1, "normal": 3}, "label", 13, inverse_depth=False)
CITYSCAPES = Layout("cityscapes", {"image": 3, "label_7": None, "depth": 1}, "label_7", 7, inverse_depth=True)
