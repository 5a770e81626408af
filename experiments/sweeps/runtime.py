"""Estimated duration of runs, from a few of their steps."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from balance.config import flatten
from balance.profiling import measure
from experiments.problems import base as problems
from experiments.recording.fingerprint import fingerprint
from experiments.training import threads
from experiments.training.data import to_device
from experiments.training.evaluation import evaluate
from experiments.training.lbfgs import LBFGSPhase
from experiments.training.run import build, closed
from experiments.training.step import build_optimizer, train_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from omegaconf import DictConfig

    from balance.profiling import Cost
    from experiments.training.run import Run

BUDGET = 1.0  # seconds for the steps of one pair of methods, and for its evaluation


def estimate_seconds(configs: Sequence[DictConfig], workers: int) -> dict[str, float]:
    """Return the time of each run in seconds, by fingerprint.

    One seed of each pair of methods and each network is timed, with the threads that it will have. Methods that fail have NaN.

    Args:
        configs: Configurations of the runs.
        workers: Runs at a time.
    """
    seconds: dict[tuple[Any, ...], float] = {}
    with threads.restored():
        for config in configs:
            if _methods_and_network(config) not in seconds:
                threads.use(config.train.threads or threads.share(workers))
                seconds[_methods_and_network(config)] = _seconds_or_nan(config)
    return {fingerprint(config): seconds[_methods_and_network(config)] for config in configs}


def _methods_and_network(config: DictConfig) -> tuple[Any, ...]:
    network = (str(value) for key, value in flatten(config).items() if key.startswith("model."))
    return config.loss_method, config.gradient_method, *network


def _seconds_or_nan(config: DictConfig) -> float:
    try:
        return estimate_run(config)
    except Exception:  # noqa: BLE001 - a method that fails is reported when its run fails, and stops no other run
        return math.nan


def estimate_run(config: DictConfig) -> float:
    """Return the time of a run in seconds, from some of its steps and one evaluation; nothing is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = build(config)
    timed = partial(measure, repeats=10, budget=BUDGET, device=config.device)
    with closed(run.agent), problems.by_design():
        return _seconds_of_epochs(run, timed)


def _seconds_of_epochs(run: Run, timed: Callable[..., Cost]) -> float:
    """Return the time of all epochs and of the steps of LBFGS in seconds."""
    config = run.config
    of_step = timed(one_step(run)).seconds
    of_evaluation = timed(lambda: evaluate(run, run.data.validation)).seconds
    epochs = config.train.epochs * (len(run.batches) * of_step + of_evaluation)
    return float(epochs + config.train.lbfgs_steps * (lbfgs_seconds(run) + of_evaluation))


def one_step(run: Run) -> Callable[[], object]:
    """Return a function that makes a step of a run: on the first samples, again and again, or on the batches of an agent."""
    optimizer, agent = build_optimizer(run), run.agent
    if agent is None:
        size = min(run.config.train.batch_size, len(run.data.train))  # type: ignore[arg-type]
        batch = to_device(run.data.train[list(range(size))], run.config.device)
        return lambda: train_step(run, optimizer, batch)
    batches = itertools.chain.from_iterable(itertools.repeat(agent))

    def step() -> None:
        train_step(run, optimizer, next(batches))
        agent.after_step()

    return step


def lbfgs_seconds(run: Run) -> float:
    """Return the time of one step of LBFGS in seconds; 0 if the run has no such steps. The network changes."""
    if not run.config.train.lbfgs_steps:
        return 0.0
    begin = time.perf_counter()
    LBFGSPhase(run).step(0)
    return time.perf_counter() - begin
