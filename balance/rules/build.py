"""Build the rules of a stage from the user's choices."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..messages import unknown
from .chain import Chain
from .compose import seed_composition
from .options import require_callable
from .priorities import prioritised_gradient_balancer, prioritised_loss_balancer
from .protocol import adapt_gradient_balancer, adapt_loss_balancer, try_out
from .registry import gradient_balancers, loss_balancers
from .switch import Switch, switched_gradients, switched_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ..types import GradientRule, LossRule, WeightedLosses
    from .protocol import AdaptedLossBalancer, GradientBalancer, JacobianBalancer, LossBalancer
    from .registry import Registry


_SWITCHING = ("stl", "tchebycheff")  # which give some tasks weight zero
_NOT_ALWAYS_POSITIVE = ("constant", "cosmos", "linear_schedule", "pbi", *_SWITCHING)


def build_loss_balancer(
    rule: str | Sequence[str] | LossRule,
    options: Mapping[str, Any] | None,
    num_tasks: int,
    seed: int,
    priorities: Tensor | None = None,
) -> LossBalancer:
    """Build the loss balancer that a user chose.

    Args:
        rule: Registered name, several names that are applied from left to right, or a callable.
        options: Options of a registered rule; of several rules, options by name.
        num_tasks: Number of tasks, K.
        seed: Seed of every rule that draws random numbers, unless its options contain a seed.
        priorities: Priorities of the tasks. Shape (K,).

    Returns:
        The adapted rule.

    Raises:
        ValueError: If a name or an option is unknown or out of range, or options are given with a callable.
        TypeError: If an option has the wrong type, or the rule is neither a name nor a callable.
    """
    if isinstance(rule, Switch):
        require_callable(loss_balancers.kind, rule, options or {})
        rule = switched_losses(rule, num_tasks, partial(build_loss_balancer, num_tasks=num_tasks, seed=seed))
    built = cast("AdaptedLossBalancer", adapt_loss_balancer(_built_loss_balancer(rule, options or {}, num_tasks, seed)))
    return built if priorities is None else prioritised_loss_balancer(built, priorities)


def build_gradient_balancer(
    rule: str | GradientRule,
    options: Mapping[str, Any] | None,
    num_tasks: int,
    seed: int,
    priorities: Tensor | None = None,
) -> GradientBalancer | JacobianBalancer:
    """Build the gradient balancer that a user chose.

    A stateless rule with options is called once, so that it refuses wrong options here and not at the first step.

    Args:
        rule: Registered name or callable.
        options: Options of a registered rule.
        num_tasks: Number of tasks, K.
        seed: Seed of a rule that draws random numbers, inside compositions too, unless its options contain a seed.
        priorities: Priorities of the tasks. Shape (K,).

    Returns:
        The adapted rule.

    Raises:
        ValueError: If the name or an option is unknown or out of range, or options are given with a callable.
        TypeError: If an option has the wrong type, or the rule is neither a name nor a callable.
    """
    if isinstance(rule, str):
        traits = gradient_balancers.traits(rule)
        built = _named(gradient_balancers, rule, options, num_tasks, seed)
        adapted = adapt_gradient_balancer(built, traits.sees, traits.heads, fixed_length=traits.ignores_weights)
        if adapted.sees == "gramian" and options:
            try_out(adapted, num_tasks)
    else:
        require_callable(gradient_balancers.kind, rule, options or {})
        turns = rule
        if isinstance(rule, Switch):
            turns = switched_gradients(rule, num_tasks, partial(build_gradient_balancer, num_tasks=num_tasks, seed=seed))
        adapted = adapt_gradient_balancer(turns)
        seed_composition(adapted, seed)
    return adapted if priorities is None else prioritised_gradient_balancer(adapted, rule, priorities)


def warn_of_pairing(loss: object, gradient: object, num_tasks: int) -> None:
    """Warn of a loss balancer that has no effect on a gradient balancer, or that stops it."""
    if not isinstance(gradient, str) or num_tasks == 1:
        return
    loss = " + ".join(loss) if isinstance(loss, list | tuple) else loss
    if loss in _SWITCHING and gradient == "mgda":
        warnings.warn(
            f"mgda gives all weight to the zero gradients of the tasks that {loss} switches off: the shared parameters "
            f"will not train. Use {loss} without a gradient balancer.",
            stacklevel=3,
        )
    if loss not in ("ls", *_NOT_ALWAYS_POSITIVE) and gradient_balancers.traits(gradient).ignores_weights:
        warnings.warn(f"{gradient} ignores positive loss weights: {loss} has no effect.", stacklevel=3)


def _built_loss_balancer(
    rule: str | Sequence[str] | LossRule, options: Mapping[str, Any], num_tasks: int, seed: int
) -> LossRule:
    if isinstance(rule, str):
        return _named(loss_balancers, rule, options, num_tasks, seed)
    if callable(rule) or not isinstance(rule, list | tuple):
        require_callable(loss_balancers.kind, rule, options if callable(rule) else {})
        return cast("LossRule", rule)
    return _chain(rule, options, num_tasks, seed)


def check_source(gradient: object, *, features: bool, losses: bool = True) -> None:
    """Check that a gradient balancer, given by name, can work with the gradients and losses that a stage has.

    Args:
        gradient: Registered name; anything else is not checked.
        features: Whether the gradients are with respect to features, which are different tensors at every step.
        losses: Whether the stage has the values of the losses.

    Raises:
        ValueError: If the rule compares gradients of different steps, or needs losses that the stage does not have.
    """
    if not isinstance(gradient, str):
        return
    needs = gradient_balancers.traits(gradient).needs
    if features and "parameters" in needs:
        raise ValueError(
            f"'{gradient}' compares gradients of different steps, but features differ from step to step. "
            'Use a Balancer with source="parameters".'
        )
    if not losses and "positive losses" in needs:
        raise ValueError(f"A Splitter sees no losses, but '{gradient}' needs them. Use a Balancer.")


def _named(registry: Registry, name: str, options: Mapping[str, Any] | None, num_tasks: int, seed: int) -> Callable[..., Any]:
    options = dict(options or {})
    if "seed" in registry.options(name):
        options.setdefault("seed", seed)
    return registry.build(name, num_tasks=num_tasks, **options)


def _chain(names: Sequence[str], options: Mapping[str, Any], num_tasks: int, seed: int) -> Callable[..., WeightedLosses]:
    for name in options:
        if name not in names:
            raise ValueError(unknown("loss balancer in loss_options", name, names))
    rules = [_named(loss_balancers, name, options.get(name), num_tasks, seed) for name in names]
    return rules[0] if len(rules) == 1 else Chain(rules, names, num_tasks)
