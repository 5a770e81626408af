"""Two losses over a plane whose landscape has conflicting and dominating gradients: where does a method come to rest?

The point (a, b) is all that is trained, and every method has the same five starts.

    f1, f2   the losses of `experiments.problems.toy.landscape`; the first has a tenth of the scale of the second

``python -m experiments.problems.toy --output FOLDER`` draws the trajectories of methods in the plane of the losses and in that
of the parameters. For the trainer the folder is like any other: the trunk holds the point, and a batch is a constant.
"""

from experiments.problems.toy.landscape import TASKS
from experiments.problems.toy.tasks import (
    HIGHER_IS_BETTER,
    DataConfig,
    ModelConfig,
    build_model,
    load,
    losses,
    metrics,
    targets,
)

__all__ = ["HIGHER_IS_BETTER", "TASKS", "DataConfig", "ModelConfig", "build_model", "load", "losses", "metrics", "targets"]
