"""Tasks of Metaworld: a simulated robot arm that reaches, pushes, opens and presses things.

Source: Yu et al., Meta-World, CoRL 2019, in the version 3 of the package ``metaworld``, which simulates with MuJoCo.
"""

from __future__ import annotations

from typing import Any

import metaworld
import numpy as np

from experiments.datasets.environments.goals import Array, GoalEnvironment

VERSION = "-v3"


class Manipulation(GoalEnvironment):
    """A task of Metaworld with the first goals of its benchmark MT1; the position of the goal is part of the observation.

    An observation has 39 entries: gripper and objects now and one step before, and the goal. An action has 4: the displacement
    of the gripper, and its grip. A reward is in 0..10.

    Args:
        task: Name of a task, without the version.
        place: Index of the task among all tasks.
        goals: Number of goals, at most 50.
        seed: Seed of the goals.
    """

    def __init__(self, task: str, place: int, goals: int, seed: int) -> None:
        super().__init__(place, observation=39, action=4)
        benchmark: Any = metaworld.MT1(task + VERSION, seed=seed)
        self.goals = benchmark.train_tasks[:goals]
        self.simulator: Any = benchmark.train_classes[task + VERSION]()

    def begin(self, goal: int) -> Array:
        """Put arm, objects and goal in their places."""
        self.simulator.set_task(self.goals[goal])
        return np.asarray(self.simulator.reset()[0], np.float32)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move the arm; no episode ends within 500 steps."""
        observation, reward, terminated, truncated, info = self.simulator.step(action)
        return np.asarray(observation, np.float32), float(reward), terminated, truncated, {"success": float(info["success"])}

    def close(self) -> None:
        """Free the simulator."""
        self.simulator.close()
