"""Addition of gradients to ``.grad``, by autograd itself, so that ``.grad`` is exactly as after an ordinary backward pass.

Autograd's accumulation node decides on strides, dtype and sparse layout. It runs the hooks of leaf tensors and of
DistributedDataParallel. So nothing else in this library writes ``.grad``.
"""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.graph import _engine_run_backward

from ..distributed.sharding import is_distributed_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

_FEW = 1 << 16  # numbers, up to which a copy of all gradients is cheap

LeafGradient = tuple["Tensor", "Tensor"]  # a leaf tensor, and the gradient to add to its ``.grad``


class _Surrogate(torch.autograd.Function):
    """A scalar whose backward pass hands given gradients to leaf tensors."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()  # so that accumulation nodes can keep them without a copy
        return (None, *gradients)


def surrogate_loss(pairs: Iterable[LeafGradient]) -> Tensor | None:
    """Return a scalar whose backward pass accumulates given gradients, all in one engine call.

    Args:
        pairs: Leaf tensors, each once, and gradients of as many numbers. Frozen leaves are left out.

    Returns:
        Shape (); None if no gradients are left.
    """
    live = [(leaf, gradient) for leaf, gradient in pairs if leaf.requires_grad]
    if not live:
        return None
    # Each in a separate tensor, which the accumulation node can take over whatever the caller keeps
    gradients = [cast_to_leaf(gradient.detach(), leaf) for leaf, gradient in live]
    leaves = [leaf for leaf, _ in live]
    del pairs, live
    with torch.enable_grad():
        return cast("Tensor", _Surrogate.apply(gradients, *leaves))  # type: ignore[no-untyped-call]


def accumulate(pairs: Iterable[LeafGradient]) -> None:
    """Add gradients to ``.grad`` of their leaves, as ``loss.backward()`` does.

    Args:
        pairs: Leaf tensors, each once, and gradients of as many numbers. Frozen leaves are left out.
    """
    pairs = list(pairs)
    if sum(leaf.numel() for leaf, _ in pairs) <= _FEW and not any(gradient.is_sparse for _, gradient in pairs):
        live = [(leaf, cast_to_leaf(gradient, leaf)) for leaf, gradient in pairs if leaf.requires_grad]
        if live:
            leaves, gradients = zip(*live, strict=True)
            # A copy of each gradient costs less than the surrogate, and the checks of torch.autograd.backward more than both
            _engine_run_backward(leaves, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)  # noqa: FBT003
        return
    loss = surrogate_loss(pairs)
    del pairs
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]


def accumulate_reduced(pairs: Iterable[LeafGradient]) -> None:
    """Add gradients that are summed over ranks to ``.grad``, without the hooks by which wrappers reduce gradients.

    A wrapper such as DistributedDataParallel registers its hooks on autograd's accumulation nodes. So other accumulation
    nodes add the gradients here. The hooks that Python code has registered on a leaf act as in an ordinary backward pass.

    Args:
        pairs: Leaf tensors, each once, and gradients of as many numbers. Frozen leaves are left out.
    """
    live = [(leaf, _after_hooks(leaf, cast_to_leaf(gradient, leaf))) for leaf, gradient in pairs if leaf.requires_grad]
    for leaf, gradient in live:
        if is_distributed_tensor(leaf):  # FSDP2 itself sets its .grad
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    live = [(leaf, gradient) for leaf, gradient in live if not is_distributed_tensor(leaf)]
    twins = [leaf.detach().requires_grad_() for leaf, _ in live]
    for twin, (leaf, _) in zip(twins, live, strict=True):
        twin.grad = leaf.grad
    accumulate([(twin, gradient) for twin, (_, gradient) in zip(twins, live, strict=True)])
    for twin, (leaf, _) in zip(twins, live, strict=True):
        leaf.grad = twin.grad
        for hook in list((getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values()):
            hook(leaf)


def _after_hooks(leaf: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient as the hooks of its leaf tensor leave it."""
    for hook in list((leaf._backward_hooks or {}).values()):
        result = hook(gradient)
        gradient = gradient if result is None else result
    return gradient


def merged_pairs(*groups: Iterable[LeafGradient]) -> list[LeafGradient]:
    """Return the sums of the gradients of each leaf tensor over groups of pairs."""
    sums: dict[int, LeafGradient] = {}
    for leaf, gradient in itertools.chain(*groups):
        before = sums.get(id(leaf))
        sums[id(leaf)] = (leaf, gradient if before is None else gradient_sum(before[1], gradient))
    return list(sums.values())


def gradient_sum(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of two gradients of one tensor, sparse if both are."""
    # torch adds a sparse tensor to a dense one, but not the other way round
    return second + first if first.is_sparse and not second.is_sparse else first + second


def leaf_gradients(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[LeafGradient]:
    """Return the leaves that have a gradient, each with it."""
    return [(leaf, gradient) for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None]


def cast_to_leaf(gradient: Tensor, leaf: Tensor) -> Tensor:
    """Return a gradient in the shape and dtype of a leaf, and on its device."""
    if gradient.dtype != leaf.dtype or gradient.device != leaf.device:
        gradient = gradient.to(device=leaf.device, dtype=leaf.dtype)
    if gradient.requires_grad:
        gradient = gradient.detach()
    return gradient if gradient.shape == leaf.shape else gradient.reshape(leaf.shape)


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all entries of all gradients are finite; costs one copy to the host where all sums are finite."""
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    values = [torch.view_as_real(value) if value.is_complex() else value for value in values]
    sums = [value.sum(dtype=torch.promote_types(value.dtype, torch.float32)) for value in values]
    if not sums or all(map(math.isfinite, torch.stack([total.to(sums[0].device, torch.float64) for total in sums]).tolist())):
        return True
    return all(bool(value.isfinite().all()) for value in values)  # a sum of finite numbers can overflow


def nan_gradients(leaves: Iterable[Tensor]) -> list[LeafGradient]:
    """Return NaN for every leaf, which makes a GradScaler skip the step."""
    return [(leaf, torch.full_like(leaf.detach(), math.nan)) for leaf in leaves]


@contextmanager
def cleared_grads(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Set ``.grad`` of leaves to None in a context, and restore it on exit."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    for leaf, _ in before:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def without_hooks(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Return a context in which tensors have no hooks, and keep the gradients that they retain.

    A gradient that is captured at a leaf has passed the leaf's hooks. So has a gradient with which a pass begins at a tensor.
    Without this context the hooks would act twice, or on every task's gradient instead of the final one.
    """
    affected = [tensor for tensor in tensors if tensor._backward_hooks or tensor.retains_grad]
    return _without_hooks(affected) if affected else nullcontext()


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
    paused = [(tensor._backward_hooks, dict(tensor._backward_hooks)) for tensor in tensors if tensor._backward_hooks]
    for hooks, _ in paused:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in paused:
            new = dict(hooks)
            hooks.clear()
            hooks.update(before | new)
        for tensor, gradient in retained:
            tensor.grad = gradient
