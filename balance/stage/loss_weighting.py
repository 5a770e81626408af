"""Apply a loss balancer and differentiate its output with respect to the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from balance.engine.accumulate import without_hooks
from balance.engine.gramian import loss_jacobian
from balance.engine.graph import leaves
from balance.rules.build import apply_rule
from balance.stage.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from balance.engine.accumulate import LeafGradient
    from balance.stage.arguments import Step
    from balance.types import Gramian, Losses, WeightedLosses, Weights


class Weighing(NamedTuple):
    """Weighted losses of one step and their derivatives, detached."""

    weighted: WeightedLosses
    jacobian: Tensor  # (K, K), of the weighted losses with respect to the losses
    own: list[Tensor]  # the loss balancer's parameters
    own_gradients: Sequence[Tensor | None]  # of the plain sum of the weighted losses

    def own_pairs(self, factor: float = 1.0) -> list[LeafGradient]:
        """Return the loss balancer's parameters and the gradients of the plain sum of the weighted losses, times a factor."""
        pairs = zip(self.own, self.own_gradients, strict=True)
        return [
            (parameter, gradient if factor == 1.0 else factor * gradient)
            for parameter, gradient in pairs
            if gradient is not None
        ]

    def report(self, step: Step, weights: Weights | None, gramian: Gramian | None, unshared: tuple[str, ...] = ()) -> Report:
        """Return the record of a step with these weighted losses."""
        losses = step.losses.detach()
        loss_weights = self.jacobian.sum(dim=0).to(losses.device, torch.promote_types(losses.dtype, torch.float32))
        weights = None if weights is None else weights.to(losses)
        return Report(step.tasks, losses, self.weighted.to(losses), loss_weights, weights, gramian, unshared)


def weighing(rule: Callable[..., Any], step: Step) -> Weighing:
    """Apply a loss balancer to detached losses, and differentiate it.

    Raises:
        ValueError: As `weigh`.
    """
    losses = step.losses.detach()
    if step.is_half and losses.device.type != "mps":  # the only device without float64
        losses = losses.double()  # the weight of a small loss overflows in half precision
    losses.requires_grad_()
    weighted = weigh(rule, step, losses)
    own = [tensor for tensor in leaves([weighted.sum()]) if tensor is not losses and tensor.requires_grad]
    with without_hooks(own):  # which act when the gradients are accumulated
        gradients = torch.autograd.grad(weighted.sum(), own, retain_graph=True, allow_unused=True) if own else ()
    return Weighing(weighted.detach(), loss_jacobian(weighted, losses).cpu(), own, gradients)


def weigh(rule: Callable[..., Any], step: Step, losses: Losses) -> WeightedLosses:
    """Apply a loss balancer.

    Raises:
        ValueError: If what it returns is not one finite value per task that depends on the losses.
    """
    with torch.enable_grad():
        weighted = apply_rule(rule, step, losses)
    if not isinstance(weighted, torch.Tensor) or weighted.shape != losses.shape:
        found = tuple(weighted.shape) if isinstance(weighted, torch.Tensor) else type(weighted).__name__
        raise ValueError(f"The loss balancer must return shape {tuple(losses.shape)}, one value per task, but got {found}.")
    if not weighted.requires_grad:
        raise ValueError("The loss balancer must return losses that depend on the given ones, but they are detached.")
    if not weighted.isfinite().all():
        raise ValueError(f"The loss balancer made {weighted.tolist()} of the losses {losses.tolist()} of {step.tasks}.")
    return weighted
