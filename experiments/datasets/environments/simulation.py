"""The environments of all tasks, stepped together: each in a separate process, or all in this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from experiments.datasets.environments.goals import Array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from experiments.datasets.environments.goals import GoalEnvironment


class Outcome(NamedTuple):
    """Results of one step of all K environments."""

    observations: Array  # (K, D)
    rewards: Array  # (K,)
    successes: Array  # (K,), 1 for success


class Simulation:
    """Environments of K tasks, one of each.

    Args:
        factories: Functions without arguments that create the environments. Processes receive them by pickle.
        processes: Whether each environment gets a separate process. The processes end with this one.
    """

    def __init__(self, factories: Sequence[Callable[[], GoalEnvironment]], *, processes: bool) -> None:
        self.goals: list[int] = []  # of the episode that has begun
        self.actions: list[Array] = []  # since then
        self.is_moving = False  # between `start` and `finish`
        self.vector: Any
        if processes:
            workers = [partial(_in_worker, create, os.getpid()) for create in factories]
            self.vector = AsyncVectorEnv(workers, context=_start_method(), autoreset_mode=AutoresetMode.DISABLED)
        else:
            self.vector = SyncVectorEnv(factories, autoreset_mode=AutoresetMode.DISABLED)
        self.processes = processes
        self.action_size: int = self.vector.single_action_space.shape[0]

    def begin(self, goals: Sequence[int]) -> Array:
        """Begin an episode in every environment, with these goals; return the first observations (K, D)."""
        self.goals, self.actions = list(goals), []
        with self.ended_process_named():
            observations: Array = self.vector.reset(options={"goals": self.goals})[0]
        return observations

    def start(self, actions: Array) -> None:
        """Start a step with actions (K, A); processes compute it in the background."""
        self.actions.append(actions)
        if self.processes:
            with self.ended_process_named():
                self.vector.step_async(actions)
        self.is_moving = True

    def finish(self) -> Outcome:
        """Wait for the step that `start` has started."""
        self.is_moving = False
        with self.ended_process_named():
            result = self.vector.step_wait() if self.processes else self.vector.step(self.actions[-1])
        observations, rewards, _, _, info = result
        return Outcome(observations, rewards.astype(np.float32), info["success"].astype(np.float32))

    def step(self, actions: Array) -> Outcome:
        """Make a step with actions (K, A)."""
        self.start(actions)
        return self.finish()

    def state(self) -> tuple[list[int], list[Array]]:
        """Return goals and actions of the current episode, which decide everything in it."""
        return list(self.goals), list(self.actions)

    def resume(self, goals: Sequence[int], actions: Sequence[Array]) -> Array:
        """Repeat an episode up to the point of `state` with these goals and actions; return the observations there."""
        observations = self.begin(goals)
        for action in actions:
            observations = self.step(action).observations
        return observations

    @contextmanager
    def ended_process_named(self) -> Iterator[None]:
        """Say so if the process of an environment has ended.

        Raises:
            RuntimeError: If one has ended.
            OSError: An error of an environment in this process.
            EOFError: An error of an environment in this process.
        """
        try:
            yield
        except (OSError, EOFError) as error:
            if not self.processes:
                raise
            raise RuntimeError(
                "Every environment must have its process, but one has ended, perhaps for lack of memory. resume=true continues "
                "the run; data.processes=false needs no further processes."
            ) from error

    def close(self) -> None:
        """End the processes, after the step that they may be making."""
        try:
            if self.is_moving:
                self.finish()
            self.vector.close()
        except (OSError, EOFError, RuntimeError):
            if not self.processes:
                raise
            for process in self.vector.processes:  # one has ended, so that the others cannot be asked
                process.kill()
            self.vector.closed = True


def _start_method() -> str:
    """Return the way in which processes are started, which must not copy the threads of this process."""
    known = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in known else "spawn"
    if multiprocessing.get_start_method(allow_none=True) not in (None, *known):
        multiprocessing.set_start_method(method, force=True)  # joblib has set one that exists in its workers only
    return method


def _in_worker(create: Callable[[], GoalEnvironment], owner: int) -> GoalEnvironment:
    """Create an environment in a process that leaves signals to its owner, which ends it when a run has been saved."""
    if os.getpid() != owner:  # gymnasium also creates one in the owner, for its spaces
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all processes of a group
    return create()
