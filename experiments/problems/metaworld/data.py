"""The environments of the tasks, and the episodes that are played in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from balance.config import check_settings, setting
from balance.messages import unknown
from experiments.datasets.environments import points
from experiments.problems.base import Batch, Splits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from experiments.datasets.environments.goals import GoalEnvironment
    from experiments.datasets.environments.simulation import Simulation

# fmt: off
MT10 = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown", "peg-insert-side",
    "window-open", "window-close",
)
# fmt: on
TASKS = ("reach", "drawer-close", "button-press-topdown")
ALL = {"metaworld": MT10, "points": points.TASKS}


@dataclass
class DataConfig:
    """Tasks, goals and episodes."""

    source: Literal["metaworld", "points"] = setting(
        "metaworld", help="Metaworld, or points in the plane that must reach goals, which need no simulator"
    )
    tasks: str = setting(",".join(TASKS), help="names of tasks, separated by commas; all: every task of the source")
    seed: int = setting(0, minimum=0, help="seed of the goals")
    goals: int = setting(1, minimum=1, maximum=50, help="goals of each task; an episode has a random one of them")
    episode_steps: int = setting(150, minimum=1, maximum=500, help="steps after which an episode is cut")
    evaluation_goals: int = setting(1, minimum=1, maximum=50, help="first goals of each task that are tried in an evaluation")
    processes: bool = setting(default=True, help="run each environment in a separate process")


class World:
    """The environments of a configuration, which start when they are used for the first time.

    Args:
        config: Tasks and goals.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tasks = task_names(config)

    @cached_property
    def simulation(self) -> Simulation:
        """The environments, one of each task."""
        from experiments.datasets.environments.simulation import Simulation  # noqa: PLC0415

        create, config = environment_of(self.config.source), self.config
        options = [(task, place, config.goals, config.seed) for place, task in enumerate(self.tasks)]
        return Simulation([partial(create, *values) for values in options], processes=config.processes)

    def close(self) -> None:
        """End the processes of the environments, if they have started."""
        if "simulation" in vars(self):
            vars(self).pop("simulation").close()

    def goals_of(self, episode: int) -> list[int]:
        """Return the goals of all tasks in an episode of the training, drawn from the seed and the number of the episode."""
        generator = np.random.default_rng((self.config.seed, episode))
        goals: list[int] = generator.integers(self.config.goals, size=len(self.tasks)).tolist()
        return goals


class Episodes(Dataset[Batch]):
    """Episodes of all tasks at once, each with one goal; an item for a list of indices is a batch of first observations.

    Args:
        world: The environments.
        goals: Index of the goal of each episode.
    """

    def __init__(self, world: World, goals: Sequence[int]) -> None:
        self.world = world
        self.goals = tuple(goals)

    def __len__(self) -> int:
        return len(self.goals)

    def __getitem__(self, indices: list[int]) -> Batch:
        every = range(len(self.world.tasks))
        first = [self.world.simulation.begin([self.goals[index] for _ in every]) for index in indices]
        return (torch.from_numpy(np.stack(first)),)


def load(config: DataConfig) -> Splits:
    """Return the episodes: for training with all goals, for validation and test, which are one, with the first goals.

    As in the published benchmark, success is measured on goals that are trained.

    Args:
        config: Tasks and goals.

    Raises:
        ValueError: If a task is unknown, or more goals are evaluated than there are.
        ModuleNotFoundError: If Metaworld is asked for and is not installed.
    """
    check_settings(config, "data")
    if config.evaluation_goals > config.goals:
        raise ValueError(f"data.evaluation_goals must be at most data.goals={config.goals}, but got {config.evaluation_goals}.")
    environment_of(config.source)
    world = World(config)
    evaluated = Episodes(world, range(config.evaluation_goals))
    return Splits(Episodes(world, range(config.goals)), evaluated, evaluated)


def task_names(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the tasks that a configuration chooses.

    Raises:
        ValueError: If a task is unknown, or named twice.
    """
    known = ALL[config.source]
    chosen = known if config.tasks == "all" else tuple(name.strip() for name in config.tasks.split(","))
    for name in chosen:
        if name not in known:
            raise ValueError(unknown(f"task of data.source={config.source}", name, [*known, "all"]))
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"data.tasks must name each task once, but got '{config.tasks}'.")
    return chosen


def environment_of(source: str) -> Callable[[str, int, int, int], GoalEnvironment]:
    """Return the class of the environments of a source.

    Raises:
        ModuleNotFoundError: If its simulator is not installed.
    """
    if source == "points":
        return points.Point
    try:
        from experiments.datasets.environments.manipulation import Manipulation  # noqa: PLC0415
    except ModuleNotFoundError as error:
        remedy = "pip install -e . --group rl, or set data.source=points, which needs no simulator."
        message = f"data.source=metaworld needs {error.name}: {remedy}"
        raise ModuleNotFoundError(message) from None
    return Manipulation
