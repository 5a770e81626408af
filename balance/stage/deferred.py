"""A scalar whose backward pass is a step of a balancer, whoever calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..engine.graph import edge, trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from .arguments import StepArguments


class _DeferredStep(torch.autograd.Function):
    """Identity of a value, with a step as its backward pass."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, value: Tensor, step: Callable[[float], object]) -> Tensor:  # noqa: ARG004
        """Return the value."""
        ctx.step = step
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        """Take the step; the gradient that arrives is its factor."""
        step, ctx.step = ctx.step, None
        if step is None:
            raise RuntimeError("The losses of this step have been balanced already. Compute them again for a further step.")
        step(float(gradient))
        return None, None, None


@torch._disable_dynamo  # type: ignore[attr-defined]  # the step cannot be traced
def deferred_loss(given: StepArguments, run: Callable[[StepArguments], object]) -> Tensor:
    """Return a scalar whose backward pass runs a step.

    Args:
        given: The arguments of the step, without a factor.
        run: Takes the step.

    Returns:
        The sum of the losses and the extra loss. Shape ().
    """
    given.check()
    given_losses = given.losses.values() if isinstance(given.losses, Mapping) else [given.losses]
    tensors = [loss for loss in (*given_losses, given.extra) if isinstance(loss, Tensor)]  # the step refuses anything else
    values = [tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).sum() for tensor in tensors]
    value = torch.stack([value.to(values[0].device) for value in values]).sum() if values else torch.zeros(())
    handle = torch.ones((), device=value.device, requires_grad=True)

    def step(factor: float) -> None:
        scaler = given.enabled_scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        run(replace(given, factor=factor / scale))

    with torch.enable_grad():
        return cast("Tensor", _DeferredStep.apply(handle, value, step))  # type: ignore[no-untyped-call]


def leaves_besides_steps(loss: Tensor) -> list[Tensor] | None:
    """Return leaf tensors that get a gradient from a scalar other than through the step of a balancer.

    Args:
        loss: The scalar that a training loop will call ``backward`` of.

    Returns:
        The leaf tensors, each once; None if no step belongs to the backward pass of the scalar.
    """
    graph = trace([loss])
    steps: list[Any] = [node for node in graph.functions if isinstance(node, _DeferredStep._backward_cls)]
    handles = {id(step.next_functions[0][0]) for step in steps}
    others = [leaf for leaf in graph.leaves if id(edge(leaf).node) not in handles]
    return others if handles else None
