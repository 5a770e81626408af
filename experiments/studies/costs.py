"""Time of a training step with each method, measured in turns."""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

from experiments.problems import base as problems
from experiments.sweeps.runtime import one_step
from experiments.training import threads
from experiments.training.run import build, closed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from omegaconf import DictConfig

ROUNDS = 15  # each times one step of every method, so that a busy moment of the machine slows all methods alike


def step_times(configs: Mapping[str, DictConfig]) -> dict[str, float]:
    """Return the median time of a training step on this machine in seconds, by method; a method that fails is left out.

    Args:
        configs: Configuration of a run of each method, all of one problem.
    """
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        stack.enter_context(threads.restored())
        stack.enter_context(problems.by_design())
        steps = {name: step for name, config in configs.items() if (step := _first_step(config, stack)) is not None}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                times.setdefault(name, []).append(_seconds(step))
    return {name: statistics.median(of_method) for name, of_method in times.items()}


def _first_step(config: DictConfig, stack: ExitStack) -> Callable[[], object] | None:
    """Return a function that makes a step, after a first one; None if it fails."""
    threads.use(config.train.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the plan of the study has printed them
        run = build(config)
    stack.enter_context(closed(run.agent))
    step = one_step(run)
    try:
        step()
    except Exception:  # noqa: BLE001 - the runs of the method have failed too, which the record says
        return None
    return step


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
