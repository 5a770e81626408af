"""What a loss balancer makes of the losses of one step, and how that depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from balance.graph import leaves
from balance.jacobian import loss_jacobian
from balance.report import Report
from balance.rules import apply_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from balance.inputs import Step
    from balance.shapes import Gramian, Losses, WeightedLosses, Weights


class Weighing(NamedTuple):
    """What the loss balancer made of the losses, detached."""

    weighted: WeightedLosses
    jacobian: Tensor  # (K, K), of the weighted losses with respect to the losses
    own: list[Tensor]  # the loss balancer's parameters
    own_gradients: Sequence[Tensor | None]  # of the plain sum of the weighted losses

    def report(self, step: Step, weights: Weights | None, gramian: Gramian | None) -> Report:
        """The record of a step with these weighted losses."""
        losses = step.losses.detach()
        loss_weights = self.jacobian.sum(dim=0).to(losses)
        return Report(step.tasks, losses, self.weighted, loss_weights, None if weights is None else weights.to(losses), gramian)


def weighing(rule: Callable[..., Any], step: Step) -> Weighing:
    """Apply a loss balancer to detached losses, and differentiate it.

    Raises:
        ValueError: As `weigh`.
    """
    losses = step.losses.detach().requires_grad_()
    weighted = weigh(rule, step, losses)
    own = [tensor for tensor in leaves([weighted.sum()]) if tensor is not losses]
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
