"""Base of the Balancer: data that its rules learn from between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .arguments import read_losses, require_present
from .over_ranks import mean_over_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from ..distributed.ranks import Ranks
    from ..rules.protocol import LossBalancer
    from .arguments import Counts, NanPolicy, StepLosses, ZeroPolicy
    from .reminders import Reminders


class LearningStage(nn.Module):
    """A stage whose loss balancer learns from losses after the steps, and from the mean losses of epochs.

    Args:
        tasks: Names of the tasks.
        nan: Meaning of a loss of NaN.
        zero: Meaning of a loss of exactly zero.
        ranks: Processes that train together.

    Attributes:
        scaler: The GradScaler of steps that are given none; None for no scaler. Not part of the state.
        backward_refusal: Message of the error of a direct call of ``backward``; empty: such calls are allowed, as they are
            inside of ``collect()``. For training loops that run the backward pass of ``loss(...)`` themselves, and would
            clear or scale the result of a direct call in another way.
        loss_sums: Sums of the losses of the epoch. Shape (K,).
        loss_counts: Numbers of steps of the epoch at which each task was present. Shape (K,).
    """

    loss_balancer: LossBalancer
    reminders: Reminders
    loss_sums: Tensor
    loss_counts: Tensor

    def __init__(self, tasks: tuple[str, ...], nan: NanPolicy, zero: ZeroPolicy, ranks: Ranks) -> None:
        super().__init__()
        self.tasks, self.nan, self.zero, self.ranks = tasks, nan, zero, ranks
        self.scaler: GradScaler | None = None
        self.backward_refusal = ""
        self.register_buffer("loss_sums", torch.zeros(len(tasks), dtype=torch.float64, device="cpu"))
        self.register_buffer("loss_counts", torch.zeros(len(tasks), dtype=torch.int64, device="cpu"))
        self._skipped = False  # whether the gradient scaler was to skip the last step

    @property
    def needs_observation(self) -> bool:
        """True if `observe` must be called after each optimizer step."""
        return self.loss_balancer.needs_observation

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor] | Tensor, *, counts: Counts | None = None) -> None:
        """Pass the losses of the same batch after the optimizer's step to a rule that learns from them (famo).

        Args:
            losses: As for `backward`, of the same tasks.
            counts: As for `backward`.

        Raises:
            ValueError: If a loss is not finite or out of the rule's domain; the rule's state is then as before.
        """
        if not self.needs_observation or self._skipped:
            return
        step = self._read(losses, counts)
        self.loss_balancer.observe(step.losses, step.context)
        self.reminders.observed()

    @property
    def needs_validation(self) -> bool:
        """True if `observe_validation` must be called every few steps."""
        return self.loss_balancer.needs_validation

    @torch.no_grad()
    def observe_validation(self, losses: Mapping[str, Tensor] | Tensor, *, counts: Counts | None = None) -> None:
        """Pass losses of validation data to a rule that learns from them (coba). For other rules this does nothing.

        Over several ranks the rule gets the mean losses over all ranks, and every rank must make the call.

        Args:
            losses: As for `backward`, of a batch of validation data. A task without a loss in this batch is left out.
            counts: As for `backward`.

        Raises:
            ValueError: If a loss is not finite or out of the rule's domain; the rule's state is then as before.
        """
        if not self.needs_validation:
            return
        step = self._read(losses, counts)
        self.loss_balancer.observe_validation(step.losses, step.context)
        self.reminders.validated()

    def _read(self, losses: Mapping[str, Tensor] | Tensor, counts: Counts | None) -> StepLosses:
        """Return losses between steps, their means over all ranks, checked."""
        step = read_losses(losses, self.tasks, self.nan, self.zero, counts)
        if self.ranks.size > 1:
            step = mean_over_ranks(step, self.tasks, self.ranks)
        require_present(step, losses, self.tasks)
        if bad := step.not_finite():
            raise ValueError(f"Losses must be finite, but got {bad}. Look at the data and the learning rate.")
        return step

    def end_epoch(self) -> None:
        """Close an epoch: rules that update once per epoch get its mean losses, NaN for a task that was never present."""
        self.reminders.epoch_ended()
        self.loss_balancer.end_epoch(self.loss_sums / self.loss_counts)
        self.loss_sums.zero_()
        self.loss_counts.zero_()
