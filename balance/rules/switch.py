"""Rules that take turns: one rule until a step, another from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from .context import Context
from .options import describe

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import GradientRule, Gramian, Heads, Losses, LossRule, WeightedLosses, Weights
    from .protocol import GradientBalancer, JacobianBalancer, LossBalancer

Turn: TypeAlias = "str | Callable[..., Tensor] | tuple[str, Mapping[str, Any]] | None"


def switch(rules: Mapping[int, Turn]) -> Switch:
    """Use one rule until a step, and another from there on.

    ``Balancer(3, gradient=compose.switch({0: "ls", 1000: "nashmtl"}))`` adds the gradients up for 1000 steps and then uses
    nashmtl. Each rule begins as a new rule when its turn comes, and heads are treated as that rule's paper does. The number
    of the step is part of the state.

    Args:
        rules: By the number of its first step, each rule: a registered name, a name with options as a pair, or a callable.
            The first begins at step 0. Of gradient balancers ``"ls"`` and None add the gradients up.

    Returns:
        The rules, for the argument ``loss`` or ``gradient`` of `Balancer`.

    Raises:
        ValueError: If no rule begins at step 0, or a number is negative.
        TypeError: If a number is not an int.
    """
    for step in rules:
        if not isinstance(step, int) or isinstance(step, bool):
            raise TypeError(f"Rules begin at numbers of steps, but got {step!r}.")
    if not rules or min(rules) != 0:
        raise ValueError(f"The first rule must begin at step 0, but got {sorted(rules)}.")
    return Switch(tuple(sorted(rules)), tuple(rules[step] for step in sorted(rules)))


def warmup(rule: Turn, steps: int) -> Switch:
    """Use equal weights for some steps, and a rule from there on.

    Args:
        rule: A registered name, a name with options as a pair, or a callable.
        steps: Number of steps with equal weights, not negative; 0 changes nothing.

    Returns:
        As `switch`.

    Raises:
        ValueError: If ``steps`` is negative.
    """
    if not steps >= 0:
        raise ValueError(f"steps of a warm-up must not be negative, but got {steps}.")
    return switch({0: rule} if steps == 0 else {0: "ls", steps: rule})


@dataclass(frozen=True)
class Switch:
    """Rules that take turns, before a stage builds them.

    Attributes:
        starts: Number of the first step of each rule, ascending.
        rules: The rules.
    """

    starts: tuple[int, ...]
    rules: tuple[Turn, ...]

    def parts(self, equal: str) -> list[tuple[Any, Mapping[str, Any]]]:
        """Return each rule with its options.

        Args:
            equal: Name of the rule that stands for ``"ls"`` and None.
        """
        pairs = [rule if isinstance(rule, tuple) else (rule, {}) for rule in self.rules]
        return [(equal if rule is None or rule == "ls" else rule, options) for rule, options in pairs]

    def __call__(self, *data: Tensor, **keywords: Tensor) -> Tensor:  # noqa: ARG002 - as a rule is called
        """Refuse a call, since the number of tasks comes from a stage.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{self} is no rule yet. Give it to Balancer(loss=...) or Balancer(gradient=...), which builds its rules."
        )

    def __repr__(self) -> str:
        turns = [f"{start}: {describe(*pair)}" for start, pair in zip(self.starts, self.parts("ls"), strict=True)]
        return f"switch({{{', '.join(turns)}}})"


class _Turns(nn.Module):
    """Built rules that take turns.

    Attributes:
        steps: Number of steps so far. Shape ()
        position: Position of the rule of the last step. Shape ()
    """

    steps: Tensor
    position: Tensor

    def __init__(self, given: Switch, rules: Iterable[object], num_tasks: int) -> None:
        super().__init__()
        self.given, self.num_tasks = given, num_tasks
        self.rules = nn.ModuleList(cast("Iterable[nn.Module]", rules))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device="cpu"))

    def _take_turn(self) -> Any:
        """Return the rule of this step."""
        starts = self.given.starts
        self.position.fill_(max(i for i, start in enumerate(starts) if start <= int(self.steps)))
        return self.active

    @property
    def active(self) -> Any:
        """The rule of the last step, adapted."""
        return self.rules[int(self.position)]

    def __repr__(self) -> str:
        return repr(self.given)


class SwitchedLosses(_Turns):
    """Loss balancers that take turns; see `switch`."""

    @property
    def uses_epochs(self) -> bool:
        """True if a rule uses the mean losses of epochs."""
        return any(cast("LossBalancer", rule).uses_epochs for rule in self.rules)

    @property
    def stays_on_device(self) -> bool:
        """True if no rule waits for the device of the losses."""
        return all(cast("LossBalancer", rule).stays_on_device for rule in self.rules)

    @property
    def needs_observation(self) -> bool:
        """True if the rule of the last step must observe the losses after it."""
        return cast("LossBalancer", self.active).needs_observation

    @property
    def needs_validation(self) -> bool:
        """True if the rule of the last step needs losses of validation data."""
        return cast("LossBalancer", self.active).needs_validation

    @property
    def needs_epochs(self) -> bool:
        """True if a rule needs the mean losses of epochs."""
        return any(cast("LossBalancer", rule).needs_epochs for rule in self.rules)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Apply the rule whose turn it is. Shape (K,) -> (K,)."""
        weighted = self._take_turn()(losses, Context.of(present, self.num_tasks))
        self.steps += 1
        return cast("WeightedLosses", weighted)

    def observe(self, losses: Losses, present: Tensor | None = None) -> None:
        """Pass the losses after the step to the rule of the step. Shape (K,)."""
        self.active.observe(losses, Context.of(present, self.num_tasks))

    def observe_validation(self, losses: Losses, present: Tensor | None = None) -> None:
        """Pass the losses of validation data to the rule of the last step. Shape (K,)."""
        self.active.observe_validation(losses, Context.of(present, self.num_tasks))

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Pass the mean losses of an epoch to the rule of the last step. Shape (tasks,)."""
        self.active.end_epoch(mean_losses)


class SwitchedGradients(_Turns):
    """Gradient balancers that take turns; see `switch`."""

    @property
    def heads(self) -> Heads:
        """Treatment of heads by the rule of the last step."""
        return cast("GradientBalancer", self.active).heads

    @property
    def fixed_length(self) -> bool:
        """True if the length of the last direction does not depend on the lengths of the gradients."""
        return cast("GradientBalancer", self.active).fixed_length

    @property
    def reuses(self) -> bool:
        """True if some steps use the weights of earlier steps."""
        return any(cast("GradientBalancer", rule).reuses for rule in self.rules)

    def forward(
        self, gramian: Gramian, present: Tensor | None = None, losses: Tensor | None = None, cross: Gramian | None = None
    ) -> Weights:
        """Apply the rule whose turn it is. Shape (K, K) -> (K,)."""
        context = replace(Context.of(present, self.num_tasks, losses), cross=cross)
        weights = self._take_turn()(gramian, context)
        self.steps += 1
        return cast("Weights", weights)

    def reuse(self, present: Tensor | None = None) -> Weights | None:
        """Return weights of an earlier step, if the rule whose turn it is uses them again. Shape (K,)."""
        weights = self._take_turn().reuse(Context.of(present, self.num_tasks))
        if weights is not None:
            self.steps += 1
        return cast("Weights | None", weights)


def switched_losses(
    given: Switch, num_tasks: int, build: Callable[[LossRule | str, Mapping[str, Any]], LossBalancer]
) -> LossRule:
    """Return loss balancers that take turns.

    Args:
        given: The rules.
        num_tasks: Number of tasks, K.
        build: Function that builds one rule from a name or a callable, and options.
    """
    return SwitchedLosses(given, [build(rule, options) for rule, options in given.parts("ls")], num_tasks)


def switched_gradients(
    given: Switch,
    num_tasks: int,
    build: Callable[[GradientRule | str, Mapping[str, Any]], GradientBalancer | JacobianBalancer],
) -> GradientRule:
    """Return gradient balancers that take turns.

    Args:
        given: The rules.
        num_tasks: Number of tasks, K.
        build: Function that builds one rule from a name or a callable, and options.

    Raises:
        ValueError: If a rule sees the Jacobian.
    """
    rules = [build(rule, options) for rule, options in given.parts("sum")]
    if any(rule.sees == "jacobian" for rule in rules):
        raise ValueError(f"Rules that take turns must return weights, but one sees the Jacobian and has none: {given}.")
    return SwitchedGradients(given, rules, num_tasks)
