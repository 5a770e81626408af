"""Transitions from the environments: episodes one after the other, scaled rewards, and what an episode has reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.problems.metaworld.replay import Replay, Transitions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from experiments.datasets.environments.goals import Array
    from experiments.problems.metaworld.data import World


class RewardScale:
    """Division of rewards by their running standard deviation, by task; the mean is not subtracted.

    Source: the normalisation of rewards in facebookresearch/mtenv. Moving mean and variance begin with 0 and 1.

    Args:
        tasks: Number of tasks.
        rate: Share of a new reward in mean and variance; 0 leaves rewards as they are.
    """

    def __init__(self, tasks: int, rate: float) -> None:
        self.rate = rate
        self.mean, self.variance = np.zeros(tasks), np.ones(tasks)

    def __call__(self, rewards: Array) -> Array:
        """Learn from the rewards of one step, and return them scaled. Shape (K,)."""
        if not self.rate:
            return rewards
        self.mean += self.rate * (rewards - self.mean)
        self.variance += self.rate * ((rewards - self.mean) ** 2 - self.variance)
        return (rewards / (np.sqrt(self.variance) + 1e-8)).astype(np.float32)


class Collection:
    """Episodes of the training, whose transitions go into a replay buffer.

    All episodes are cut after equally many steps. A cut is no end, so the value of the last observation still counts.

    Args:
        world: The environments.
        replay: Receives the transitions.
        reward_rate: See `RewardScale`.
    """

    def __init__(self, world: World, replay: Replay, reward_rate: float) -> None:
        self.world = world
        self.replay = replay
        self.scale = RewardScale(len(world.tasks), reward_rate)
        self.episodes = 0  # that have begun
        self.observations = np.empty(0, np.float32)  # (K, D), of the current episode
        self.returns, self.successes = np.zeros(len(world.tasks)), np.zeros(len(world.tasks))  # of the current episode
        self.last: dict[str, float] = {}  # results of the last complete episode, as metrics

    def start(self, policy: Callable[[Array], Array]) -> None:
        """Let all environments begin a step; a new episode begins before it where one is over."""
        simulation = self.world.simulation
        if self.episodes == 0 or len(simulation.actions) == self.world.config.episode_steps:
            self.observations = simulation.begin(self.world.goals_of(self.episodes))
            self.episodes += 1
            self.returns, self.successes = np.zeros_like(self.returns), np.zeros_like(self.successes)
        simulation.start(policy(self.observations))

    def finish(self) -> None:
        """Wait for the step, and store its transitions."""
        simulation = self.world.simulation
        outcome = simulation.finish()
        rewards = self.scale(outcome.rewards)
        parts = (self.observations, simulation.actions[-1], rewards, outcome.observations)
        self.replay.add(Transitions(*(torch.from_numpy(part) for part in parts)))
        self.observations = outcome.observations
        self.returns += outcome.rewards
        self.successes = np.maximum(self.successes, outcome.successes)
        if len(simulation.actions) == self.world.config.episode_steps:
            self.last = self.results()

    def results(self) -> dict[str, float]:
        """Return the success and the sum of the rewards of the current episode, by task."""
        tasks = self.world.tasks
        successes = {f"episode/{task}/success": float(value) for task, value in zip(tasks, self.successes, strict=True)}
        returns = {f"episode/{task}/return": float(value) for task, value in zip(tasks, self.returns, strict=True)}
        return successes | returns

    def try_goal(self, goal: int, policy: Callable[[Array], Array]) -> np.ndarray:
        """Play an episode of all tasks with one goal; return whether each task has ever been a success in it. Shape (K,)."""
        simulation = self.world.simulation
        observations = simulation.begin([goal] * len(self.world.tasks))
        successes = np.zeros(len(self.world.tasks))
        for _ in range(self.world.config.episode_steps):
            outcome = simulation.step(policy(observations))
            observations, successes = outcome.observations, np.maximum(successes, outcome.successes)
        return successes

    def continue_episode(self, goals: Sequence[int], actions: Sequence[Array]) -> None:
        """Repeat the current episode of the training up to its last step, after the environments were used otherwise.

        Raises:
            RuntimeError: If it takes another course this time.
        """
        if not self.episodes:
            return
        observations = self.world.simulation.resume(goals, actions)
        if not np.array_equal(observations, self.observations):
            raise RuntimeError(
                "The same actions must lead to the same observations, but the environments took another course this time. The "
                "versions of metaworld and mujoco must be those that the run began with; otherwise start a new run."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the following transitions depend on, except for the policy."""
        goals, actions = self.world.simulation.state() if self.episodes else ([], [])
        arrays: dict[str, Any] = {"observations": self.observations, "returns": self.returns, "successes": self.successes}
        arrays |= {"mean": self.scale.mean, "variance": self.scale.variance, "actions": np.array(actions, np.float32)}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return tensors | {"goals": goals, "episodes": self.episodes, "last": dict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the episode of `state_dict`."""
        self.episodes, self.last = state["episodes"], dict(state["last"])
        self.observations, self.returns, self.successes = (
            state[key].numpy() for key in ("observations", "returns", "successes")
        )
        self.scale.mean, self.scale.variance = state["mean"].numpy(), state["variance"].numpy()
        self.continue_episode(state["goals"], list(state["actions"].numpy()))
