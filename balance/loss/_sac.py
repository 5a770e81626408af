"""Soft actor-critic agent of igbv2: states are losses, actions are weights. Small networks, on the host, in float32."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

HIDDEN = 128
DISCOUNT = 0.99
POLYAK = 0.005
INITIAL_TEMPERATURE = 0.2
BATCH = 256  # transitions in a batch when the buffer is full; half of it when the buffer is empty
UPDATES = 50  # updates at each training when the buffer is full; half of it when the buffer is empty


class Agent:
    """Actor, two critics with slow copies, temperature, replay buffer and generator.

    The agent is not a module. So its parameters are never in the user's optimizer, and it stays on the host in float32 when
    the user's network is moved or cast. The default dtype and the default device of torch have no effect.

    Args:
        num_tasks: K, the size of states and actions.
        lr: Learning rate of the three Adam optimizers.
        capacity: Maximum number of transitions in the buffer; the oldest are overwritten.
        official: Use the log-density of the authors' code, which corrects for a tanh that it does not apply.
        seed: Seed of the initial networks and of all draws.

    Source:
        Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018; sizes and constants as in the code of Dai
        et al., "Improvable Gap Balancing for Multi-Task Learning", UAI 2023.
    """

    def __init__(self, num_tasks: int, lr: float, capacity: int, seed: int, *, official: bool = False) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.num_tasks, self.lr, self.official = num_tasks, lr, official
        self.actor = nn.Sequential(*self._layers(num_tasks, HIDDEN, HIDDEN), nn.ReLU(), *self._layers(HIDDEN, 2 * num_tasks))
        self.critics = nn.ModuleList(nn.Sequential(*self._layers(2 * num_tasks, HIDDEN, HIDDEN, 1)) for _ in range(2))
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(requires_grad=False)
        logarithm = math.log(INITIAL_TEMPERATURE)
        self.log_temperature = torch.tensor(logarithm, dtype=torch.float64, device="cpu", requires_grad=True)
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr),
            "critics": adam(self.critics.parameters(), lr),
            "temperature": adam([self.log_temperature], lr),
        }
        # Rows: state, action, reward, next state
        self.buffer = torch.zeros(capacity, 3 * num_tasks + 1, dtype=torch.float32, device="cpu")
        self.stored = torch.zeros((), dtype=torch.int64, device="cpu")  # transitions so far, overwritten ones included
        # Views of the bytes of the whole state, so that saving it is one copy
        self._bytes = [tensor.detach().flatten().view(torch.uint8) for tensor in self._tensors()]

    def explore(self) -> Tensor:
        """Draw a random action: K times a softmax of standard normal numbers. Shape (K,), float64."""
        noise = torch.randn(self.num_tasks, generator=self.generator, dtype=torch.float64, device="cpu")
        return self.num_tasks * noise.softmax(dim=0)

    @torch.no_grad()
    def act(self, state: Tensor) -> Tensor:
        """Draw an action from the actor. Shape (K,) -> (K,), float64."""
        u = self._draw(state.float()[None])[0][0]
        return self.num_tasks * u.double().softmax(dim=0)

    def remember(self, state: Tensor, action: Tensor, reward: float, after: Tensor) -> None:
        """Store a transition. Shapes (K,), (K,), scalar, (K,)."""
        row = torch.cat([state, action, state.new_tensor([reward]), after])
        self.buffer[int(self.stored) % len(self.buffer)] = row.float()
        self.stored += 1

    @torch.enable_grad()
    def train(self) -> None:
        """Update all networks: more often and on larger batches, the fuller the buffer is. No-op on an empty buffer."""
        size = min(int(self.stored), len(self.buffer))
        updates, batch = schedule(size / len(self.buffer))
        for _ in range(updates if size else 0):
            chosen = torch.randint(size, (batch,), generator=self.generator, dtype=torch.int64, device="cpu")
            K = self.num_tasks
            self._update(*torch.split(self.buffer[chosen], [K, K, 1, K], dim=1))

    def state(self) -> Tensor:
        """Return a copy of the whole state. Shape (n,), uint8; n depends on K and the capacity only."""
        return torch.cat([*self._bytes, self.generator.get_state()])

    @torch.no_grad()
    def restore(self, state: Tensor) -> None:
        """Restore a state of an agent with the same K and capacity.

        Raises:
            ValueError: If the state has another size, which is the state of another K or capacity.
        """
        sizes = [*map(len, self._bytes), len(self.generator.get_state())]
        if state.shape != (sum(sizes),) or state.dtype != torch.uint8:
            raise ValueError(
                f"State of the agent of 'igbv2' must have shape ({sum(sizes)},) and dtype uint8, but got {tuple(state.shape)} "
                f"and {state.dtype}. Use the same number of tasks and buffer_size as in the run that was saved."
            )
        *pieces, generator = torch.split(state.cpu(), sizes)
        for view, piece in zip(self._bytes, pieces, strict=True):
            view.copy_(piece)
        self.generator.set_state(generator.clone())

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of the attributes would separate the views of the bytes from the tensors
        options = (self.num_tasks, self.lr, len(self.buffer), self.official)
        return _restored, (*options, self.state())

    def _tensors(self) -> list[Tensor]:
        """Return every tensor that changes."""
        networks = [p for network in (self.actor, self.critics, self.slow_critics) for p in network.parameters()]
        moments = [
            tensor for optimizer in self.optimizers.values() for state in optimizer.state.values() for tensor in state.values()
        ]
        return [*networks, self.log_temperature, *moments, self.buffer, self.stored]

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
        """Draw the numbers u whose softmax is an action, and return their log-density. Shape (B, K) -> (B, K), (B,)."""
        mean, log_deviation = self.actor(states).chunk(2, dim=1)
        log_deviation = log_deviation.clamp(-20, 2)
        noise = torch.randn(mean.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        u = mean + log_deviation.exp() * noise
        log_density = gaussian_log_density(noise, log_deviation)
        if self.official:
            log_density = log_density - tanh_correction(u)
        return u, log_density

    def _sample(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions, and return their log-densities. Shape (B, K) -> (B, K), (B,)."""
        u, log_density = self._draw(states)
        return self.num_tasks * u.softmax(dim=1), log_density

    def _layers(self, *sizes: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            # skip_init, because the initialisation of nn.Linear draws from torch's global generator
            options = {"dtype": torch.float32, "device": "cpu"}
            layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, **options)  # type: ignore[no-untyped-call]
            for parameter in layer.parameters():  # the distribution of nn.Linear, from this generator
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=self.generator)
            layers += [layer, nn.ReLU()]
        return layers[:-1]


def adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    """Return an Adam optimizer whose state exists before its first update, so that all checkpoints have one shape."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def schedule(fill: float) -> tuple[int, int]:
    """Return the number and the batch size of the updates at one training, for a buffer filled to ``fill`` in 0..1."""
    share = (1 + fill) / 2
    return int(UPDATES * share), int(BATCH * share)


def gaussian_log_density(noise: Tensor, log_deviation: Tensor) -> Tensor:
    """Compute the log-density of u = mean + deviation * noise, from shapes (..., K) and (..., K) to (...)."""
    return (-0.5 * noise.square() - log_deviation - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def tanh_correction(u: Tensor) -> Tensor:
    """Compute the authors' correction of the log-density, as if a tanh squashed u, from shape (..., K) to (...)."""
    return (2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(dim=-1)


def _restored(num_tasks: int, lr: float, capacity: int, official: bool, state: Tensor) -> Agent:  # noqa: FBT001
    agent = Agent(num_tasks, lr, capacity, seed=0, official=official)
    agent.restore(state)
    return agent
