"""Two overlapping digits, and which they are: the left and the right one, whose loss can be made a thousand times larger.

Made of MNIST where ``data.path`` names the folder with its files, else of the digits that ship with scikit-learn.

    left, right   cross-entropy over 10 classes, with smoothed labels; accuracy

What the comparison of this problem's origin varied is configuration here:

    single-task       loss_method=stl loss.main_task=0
    summed loss       nothing
    splitters         model.splitter=normalized, normalized-project1 .. 3, project1 .. 3, or any gradient balancer
    whole network     gradient_method=pcgrad model.shared=everything
    imbalance         data.imbalance=1000

``python -m experiments.problems.multimnist --output FOLDER --epochs N --seeds S`` trains them all and draws them side by side.

Source of data, networks and protocol: repository guillaumeBellec/multitask, its demonstration on Multi-MNIST.
"""

from experiments.problems.multimnist.data import ON_DISK, DataConfig, load
from experiments.problems.multimnist.model import ModelConfig, build_model
from experiments.problems.multimnist.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, targets

__all__ = [
    "HIGHER_IS_BETTER",
    "ON_DISK",
    "TASKS",
    "DataConfig",
    "ModelConfig",
    "build_model",
    "load",
    "losses",
    "metrics",
    "targets",
]
