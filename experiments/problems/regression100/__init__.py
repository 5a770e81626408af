"""A hundred linear regressions on noise: a smoke test of many tasks, in less than a second.

1000 points of 20 standard normal inputs; 100 standard normal targets, which do not depend on them; one linear layer; the whole
data set in every batch. There is nothing to generalise, so the validation and test points are the training points.

    y00 .. y99   squared error; mean squared error

As published: ``loss_method=famo loss.gamma=0.01 loss.lr=0.025``, 100 steps of Adam at 1e-3. The weights stay near 1/100 and the
mean loss falls.

Source: the demonstration in the stand-alone famo.py of the repository Cranial-XIX/FAMO. Differs: seeded.
"""

from experiments.problems.regression100.data import DataConfig, load
from experiments.problems.regression100.model import build_model
from experiments.problems.regression100.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, targets

__all__ = ["HIGHER_IS_BETTER", "TASKS", "DataConfig", "build_model", "load", "losses", "metrics", "targets"]
