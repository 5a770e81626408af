"""Rules made from rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from balance.registry import gradient_balancers, takes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from balance.shapes import GradientRule, Gramian, Heads, Losses, WeightedLosses, Weights


def every(n: int, rule: str | GradientRule, num_tasks: int, **options: Any) -> Every:
    """Weights of ``rule``, solved at one step and used for n: n - 1 of n steps cost one ordinary backward pass.

    Args:
        n: At least 1; 1 changes nothing.
        rule: A gradient balancer that returns weights, by name or as a callable.
        num_tasks: K.
        **options: Options of a rule that is given by name.

    Raises:
        ValueError: If n is less than 1, or the rule has no weights.
    """
    return Every(n, _built(rule, num_tasks, options), num_tasks, _heads(rule))


def smoothed(rule: str | GradientRule, beta: float, num_tasks: int, **options: Any) -> Smoothed:
    """Moving average of the weights of ``rule``: β times the average so far plus 1 - β times the new weights.

    Args:
        rule: A gradient balancer that returns weights, by name or as a callable.
        beta: In 0..1, 1 excluded; 0 changes nothing. The first weights of a task are taken as they are.
        num_tasks: K.
        **options: Options of a rule that is given by name.

    Raises:
        ValueError: If beta is out of range, or the rule has no weights.
    """
    return Smoothed(_built(rule, num_tasks, options), beta, num_tasks, _heads(rule))


def grouped(rule: str | GradientRule, groups: Sequence[Sequence[int]], num_tasks: int, **options: Any) -> Grouped:
    """``rule`` between groups of tasks: the gradient of a group is the sum of those of its tasks, which share its weight.

    Args:
        rule: A gradient balancer that returns weights, by name or as a callable; by name, it is built for as many tasks as
            there are groups.
        groups: Indices of the tasks of each group; every task is in exactly one.
        num_tasks: K.
        **options: Options of a rule that is given by name.

    Raises:
        ValueError: If the groups are not a partition of the tasks, or the rule has no weights.
    """
    return Grouped(_built(rule, len(groups), options), groups, num_tasks, _heads(rule))


class Every(nn.Module):
    """Weights that are used for several steps; see `every`. Solves at once for tasks that have no weights yet."""

    weights: Tensor
    steps: Tensor

    def __init__(self, n: int, rule: Callable[..., Weights], num_tasks: int, heads: Heads | None = None) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"Weights must be used for at least 1 step, but got {n}.")
        self.n = n
        self.rule = rule
        self.heads = heads
        self.register_buffer("weights", torch.full((num_tasks,), torch.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # since the weights were solved

    def forward(self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None) -> Weights:
        """Solve, and remember the weights. Shape (K, K) -> (K,)."""
        weights: Weights = _apply(self.rule, gramian, present, losses)
        self.weights[_indices(present, self.weights)] = weights.detach().to(self.weights)
        self.steps.fill_(1)
        return weights

    def reuse(self, present: Tensor | None = None) -> Weights | None:
        """Remembered weights of the present tasks, counting one use of them; None if it is time to solve. Shape (K,)."""
        weights = self.weights[_indices(present, self.weights)]
        if self.steps == 0 or self.steps >= self.n or weights.isnan().any():
            return None
        self.steps += 1
        return weights


class Smoothed(nn.Module):
    """A moving average of weights; see `smoothed`."""

    weights: Tensor

    def __init__(self, rule: Callable[..., Weights], beta: float, num_tasks: int, heads: Heads | None = None) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta of a moving average must be in 0..1, 1 excluded, but got {beta}.")
        self.rule = rule
        self.beta = beta
        self.heads = heads
        self.register_buffer("weights", torch.full((num_tasks,), torch.nan, dtype=torch.float64))

    def forward(self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None) -> Weights:
        """Average the rule's weights with those of the steps before. Shape (K, K) -> (K,)."""
        new = _apply(self.rule, gramian, present, losses)
        tasks = _indices(present, self.weights)
        before = self.weights[tasks]
        average = torch.where(before.isnan(), new.to(before), self.beta * before + (1 - self.beta) * new.to(before))
        self.weights[tasks] = average
        return average.to(new)


class Grouped(nn.Module):
    """A rule between groups of tasks; see `grouped`."""

    membership: Tensor

    def __init__(
        self, rule: Callable[..., Weights], groups: Sequence[Sequence[int]], num_tasks: int, heads: Heads | None = None
    ) -> None:
        super().__init__()
        if sorted(task for group in groups for task in group) != list(range(num_tasks)) or not all(groups):
            raise ValueError(
                f"Every task of 0..{num_tasks - 1} must be in exactly one group, but got {[list(g) for g in groups]}."
            )
        self.rule = rule
        self.heads = heads
        membership = torch.zeros(len(groups), num_tasks, dtype=torch.float64)
        for row, group in zip(membership, groups, strict=True):
            row[list(group)] = 1
        self.register_buffer("membership", membership, persistent=False)

    def forward(self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None) -> Weights:
        """Weights of the groups, given to their tasks. A group with no task present takes no part. Shape (K, K) -> (K,)."""
        S = self.membership[:, _indices(present, self.membership[0])].to(gramian)
        there = S.any(dim=1)
        groups = None if there.all() else there.nonzero().flatten()
        S = S[there]
        return _apply(self.rule, S @ gramian @ S.T, groups, None if losses is None else S @ losses.to(S)) @ S


class Chain(nn.Module):
    """Loss balancers applied from left to right, each to what the one before has made of the losses.

    Weights and states come from the values that reach a rule, but for the means of an epoch, which are always of the raw
    losses. A rule that observes losses after the step (famo) must be the first, since only it sees the raw ones.

    Args:
        rules: Built loss balancers.
        names: Their names, for messages.

    Raises:
        ValueError: If there is no rule, or one that observes is not the first.
    """

    def __init__(self, rules: Sequence[Callable[..., Tensor]], names: Sequence[str]) -> None:
        super().__init__()
        if not rules:
            raise ValueError("A chain of loss balancers must have at least one.")
        for rule, name in zip(rules[1:], names[1:], strict=True):
            if hasattr(rule, "observe"):
                raise ValueError(f"'{name}' observes the raw losses, so it must come first, but got {tuple(names)}.")
        self.stateful = nn.ModuleList(rule for rule in rules if isinstance(rule, nn.Module))
        self.rules = tuple(rules)
        self.needs_observation = hasattr(rules[0], "observe") and getattr(rules[0], "needs_observation", True)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Apply all rules. Shape (K,) -> (K,)."""
        for rule in self.rules:
            losses = rule(losses, present) if present is not None and takes(rule, "present") else rule(losses)
        return losses

    def observe(self, losses: Losses, present: Tensor | None = None) -> None:
        """Hand the losses after the step to the first rule. Shape (K,)."""
        self.rules[0].observe(losses, present)  # type: ignore[attr-defined]

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Hand the mean raw losses of an epoch to every rule that thinks in epochs. Shape (K,)."""
        for rule in self.rules:
            if hasattr(rule, "end_epoch"):
                rule.end_epoch(mean_losses)


def _built(rule: str | GradientRule, num_tasks: int, options: Mapping[str, Any]) -> Callable[..., Any]:
    if not isinstance(rule, str):
        return rule
    if gradient_balancers.sees(rule) != "gramian":
        raise ValueError(f"Only rules with weights can be composed, but '{rule}' sees the Jacobian and has none.")
    return gradient_balancers.build(rule, num_tasks=num_tasks, **options)


def _heads(rule: str | GradientRule) -> Heads | None:
    """How heads are treated: as by the rule that is wrapped."""
    return gradient_balancers.heads(rule) if isinstance(rule, str) else getattr(rule, "heads", None)


def _indices(present: Tensor | None, state: Tensor) -> Tensor:
    return torch.arange(len(state), device="cpu") if present is None else present


def _apply(rule: Callable[..., Any], gramian: Gramian, present: Tensor | None, losses: Tensor | None) -> Weights:
    keywords = {}
    if present is not None and takes(rule, "present"):
        keywords["present"] = present
    if losses is not None and takes(rule, "losses"):
        keywords["losses"] = losses
    return rule(gramian, **keywords)  # type: ignore[no-any-return]
