"""CelebA: 40 binary attributes of a face, 40 tasks of one loss.

Faces of 64 x 64 pixels. A program cannot fetch the data set: get it from its authors and set ``data.path=FOLDER``. Without it,
drawn faces in its layout show that everything runs. Never report their numbers as results, or next to published ones.

    <attribute>      presence of the attribute: binary cross-entropy; F1 score

The papers train the official network with Adam at a constant rate of 3e-4, for 15 epochs in batches of 256. They choose the
epoch with the highest mean validation F1, and report the 40 test F1 of that epoch. `published.yaml` has such numbers.
"""

from experiments.problems.celeba.data import ON_DISK, DataConfig, load
from experiments.problems.celeba.model import ModelConfig, build_model
from experiments.problems.celeba.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, score, targets

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
    "score",
    "targets",
]
