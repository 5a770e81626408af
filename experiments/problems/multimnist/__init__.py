"""Two overlapping digits, left and right; the loss of the right one can be multiplied by a thousand.

The digits are taken from MNIST if ``data.path`` is the folder with its files, else from scikit-learn.

    left, right   cross-entropy over 10 classes, with smoothed labels; accuracy

The variants of the published comparison are entries of the configuration:

    single-task       loss_method=stl loss.main_task=0
    summed loss       the defaults
    splitters         model.splitter=normalized, normalized-project1 .. 3, project1 .. 3, or any gradient balancer
    whole network     gradient_method=pcgrad model.shared=everything
    imbalance         data.imbalance=1000

``python experiments/sweep.py --file=experiments/problems/multimnist/comparison.yaml`` trains them all, and
``python experiments/compare.py --experiment=multimnist --per=data.imbalance`` draws them next to each other.

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
