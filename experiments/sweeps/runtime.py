"""How long runs will take, from a few of their steps."""

from __future__ import annotations

import math
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch

from balance.profiling import measure
from experiments.recording.store import fingerprint
from experiments.training.data import to_device
from experiments.training.evaluation import evaluate
from experiments.training.run import build
from experiments.training.step import build_optimizer, train_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

BUDGET = 1.0  # seconds to spend on the steps of one pair of methods, and on its evaluation


def seconds_of(configs: Sequence[DictConfig], workers: int) -> dict[str, float]:
    """Time of each run in seconds, by fingerprint; one seed of each pair of methods is tried, with the threads it will have.

    NaN for methods that fail.

    Args:
        configs: Of the runs.
        workers: Runs at a time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    known: dict[tuple[str, str | None], float] = {}
    try:
        for config in configs:
            if (methods := (config.loss_method, config.gradient_method)) not in known:
                try:
                    known[methods] = of_a_run(config)
                except Exception:  # noqa: BLE001 - a method that fails is told when its run fails, and stops no other
                    known[methods] = math.nan
    finally:
        torch.set_num_threads(before)
    return {fingerprint(config): known[config.loss_method, config.gradient_method] for config in configs}


def of_a_run(config: DictConfig) -> float:
    """Time of a run in seconds, from some of its steps and one evaluation; nothing is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = build(config)
    optimizer = build_optimizer(run)
    size = len(run.data.train)  # type: ignore[arg-type]
    batch = to_device(run.data.train[list(range(min(config.train.batch_size, size)))], config.device)
    steps = math.ceil(size / config.train.batch_size)
    timed = partial(measure, repeats=10, budget=BUDGET, device=config.device)
    of_a_step = timed(lambda: train_step(run, optimizer, batch)).seconds
    of_an_evaluation = timed(lambda: evaluate(run, run.data.validation)).seconds
    return float(config.train.epochs * (steps * of_a_step + of_an_evaluation))
