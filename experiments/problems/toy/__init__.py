"""Two losses over a plane, with conflicting and dominating gradients; the end point shows the preference of a method.

The point (a, b) is the only parameter, and every method has the same five starts.

    f1, f2   the losses of `experiments.problems.toy.landscape`; the first has a tenth of the scale of the second

``python -m experiments.problems.toy --output FOLDER`` draws trajectories in the plane of the losses and in the plane of the
parameters. For the trainer the folder is a problem like any other: the trunk is the point, and a batch is constant.
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
