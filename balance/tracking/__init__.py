"""Training runs in MLflow, TensorBoard and Weights & Biases; each of these packages is imported only when a run starts."""

from balance.tracking.checkout import git_tags
from balance.tracking.logger import Logger, Loggers
from balance.tracking.server import connect, recorded_experiments, tracking_uri, without_password
from balance.tracking.tensorboard import TensorBoard
from balance.tracking.tracker import Tracker
from balance.tracking.wandb import WandB

__all__ = [
    "Logger",
    "Loggers",
    "TensorBoard",
    "Tracker",
    "WandB",
    "connect",
    "git_tags",
    "recorded_experiments",
    "tracking_uri",
    "without_password",
]
