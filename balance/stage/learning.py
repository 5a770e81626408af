"""Base of the Balancer: data that its rules learn from between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..rules import checks
from ..rules.context import TaskError
from ..rules.task_names import check_tasks, encode_tasks
from .arguments import read_losses, require_present
from .delayed import DelayedCall, not_finite_error
from .over_ranks import mean_over_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from ..distributed.ranks import Ranks
    from ..rules.protocol import GradientBalancer, JacobianBalancer, LossBalancer
    from .arguments import Counts, NanPolicy, StepLosses, ZeroPolicy
    from .choices import Checks
    from .reminders import Reminders
    from .report import Report


@dataclass
class LastCall:
    """Record of the last step, and a call whose checks are still on their way from the device.

    Attributes:
        report: Record of the last step; None before the first.
        skipped: Whether the gradient scaler was to skip it.
        delayed: The call whose checks the host has not read yet.
        error: An error of a call whose checks have been read, but that has not been raised yet.
    """

    report: Report | None = None
    skipped: bool = False
    delayed: DelayedCall | None = None
    error: Exception | None = None

    def settle(self) -> None:
        """Read the checks that are on their way, and restore the state of a rule that must not have learned."""
        delayed, self.delayed = self.delayed, None
        if delayed is not None:
            self.error = delayed.error()


class LearningStage(nn.Module):
    """A stage whose loss balancer learns from losses after the steps, and from the mean losses of epochs.

    Args:
        tasks: Names of the tasks.
        nan: Meaning of a loss of NaN.
        zero: Meaning of a loss of exactly zero.
        ranks: Processes that train together.
        when: Time at which errors in the values of losses are raised.

    Attributes:
        checks: The same time.
        last: Record of the last call.
        scaler: The GradScaler of steps that are given none; None for no scaler. Not part of the state.
        backward_refusal: Message of the error of a direct call of ``backward``; empty: such calls are allowed, as they are
            inside of ``collect()``. For training loops that run the backward pass of ``loss(...)`` themselves, and would
            clear or scale the result of a direct call in another way.
        loss_sums: Sums of the losses of the epoch. Shape (K,).
        loss_counts: Numbers of steps of the epoch at which each task was present. Shape (K,).
    """

    loss_balancer: LossBalancer
    gradient_balancer: GradientBalancer | JacobianBalancer | None
    reminders: Reminders
    loss_sums: Tensor
    loss_counts: Tensor

    def __init__(self, tasks: tuple[str, ...], nan: NanPolicy, zero: ZeroPolicy, ranks: Ranks, when: Checks) -> None:
        super().__init__()
        self.tasks, self.nan, self.zero, self.ranks, self.checks = tasks, nan, zero, ranks, when
        self.last = LastCall()
        self.scaler: GradScaler | None = None
        self.backward_refusal = ""
        self.register_buffer("loss_sums", torch.zeros(len(tasks), dtype=torch.float64, device="cpu"))
        self.register_buffer("loss_counts", torch.zeros(len(tasks), dtype=torch.int64, device="cpu"))

    def check(self) -> None:
        """Raise the error of the last call, if its losses were on an accelerator and not finite or out of a rule's domain.

        Without this call the next one raises it, see the option ``checks``. Waits for the losses of the last call.

        Raises:
            ValueError: If there is such an error; the state of all rules is then as before the call that caused it.
        """
        if self.last.delayed is None and self.last.error is None:
            return
        self.last.settle()
        error, self.last.error = self.last.error, None
        if error is not None:
            raise error

    def delays(self, losses: Tensor) -> bool:
        """Return whether the checks of a call with these losses are read one call later."""
        return (
            self.checks == "auto"
            and checks.waits(losses.device)
            and self.gradient_balancer is None
            and self.nan == "error"
            and self.zero == "present"
            and self.ranks.size == 1
            and self.loss_balancer.stays_on_device
        )

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
        self.check()
        if not self.needs_observation or self.last.skipped:
            return
        step = self._read(losses, counts)
        if self.delays(step.losses):
            delayed = DelayedCall(self, self.loss_balancer, step.losses.device, step.tasks)
            with delayed.checks:
                self.loss_balancer.observe(delayed.finite(step.losses), step.context)
            self._delay(delayed)
        else:
            self.loss_balancer.observe(_finite(step), step.context)
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
        self.check()
        if not self.needs_validation:
            return
        step = self._read(losses, counts)
        self.loss_balancer.observe_validation(_finite(step), step.context)
        self.reminders.validated()

    def _read(self, losses: Mapping[str, Tensor] | Tensor, counts: Counts | None) -> StepLosses:
        """Return losses between steps, their means over all ranks."""
        step = read_losses(losses, self.tasks, self.nan, self.zero, counts)
        if self.ranks.size > 1:
            step = mean_over_ranks(step, self.tasks, self.ranks)
        require_present(step, losses, self.tasks)
        return step

    def end_epoch(self) -> None:
        """Close an epoch: rules that update once per epoch get its mean losses, NaN for a task that was never present.

        Raises:
            ValueError: If a mean is out of the rule's domain; the rule's state is then as before.
        """
        self.check()
        self.reminders.epoch_ended()
        if not self.loss_balancer.uses_epochs:
            return
        means = self.loss_sums / checks.beside(self.loss_counts, self.loss_sums)
        if self.delays(means):
            delayed = DelayedCall(self, self.loss_balancer, means.device, self.tasks)
            with delayed.checks:
                self._close_epoch(means)
            self._delay(delayed)
        else:
            self._close_epoch(means)

    def _close_epoch(self, means: Tensor) -> None:
        try:
            self.loss_balancer.end_epoch(means)
        except TaskError as error:
            raise ValueError(error.naming(self.tasks[error.task])) from None
        self.loss_sums.zero_()
        self.loss_counts.zero_()

    def _delay(self, delayed: DelayedCall) -> None:
        delayed.close()
        self.last.delayed = delayed

    def get_extra_state(self) -> Tensor:
        """Return the names of the tasks, so that a checkpoint is not loaded into a stage for others. Shape (n,), uint8."""
        return encode_tasks(self.tasks)

    def set_extra_state(self, state: Tensor) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from the tasks of this stage.
        """
        check_tasks(state, self.tasks, "Balancer")

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.last.settle()  # before the rules' state is read
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.last.settle()  # and before it is replaced
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        self.last.settle()  # events of a device cannot be copied
        return self.__dict__


def _finite(step: StepLosses) -> Tensor:
    """Return the losses of a call between steps, after a check that they are finite."""
    if step.not_finite():
        raise not_finite_error(step.tasks, step.losses.tolist())
    return step.losses
