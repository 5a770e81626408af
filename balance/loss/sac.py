"""A soft actor-critic agent for igbv2: states are losses, actions are weights. Small networks, on the host, in float32."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 128
DISCOUNT = 0.99
POLYAK = 0.005
INITIAL_TEMPERATURE = 0.2
BATCH = 256  # transitions in a batch when the buffer is full; half of that when it is empty
UPDATES = 50  # updates at each training when the buffer is full; half of that when it is empty


class Agent:
    """Actor, two critics with slow copies, temperature, replay buffer and generator.

    Not a module, so that the optimizer of the network that is trained never sees its parameters.

    Args:
        num_tasks: K, the size of states and actions.
        lr: Learning rate of the three Adam optimizers.
        capacity: Transitions that the buffer holds; the oldest are overwritten.
        official: Use the log-density of the authors' code, which corrects for a tanh that is not there.
        seed: Seed of the initial networks and of all draws.

    Source:
        Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018; sizes and constants as in the code of Dai
        et al., "Improvable Gap Balancing for Multi-Task Learning", UAI 2023.
    """

    def __init__(self, num_tasks: int, lr: float, capacity: int, seed: int, *, official: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.official = official
        self.actor = nn.Sequential(*self._layers(num_tasks, HIDDEN, HIDDEN), nn.ReLU(), *self._layers(HIDDEN, 2 * num_tasks))
        self.critics = nn.ModuleList(nn.Sequential(*self._layers(2 * num_tasks, HIDDEN, HIDDEN, 1)) for _ in range(2))
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(requires_grad=False)
        self.log_temperature = torch.tensor(math.log(INITIAL_TEMPERATURE), dtype=torch.float64, requires_grad=True)
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=lr),
            "critics": torch.optim.Adam(self.critics.parameters(), lr=lr),
            "temperature": torch.optim.Adam([self.log_temperature], lr=lr),
        }
        # rows: state, action, reward, next state
        self.buffer = torch.zeros(capacity, 3 * num_tasks + 1)
        self.stored = 0
        self.num_tasks = num_tasks

    def explore(self) -> Tensor:
        """A random action: K times a softmax of standard normal numbers. Shape (K,), float64."""
        noise = torch.randn(self.num_tasks, generator=self.generator, dtype=torch.float64)
        return self.num_tasks * noise.softmax(dim=0)

    @torch.no_grad()
    def act(self, state: Tensor) -> Tensor:
        """An action drawn from the actor. Shape (K,) -> (K,), float64."""
        u = self._draw(state.float()[None])[0][0]
        return self.num_tasks * u.double().softmax(dim=0)

    def remember(self, state: Tensor, action: Tensor, reward: float, after: Tensor) -> None:
        """Store a transition. Shapes (K,), (K,), scalar, (K,)."""
        row = torch.cat([state, action, state.new_tensor([reward]), after])
        self.buffer[self.stored % len(self.buffer)] = row.float()
        self.stored += 1

    def train(self) -> None:
        """Some updates of all networks, more and on larger batches the fuller the buffer is. No-op on an empty buffer."""
        size = min(self.stored, len(self.buffer))
        updates, batch = schedule(size / len(self.buffer))
        for _ in range(updates if size else 0):
            chosen = torch.randint(size, (batch,), generator=self.generator)
            K = self.num_tasks
            self._update(*torch.split(self.buffer[chosen], [K, K, 1, K], dim=1))

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint; tensors are copies."""
        state = {
            "actor": self.actor.state_dict(),
            "critics": self.critics.state_dict(),
            "slow_critics": self.slow_critics.state_dict(),
            "log_temperature": self.log_temperature.detach(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "buffer": self.buffer[: self.stored],
            "stored": self.stored,
            "generator": self.generator.get_state(),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of an agent of the same size."""
        for name in ("actor", "critics", "slow_critics"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))
        self.buffer.zero_()
        self.buffer[: len(state["buffer"])] = state["buffer"]
        self.stored = state["stored"]
        self.generator.set_state(state["generator"].cpu())

    def _update(self, state: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        temperature = self.log_temperature.detach().exp().float()
        with torch.no_grad():
            next_action, log_density = self._sample(after)
            value = torch.minimum(*(critic(torch.cat([after, next_action], dim=1)) for critic in self.slow_critics))
            target = reward + DISCOUNT * (value - temperature * log_density[:, None])
        errors = [(critic(torch.cat([state, action], dim=1)) - target).square().mean() for critic in self.critics]
        self._step("critics", errors[0] + errors[1])

        proposed, log_density = self._sample(state)
        self.critics.requires_grad_(requires_grad=False)
        value = torch.minimum(*(critic(torch.cat([state, proposed], dim=1)) for critic in self.critics))[:, 0]
        self._step("actor", (temperature * log_density - value).mean())
        self.critics.requires_grad_(requires_grad=True)

        surplus = log_density.detach().double() - self.num_tasks  # the target entropy is -K
        self._step("temperature", -(self.log_temperature * surplus).mean())
        for slow, fast in zip(self.slow_critics.parameters(), self.critics.parameters(), strict=True):
            slow.lerp_(fast.detach(), POLYAK)

    def _step(self, name: str, objective: Tensor) -> None:
        self.optimizers[name].zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        self.optimizers[name].step()

    def _draw(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the softmax makes actions of, and its log-density. Shape (B, K) -> (B, K), (B,)."""
        mean, log_deviation = self.actor(states).chunk(2, dim=1)
        log_deviation = log_deviation.clamp(-20, 2)
        noise = torch.randn(mean.shape, generator=self.generator)
        u = mean + log_deviation.exp() * noise
        log_density = gaussian_log_density(noise, log_deviation)
        if self.official:
            log_density = log_density - tanh_correction(u)
        return u, log_density

    def _sample(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and their log-densities. Shape (B, K) -> (B, K), (B,)."""
        u, log_density = self._draw(states)
        return self.num_tasks * u.softmax(dim=1), log_density

    def _layers(self, *sizes: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layer = nn.Linear(inputs, outputs)
            for parameter in layer.parameters():  # PyTorch's own initialisation, from this generator
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=self.generator)
            layers += [layer, nn.ReLU()]
        return layers[:-1]


def schedule(fill: float) -> tuple[int, int]:
    """Updates at a training and size of their batches, for a buffer that is full to ``fill`` in 0..1."""
    share = (1 + fill) / 2
    return int(UPDATES * share), int(BATCH * share)


def gaussian_log_density(noise: Tensor, log_deviation: Tensor) -> Tensor:
    """Log-density of u = mean + deviation * noise. Shapes (..., K), (..., K) -> (...)."""
    return (-0.5 * noise.square() - log_deviation - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def tanh_correction(u: Tensor) -> Tensor:
    """What the authors' code subtracts from the log-density, as if u were squashed by a tanh. Shape (..., K) -> (...)."""
    return (2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(dim=-1)
