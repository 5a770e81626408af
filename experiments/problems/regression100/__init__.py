"""A hundred linear regressions on noise: a smoke test of many tasks, in less than a second.

1000 points have 20 standard normal inputs, and 100 standard normal targets that do not depend on them. The network is one
linear layer, and every batch is the whole data set. Nothing generalises, so the validation and test points are the training
points.

    y00 .. y99   squared error; mean squared error

Published run: ``loss_method=famo loss.gamma=0.01 loss.lr=0.025``, 100 steps of Adam at 1e-3. The weights stay near 1/100, and
the mean loss falls.

Source: the demonstration in the single file famo.py of the repository Cranial-XIX/FAMO. Differs: seeded.
"""

from experiments.problems.regression100.data import DataConfig, load
from experiments.problems.regression100.model import build_model
from experiments.problems.regression100.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, targets

__all__ = ["HIGHER_IS_BETTER", "TASKS", "DataConfig", "build_model", "load", "losses", "metrics", "targets"]
