"""Learning rates over a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch.optim import Optimizer


class Schedule:
    """Learning rates of all groups of an optimizer, the balancer's parameters included, as in the published codes.

    Args:
        optimizer: Optimizer before its first step.
        train: Group ``train`` of a configuration; see `experiments.config.schema.TrainConfig`.
        steps_per_epoch: Number of batches.
    """

    def __init__(self, optimizer: Optimizer, train: DictConfig, steps_per_epoch: int) -> None:
        self.train = train
        self.steps_per_epoch = steps_per_epoch
        self.steps = 0  # steps made
        self.by_step = LambdaLR(optimizer, self.factor)
        self.plateau = None
        if train.schedule == "plateau":
            self.plateau = ReduceLROnPlateau(optimizer, factor=train.factor, patience=train.patience, min_lr=train.min_lr)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates at a step, counted from 0, without the drops of a plateau."""
        train = self.train
        factor: float = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        if train.schedule == "cosine":
            factor *= 0.5 + 0.5 * math.cos(math.pi * step / (train.epochs * self.steps_per_epoch))
        if train.schedule == "step":
            factor *= train.factor ** (step // (train.step_epochs * self.steps_per_epoch))
        return factor

    def after_step(self) -> None:
        """Set the rates after a step of the optimizer."""
        self.steps += 1
        if self.plateau is None or self.steps < self.train.warmup_steps:  # later, it would undo the drops of the plateau
            self.by_step.step()

    def after_epoch(self, score: float) -> None:
        """Set the rates after an epoch. ``score`` is the score by which epochs are selected; a smaller one is better."""
        if self.plateau is not None and self.steps >= self.train.warmup_steps:
            self.plateau.step(score)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule; the rates are part of the optimizer's state."""
        plateau = None if self.plateau is None else self.plateau.state_dict()
        return {"steps": self.steps, "by_step": self.by_step.state_dict(), "plateau": plateau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self.steps = state["steps"]
        self.by_step.load_state_dict(state["by_step"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
