"""Chains of loss balancers, applied from left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from .context import Context
from .protocol import adapt_loss_balancer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from ..types import Losses, WeightedLosses
    from .protocol import LossBalancer


class Chain(nn.Module):
    """Loss balancers applied from left to right, each to the losses that the balancer before it has weighted.

    Weights and states follow from the values that reach a rule. Only the means of an epoch and the validation losses are
    always raw. A rule that observes losses after the step (famo) must be the first, since no other rule gets the raw losses.

    Args:
        rules: Built loss balancers.
        names: Their names, for messages.
        num_tasks: Number of tasks, K.

    Attributes:
        needs_observation: Whether the first rule must observe the losses after each step.
        needs_epochs: Whether a rule needs the mean losses of epochs.
        needs_validation: Whether a rule needs losses of validation data.
        uses_epochs: Whether a rule uses the mean losses of epochs.
        stays_on_device: Whether no rule waits for the device of the losses.

    Raises:
        ValueError: If there is no rule, or one that observes is not the first.
    """

    def __init__(self, rules: Sequence[Callable[..., WeightedLosses]], names: Sequence[str], num_tasks: int) -> None:
        super().__init__()
        if not rules:
            raise ValueError("A chain of loss balancers must have at least one.")
        adapted = [adapt_loss_balancer(rule) for rule in rules]
        for rule, name in zip(adapted[1:], names[1:], strict=True):
            if rule.observes:
                raise ValueError(f"'{name}' observes the raw losses, so it must come first, but got {tuple(names)}.")
        self.rules = nn.ModuleList(cast("Iterable[nn.Module]", adapted))
        self.names = tuple(names)
        self.num_tasks = num_tasks
        self.needs_observation = adapted[0].needs_observation
        self.needs_epochs = any(rule.needs_epochs for rule in adapted)
        self.needs_validation = any(rule.needs_validation for rule in adapted)
        self.uses_epochs = any(rule.uses_epochs for rule in adapted)
        self.stays_on_device = all(rule.stays_on_device for rule in adapted)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Apply all rules. Shape (K,) -> (K,)."""
        context = Context.of(present, self.num_tasks)
        for rule in self._balancers():
            rule.check(context)  # before any rule changes its state
        for rule in self._balancers():
            losses = rule(losses, context)
        return losses

    def observe(self, losses: Losses, present: Tensor | None = None) -> None:
        """Pass the losses after the step to the first rule. Shape (K,)."""
        next(self._balancers()).observe(losses, Context.of(present, self.num_tasks))

    def observe_validation(self, losses: Losses, present: Tensor | None = None) -> None:
        """Pass the raw losses of validation data to every rule that uses them. Shape (K,)."""
        for rule in self._balancers():
            rule.observe_validation(losses, Context.of(present, self.num_tasks))

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Pass the mean raw losses of an epoch to every rule that uses them. Shape (K,)."""
        for rule in self._balancers():
            rule.end_epoch(mean_losses)

    def _balancers(self) -> Iterator[LossBalancer]:
        return cast("Iterator[LossBalancer]", iter(self.rules))

    def __repr__(self) -> str:
        return f"chain({', '.join(self.names)})"
