"""Two overlapping handwritten digits, four tasks of deliberately different scale; the default experiment.

Real digits come from scikit-learn's `load_digits` (8 x 8 pixels); nothing is downloaded. One is at the top left and one at the
bottom right of a canvas of 12 x 12, combined by their maximum.

    left, right      the digit: cross-entropy over 10 classes; accuracy
    sum              sum of both digits, 0 to 18: squared error on that raw scale; mean absolute error
    reconstruction   the left digit without the right one, pixels in 0..1: squared error; root mean squared error
"""

from experiments.problems.digits.data import DataConfig, load
from experiments.problems.digits.model import build_model
from experiments.problems.digits.tasks import HIGHER_IS_BETTER, TASKS, losses, metrics, targets

__all__ = ["HIGHER_IS_BETTER", "TASKS", "DataConfig", "build_model", "load", "losses", "metrics", "targets"]
