"""Rules of a stage: built from the user's choice, and applied to the tasks that are present."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from balance.messages import unknown
from balance.rules.compose import Chain, seed_composition
from balance.rules.protocol import TaskError
from balance.rules.registry import Registry, gradient_balancers, loss_balancers, present_keyword, require_callable, takes
from balance.rules.registry import describe as describe  # noqa: PLC0414 - part of this module's interface, for mypy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


class PresentTasks(Protocol):
    """The tasks of one step."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the present tasks."""

    @property
    def present(self) -> Tensor | None:
        """Indices of the present tasks among all tasks; None if all are present."""


def build_rule(
    registry: Registry, rule: str | Callable[..., Tensor], options: Mapping[str, Any] | None, num_tasks: int, seed: int
) -> Callable[..., Any]:
    """Return the rule that a user chose, built from its registered name; a callable is returned as it is.

    Args:
        registry: Registry of the names.
        rule: Name or callable.
        options: Options of a registered rule.
        num_tasks: K.
        seed: Seed of a rule by name that draws random numbers, inside compositions too; a seed in its options comes first.

    Raises:
        ValueError: If the name or an option is unknown or out of range, or options are given with a callable.
        TypeError: If an option has the wrong type, or the rule is neither a name nor a callable.
    """
    options = dict(options or {})
    if isinstance(rule, str):
        if "seed" in registry.options(rule):
            options.setdefault("seed", seed)
        return registry.build(rule, num_tasks=num_tasks, **options)
    require_callable(registry.kind, rule, options)
    seed_composition(rule, seed)
    return rule


def try_out(rule: Callable[..., Any], num_tasks: int) -> None:
    """Call a stateless rule once, so that it refuses wrong options now and not at the first step."""
    keywords = {"losses": torch.ones(num_tasks, device="cpu")} if takes(rule, "losses") else {}
    rule(torch.eye(num_tasks, dtype=torch.float64, device="cpu"), **keywords)


def build_chain(names: Sequence[str], options: Mapping[str, Any] | None, num_tasks: int, seed: int) -> Callable[..., Any]:
    """Return registered loss balancers that are applied from left to right; a chain of one rule is the rule itself.

    Args:
        names: Names of the loss balancers.
        options: Options by name.
        num_tasks: K.
        seed: Seed of every rule that draws random numbers, unless its options have one.

    Raises:
        ValueError: If a name or an option is unknown or out of range.
    """
    options = dict(options or {})
    for name in options:
        if name not in names:
            raise ValueError(unknown("loss balancer in loss_options", name, names))
    rules = [build_rule(loss_balancers, name, options.get(name), num_tasks, seed) for name in names]
    if len(rules) != 1:
        return Chain(rules, names)
    if isinstance(rules[0], nn.Module):
        rules[0]._register_load_state_dict_pre_hook(_rename_keys_of_chain)  # type: ignore[no-untyped-call]
    return rules[0]


def _rename_keys_of_chain(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of a checkpoint of version 0.1, in which a chain of one rule was a module around the rule."""
    before = f"{prefix}stateful.0."
    for key in [key for key in state_dict if key.startswith(before)]:
        state_dict[prefix + key.removeprefix(before)] = state_dict.pop(key)


def warn_of_pairing(loss: object, gradient: object, num_tasks: int) -> None:
    """Warn of a loss balancer that has no effect on a gradient balancer, or stops it."""
    if not isinstance(gradient, str) or num_tasks == 1:
        return
    loss = " + ".join(loss) if isinstance(loss, list | tuple) else loss
    if loss == "stl" and gradient == "mgda":
        warnings.warn(
            "mgda gives all weight to the zero gradients of the tasks that stl switches off: the shared parameters "
            "will not train. Use stl alone.",
            stacklevel=3,
        )
    if loss not in ("ls", "stl") and gradient_balancers.method(gradient).traits.ignores_weights:
        warnings.warn(f"{gradient} ignores positive loss weights: {loss} has no effect.", stacklevel=3)


def apply_rule(rule: Callable[..., Any], step: PresentTasks, data: Tensor, **keywords: Any) -> Any:
    """Apply a rule to the tasks that are present.

    Args:
        rule: A built rule.
        step: The tasks of the step.
        data: Losses, a Gramian or a Jacobian of the present tasks.
        **keywords: Further keywords of the rule.

    Raises:
        ValueError: If tasks are absent and the rule keeps state by task without a keyword ``present``, or a value of a task
            lies outside the rule's domain; the message names the task.
    """
    keywords |= present_keyword(rule, step.present, step.tasks)
    try:
        return rule(data, **keywords)
    except TaskError as error:
        raise ValueError(error.naming(step.tasks[error.task])) from None
