"""Names and options of the two methods of a balancer, for records of runs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from ..rules.options import describe
from ..rules.registry import gradient_balancers, loss_balancers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..rules.registry import Registry
    from ..types import GradientRule, LossRule


class Methods(NamedTuple):
    """The methods that a balancer was built with.

    Attributes:
        loss: Name of the loss balancer, names of a chain joined by ``+``, or the description of a callable.
        gradient: Name or description of the gradient balancer, or None.
        options: Options of registered methods by dotted key, such as ``gradient.c``, defaults included.
    """

    loss: str
    gradient: str | None
    options: dict[str, Any]


def methods_of(
    loss: str | Sequence[str] | LossRule,
    loss_options: Mapping[str, Any] | None,
    gradient: str | GradientRule | None,
    gradient_options: Mapping[str, Any] | None,
) -> Methods:
    """Return names and options of the methods; the arguments are the arguments of `Balancer`."""
    if isinstance(loss, list | tuple):
        chain = [_options(loss_balancers, name, (loss_options or {}).get(name), f"loss.{name}") for name in loss]
        options = {key: value for of_one in chain for key, value in of_one.items()}
    else:
        options = _options(loss_balancers, loss, loss_options, "loss")
    options |= _options(gradient_balancers, gradient, gradient_options, "gradient")
    name = "+".join(map(describe, loss)) if isinstance(loss, list | tuple) else describe(loss)
    return Methods(name, None if gradient is None else describe(gradient), options)


def _options(registry: Registry, rule: object, given: Mapping[str, Any] | None, group: str) -> dict[str, Any]:
    """Return the options of a registered rule; none for a callable. The seed is left out, since it belongs to the run."""
    if not isinstance(rule, str):
        return {}
    defaults = {name: option.default for name, option in registry.options(rule).items() if name != "seed"}
    chosen = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty} | dict(given or {})
    return {f"{group}.{name}": value for name, value in chosen.items()}
