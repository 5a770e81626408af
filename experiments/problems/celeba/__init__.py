"""CelebA: 40 binary attributes of a face, 40 tasks of one loss.

Faces of 64 x 64 pixels. The data set cannot be fetched by a program: get it from its authors and say
``data.path=FOLDER``. Without it, drawn faces in its layout show that everything runs; numbers of those are
never results, and never stand beside published ones.

    <attribute>      whether the face has it: binary cross-entropy; F1 score

The papers train the official network with Adam at a constant rate of 3e-4 for 15 epochs in batches of 256, choose the epoch
with the highest mean validation F1 and report the 40 test F1 of that epoch; `published.yaml` has such numbers.
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
