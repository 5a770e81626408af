"""Street scenes, two dense tasks: classes and inverse depth.

    segmentation   7 classes: cross-entropy; mean intersection over union, pixel accuracy
    depth          inverse depth, about 0 to 0.49: absolute error; absolute and relative error

Source:
    Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016, in the form of Liu et al.,
    "End-to-End Multi-Task Learning with Attention", CVPR 2019.
"""

from experiments.problems.cityscapes.data import ON_DISK, DataConfig, load
from experiments.problems.cityscapes.model import ModelConfig, build_model
from experiments.problems.cityscapes.tasks import HIGHER_IS_BETTER, TASKS, counts, losses, metrics, targets

__all__ = [
    "HIGHER_IS_BETTER",
    "ON_DISK",
    "TASKS",
    "DataConfig",
    "ModelConfig",
    "build_model",
    "counts",
    "load",
    "losses",
    "metrics",
    "targets",
]
