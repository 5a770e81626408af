"""Steps without a gradient balancer, and steps that a gradient scaler will skip."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..engine.accumulate import (
    accumulate,
    accumulate_reduced,
    are_finite,
    cast_to_leaf,
    leaf_gradients,
    merged_pairs,
    nan_gradients,
    without_hooks,
)
from ..engine.gramian import HeadGradients
from ..engine.graph import leaves
from ..engine.passes import sequential_passes
from ..rules.snapshot import parameters_of
from .loss_weighting import WeightedStep, weighted_step
from .report import Report
from .weighted import weighted_losses

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from ..engine.accumulate import LeafGradient
    from ..rules.protocol import LossBalancer
    from .arguments import StepLosses
    from .delayed import DelayedCall


class Outcome(NamedTuple):
    """Record of a step, and whether the gradient scaler will skip it."""

    report: Report
    skipped: bool = False


class Seed(NamedTuple):
    """Gradient with which backward passes begin: 1, or the scale factor of mixed precision."""

    gradient: Tensor  # shape ()
    scale: float
    unit: Tensor  # the number 1 in its dtype and on its device. Shape ()


def seed_of(step: StepLosses, scaler: GradScaler | None) -> Seed:
    """Return the gradient with which the backward passes of a step begin."""
    if scaler is None:
        return Seed(step.one, 1.0, step.one)
    return Seed(scaler.scale(step.one), scaler.get_scale(), step.one)


def take_plain_step(
    rule: LossBalancer,
    step: StepLosses,
    scaler: GradScaler | None,
    factor: float,
    extra: Tensor | None,
    delayed: DelayedCall | None = None,
) -> Outcome:
    """Run one ordinary backward pass of the sum of the weighted losses.

    Args:
        rule: The loss balancer.
        step: The losses.
        scaler: The gradient scaler, if any.
        factor: Factor on all gradients that are added to ``.grad``.
        extra: A loss that is added to the weighted losses.
        delayed: The call, if its checks are delayed.

    Returns:
        The record of the step, and whether the scaler will skip the step.

    Raises:
        ValueError: As `weighted_losses`.
    """
    if step.is_half:
        return _take_half_precision_step(rule, step, scaler, factor, extra)
    losses = step.losses if delayed is None else delayed.finite(step.losses, skips=scaler is not None)
    if delayed is None:
        weighted = weighted_losses(rule, step, losses)
    else:
        with delayed.checks:
            weighted = weighted_losses(rule, step, losses, delayed)
        delayed.close()
    total = weighted.sum() if extra is None else weighted.sum() + extra.reshape(()).to(weighted)
    total = total if factor == 1.0 else factor * total
    if weighted is not losses:
        losses.retain_grad()  # the backward pass also computes the weights of the losses
    if delayed is not None:
        delayed.backward(total if scaler is None else scaler.scale(total), [losses, *parameters_of(rule)])
    else:
        (total if scaler is None else scaler.scale(total)).backward()  # type: ignore[no-untyped-call]
    report = _report(step, losses, weighted, factor, scaler)
    skipped = False
    if scaler is not None and rule.learns:  # its state must not change at a step that the scaler will skip
        gradients = [leaf.grad for leaf in leaves([step.losses, extra]) if leaf.grad is not None]
        skipped = not are_finite(gradients)
    return Outcome(report, skipped)


def _report(step: StepLosses, losses: Tensor, weighted: Tensor, factor: float, scaler: GradScaler | None) -> Report:
    """Return the record of a step after its backward pass."""
    raw = step.losses.detach()
    ones = torch.ones_like(raw)
    if weighted is losses:  # with weights that need no backward pass
        return Report(step.tasks, raw, raw, ones, ones, total_weights=ones)
    loss_weights = losses.grad
    if loss_weights is None:
        raise ValueError("The loss balancer must return losses that depend on the given ones, but they do not.")
    if factor != 1.0 or scaler is not None:
        loss_weights = loss_weights / (factor if scaler is None else scaler.scale(factor * step.one))
    loss_weights = loss_weights.detach()
    return Report(step.tasks, raw, weighted.detach(), loss_weights, ones, total_weights=loss_weights)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, whose half precision is too coarse for weights and directions."""
    kind = device.type
    is_on = kind == "cpu" or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if is_on and torch.is_autocast_enabled(kind) else nullcontext()


def _take_half_precision_step(
    rule: LossBalancer, step: StepLosses, scaler: GradScaler | None, factor: float, extra: Tensor | None
) -> Outcome:
    """Run one backward pass for each task: the weight of a small loss overflows as the seed of a pass in half precision."""
    weighted = weighted_step(rule, step)
    seed = seed_of(step, scaler)
    extras = extra_gradients(extra, factor, seed)
    trained = [leaf for leaf in leaves(step.starts) if leaf.requires_grad]
    by_task = task_passes(step, seed, trained)
    pairs = [
        *merged_pairs(by_task.weighted_sums((factor * weighted.loss_weights).tolist()), extras),
        *weighted.parameter_pairs(factor * seed.scale),
    ]
    skipped = scaler is not None and not are_finite([cast_to_leaf(gradient, leaf) for leaf, gradient in pairs])
    accumulate(pairs)
    return Outcome(plain_report(weighted, step), skipped)


def task_passes(step: StepLosses, seed: Seed, leaves: Sequence[Tensor]) -> HeadGradients:
    """Return the gradients of each task with respect to leaf tensors, by one backward pass for each task."""
    by_task = HeadGradients([])
    outputs = step.outputs(seed.gradient)
    with without_hooks(leaves):
        for task, gradients in enumerate(sequential_passes(outputs, leaves, retain_graph=False)):
            by_task.add(task, leaves, gradients)
    return by_task


def extra_gradients(extra: Tensor | None, factor: float, seed: Seed) -> list[LeafGradient]:
    """Return the gradients of an extra loss, with all factors; its graph is retained.

    Args:
        extra: A scalar; None: there is none.
        factor: Factor on all gradients that are added to ``.grad``.
        seed: Gradient with which every backward pass begins.

    Returns:
        The leaf tensors that it reaches, and their gradients.
    """
    if extra is None:
        return []
    reached = [leaf for leaf in leaves([extra]) if leaf.requires_grad]
    begin = torch.full_like(extra.detach(), factor * seed.scale)
    with without_hooks(reached):
        gradients = torch.autograd.grad(extra, reached, begin, retain_graph=True, allow_unused=True)
    return leaf_gradients(reached, gradients)


def plain_report(weighted: WeightedStep, step: StepLosses) -> Report:
    """Return the record of a step without a gradient balancer."""
    ones = torch.ones(len(step.tasks), dtype=torch.float64, device="cpu")
    return weighted.report(step, ones, None, total=weighted.loss_weights)


def leave_to_scaler(step: StepLosses, scaler: GradScaler, trained: Iterable[Tensor]) -> Outcome:
    """Leave NaN gradients, so that the scaler skips the step; no rule sees the step.

    Args:
        step: The losses.
        scaler: The gradient scaler.
        trained: Leaf tensors that get these gradients.

    Returns:
        A record without weights.
    """
    scaler.scale(step.one)  # initialises the scaler, which scaler.step requires
    # No rank may wait in a hook for the NaN of another rank
    accumulate_reduced(nan_gradients({id(leaf): leaf for leaf in trained if leaf.requires_grad}.values()))
    return Outcome(unknown_report(step), skipped=True)


def unknown_report(step: StepLosses) -> Report:
    """Return the record of losses whose weights are unknown."""
    losses = step.losses.detach()
    unknown = torch.full_like(losses, torch.nan)
    return Report(step.tasks, losses, unknown, unknown, unknown)
