"""Conditions of the steps of LBFGS, which are checked before training, and the samples of their batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from balance import extra_forward
from experiments.training import ranks
from experiments.training.data import generator_state, set_generator_state, to_device

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch.utils.data import Dataset

    from experiments.problems.base import Batch, Network, Problem


def chosen_samples(config: DictConfig, data: Dataset[Batch]) -> list[int]:
    """Return the indices of the samples in the batch of LBFGS: all, or ``lbfgs.samples`` that are drawn with the run's seed."""
    size: int = len(data)  # type: ignore[arg-type]
    count = config.lbfgs.samples
    if count is None or count >= size:
        return list(range(size))
    generator = torch.Generator().manual_seed(config.seed)
    return sorted(torch.randperm(size, generator=generator)[:count].tolist())


def check_lbfgs(config: DictConfig, model: Network, problem: Problem, data: Dataset[Batch]) -> None:
    """Check before training that the steps of LBFGS will be possible, if there are any.

    `experiments.config.layers.check_lbfgs` has checked the configuration itself.

    Args:
        config: Configuration of the run.
        model: Network before its first step.
        problem: The problem.
        data: Training data.

    Raises:
        ValueError: If losses are random, or several processes train.
    """
    if not config.train.lbfgs_steps:
        return
    if ranks.size() > 1:
        raise ValueError(
            f"LBFGS must run in one process, but torchrun has started {ranks.size()}. Start one, or set train.lbfgs_steps=0."
        )
    check_repeatable(config, model, problem, data)


def check_repeatable(config: DictConfig, model: Network, problem: Problem, data: Dataset[Batch]) -> None:
    """Check that the losses of a batch are equal when they are computed twice, as a line search needs; nothing changes.

    Args:
        config: Configuration of the run.
        model: Network before its first step.
        problem: The problem.
        data: Training data.

    Raises:
        ValueError: If a loss differs, for example because of dropout.
    """
    before = generator_state(data)
    batch = to_device(data[chosen_samples(config, data)[: config.train.batch_size]], config.device)
    set_generator_state(data, before)
    model.train()
    with extra_forward(model), torch.no_grad():
        first, second = (problem.losses(model(batch[0]), batch) for _ in range(2))
    for task, loss in first.items():
        if not torch.equal(loss, second[task]):
            raise ValueError(
                f"Losses must be equal when they are computed twice for the steps of LBFGS, but the loss of '{task}' was "
                f"{loss.item()} and {second[task].item()}. Remove dropout and other randomness, or set train.lbfgs_steps=0."
            )
