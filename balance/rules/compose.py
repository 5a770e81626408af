"""Compositions of rules: weights used for several steps, averaged, or shared within groups of tasks; rules that take turns.

A composition is a rule in an author's form and calls its own rule through the protocol of `balance.rules.protocol`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from .context import Context
from .options import describe, require_callable
from .protocol import AdaptedGradientBalancer, adapt_gradient_balancer, try_out
from .registry import gradient_balancers
from .switch import Switch, switch, warmup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..types import GradientRule, Gramian, Heads, Weights
    from .protocol import GradientBalancer, JacobianBalancer


__all__ = ["every", "grouped", "smoothed", "switch", "warmup"]


def every(n: int, rule: str | GradientRule, num_tasks: int, **options: Any) -> Every:
    """Use the weights of ``rule`` for n steps: the first of them solves, the others cost one ordinary backward pass.

    A step reuses weights only if its tasks are exactly the tasks that the weights were solved for; otherwise it solves anew.

    Args:
        n: At least 1; 1 changes nothing.
        rule: A gradient balancer that returns weights, by name or as a callable.
        num_tasks: Number of tasks, K.
        **options: Options of a rule that is given by name.

    Returns:
        A gradient balancer whose weights are used for n steps.

    Raises:
        ValueError: If n is less than 1, the rule returns no weights, or n > 1 and the rule reuses its weights already.
    """
    return Every(n, rule, num_tasks, options)


def smoothed(rule: str | GradientRule, beta: float, num_tasks: int, **options: Any) -> Smoothed:
    """Average the weights of ``rule`` over time: β times the average so far plus 1 - β times the weights of the step.

    Weights that the rule reuses count like weights that it has just solved for.

    Args:
        rule: A gradient balancer that returns weights, by name or as a callable.
        beta: In 0..1, 1 excluded; 0 changes nothing. The first weights of a task are not averaged.
        num_tasks: Number of tasks, K.
        **options: Options of a rule that is given by name.

    Returns:
        A gradient balancer whose weights are averaged.

    Raises:
        ValueError: If beta is out of range, or the rule returns no weights.
    """
    return Smoothed(rule, beta, num_tasks, options)


def grouped(rule: str | GradientRule, groups: Sequence[Sequence[int]], num_tasks: int, **options: Any) -> Grouped:
    """Apply ``rule`` to groups of tasks: the gradients within a group are added up, and its tasks share its weight.

    Args:
        rule: A gradient balancer that returns weights, by name or as a callable; by name, it is built for as many tasks as
            there are groups.
        groups: Indices of the tasks of each group; every task is in exactly one.
        num_tasks: Number of tasks, K.
        **options: Options of a rule that is given by name.

    Returns:
        A gradient balancer whose weights are shared within groups.

    Raises:
        ValueError: If the groups are not a partition of the tasks, or the rule returns no weights.
    """
    return Grouped(rule, groups, num_tasks, options)


class Wrapped(NamedTuple):
    """The rule of a composition, as the user gave it."""

    rule: str | GradientRule
    num_tasks: int
    options: Mapping[str, Any]

    @property
    def needs_seed(self) -> bool:
        """True if the rule draws random numbers and the user gave no seed."""
        return isinstance(self.rule, str) and "seed" in gradient_balancers.options(self.rule) and "seed" not in self.options

    def build(self, **seed: int) -> GradientBalancer:
        """Build the rule.

        Returns:
            The adapted rule.

        Raises:
            ValueError: If the name or an option is unknown or out of range, the rule returns no weights, or options are
                given with a callable.
            TypeError: If an option has the wrong type, or the rule is neither a name nor a callable.
        """
        if not isinstance(self.rule, str):
            require_callable(gradient_balancers.kind, self.rule, self.options)
            return cast("GradientBalancer", adapt_gradient_balancer(self.rule))
        traits = gradient_balancers.traits(self.rule)
        if traits.sees != "gramian":
            raise ValueError(
                f"A composition needs a rule that returns weights, but '{self.rule}' sees the Jacobian and has none."
            )
        rule = gradient_balancers.build(self.rule, num_tasks=self.num_tasks, **self.options, **seed)
        adapted = adapt_gradient_balancer(rule, heads=traits.heads, fixed_length=traits.ignores_weights)
        if adapted.sees == "gramian" and self.options:
            try_out(adapted, self.num_tasks)
        return cast("GradientBalancer", adapted)

    def __str__(self) -> str:
        return describe(self.rule, self.options)


class _Composition(nn.Module):
    """A rule that calls another rule.

    Attributes:
        wrapped: The other rule as the user gave it.
        rule: The same rule, built.
    """

    rule: GradientBalancer

    def __init__(self, wrapped: Wrapped) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.rule = wrapped.build()

    @property
    def heads(self) -> Heads:
        """Treatment of heads."""
        return self.rule.heads

    @property
    def fixed_length(self) -> bool:
        """True if the length of the direction does not depend on the lengths of the gradients."""
        return self.rule.fixed_length

    @property
    def reuses(self) -> bool:
        """True if some steps use the weights of earlier steps."""
        return self.rule.reuses

    def seed(self, seed: int) -> None:
        """Build the innermost rule anew with a seed, if it draws random numbers and the user gave a name without a seed."""
        if self.wrapped.needs_seed:
            self.rule = self.wrapped.build(seed=seed)
        seed_composition(self.rule, seed)


class Every(_Composition):
    """A rule whose weights are used for several steps; see `every`.

    Attributes:
        weights: Weights of the last solve; NaN for tasks that took no part in it. Shape (K,).
        steps: Number of steps that have used these weights.
    """

    weights: Tensor
    steps: Tensor

    def __init__(self, n: int, rule: str | GradientRule, num_tasks: int, options: Mapping[str, Any] | None = None) -> None:
        if n < 1:
            raise ValueError(f"Weights must be used for at least 1 step, but got {n}.")
        super().__init__(Wrapped(rule, num_tasks, options or {}))
        self.n = n
        if n > 1 and self.rule.reuses:
            raise ValueError(
                f"Weights must be reused in one place only, but got {self}. "
                "Use only compose.every(n, rule, num_tasks), with a rule that solves at every step."
            )
        self.register_buffer("weights", _nan(num_tasks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))

    @property
    def reuses(self) -> bool:
        """True if some steps use the weights of earlier steps."""
        return self.n > 1 or self.rule.reuses

    def forward(self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None) -> Weights:
        """Solve, and remember the weights in place of all earlier ones. Shape (K, K) -> (K,)."""
        weights = self.rule(gramian, Context.of(present, len(self.weights), losses))
        solved = torch.full_like(self.weights, torch.nan)
        solved[_indices(present, solved)] = weights.to(solved)
        self.weights.copy_(solved)
        self.steps.fill_(1)
        return weights

    def reuse(self, present: Tensor | None = None) -> Weights | None:
        """Return the remembered weights and count one use of them, or None if it is time to solve. Shape (K,)."""
        if self.n == 1:
            return self.rule.reuse(Context.of(present, len(self.weights)))
        tasks = _indices(present, self.weights)
        weights = self.weights[tasks]
        solved_for = int((~self.weights.isnan()).sum())  # number of tasks
        if not 0 < int(self.steps) < self.n or len(tasks) != solved_for or weights.isnan().any():
            return None
        self.steps += 1
        return weights

    def __repr__(self) -> str:
        return f"every({self.n}, {self.wrapped})"


class Smoothed(_Composition):
    """A rule whose weights are averaged over time; see `smoothed`.

    Attributes:
        weights: Average of each task; NaN before its first weights. Shape (K,).
    """

    weights: Tensor

    def __init__(self, rule: str | GradientRule, beta: float, num_tasks: int, options: Mapping[str, Any] | None = None) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta of a moving average must be in 0..1, 1 excluded, but got {beta}.")
        super().__init__(Wrapped(rule, num_tasks, options or {}))
        self.beta = beta
        self.register_buffer("weights", _nan(num_tasks))

    def forward(self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None) -> Weights:
        """Average the rule's weights with the weights of the steps before. Shape (K, K) -> (K,)."""
        weights = self.rule(gramian, Context.of(present, len(self.weights), losses))
        return self._average(weights, present).to(weights)

    def reuse(self, present: Tensor | None = None) -> Weights | None:
        """Average the weights that the rule reuses, or return None if it must solve. Shape (K,)."""
        weights = self.rule.reuse(Context.of(present, len(self.weights)))
        return None if weights is None else self._average(weights, present)

    def _average(self, weights: Weights, present: Tensor | None) -> Weights:
        tasks = _indices(present, self.weights)
        before, new = self.weights[tasks], weights.to(self.weights)
        average = torch.where(before.isnan(), new, self.beta * before + (1 - self.beta) * new)
        self.weights[tasks] = average
        return average

    def __repr__(self) -> str:
        return f"smoothed({self.wrapped}, beta={self.beta})"


class Grouped(_Composition):
    """A rule that is applied to groups of tasks; see `grouped`.

    Attributes:
        solved_for: Tasks that were present when the rule last solved. Shape (K,), bool.
    """

    membership: Tensor
    solved_for: Tensor

    def __init__(
        self,
        rule: str | GradientRule,
        groups: Sequence[Sequence[int]],
        num_tasks: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        partition = [list(group) for group in groups]
        if sorted(task for group in partition for task in group) != list(range(num_tasks)) or not all(partition):
            raise ValueError(f"Every task of 0..{num_tasks - 1} must be in exactly one group, but got {partition}.")
        super().__init__(Wrapped(rule, len(groups), options or {}))
        self.groups = partition
        membership = torch.zeros(len(groups), num_tasks, dtype=torch.float64, device="cpu")
        for row, group in zip(membership, self.groups, strict=True):
            row[group] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("solved_for", torch.zeros(num_tasks, dtype=torch.bool, device="cpu"))

    def forward(self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None) -> Weights:
        """Give the weights of the groups to their tasks; a group without a present task has no part. Shape (K, K) -> (K,)."""
        S, groups = self._present_groups(present)
        S = S.to(gramian)
        context = Context.of(groups, len(self.groups), None if losses is None else S @ losses.to(S))
        weights = self.rule(S @ gramian @ S.T, context)
        self.solved_for.copy_(self._mask(present))
        return weights @ S

    def reuse(self, present: Tensor | None = None) -> Weights | None:
        """Give the weights that the rule reuses to the tasks, or return None if it must solve. Shape (K,)."""
        if not torch.equal(self._mask(present), self.solved_for):  # the same groups can stand for other tasks
            return None
        S, groups = self._present_groups(present)
        weights = self.rule.reuse(Context.of(groups, len(self.groups)))
        return None if weights is None else weights @ S.to(weights)

    def _present_groups(self, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the membership of the present tasks in the present groups, and the indices of these groups; None for all."""
        S = self.membership[:, _indices(present, self.solved_for)]
        reached = S.any(dim=1)
        return S[reached], None if reached.all() else reached.nonzero().flatten()

    def _mask(self, present: Tensor | None) -> Tensor:
        mask = torch.zeros_like(self.solved_for)
        mask[_indices(present, mask)] = True
        return mask

    def __repr__(self) -> str:
        return f"grouped({self.wrapped}, groups={self.groups})"


def names_inside(rule: object) -> tuple[str, ...]:
    """Return the registered names of the rules that a rule, as a user gave it, is made of.

    Args:
        rule: A name, several names, or a callable, which can be a composition.
    """
    if isinstance(rule, str):
        return (rule,)
    if isinstance(rule, list | tuple):
        return tuple(name for name in rule if isinstance(name, str))
    if isinstance(rule, Switch):
        return tuple(name for inner, _ in rule.parts("ls") for name in names_inside(inner))
    return names_inside(rule.wrapped.rule) if isinstance(rule, _Composition) else ()


def seed_composition(rule: GradientBalancer | JacobianBalancer, seed: int) -> None:
    """Seed the rule at the centre of a composition, if it was given by name and without a seed.

    The rule is built anew, so that it draws the numbers that a rule by name draws in a stage with that seed.

    Args:
        rule: Any rule; a rule that is no composition keeps its seed.
        seed: Seed of the stage's gradient balancer.
    """
    if isinstance(rule, AdaptedGradientBalancer) and isinstance(rule.rule, _Composition):
        rule.rule.seed(seed)


def _indices(present: Tensor | None, state: Tensor) -> Tensor:
    return torch.arange(len(state), device="cpu") if present is None else present


def _nan(num_tasks: int) -> Tensor:
    return torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu")
