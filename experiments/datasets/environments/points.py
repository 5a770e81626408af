"""A point in the plane that must reach a goal: a small environment for tests, which needs no simulator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.datasets.environments.goals import Array, GoalEnvironment

TASKS = ("east", "north", "west", "south")
LARGEST_STEP, REACHED, SPREAD = 0.1, 0.1, 0.2


class Point(GoalEnvironment):
    """A point that starts at the origin; the goals of a task lie around a point at distance 0.7, in its direction.

    An observation is position and goal (4,), an action a velocity (2,), and the reward the negative distance to the goal.

    Args:
        task: One of `TASKS`.
        place: Index of the task among all tasks.
        goals: Number of goals.
        seed: Seed of the goals.
    """

    def __init__(self, task: str, place: int, goals: int, seed: int) -> None:
        super().__init__(place, observation=4, action=2)
        angle = math.tau * TASKS.index(task) / len(TASKS)
        centre = 0.7 * np.array([math.cos(angle), math.sin(angle)])
        generator = np.random.default_rng((seed, TASKS.index(task)))
        self.goals = centre + generator.uniform(-SPREAD, SPREAD, (goals, 2))
        self.goal = self.goals[0]
        self.position = np.zeros(2)

    def begin(self, goal: int) -> Array:
        """Put the point at the origin."""
        self.goal = self.goals[goal]
        self.position = np.zeros(2)
        return self.observe()

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move the point; no episode ends."""
        self.position = np.clip(self.position + LARGEST_STEP * np.clip(action, -1, 1), -1, 1)
        distance = float(np.linalg.norm(self.position - self.goal))
        return self.observe(), -distance, False, False, {"success": float(distance < REACHED)}

    def observe(self) -> Array:
        """Return position and goal."""
        return np.concatenate([self.position, self.goal]).astype(np.float32)
