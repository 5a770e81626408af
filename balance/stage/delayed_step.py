"""Steps without a gradient balancer that do not wait for the device of the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..rules.checks import beside
from .delayed import DelayedCall
from .own_gradients import restore
from .plain_step import take_plain_step, without_autocast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .arguments import StepArguments, StepLosses
    from .owner import Owner, Prepared
    from .plain_step import Outcome


def take_delayed_step(owner: Owner, given: StepArguments, prepared: Prepared) -> Outcome:
    """Take a step whose checks the host reads one call later; if it fails, ``.grad`` and the state of all rules are as before.

    Args:
        owner: The balancer.
        given: The arguments.
        prepared: The step.

    Returns:
        The record of the step.
    """
    step, rule = prepared.step, owner.loss_balancer
    delayed = DelayedCall(cast("nn.Module", owner), rule, step.losses.device, step.tasks)
    gradients = owner.own_gradients.clear_used(prepared.parameters, are_all_present=len(step.tasks) == step.num_tasks)
    try:
        with without_autocast(step.losses.device):
            outcome = take_plain_step(rule, step, given.enabled_scaler, given.factor, given.extra, delayed)
            if rule.uses_epochs:
                note_losses(owner, step, step.losses.detach())
    except BaseException:
        delayed.restore()
        restore(gradients)
        raise
    owner.last.delayed = delayed
    owner.reminders.after_step(rule, prepared.parameters)
    return outcome


def note_losses(owner: Owner, step: StepLosses, losses: Tensor) -> None:
    """Add the losses of a step to the sums of the epoch, in place.

    Args:
        owner: The balancer.
        step: The step.
        losses: Values of the losses. Shape (K,).
    """
    present = step.context.present
    if present is None:
        owner.loss_sums.add_(losses.to(owner.loss_sums))
        owner.loss_counts.add_(1)
    else:
        owner.loss_sums[beside(present, owner.loss_sums, present.dtype)] += losses.to(owner.loss_sums)
        owner.loss_counts[present] += 1
