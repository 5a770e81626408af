"""Steps without a gradient balancer, and steps that a gradient scaler will skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from balance.engine.accumulate import accumulate, are_finite, cast_to_leaf, nan_gradients
from balance.engine.gramian import HeadGradients
from balance.engine.graph import leaves
from balance.engine.passes import LossOutputs, sequential_passes
from balance.stage.loss_weighting import weighted_losses, weighted_step
from balance.stage.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from balance.rules.protocol import LossBalancer
    from balance.stage.arguments import StepLosses


class Outcome(NamedTuple):
    """Record of a step, and whether the gradient scaler will skip it."""

    report: Report
    skipped: bool = False


class Seed(NamedTuple):
    """Gradient with which backward passes begin: 1, or the scale factor of mixed precision."""

    gradient: Tensor  # shape ()
    scale: float


def seed_of(step: StepLosses, scaler: GradScaler | None) -> Seed:
    """Return the gradient with which the backward passes of a step begin."""
    one = torch.ones_like(step.losses[0].detach())
    return Seed(one, 1.0) if scaler is None else Seed(scaler.scale(one), scaler.get_scale())


def take_plain_step(rule: LossBalancer, step: StepLosses, scaler: GradScaler | None, factor: float) -> Outcome:
    """Run one ordinary backward pass of the sum of the weighted losses.

    Args:
        rule: The loss balancer.
        step: The losses.
        scaler: The gradient scaler, if any.
        factor: Factor on all gradients that are added to ``.grad``.

    Returns:
        The record of the step, and whether the scaler will skip the step.

    Raises:
        ValueError: As `weighted_losses`.
    """
    if step.is_half:
        return _take_half_precision_step(rule, step, scaler, factor)
    step.losses.retain_grad()  # the backward pass also computes the weights of the losses
    weighted = weighted_losses(rule, step, step.losses)
    total = weighted.sum() if factor == 1.0 else factor * weighted.sum()
    (total if scaler is None else scaler.scale(total)).backward()  # type: ignore[no-untyped-call]
    loss_weights = step.losses.grad
    if loss_weights is None:
        raise ValueError("The loss balancer must return losses that depend on the given ones, but they do not.")
    loss_weights = loss_weights / (factor * (1.0 if scaler is None else scaler.get_scale()))
    skipped = False
    if scaler is not None and rule.learns:  # its state must not change at a step that the scaler will skip
        gradients = [leaf.grad for leaf in leaves([step.losses]) if leaf.grad is not None]
        skipped = not are_finite(gradients)
    weighted = weighted.detach()
    return Outcome(Report(step.tasks, step.losses.detach(), weighted, loss_weights, torch.ones_like(weighted)), skipped)


def _take_half_precision_step(rule: LossBalancer, step: StepLosses, scaler: GradScaler | None, factor: float) -> Outcome:
    """Run one backward pass for each task: the weight of a small loss overflows as the seed of a pass in half precision."""
    weighted = weighted_step(rule, step)
    seed = seed_of(step, scaler)
    trained = [leaf for leaf in leaves(step.roots) if leaf.requires_grad]
    by_task = HeadGradients([])
    for gradients in sequential_passes(LossOutputs(step.roots, seed.gradient), trained, retain_graph=False):
        by_task.append(trained, gradients)
    pairs = [
        *by_task.weighted_sums((factor * weighted.loss_weights).tolist()),
        *weighted.parameter_pairs(factor * seed.scale),
    ]
    skipped = scaler is not None and not are_finite([cast_to_leaf(gradient, leaf) for leaf, gradient in pairs])
    accumulate(pairs)
    ones = torch.ones(len(step.tasks), dtype=torch.float64, device="cpu")
    return Outcome(weighted.report(step, ones, None), skipped)


def leave_to_scaler(step: StepLosses, scaler: GradScaler, parameters: Iterable[Tensor]) -> Outcome:
    """Leave NaN gradients, so that the scaler skips the step; no rule sees the step.

    Args:
        step: The losses.
        scaler: The gradient scaler.
        parameters: The balancer's parameters.

    Returns:
        A record without weights.
    """
    scaler.scale(step.losses.detach())  # initialises the scaler, which scaler.step requires
    accumulate(nan_gradients([*leaves(step.roots), *(p for p in parameters if p.requires_grad)]))
    losses = step.losses.detach()
    unknown = torch.full_like(losses, torch.nan)
    return Outcome(Report(step.tasks, losses, unknown, unknown, unknown), skipped=True)
