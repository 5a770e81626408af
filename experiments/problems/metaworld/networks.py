"""The networks of a soft actor-critic: an actor and two critics for all tasks, and temperatures."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from balance.config import check_settings, setting
from experiments.problems.base import Network

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = {"metaworld": (39, 4), "points": (4, 2)}  # of an observation and an action, by data.source
LOG_DEVIATION = (-20.0, 2.0)  # range of the logarithm of a standard deviation


@dataclass
class ModelConfig:
    """Networks that all tasks share; the identity of the task is a further input."""

    source: str = setting("metaworld", choices=tuple(SIZES), help="source of the observations, which decides the sizes")
    width: int = setting(400, minimum=1, help="units of a hidden layer")
    layers: int = setting(3, minimum=1, help="hidden layers of the actor and of each critic")
    task_identity: bool = setting(default=True, help="append the one-hot index of the task to the inputs of actor and critics")
    deviation: Literal["clamp", "tanh"] = setting(
        "clamp", help="bound of the logarithm of the actor's standard deviation: cut off, or by a tanh, whose middle is e^-9"
    )
    temperature: float = setting(1.0, above=0, help="first temperature, the factor of the entropy")
    temperature_per_task: bool = setting(default=True, help="a temperature for each task, or one for all")
    target_rate: float = setting(0.005, above=0, maximum=1, help="share of the critics in an update of the target critics")
    separate_passes: bool | None = setting(
        None,
        help="compute each task in a separate forward pass, whose gradient costs less; null: with a gradient method",
    )


class Inputs(NamedTuple):
    """Inputs of the critics, the rows of each task together, in the order of the tasks."""

    rows: Tensor  # (B, observation, action and identity)
    counts: tuple[int, ...]  # rows of each task

    def to(self, device: str) -> Inputs:
        """Return the inputs on a device."""
        return Inputs(self.rows.to(device), self.counts)


def mlp(inputs: int, config: ModelConfig, outputs: int) -> nn.Sequential:
    """Return a multilayer perceptron with Xavier's uniform weights and zero biases."""
    widths = [inputs, *[config.width] * config.layers]
    hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    network = nn.Sequential(*hidden, nn.Linear(config.width, outputs))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


class Critics(nn.Module):
    """Two networks that estimate the value of an action.

    Args:
        inputs: Number of entries of observation, action and identity.
        config: Width and depth, and whether each task has a separate forward pass.
    """

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        self.pair = nn.ModuleList(mlp(inputs, config, 1) for _ in range(2))
        self.separate_passes = bool(config.separate_passes)

    def values(self, rows: Tensor) -> Tensor:
        """Return both estimates. Shapes: rows (B, inputs), result (2, B)."""
        return torch.stack([critic(rows).squeeze(1) for critic in self.pair])

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return both estimates by task. Shape of the k-th tensor (2, rows of task k)."""
        if self.separate_passes:
            return tuple(self.values(rows) for rows in torch.split(inputs.rows, list(inputs.counts)))
        return torch.split(self.values(inputs.rows), list(inputs.counts), dim=1)


class ByTaskName(nn.Module):
    """Names for the estimates of the tasks; no parameters."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return estimates by task."""
        return dict(zip(self.tasks, features, strict=True))


class Actor(nn.Module):
    """A Gaussian policy whose actions are squashed by a tanh.

    Source: Haarnoja et al., Soft Actor-Critic Algorithms and Applications, arXiv 1812.05905, appendix C.

    Args:
        inputs: Number of entries of observation and identity.
        actions: Number of entries of an action.
        config: Width, depth, and the bound of the standard deviation.
    """

    def __init__(self, inputs: int, actions: int, config: ModelConfig) -> None:
        super().__init__()
        self.network = mlp(inputs, config, 2 * actions)
        self.deviation = config.deviation

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the mean action, as an output named ``action``. Shapes: rows (B, inputs), action (B, A)."""
        return {"action": self.network(rows).chunk(2, dim=1)[0].tanh()}

    def sample(self, rows: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return random actions and the logarithms of their densities.

        Args:
            rows: Observations and identities. Shape (B, inputs).
            noise: Standard normal numbers; None to draw them. Shape (B, A).

        Returns:
            Actions (B, A), and logarithms (B,).
        """
        mean, raw = self.network(rows).chunk(2, dim=1)
        log_deviation = self.bounded(raw)
        noise = torch.randn_like(mean) if noise is None else noise
        before = mean + log_deviation.exp() * noise
        normal = (-0.5 * noise.square() - log_deviation - 0.5 * math.log(2 * math.pi)).sum(1)
        squashing = 2 * (math.log(2) - before - softplus(-2 * before)).sum(1)  # the logarithm of the derivative of tanh
        return before.tanh(), normal - squashing

    def bounded(self, raw: Tensor) -> Tensor:
        """Return logarithms of standard deviations within `LOG_DEVIATION`. Shape (B, A) -> (B, A)."""
        low, high = LOG_DEVIATION
        return raw.clamp(low, high) if self.deviation == "clamp" else low + 0.5 * (high - low) * (raw.tanh() + 1)


class SoftActorCritic(Network):
    """Critics as the trunk, which the stage balances, with an actor, temperatures and target critics.

    Args:
        tasks: Names of the K tasks.
        config: Sizes of the networks.
    """

    def __init__(self, tasks: Sequence[str], config: ModelConfig) -> None:
        observation, action = SIZES[config.source]
        identity = len(tasks) if config.task_identity else 0
        super().__init__(Critics(observation + action + identity, config), ByTaskName(tasks))
        self.actor = Actor(observation + identity, action, config)
        count = len(tasks) if config.temperature_per_task else 1
        self.log_temperature = nn.Parameter(torch.full((count,), math.log(config.temperature)))
        self.targets = copy.deepcopy(self.trunk).requires_grad_(requires_grad=False)
        self.target_rate = config.target_rate
        self.task_identity = config.task_identity
        self.register_buffer("identities", torch.eye(len(tasks)), persistent=False)

    def with_identity(self, rows: Tensor, tasks: Tensor) -> Tensor:
        """Return rows with the identity of their tasks, if the networks see it. Shape (B, ·), (B,) -> (B, · + K)."""
        return torch.cat([rows, self.get_buffer("identities")[tasks]], dim=1) if self.task_identity else rows

    def values(self, rows: Tensor) -> Tensor:
        """Return the estimates of both critics. Shapes: rows (B, inputs), result (2, B)."""
        assert isinstance(self.trunk, Critics)
        return self.trunk.values(rows)

    def target_values(self, rows: Tensor) -> Tensor:
        """Return the estimates of both target critics. Shapes: rows (B, inputs), result (2, B)."""
        assert isinstance(self.targets, Critics)
        return self.targets.values(rows)

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target critics towards the critics."""
        for target, critic in zip(self.targets.parameters(), self.trunk.parameters(), strict=True):
            target.lerp_(critic, self.target_rate)

    def temperatures(self, tasks: Tensor) -> Tensor:
        """Return the temperature of each row, without a gradient. Shape (B,) -> (B,)."""
        return self.log_temperature.detach().exp().expand(len(self.get_buffer("identities")))[tasks]


def build_model(config: ModelConfig | None = None, tasks: Sequence[str] = ()) -> SoftActorCritic:
    """Return freshly initialised networks for tasks."""
    config = config or ModelConfig()
    check_settings(config, "model")
    return SoftActorCritic(tasks, config)
