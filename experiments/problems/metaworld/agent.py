"""The agent of all tasks: it acts, draws batches for the critics, and trains actor and temperatures after their steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from balance.config import build_balancer, check_settings
from experiments.problems.metaworld.collection import Collection
from experiments.problems.metaworld.data import Episodes
from experiments.problems.metaworld.learning import Learner, Rows, critic_inputs, draw_rows, frozen, target_values
from experiments.problems.metaworld.networks import SIZES, Critics, Inputs
from experiments.problems.metaworld.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from omegaconf import DictConfig
    from torch import Tensor, nn

    from experiments.datasets.environments.goals import Array
    from experiments.problems.base import Batch, Splits
    from experiments.problems.metaworld.networks import SoftActorCritic
    from experiments.problems.metaworld.options import AgentConfig


class MultiTaskAgent:
    """Multi-task soft actor-critic, one environment of each task.

    In a step of training every environment moves by one step, and a batch is drawn from the replay buffers. The trainer makes
    the step of the critics, whose losses the stage balances. Then actor, temperatures and target critics follow.

    Args:
        data: Episodes.
        network: Actor, critics and temperatures.
        config: Configuration of the run.
        tasks: Names of the tasks.

    Raises:
        ValueError: If an option is out of range, or there are more tasks than rows in a batch.
    """

    def __init__(self, data: Splits, network: SoftActorCritic, config: DictConfig, tasks: Sequence[str]) -> None:
        check_settings(config.agent, "agent")
        check_sizes(config, len(tasks))
        self.tasks = tuple(tasks)
        self.network = network
        self.options: AgentConfig = OmegaConf.to_object(config.agent)  # type: ignore[assignment]
        self.batch_size: int = config.train.batch_size
        observation, self.action_size = SIZES[config.data.source]
        self.replay = Replay(len(tasks), self.options.replay_size // len(tasks), observation, self.action_size)
        assert isinstance(data.train, Episodes)
        self.collection = Collection(data.train.world, self.replay, self.options.reward_rate)
        self.critic_parameters = list(network.trunk.parameters())
        self.actor = build_learner("actor", list(network.actor.parameters()), config, tasks)
        self.temperature = build_learner("temperature", [network.log_temperature], config, tasks)
        entropy = self.options.target_entropy
        self.target_entropy = float(-self.action_size if entropy is None else entropy)
        self.first = 0  # step at which the next epoch begins
        self.steps = 0  # of training
        self.drawn: tuple[Tensor, Rows] | None = None  # observations and tasks of the current batch

    def __len__(self) -> int:
        return self.options.epoch_steps

    def __iter__(self) -> Iterator[Batch]:
        first, self.first = self.first, 0
        for _ in range(first, len(self)):
            yield self.begin_step()
        for learner in (self.actor, self.temperature):
            if learner.balancer is not None and first < len(self):
                learner.balancer.end_epoch()

    def begin_step(self) -> Batch:
        """Let the environments start a step, and return a batch for the critics: inputs and target values."""
        if not self.collection.episodes:
            self.explore()
        if self.moves:
            self.collection.start(self.act)
        return self.draw()

    def after_step(self) -> None:
        """Train actor, temperatures and target critics on the observations of the batch, and let the environments finish."""
        assert self.drawn is not None
        observations, rows = self.drawn
        self.train_actor(observations, rows)
        self.network.update_targets()
        if self.moves:
            self.collection.finish()
        self.steps += 1

    @property
    def moves(self) -> bool:
        """True if the environments move in the current step."""
        return self.steps >= self.options.first_updates

    def explore(self) -> None:
        """Fill the buffers with transitions of random actions."""
        for _ in range(self.options.random_steps):
            self.collection.start(lambda observations: (2 * torch.rand(len(observations), self.action_size) - 1).numpy())
            self.collection.finish()

    @torch.no_grad()
    def act(self, observations: Array, *, at_random: bool = True) -> Array:
        """Return random actions of the policy, or its mean actions. Shape (K, D) -> (K, A)."""
        tasks = torch.arange(len(self.tasks))
        rows = self.network.with_identity(torch.from_numpy(observations).to(self.device), tasks.to(self.device))
        actions = self.network.actor.sample(rows)[0] if at_random else self.network.actor(rows)["action"]
        array: Array = actions.cpu().numpy()
        return array

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.network.log_temperature.device

    def draw(self) -> Batch:
        """Return a batch of the critics from the buffers: inputs and target values (B,)."""
        rows = draw_rows(len(self.tasks), self.batch_size, mixed=self.options.sampling == "mixed")
        transitions = self.replay.draw(rows.tasks)
        transitions = type(transitions)(*(part.to(self.device) for part in transitions))
        rows = rows._replace(tasks=rows.tasks.to(self.device))
        self.drawn = transitions.observations, rows
        inputs = critic_inputs(self.network, transitions.observations, transitions.actions, rows)
        return Inputs(inputs, rows.counts), target_values(self.network, transitions, rows, self.options.discount)

    def train_actor(self, observations: Tensor, rows: Rows) -> None:
        """Make a step of the actor, and one of the temperatures with the densities before it."""
        states = self.network.with_identity(observations, rows.tasks)
        noise = torch.randn(len(states), self.action_size, device=self.device)
        densities: list[Tensor] = []

        def actor_losses() -> dict[str, Tensor]:
            actions, log_density = self.network.actor.sample(states, noise)
            densities.append(log_density.detach())
            values = self.network.values(critic_inputs(self.network, observations, actions, rows)).amin(0)
            return rows.means(self.network.temperatures(rows.tasks) * log_density - values, self.tasks)

        with frozen(self.critic_parameters):
            self.actor.step(actor_losses, rows)
        self.temperature.step(partial(self.temperature_losses, densities[0], rows), rows)

    def temperature_losses(self, log_density: Tensor, rows: Rows) -> dict[str, Tensor]:
        """Return by task the loss whose gradient lowers the temperature where the entropy exceeds the target."""
        temperatures = self.network.log_temperature.exp().expand(len(self.tasks))[rows.tasks]
        return rows.means(-temperatures * (log_density + self.target_entropy), self.tasks)

    def metrics(self) -> dict[str, float]:
        """Return the temperatures, and success and return of each task in the last complete episode of the training."""
        values = self.network.log_temperature.detach().exp().expand(len(self.tasks)).tolist()
        temperatures = {f"temperature/{task}": value for task, value in zip(self.tasks, values, strict=True)}
        return temperatures | self.collection.last

    def evaluate(self, data: Episodes) -> Iterator[dict[str, float]]:
        """Yield the success of each task in each episode of a split, by metric; actions are the means of the policy."""
        running = data.world.simulation.state()
        for goal in data.goals:
            successes = self.collection.try_goal(goal, partial(self.act, at_random=False))
            yield {f"{task}/success": float(success) for task, success in zip(self.tasks, successes, strict=True)}
        self.collection.continue_episode(*running)

    def policy(self) -> tuple[nn.Module, Tensor]:
        """Return the actor, and inputs that give the shape of its inputs."""
        first = self.collection.observations
        tasks = torch.arange(len(self.tasks), device=self.device)
        return self.network.actor, self.network.with_identity(torch.from_numpy(first).to(self.device), tasks)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on, except for the networks."""
        parts = {name: getattr(self, name).state_dict() for name in ("actor", "temperature", "replay", "collection")}
        return parts | {"steps": self.steps}

    def resume(self, state: Mapping[str, Any], position: int) -> None:
        """Continue from a state, at a step of an epoch."""
        for name in ("actor", "temperature", "replay", "collection"):
            getattr(self, name).load_state_dict(state[name])
        self.steps, self.first = state["steps"], position

    def close(self) -> None:
        """End the processes of the environments."""
        self.collection.world.close()


def build_learner(part: str, parameters: Sequence[nn.Parameter], config: DictConfig, tasks: Sequence[str]) -> Learner:
    """Return the optimizer of a part of the agent, with a balancer if the configuration asks for one."""
    rate = config.train.lr if config.agent.lr is None else config.agent.lr
    balancer = build_balancer(config, tasks) if part in config.agent.balanced else None
    learner = Learner(parameters, rate, balancer, config.train.balancer_lr)
    if balancer is not None and config.balancer.metric == "optimizer":
        balancer.metric = learner.optimizer
    return learner


def check_sizes(config: DictConfig, tasks: int) -> None:
    """Check that a batch and the buffers have room for each task, and that the networks fit the observations.

    Raises:
        ValueError: If a batch or the buffers are too small, or the networks have another source.
    """
    source = config.data.source
    if config.model.source != source:
        raise ValueError(f"model.source must equal data.source={source}, but got {config.model.source}. Leave it out.")
    for key, size in {"train.batch_size": config.train.batch_size, "agent.replay_size": config.agent.replay_size}.items():
        if size < tasks:
            raise ValueError(f"{key} must be at least {tasks}, one for each task, but got {size}.")


def build_agent(data: Splits, network: SoftActorCritic, config: DictConfig, tasks: Sequence[str]) -> MultiTaskAgent:
    """Return an agent that has seen nothing yet; it decides whether the critics compute each task separately."""
    if config.model.separate_passes is None:
        assert isinstance(network.trunk, Critics)
        network.trunk.separate_passes = config.gradient_method is not None
    return MultiTaskAgent(data, network, config, tasks)
