"""Rules as the stage holds them: built from what a user chose, applied to the tasks that are present."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from balance.compose import Chain
from balance.loss.domain import TaskError
from balance.registry import Registry, gradient_balancers, loss_balancers, takes, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from balance.inputs import Step


def build_rule(
    registry: Registry, rule: str | Callable[..., Tensor], options: Mapping[str, Any] | None, num_tasks: int, seed: int
) -> Callable[..., Any]:
    """The rule that a user chose: built from its registered name, or a callable as it is.

    Args:
        registry: Where names are looked up.
        rule: Name or callable.
        options: Options of a registered rule.
        num_tasks: K.
        seed: For a rule that draws, unless its options have one.

    Raises:
        ValueError: If the name or an option is unknown or out of range, or options are given with a callable.
        TypeError: If an option has the wrong type, or the rule is neither.
    """
    options = dict(options or {})
    if isinstance(rule, str):
        if "seed" in registry.options(rule):
            options.setdefault("seed", seed)
        return registry.build(rule, num_tasks=num_tasks, **options)
    if not callable(rule):
        raise TypeError(f"A {registry.kind} must be a registered name or a callable, but got {rule!r}.")
    if options:
        raise ValueError(f"Options are for registered names, but got {options} with {rule!r}. Use functools.partial.")
    return rule


def try_out(rule: Callable[..., Any], num_tasks: int) -> None:
    """Let a stateless rule complain of its options now, not at the first step."""
    keywords = {"losses": torch.ones(num_tasks)} if takes(rule, "losses") else {}
    rule(torch.eye(num_tasks, dtype=torch.float64), **keywords)


def build_chain(names: Sequence[str], options: Mapping[str, Any] | None, num_tasks: int, seed: int) -> Chain:
    """Several registered loss balancers, applied from left to right; ``options`` are by name.

    Raises:
        ValueError: If a name or an option is unknown or out of range.
    """
    options = dict(options or {})
    for name in options:
        if name not in names:
            raise ValueError(unknown("loss balancer in loss_options", name, names))
    rules = [build_rule(loss_balancers, name, options.get(name), num_tasks, seed) for name in names]
    return Chain(rules, names)


def warn_of_pairing(loss: object, gradient: object, num_tasks: int) -> None:
    """Warn of a loss balancer that has no effect on a gradient balancer, or stops it."""
    if not isinstance(gradient, str) or num_tasks == 1:
        return
    if loss == "stl" and gradient == "mgda":
        warnings.warn(
            "mgda gives all weight to the zero gradients of the tasks that stl switches off: the shared parameters "
            "will not train. Use stl alone.",
            stacklevel=3,
        )
    loss = " + ".join(loss) if isinstance(loss, list | tuple) else loss
    if loss not in ("ls", "stl") and gradient_balancers.method(gradient).ignores_weights:
        warnings.warn(f"{gradient} ignores positive loss weights: {loss} has no effect.", stacklevel=3)


def apply_rule(rule: Callable[..., Any], step: Step, data: Tensor, **keywords: Any) -> Any:
    """Apply a rule to the tasks that are present; name the task in its complaints."""
    if step.present is not None:
        if takes(rule, "present"):
            keywords["present"] = step.present
        elif isinstance(rule, nn.Module) and (any(True for _ in rule.parameters()) or any(True for _ in rule.buffers())):
            raise ValueError(
                f"{type(rule).__name__} keeps state by task and cannot leave tasks out, but only {step.tasks} are present. "
                "Give its forward a keyword present=None, the indices of the tasks."
            )
    try:
        return rule(data, **keywords)
    except TaskError as error:
        raise ValueError(error.naming(step.tasks[error.task])) from None
