"""Custom autograd functions and hooks of the random networks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Reverse(Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.3 * g


class KeepsVariable(Function):
    """Halve the gradient; the context has an attribute that leaf nodes have too."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable = x
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


class Opaque(Function):
    """Read a number of the gradient, which no batched backward pass allows."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g * (1.0 if g.sum().item() < 1e30 else 0.0)


class FusedLinear(Function):
    """Product and its row sums, so two outputs, with saved tensors and gradients that may be undefined."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        product = x @ weight
        return product, product.sum(dim=1, keepdim=True)

    @staticmethod
    def backward(ctx, g, total):
        x, weight = ctx.saved_tensors
        if total is not None:
            g = total.expand(-1, weight.shape[1]) if g is None else g + total
        if g is None:
            return None, None
        return g @ weight.t(), x.t() @ g


class Round(Function):
    """Straight-through estimator of rounding."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Hook(NamedTuple):
    """A hook inside the graph."""

    kind: str  # one of HOOKS
    factor: int  # index in FACTORS; the last is a clamp, which is not linear


HOOKS = ("tensor", "pre", "post", "module", "module_pre", "weight", "retain")
FACTORS = (0.5, -0.1, 2.0, "mask", "clamp")
LINEAR = 4


class Switch:
    """State of the hooks that share it: they act or not."""

    def __init__(self) -> None:
        self.on = True


def changed(gradient: Tensor | None, factor: int) -> Tensor | None:
    """Apply the function of a hook to a gradient; torch calls hooks on one of several outputs also without one."""
    if gradient is None:
        return None
    how = FACTORS[factor]
    if gradient.layout != torch.strided:
        return gradient * (how if isinstance(how, float) else 0.5)
    if how == "clamp":
        return gradient.clamp(-0.01, 0.01)
    if how == "mask":
        mask = torch.arange(gradient.shape[-1] if gradient.dim() else 1).remainder(3) + 0.5
        return gradient * mask.to(gradient.dtype).view(-1 if gradient.dim() else ())
    return gradient * how


class Passage(nn.Module):
    """A module that changes nothing, for module hooks."""

    def __init__(self, hook: Hook) -> None:
        super().__init__()
        if hook.kind == "module":
            self.register_full_backward_hook(lambda _, inputs, __: _each(inputs, hook.factor))
        else:
            self.register_full_backward_pre_hook(lambda _, outputs: _each(outputs, hook.factor))

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


def hooked(x: Tensor, hook: Hook | None, switch: Switch | None = None) -> Tensor:
    """Put a hook on a tensor of the graph and return the tensor that the network continues with."""
    if hook is None or hook.kind == "weight" or not x.requires_grad or x.grad_fn is None:
        return x
    if hook.kind == "tensor":
        x.register_hook(lambda g: changed(g, hook.factor) if switch is None or switch.on else g)
    elif hook.kind == "pre":
        x.grad_fn.register_prehook(lambda gradients: _each(gradients, hook.factor))
    elif hook.kind == "post":
        x.grad_fn.register_hook(lambda inputs, _: _each(inputs, hook.factor))
    elif hook.kind == "retain":
        x.retain_grad()
    else:
        x = Passage(hook)(x)
    return x


def _each(gradients: tuple[Tensor | None, ...], factor: int) -> tuple[Tensor | None, ...]:
    return tuple(changed(g, factor) for g in gradients)
