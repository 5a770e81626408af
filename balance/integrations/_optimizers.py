"""Parameters of a balancer that the optimizers of a training loop lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..stage.balancer import Balancer


def untrained_parameters(balancer: Balancer, optimizers: Iterable[Any], prefix: str = "") -> list[str]:
    """Return the names of the balancer's parameters that are in no optimizer, without frozen ones.

    Args:
        balancer: The balancer.
        optimizers: Optimizers, or wrappers with their ``param_groups``.
        prefix: Name of the balancer in a module, which begins the names.
    """
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in balancer.named_parameters(prefix) if p.requires_grad and id(p) not in trained]
