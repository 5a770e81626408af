"""Learning rates over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch.optim import Optimizer


class Schedule:
    """Sets the learning rates of all groups of an optimizer, that of the balancer's parameters too, as the published codes do.

    Args:
        optimizer: Before its first step.
        train: The group ``train`` of a configuration; see `TrainConfig`.
        steps_per_epoch: Number of batches.
    """

    def __init__(self, optimizer: Optimizer, train: DictConfig, steps_per_epoch: int) -> None:
        self.train = train
        self.steps_per_epoch = steps_per_epoch
        self.steps = 0  # that were made
        self.by_step = LambdaLR(optimizer, self.factor)
        self.by_score = None
        if train.schedule == "plateau":
            self.by_score = ReduceLROnPlateau(optimizer, factor=train.factor, patience=train.patience, min_lr=train.min_lr)

    def factor(self, step: int) -> float:
        """What the rates are multiplied by at a step, counted from 0; without what a plateau has taken."""
        train = self.train
        factor: float = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        if train.schedule == "cosine":
            factor *= 0.5 + 0.5 * math.cos(math.pi * step / (train.epochs * self.steps_per_epoch))
        if train.schedule == "step":
            factor *= train.factor ** (step // (train.step_epochs * self.steps_per_epoch))
        return factor

    def after_step(self) -> None:
        """To be called after each step of the optimizer."""
        self.steps += 1
        if self.by_score is None or self.steps < self.train.warmup_steps:  # or it would undo what the plateau has done
            self.by_step.step()

    def after_epoch(self, score: float) -> None:
        """To be called after each epoch. ``score``: by which epochs are chosen, the less the better."""
        if self.by_score is not None and self.steps >= self.train.warmup_steps:
            self.by_score.step(score)
