"""The contract of an environment with several goals."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class GoalEnvironment(gymnasium.Env):  # type: ignore[misc]
    """An environment whose episodes are decided by a goal and the actions, without further randomness.

    The environments of all tasks are reset together, with one list of goals. A step reports ``success`` in its ``info``.

    Args:
        place: Index of the task among all tasks.
        observation: Number of entries of an observation.
        action: Number of entries of an action, each in -1..1.
    """

    def __init__(self, place: int, observation: int, action: int) -> None:
        self.place = place
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (action,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Ignored, since nothing is random.
            options: ``goals``, the indices of the goals of all tasks.

        Returns:
            The first observation, and no further information.
        """
        super().reset(seed=seed)
        assert options is not None
        return self.begin(int(options["goals"][self.place])), {}

    @abstractmethod
    def begin(self, goal: int) -> Array:
        """Begin an episode with a goal, and return the first observation."""
