"""A small network for digits, the published one for MNIST, with or without a splitter between trunk and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from balance import gradient_balancers
from balance.config import check_settings, setting
from balance.messages import unknown
from balance.splitter.splitter import Splitter
from experiments.problems.base import Heads, Network
from experiments.problems.multimnist.data import CLASSES
from experiments.problems.multimnist.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

NAMES = ("small", "demo")
PROJECTIONS = {"project1": "after_norm", "project2": "shortest", "project3": "before_norm"}  # by their published names
SPLITTERS: Mapping[str, Mapping[str, Any]] = {
    "normalized": {"gradient": "normalized"},
    **{f"normalized-{name}": {"gradient": "normalized", "projection": value} for name, value in PROJECTIONS.items()},
    **{name: {"gradient": None, "projection": value} for name, value in PROJECTIONS.items()},
}


@dataclass
class ModelConfig:
    """The network: ``small`` for digits on 10 x 12 pixels, or ``demo``, the published one for MNIST on 28 x 28.

    With ``shared: everything`` a gradient balancer treats the heads as shared too. Their gradients then count in the lengths of
    the tasks' gradients and get the tasks' weights.
    """

    name: str = setting("small", choices=NAMES, help="network")
    width: int = setting(8, minimum=1, help="channels of the small network's first convolution; tasks compete for 8")
    splitter: str | None = setting(None, help="balancer of the features' gradients: one of `SPLITTERS`, or a gradient balancer")
    shared: str = setting("trunk", choices=("trunk", "everything"), help="parameters that a gradient balancer shares")
    splitter_seed: int = setting(0, minimum=0, help="seed of projections in random order")


class Canvases(nn.Module):
    """Refuse canvases of a wrong size; return all others unchanged."""

    def __init__(self, rows: int, columns: int, remedy: str) -> None:
        super().__init__()
        self.size, self.remedy = (1, rows, columns), remedy

    def forward(self, canvases: Tensor) -> Tensor:
        """Return the canvases. Shape (B, 1, rows, columns)."""
        if canvases.shape[1:] != self.size:
            raise ValueError(f"Canvases must have shape {self.size}, but got {tuple(canvases.shape[1:])}. Use {self.remedy}.")
        return canvases


class SplitHeads(nn.Module):
    """Heads, and a splitter before them if there is one."""

    def __init__(self, of_task: Mapping[str, nn.Module], splitter: Splitter | None) -> None:
        super().__init__()
        self.splitter = splitter
        self.of_task = Heads(of_task)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return logits, or their log-softmax, by task. Shape (B, F) -> (B, 10)."""
        outputs: dict[str, Tensor] = self.of_task(features if self.splitter is None else self.splitter(features))
        return outputs


def build_model(config: ModelConfig | None = None) -> Network:
    """Return a freshly initialised network.

    Args:
        config: The network; the small one without a splitter by default.

    Returns:
        The network.
    """
    config = config or ModelConfig()
    check_settings(config, "model")
    splitter = None if config.splitter is None else build_splitter(config.splitter, config.splitter_seed)
    trunk = small_trunk(config.width) if config.name == "small" else demo_trunk()
    heads = SplitHeads({task: nn.Linear(64, CLASSES) if config.name == "small" else demo_head() for task in TASKS}, splitter)
    return Network(trunk, heads) if config.shared == "trunk" else Network(nn.Sequential(trunk, heads), nn.Identity())


def build_splitter(name: str, seed: int = 0) -> Splitter:
    """Return a splitter of the published comparison, or one with a gradient balancer.

    Args:
        name: A name of `SPLITTERS` or a gradient balancer.
        seed: Seed of projections in random order.

    Returns:
        The splitter of the two tasks.

    Raises:
        ValueError: If there is no splitter of that name.
    """
    if name not in SPLITTERS and name not in gradient_balancers:
        raise ValueError(unknown("model.splitter", name, (*SPLITTERS, *gradient_balancers.names())))
    options = SPLITTERS.get(name, {"gradient": name})
    return Splitter(TASKS, seed=seed, **options)


def small_trunk(width: int) -> nn.Sequential:
    """Return the trunk for scikit-learn's digits: canvases (B, 1, 10, 12) to features (B, 64)."""
    return nn.Sequential(
        Canvases(10, 12, "model.name=demo for MNIST"),
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 5 * 6, 64),
        nn.ReLU(),
    )


def demo_trunk() -> nn.Sequential:
    """Return the published trunk for MNIST: canvases (B, 1, 28, 28) to features (B, 128)."""
    return nn.Sequential(
        Canvases(28, 28, "model.name=small for scikit-learn's digits"),
        nn.Conv2d(1, 10, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(320, 256),
        nn.LayerNorm(256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.LayerNorm(128),
        nn.ReLU(),
    )


def demo_head() -> nn.Sequential:
    """Return a published head: features (B, 128) to log-probabilities (B, 10)."""
    return nn.Sequential(
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES), nn.LogSoftmax(dim=1)
    )
