"""Indoor scenes, three dense tasks: classes, depth and surface normals.

    segmentation   13 classes: cross-entropy; mean intersection over union, pixel accuracy
    depth          metres: absolute error; absolute and relative error
    normals        unit vectors: one minus the cosine; mean and median angle, shares within 11.25, 22.5 and 30 degrees

Source:
    Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012, in the form of Liu et al.,
    "End-to-End Multi-Task Learning with Attention", CVPR 2019.
"""

from experiments.problems.nyuv2.data import ON_DISK, DataConfig, load
from experiments.problems.nyuv2.model import ModelConfig, build_model
from experiments.problems.nyuv2.tasks import HIGHER_IS_BETTER, TASKS, counts, losses, metrics, targets

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
