"""Training runs in MLflow, TensorBoard and Weights & Biases; each of these packages is imported only when a run starts."""

from .checkout import git_tags
from .logger import Logger, Loggers
from .server import connect, recorded_experiments, tracking_uri, without_password
from .tensorboard import TensorBoard
from .tracker import Tracker
from .wandb import WandB

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
